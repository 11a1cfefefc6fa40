"""The command `vit_jax` and main.py: subcommands, the command line of training, and one line for every error."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import vit_jax
from vit_jax import __main__ as entry
from vit_jax.config_files import to_json
from vit_jax.training import command, hosts

ROOT = Path(__file__).parents[1]


def train(argv):
    """The exit status of a command line of training, which begins with the program."""
    return entry._train(argv[1:], argv[0])


def called(argv):
    """The exit status of a command line of training, as a process would give it."""
    return entry.train(argv[1:], argv[0])


def process(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs Python with these arguments in a process that finds the package from any folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_full_disk_and_closed_pipe_give_no_traceback():
    for shell, status in ((">/dev/full", 1), ("| true; exit ${PIPESTATUS[0]}", 0)):
        command = ["bash", "-c", f"{sys.executable} -u -m vit_jax --help {shell}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
        assert done.returncode == status or (status == 0 and done.returncode in (0, 141)), done.stderr


def test_help_lists_every_command(capsys):
    assert entry.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: vit_jax {train,predict,report,data,checkpoints,sweep,ablate,probe} …\n")
    assert all(f"\n  {name:13}{words}\n" in text for name, words in entry.COMMANDS.items())
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vit_jax {vit_jax.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "unknown command 'trian'; the nearest is train; see vit_jax --help"),
        (["reports"], "unknown command 'reports'; the nearest is report; see vit_jax --help"),
        (
            ["xyz", "--help"],
            "unknown command 'xyz'; commands are train, predict, report, data, checkpoints, sweep, ablate, probe; see vit_jax",
        ),
        (
            ["--config", "demo"],
            "unknown command '--config'; commands are train, predict, report, data, checkpoints, sweep, ablate, probe; see",
        ),
        ([], "no command; commands are train, predict, report, data, checkpoints, sweep, ablate, probe; see vit_jax --help"),
    ],
)
def test_unknown_command_is_one_line_and_status_2(capsys, arguments, said):
    assert entry.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: vit_jax: {said}") and error.count("\n") == 1


@pytest.mark.parametrize("name", entry.COMMANDS)
@pytest.mark.parametrize("program", ["vit_jax", "python -m vit_jax"])
def test_command_help_names_the_program_that_was_called(capsys, name, program):
    try:
        status = entry.main([name, "--help"], program)
    except SystemExit as error:  # of argparse
        status = error.code
    assert status == 0
    text = capsys.readouterr().out
    assert f"usage: {program} {name} " in text and "main.py" not in text


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        (["main.py"], "python main.py"),
        (["-m", "vit_jax", "train"], "python -m vit_jax train"),
        (["-m", "vit_jax", "data"], "python -m vit_jax data"),
        (["-m", "vit_jax.data"], "python -m vit_jax.data"),
        (["-m", "vit_jax.predict"], "python -m vit_jax.predict"),
        (["-c", "import sys; sys.argv[0] = '/bin/vit_jax'; from vit_jax.__main__ import console; console()"], "vit_jax"),
    ],
)
def test_usage_names_the_command_of_the_process(command, usage):
    done = process(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: {usage} " in done.stdout


def test_command_line_loads_nothing_slow_before_it_is_needed():
    code = "import sys; from vit_jax.__main__ import main; main(['--help']); main(['nope']); print(sorted(sys.modules))"
    done = process("-c", code)
    loaded = done.stdout.splitlines()[-1]
    assert "'vit_jax.cli'" in loaded
    assert not [
        name for name in ("jax", "numpy", "absl", "argparse", "vit_jax.training", "vit_jax.config") if f"'{name}'" in loaded
    ]


@pytest.mark.parametrize("command", [["-m", "vit_jax"], ["-c", "from vit_jax.__main__ import console; console()"]])
@pytest.mark.parametrize("module", ["vit_jax.errors", "numpy"])
def test_interrupt_during_imports_prints_no_traceback(command, module):
    child = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command, "train", "--config", "demo", "--dry_run"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        assert child.stderr
        lines = iter(child.stderr)
        next(line for line in lines if line.endswith(f" {module}\n"))
        child.send_signal(signal.SIGINT)
        rest = "".join(lines)
    assert child.returncode in (-signal.SIGINT, 130) and "Traceback" not in rest


@pytest.mark.parametrize("name", ["demo", "augreg:R+Ti/16,pets"])
def test_configuration_name_is_found_from_any_folder(tmp_path, name):
    done = process("-m", "vit_jax", "train", "--config", name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint = "mini_8" if name == "demo" else "R+Ti/16"
    assert f"--config.model.checkpoint={checkpoint}\n" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--dry_run", "--eval_only"])
def test_flag_for_one_host_is_refused_under_a_launcher(monkeypatch, capsys, tmp_path, flag):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "initialize", lambda *_: None)
    assert entry.main(["train", "--config", "demo", "--workdir", str(tmp_path / "run"), flag]) == 1
    assert capsys.readouterr().err == f"error: {flag} runs on one host, and a launcher started several\n"


def test_configuration_name_that_is_unknown_shows_all_names(capsys):
    assert entry.main(["train", "--config", "cifar10_b16"]) == 2
    assert capsys.readouterr().err == (
        "error: configuration 'cifar10_b16': there is no such file or name; names are augreg, cifar100_b16, cifar100_best, "
        "cifar100_nano, cifar100_scratch, demo, finetune; the nearest is cifar100_b16\n"
    )


@pytest.mark.parametrize("arguments", [["--config"], ["--config="], ["--config", "--config.seed=1"], []])
def test_configuration_without_a_value_is_one_line_and_status_2(capsys, arguments):
    assert entry.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "config" in error and error.count("\n") == 1


def test_main_py_imports_without_running():
    spec = importlib.util.spec_from_file_location("main", ROOT / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.train is entry.train


def test_run_continues_from_its_own_json(demo, tmp_path, monkeypatch, capsys):
    from vit_jax.training import loop

    config, _ = command.parse(demo)
    (tmp_path / "config.json").write_text(to_json(config))
    seen = []

    def record(config, workdir):
        seen.append((config, workdir))
        return loop.Result({"step": 100, "test/accuracy": 0.5, "test/loss": 1.25, "best/step": 2, "best/accuracy": 0.625}, {})

    monkeypatch.setattr(loop, "train", record)
    assert train(["main.py", "--config", str(tmp_path / "config.json")]) == 0
    assert seen == [(config, tmp_path)]
    assert capsys.readouterr().out.splitlines()[:5] == [
        "Test accuracy 50.00 % after 100 steps (expected 80.20 %)",
        "Test loss 1.25 after 100 steps",
        "Best test accuracy 62.50 % after 2 steps, chosen on the test split",
        "Expected test accuracy from random weights: 50.40 %",
        f"Weights: {tmp_path / 'best.npz'} (best), {tmp_path / 'final.npz'} (last)",
    ]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_training_says_how_to_continue(demo, monkeypatch, capsys, number, status):
    from vit_jax.training import loop

    monkeypatch.setattr(loop, "train", lambda *_: loop.Result({"step": 3}, {}, finished=False, signal=number))
    assert train([*demo, "--workdir", "w"]) == status
    assert capsys.readouterr().err == "stopped and saved in w; run the same command again to continue\n"


def test_page_that_cannot_be_drawn_does_not_fail_the_run(tmp_path, capsys):
    entry.write_page(tmp_path / "nowhere")
    assert "no page was drawn (ReportError: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said", "status"),
    [
        (OSError(28, "No space left on device", "metrics.jsonl"), "error: metrics.jsonl: No space left on device", 1),
        (KeyboardInterrupt(), "interrupted", 130),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
            "the device has too little memory: raise training.grad_accum_steps",
            1,
        ),
    ],
)
def test_errors_of_the_machine_are_one_line_and_a_status(demo, monkeypatch, capsys, error, said, status):
    from vit_jax.training import loop

    def fails(*args):
        raise error

    monkeypatch.setattr(loop, "train", fails)
    assert called(demo) == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("mode", [["--dry_run"], ["--eval_only"], []])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.checkpoint=~no-such-user/x", "error: checkpoint='~no-such-user/x': the user '~no-such-user' does not exist"),
        ("model.checkpoint=/proc/self/mem", "error: /proc/self/mem is empty"),
        ("model.checkpoint=loop", "error: there is no file loop"),
        ("run.data_dir=~no-such-user/x", "error: data_dir='~no-such-user/x': the user '~no-such-user' does not exist"),
        ("run.data_dir=/proc/self/mem", "error: cifar100 cannot be written into /proc/self/mem"),
        ("run.data_dir=loop", "error: cifar100 cannot be written into loop"),
    ],
)
def test_unusable_paths_are_named(demo, capsys, tmp_path, monkeypatch, mode, override, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    task = ["--config.data.task=cifar100"] if override.startswith("run") else []
    assert called([*demo, *mode, *task, f"--config.{override}", "--workdir=w"]) == 1
    *_, error = capsys.readouterr().err.splitlines()  # before it, a training says what it loads
    assert error.startswith(said)


@pytest.mark.parametrize("module", ["formats.google", "data.prepare"])
def test_unreadable_weights_and_data_are_named(demo, capsys, tmp_path, monkeypatch, module):
    def refused(*args):
        raise PermissionError(13, "Permission denied", "there")

    name = {"formats.google": "Npz", "data.prepare": "find_prepared"}[module]
    monkeypatch.setattr(f"vit_jax.{module}.{name}", refused, raising=False)
    assert called([*demo, "--dry_run", "--workdir", str(tmp_path / "w")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "there" in error and "Permission denied" in error and error.count("\n") == 1


def test_missing_checkpoint_says_where_to_get_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(ROOT / "configs" / "cifar100_b16.py")
    assert called(["main.py", "--config", source, "--config.data.task=cifar100_excerpt"]) == 1
    error = capsys.readouterr().err
    assert "no network: ViT-B_16 could not be downloaded: " in error and "https://storage.googleapis.com/" in error
    assert "hf://google/vit-base-patch16-224-in21k/" in error and "VIT_JAX_MIRROR" in error
    assert not list(tmp_path.iterdir())
