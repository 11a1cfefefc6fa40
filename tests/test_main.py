"""The command line: what it gets wrong ends in a sentence and a status, never in a traceback."""

import importlib.util
import itertools
import signal
from pathlib import Path

import jax
import pytest

from vit_jax import cli
from vit_jax import config as configuration
from vit_jax.config import Config, to_json
from vit_jax.training import command

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("main", ROOT / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def called(main, argv):
    """The exit status of a command line, as a process would give it."""
    return cli.call(lambda: main.main(argv), main.MEMORY_ADVICE)


@pytest.fixture
def demo():
    return ["main.py", "--config", str(ROOT / "configs" / "demo.py")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.augment.flip", "False"], "stray argument 'False'; values are given with ="),
        (["train"], "stray argument 'train'"),
        (["--config.augment.flp=False"], "there is no field config.augment.flp; the nearest: --config.augment.flip=True"),
        (["--noconfig.augment.flp"], "there is no field config.augment.flp; the nearest: --config.augment.flip=True"),
        (["--config.flip=False"], "there is no field config.flip; the nearest: --config.augment.flip=True"),
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
def test_wrong_command_line_is_one_line_and_status_2(main, demo, capsys, arguments, said):
    assert main.main(demo + arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_misspelt_field_shows_nearest_with_values_of_the_file(main, demo, capsys):
    main.main([*demo, "--config.training.step=9"])
    error = capsys.readouterr().err
    assert "the nearest: --config.training.steps=80" in error and "model.variant" not in error


def test_a_value_of_the_wrong_type_is_answered_with_what_is_expected(main, demo, capsys):
    main.main([*demo, "--config.training.steps=1.5"])
    assert "training.steps" in (error := capsys.readouterr().err) and "int" in error


@pytest.mark.parametrize("source", ["nowhere.py", "configs"])
def test_a_configuration_that_is_not_there(main, capsys, source):
    assert main.main(["main.py", "--config", source]) == 2
    assert f"there is no configuration file {source}" in capsys.readouterr().err
    assert main.main(["main.py"]) == 2
    assert "name a configuration" in capsys.readouterr().err


def test_overrides_are_typed(main, demo):
    config, _ = command.parse(
        [*demo, "--config.seed=7", "--noconfig.augment.flip", "--config.augment.crop_area=(0.5,1)",
         "--config.optimizer.learning_rate=1e-2", "--config.model.checkpoint="]
    )  # fmt: skip
    assert (config.seed, config.augment.flip, config.augment.crop_area) == (7, False, (0.5, 1))
    assert (config.optimizer.learning_rate, config.model.checkpoint) == (0.01, "")


def test_help_describes_every_field_with_the_values_of_the_file(main, demo, capsys):
    assert main.main([*demo, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--workdir DIR" in text and "--config.model.checkpoint=mini_8" in text and "auto | float32 | bfloat16" in text
    assert "images per update, over all devices (int)" in text and "tuple[float, float]" in text
    assert max(map(len, text.splitlines())) <= 120
    assert main.main(["main.py", "--help"]) == 0


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
        ("configs/augreg.py:R+Ti/16,pets", "runs/augreg-R+Ti_16-pets"),
        ("runs/x/config.json", "runs/x"),
    ],
)
def test_where_a_run_lives(main, source, expected):
    assert command.workdir_of(source) == Path(expected)


def test_a_run_goes_on_from_its_own_json(main, demo, tmp_path, monkeypatch, capsys):
    from vit_jax.training import loop

    config, _ = command.parse(demo)
    (tmp_path / "config.json").write_text(to_json(config))
    seen = []

    def train(config, workdir):
        seen.append((config, workdir))
        return loop.Result({"step": 100, "test/accuracy": 0.5, "test/loss": 1.25, "best/step": 2, "best/accuracy": 0.625}, {})

    monkeypatch.setattr(loop, "train", train)
    assert main.main(["main.py", "--config", str(tmp_path / "config.json")]) == 0
    assert seen == [(config, tmp_path)]
    assert capsys.readouterr().out.splitlines()[:5] == [
        "Test accuracy 50.00 % after 100 steps (expected 80.20 %)",
        "Test loss 1.25 after 100 steps",
        "Best test accuracy 62.50 % after 2 steps, chosen on the test split",
        "Expected test accuracy from random weights: 50.40 %",
        f"Weights: {tmp_path / 'best.npz'} (best), {tmp_path / 'final.npz'} (last)",
    ]


def test_report_names_the_split_that_was_evaluated(main, demo):
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
def test_interrupted_training_says_how_to_continue(main, demo, monkeypatch, capsys, number, status):
    from vit_jax.training import loop

    monkeypatch.setattr(loop, "train", lambda *_: loop.Result({"step": 3}, {}, finished=False, signal=number))
    assert main.main([*demo, "--workdir", "w"]) == status
    assert capsys.readouterr().err == "stopped and saved in w; run the same command again to continue\n"


def test_a_page_that_cannot_be_drawn_fails_no_run(main, tmp_path, capsys):
    main.draw(tmp_path / "nowhere")
    assert "no page was drawn (ReportError: " in capsys.readouterr().err


def test_paths_that_look_like_overrides(main, demo, tmp_path, monkeypatch, capsys):
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
            "the device has too little memory: raise training.acc",
            1,
        ),
    ],
)
def test_what_the_machine_refuses_ends_in_a_sentence(main, demo, monkeypatch, capsys, error, said, status):
    from vit_jax.training import loop

    def fails(*args):
        raise error

    monkeypatch.setattr(loop, "train", fails)
    assert called(main, demo) == status
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
def test_paths_that_lead_nowhere(main, demo, capsys, tmp_path, monkeypatch, mode, override, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    task = ["--config.data.task=cifar100"] if override.startswith("run") else []
    assert called(main, [*demo, *mode, *task, f"--config.{override}", "--workdir=w"]) == 1
    *_, error = capsys.readouterr().err.splitlines()  # before it, a training says what it loads
    assert error.startswith(said)


@pytest.mark.parametrize("module", ["checkpoints.google", "data.prepare"])
def test_what_nobody_may_read(main, demo, capsys, tmp_path, monkeypatch, module):
    """The weights; the folder of the data."""

    def refused(*args):
        raise PermissionError(13, "Permission denied", "there")

    name = {"checkpoints.google": "Npz", "data.prepare": "find_prepared"}[module]
    monkeypatch.setattr(f"vit_jax.{module}.{name}", refused, raising=False)
    assert called(main, [*demo, "--dry_run", "--workdir", str(tmp_path / "w")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "there" in error and "Permission denied" in error and error.count("\n") == 1


def test_a_checkpoint_that_is_not_there_says_where_to_get_it(main, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = str(ROOT / "configs" / "cifar100_b16.py")
    assert called(main, ["main.py", "--config", source, "--config.data.task=cifar100_excerpt"]) == 1
    error = capsys.readouterr().err
    assert "no network: ViT-B_16 could not be downloaded: " in error and "https://storage.googleapis.com/" in error
    assert "hf://google/vit-base-patch16-224-in21k/" in error and "VIT_JAX_MIRROR" in error
    assert not list(tmp_path.iterdir())
