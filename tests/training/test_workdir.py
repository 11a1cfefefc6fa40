"""A run's folder: whose it is, and who else may use it."""

import json
import shlex

import pytest

from vit_jax.config import Config
from vit_jax.errors import ConfigError
from vit_jax.training.workdir import check_workdir, lock_workdir, record_environment


def test_folder_of_another_configuration_is_refused(tmp_path):
    first, second = Config(), Config(seed=1)
    second.optimizer.learning_rate = 0.5
    with lock_workdir(tmp_path / "run", first):
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match="these fields differ: optimizer.learning_rate, seed. Name another --workdir"):
        check_workdir(tmp_path / "run", second)
    first.run.parallel = "pmap"  # changes no number
    with lock_workdir(tmp_path / "run", first):
        pass
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["parallel"] == "pmap"


def test_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        check_workdir(tmp_path, Config())
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        check_workdir(tmp_path / "thesis.tex", Config())


def test_folder_of_a_start_that_was_killed_at_once_is_usable(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.7.tmp").touch()
    with lock_workdir(tmp_path, Config()):
        assert (tmp_path / "config.json").exists()


def test_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"), lock_workdir(tmp_path / "file" / "run", Config()):
        pass


def test_folder_is_locked_for_one_process(tmp_path):
    with (
        lock_workdir(tmp_path, Config()),
        pytest.raises(ConfigError, match="another process trains in"),
        lock_workdir(tmp_path, Config()),
    ):
        pass


def test_configuration_can_change_before_the_first_step(tmp_path):
    """A first start that failed, as attention="cudnn" does on a CPU, must not decide how the corrected command runs."""
    first = Config()
    first.model.attention, first.model.dtype = "cudnn", "bfloat16"
    with lock_workdir(tmp_path, first):
        pass
    corrected = Config()
    assert check_workdir(tmp_path, corrected).model.attention == "auto"
    corrected.model.attention = "xla"
    with lock_workdir(tmp_path, corrected):
        assert json.loads((tmp_path / "config.json").read_text())["model"]["attention"] == "xla"


def test_configuration_is_compared_again_under_the_lock(tmp_path, monkeypatch):
    """Between the first comparison and the lock, another process may have trained in the folder."""
    from vit_jax.training import workdir

    original, first = workdir.check_workdir, Config(seed=1)

    def check_then_train(folder, config):
        result = original(folder, config)
        monkeypatch.setattr(workdir, "check_workdir", original)
        with workdir.lock_workdir(folder, first):
            (folder / "metrics.jsonl").write_text('{"step": 1}\n')
        return result

    monkeypatch.setattr(workdir, "check_workdir", check_then_train)
    with pytest.raises(ConfigError, match="these fields differ: seed"), lock_workdir(tmp_path, Config(seed=2)):
        pass
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


def test_more_steps_of_a_finished_run_are_answered_with_a_command(tmp_path):
    config = Config()
    config.model.variant = "Nano/8"
    folder = tmp_path / "my run"
    with lock_workdir(folder, config):
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    config.training.steps = 3000
    with pytest.raises(ConfigError, match="these fields differ: training.steps. Name another --workdir"):
        check_workdir(folder, config)
    (folder / "final.npz").touch()
    with pytest.raises(ConfigError, match="start a new run from its weights: python -m vit_jax train") as error:
        check_workdir(folder, config)
    assert shlex.split(str(error.value).split("weights: ")[1])[4:] == [
        *("--config", f"{folder}/config.json", "--config.training.steps=3000", f"--config.model.checkpoint={folder}"),
        *("--config.model.variant=", "--workdir", f"{folder}-3000"),
    ]


def test_scratch_files_of_killed_processes_are_removed(tmp_path):
    for name in (".best.npz.7.tmp", ".final.npz.7-0123abcd.tmp", ".predictions.npz.7.tmp"):
        (tmp_path / name).write_bytes(bytes(9))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "mine.tmp").touch()
    with lock_workdir(tmp_path, Config()):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.json", "mine.tmp"}


def test_environment_records_command_and_warnings(tmp_path):
    record_environment(tmp_path, "1 CPU", ["a warning"])
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["warnings"] == ["a warning"] and found["devices"] == "1 CPU" and {"command", "started", "jax"} <= found.keys()
    record_environment(tmp_path, "1 CPU", [])
    assert "warnings" not in json.loads((tmp_path / "environment.json").read_text())
