"""The command `vit_jax` and main.py: subcommands, the command line of training, and one line for every error."""

import importlib.util
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import vit_jax
from vit_jax import __main__ as entry
from vit_jax import config as configuration
from vit_jax.config import Config
from vit_jax.config_files import to_json
from vit_jax.training import command

ROOT = Path(__file__).parents[1]


def train(argv):
    """The exit status of a command line of training, which begins with the program."""
    return entry._train(argv[1:], argv[0])


def called(argv):
    """The exit status of a command line of training, as a process would give it."""
    return entry.train(argv[1:], argv[0])


@pytest.fixture
def demo():
    return ["main.py", "--config", str(ROOT / "configs" / "demo.py")]


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
    assert text.startswith("usage: vit_jax {train,predict,report,data,checkpoints} …\n")
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
            "unknown command 'xyz'; commands are train, predict, report, data, checkpoints; see vit_jax --help",
        ),
        (["--config", "demo"], "unknown command '--config'; commands are train, predict, report, data, checkpoints; see"),
        ([], "no command; commands are train, predict, report, data, checkpoints; see vit_jax --help"),
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


def test_configuration_name_that_is_unknown_shows_all_names(capsys):
    assert entry.main(["train", "--config", "cifar10_b16"]) == 2
    assert capsys.readouterr().err == (
        "error: configuration 'cifar10_b16': there is no such file or name; names are augreg, cifar100_b16, cifar100_scratch, "
        "demo; the nearest is cifar100_b16\n"
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.augment.flip", "False"], "unexpected argument 'False'; values are given with ="),
        (["train"], "unexpected argument 'train'"),
        (["--config.augment.flp=False"], "there is no field config.augment.flp; the nearest: --config.augment.flip=True"),
        (["--noconfig.augment.flp"], "there is no field config.augment.flp; the nearest: --config.augment.flip=True"),
        (["--config.flip=False"], "there is no field config.flip; the nearest: --config.augment.flip=True"),
        (["--config.training.accumulation=2"], "config.training.accumulation is called config.training.grad_accum_steps now"),
        (["--config.zzz=1"], "there is no field config.zzz; --help lists all"),
        (["--config.training.steps=ten"], "config.training.steps=ten"),
        (["--config.augment.flip=maybe"], "config.augment.flip=maybe"),
        (["--config.model.checkpoint"], "config.model.checkpoint"),
        (["--config.augment.crop_area=0.3"], "augment.crop_area must be of type tuple[float, float], got (0.3,)"),
        (["--config.augment.crop_area=(0.1,0.9,0.4)"], "augment.crop_area must be of type tuple[float, float]"),
        (["--config.augment.crop_area=('a','b')"], "augment.crop_area must be of type tuple[float, float]"),
        (["--config.run.expected=3"], "config.run.expected cannot be set on the command line"),
        (["--config.training.steps=100000000000000000000"], "training.steps must be from 1 to 100,000,000, got 1000000000000"),
        ([f"--config.seed={'9' * 5000}"], "config.seed"),
        (["--workdir", "a\0b"], "--workdir must not contain a NUL character"),
        (["--config.optimizer=sgd"], "there is no field config.optimizer"),
        (["--config.optimizer.warmup_steps=100"], "optimizer.warmup_steps = 100 must be shorter than the run"),
        (["--wordir=x"], "Unknown command line flag 'wordir'"),
        (["--dry_run", "--eval_only"], "--dry_run and --eval_only exclude each other"),
    ],
)
def test_wrong_command_line_is_one_line_and_status_2(demo, capsys, arguments, said):
    assert train(demo + arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_misspelt_field_shows_nearest_with_values_of_the_file(demo, capsys):
    train([*demo, "--config.training.step=9"])
    error = capsys.readouterr().err
    assert "the nearest: --config.training.steps=80" in error and "model.variant" not in error


def test_value_of_the_wrong_type_shows_the_expected_type(demo, capsys):
    train([*demo, "--config.training.steps=1.5"])
    assert "training.steps" in (error := capsys.readouterr().err) and "int" in error


@pytest.mark.parametrize("source", ["nowhere.py", "configs"])
def test_missing_configuration_is_named(capsys, source):
    assert train(["main.py", "--config", source]) == 2
    assert f"configuration {source!r}: there is no such file or name" in capsys.readouterr().err
    assert train(["main.py"]) == 2
    assert "name a configuration" in capsys.readouterr().err


def test_overrides_are_typed(demo):
    config, _ = command.parse(
        [*demo, "--config.seed=7", "--noconfig.augment.flip", "--config.augment.crop_area=(0.5,1)",
         "--config.optimizer.learning_rate=1e-2", "--config.model.checkpoint="]
    )  # fmt: skip
    assert (config.seed, config.augment.flip, config.augment.crop_area) == (7, False, (0.5, 1))
    assert (config.optimizer.learning_rate, config.model.checkpoint) == (0.01, "")


def test_help_describes_every_field_with_the_values_of_the_file(demo, capsys):
    assert train([*demo, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--workdir DIR" in text and "--config.model.checkpoint=mini_8" in text and "auto | float32 | bfloat16" in text
    assert "images per update, over all devices (int)" in text and "tuple[float, float]" in text
    assert max(map(len, text.splitlines())) <= 120
    assert train(["main.py", "--help"]) == 0


def test_help_lists_only_fields_that_can_be_set_and_each_with_a_description():
    listed = command.describe_fields(Config()).splitlines()
    options = [line.split("=")[0].strip() for line in listed if line.startswith("  --config.")]
    assert options == [f"--config.{name}" for name in configuration.fields(Config()) if name != "run.expected"]
    for line, below in itertools.pairwise(listed):
        if line.startswith("  --config."):
            assert below.startswith("      ") and not below.strip().startswith("("), line


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("configs/demo.py", "runs/demo"),
        ("demo", "runs/demo"),
        ("augreg:R+Ti/16,pets", "runs/augreg-R+Ti_16-pets"),
        ("configs/augreg.py:R+Ti/16,pets", "runs/augreg-R+Ti_16-pets"),
        ("runs/x/config.json", "runs/x"),
    ],
)
def test_workdir_follows_the_configuration_name(source, expected):
    assert command.workdir_of(source) == Path(expected)


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


def test_report_names_the_split_that_was_evaluated(demo):
    config, _ = command.parse([*demo, "--config.data.test_split=train[90%:]"])
    metrics = {"step": 100, "test/accuracy": 0.5, "test/loss": 1.0, "best/step": 2, "best/accuracy": 0.625}
    assert command.report(config, metrics).splitlines() == [
        "Accuracy on train[90%:] 50.00 % after 100 steps",
        "Loss on train[90%:] 1 after 100 steps",
        "Best accuracy on train[90%:] 62.50 % after 2 steps, chosen on train[90%:]",
    ]


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("seed=5", False),
        ("training.steps=90", False),
        ("model.checkpoint=Ti/16", False),
        ("model.checkpoint=/data/mini_8.npz", True),
        ("run.parallel=pmap", True),
        ("training.save_every=7", True),
        ("training.eval_every=7", True),
    ],
)
def test_expected_values_survive_what_changes_no_numbers(demo, override, kept):
    config, _ = command.parse([*demo, f"--config.{override}"])
    assert bool(config.run.expected) == kept


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_training_says_how_to_continue(demo, monkeypatch, capsys, number, status):
    from vit_jax.training import loop

    monkeypatch.setattr(loop, "train", lambda *_: loop.Result({"step": 3}, {}, finished=False, signal=number))
    assert train([*demo, "--workdir", "w"]) == status
    assert capsys.readouterr().err == "stopped and saved in w; run the same command again to continue\n"


def test_page_that_cannot_be_drawn_does_not_fail_the_run(tmp_path, capsys):
    entry.write_page(tmp_path / "nowhere")
    assert "no page was drawn (ReportError: " in capsys.readouterr().err


def test_paths_that_look_like_overrides_are_paths(demo, tmp_path, monkeypatch, capsys):
    config, _ = command.parse(demo)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "at 12:30.json").write_text(to_json(config))
    assert command.parse(["main.py", "--config", "config.json", "--workdir", "config.old"])[0] == config
    assert command.parse(["main.py", "--config", "at 12:30.json"])[0] == config


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
