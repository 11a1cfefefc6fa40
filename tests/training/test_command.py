"""The command line of training: overrides, errors, help, working directories and the report of a run."""

import itertools
from pathlib import Path

import pytest

from vit_jax import __main__ as entry
from vit_jax import config as configuration
from vit_jax.config import Config
from vit_jax.config_files import to_json
from vit_jax.training import command


def train(argv):
    """The exit status of a command line of training, which begins with the program."""
    return entry._train(argv[1:], argv[0])


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
        (["--config.training.epochs=2", "--config.training.steps=9"], "give training.steps or training.epochs, not both"),
        (["--dry_run", "--eval_only"], "--dry_run and --eval_only exclude each other"),
        (["--hosts=0"], "flag --hosts=0"),
        (["--hosts=2", "--coordinator=a:1"], "--hosts starts all processes itself: leave out --coordinator, --num_processes"),
        (["--hosts=2", "--process_id=1"], "--hosts starts all processes itself"),
        (["--coordinator=a:1"], "--coordinator HOST:PORT, --num_processes and --process_id need each other"),
        (
            ["--coordinator=a:1", "--num_processes=2"],
            "--coordinator HOST:PORT, --num_processes and --process_id need each other",
        ),
        (["--process_id=1"], "--coordinator HOST:PORT, --num_processes and --process_id need each other"),
        (["--coordinator=auto", "--num_processes=2", "--process_id=1"], "need each other"),
        (
            ["--coordinator=a", "--num_processes=2", "--process_id=1"],
            "--coordinator must be HOST:PORT of host 0, or auto, got 'a'",
        ),
        (
            ["--coordinator=a:1", "--num_processes=2", "--process_id=2"],
            "--process_id must be less than --num_processes = 2, got 2",
        ),
        (["--coordinator=auto", "--dry_run"], "--dry_run runs on one host"),
        (["--hosts=2", "--eval_only"], "--eval_only runs on one host"),
    ],
)
def test_wrong_command_line_is_one_line_and_status_2(demo, capsys, arguments, said):
    assert train(demo + arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_hosts_are_started_by_another_process(demo, monkeypatch):
    started = []
    monkeypatch.setattr("vit_jax.training.launch.launch", lambda arguments, number: started.append((arguments, number)) or 143)
    assert train([*demo, "--hosts", "2"]) == 143
    assert started == [([*demo[1:], "--hosts", "2"], 2)]


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


def test_report_names_the_split_that_was_evaluated(demo):
    config, _ = command.parse([*demo, "--config.data.test_split=train[90%:]"])
    metrics = {"step": 100, "test/accuracy": 0.5, "test/loss": 1.0, "best/step": 2, "best/accuracy": 0.625}
    assert command.report(config, metrics).splitlines() == [
        "Accuracy on train[90%:] 50.00 % after 100 steps",
        "Loss on train[90%:] 1 after 100 steps",
        "Best accuracy on train[90%:] 62.50 % after 2 steps, chosen on train[90%:]",
    ]


def test_steps_of_a_command_line_replace_the_epochs_of_a_file(tmp_path):
    config = command.parse(["main.py", "--config", "demo", "--config.training.epochs=2"])[0]
    (tmp_path / "config.json").write_text(to_json(config))
    arguments = ["main.py", "--config", str(tmp_path / "config.json")]
    assert command.parse(arguments)[0].training.epochs == 2
    replaced = command.parse([*arguments, "--config.training.steps=9"])[0].training
    assert (replaced.steps, replaced.epochs) == (9, 0)


def test_report_says_that_patience_ended_the_run(demo):
    overrides = ["--config.data.validation_split=train[90%:]", "--config.training.patience=3", "--config.training.eval_every=5"]
    config, _ = command.parse([*demo, *overrides])
    metrics = {"step": 20, "test/accuracy": 0.5, "best/step": 5, "best/accuracy": 0.625}
    said = "Training ended, as training.patience asks: no better validation accuracy in 3 evaluations"
    assert said in command.report(config, metrics)
    assert said not in command.report(config, metrics | {"best/step": 10})


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("seed=5", False),
        ("training.steps=90", False),
        ("training.epochs=2", False),
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


def test_paths_that_look_like_overrides_are_paths(demo, tmp_path, monkeypatch, capsys):
    config, _ = command.parse(demo)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "at 12:30.json").write_text(to_json(config))
    assert command.parse(["main.py", "--config", "config.json", "--workdir", "config.old"])[0] == config
    assert command.parse(["main.py", "--config", "at 12:30.json"])[0] == config
