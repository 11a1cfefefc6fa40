"""What survives: saved states, damaged ones, full disks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.config import Config, Optimizer
from vit_jax.errors import ConfigError, TrainingError
from vit_jax.formats.google import read_meta, read_npz, save_npz
from vit_jax.training import optimizer as optimizers
from vit_jax.training import restore
from vit_jax.training.saving import Saver
from vit_jax.training.state import TrainState, create

PARAMS = {"head": {"kernel": np.arange(6, dtype=np.float32).reshape(3, 2), "bias": np.zeros(2, np.float32)}}
OPTIMIZER = optimizers.build(Optimizer(), 10)  # bfloat16 momentum among the leaves


def state_at(step: int) -> TrainState:
    """A state that is all `step`, on the host."""
    state = create(jax.tree.map(jnp.asarray, PARAMS), OPTIMIZER)
    return jax.tree.map(lambda leaf: np.full(leaf.shape, step, leaf.dtype), state)


ABSTRACT = jax.eval_shape(lambda: create(PARAMS, OPTIMIZER))


def same(a, b) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def saved(workdir, steps=(1, 2, 3), best_at=1):
    with Saver(workdir, {"task": "t"}, Config()) as saver:
        for step in steps:
            saver.update_best(step, 0.9 if step == best_at else 0.1, state_at(step).params)
            saver.save(state_at(step))


def restored(workdir):
    with Saver(workdir, {}, Config()) as saver:
        return saver.restore(ABSTRACT), saver.best


def read_state(workdir):
    saved = restore.read_newest(workdir / "checkpoints", ABSTRACT, Config())
    return saved and saved.state


def test_restore_of_an_empty_folder_is_none(tmp_path):
    assert restored(tmp_path) == (None, None)


def test_saver_keeps_two_states_and_the_best_parameters(tmp_path):
    saved(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    state, best = restored(tmp_path)
    assert same(state, state_at(3)) and best == {"step": 1, "accuracy": 0.9}
    assert same(read_npz(tmp_path / "best.npz"), state_at(1).params)
    assert read_meta(tmp_path / "best.npz") == {"task": "t", "step": 1, "accuracy": 0.9}
    with Saver(tmp_path, {"task": "t"}, Config()) as saver:  # the best of an earlier start is not forgotten
        saver.restore(ABSTRACT)
        (tmp_path / "best.npz").unlink()
        saver.export(state, 0.1)
    assert same(read_npz(tmp_path / "best.npz"), state_at(1).params)
    assert same(read_npz(tmp_path / "final.npz"), state_at(3).params)
    assert read_meta(tmp_path / "final.npz") == {"task": "t", "step": 3, "accuracy": 0.1}


def test_best_is_the_first_of_equal_evaluations(tmp_path):
    with Saver(tmp_path, {}, Config()) as saver:
        for step in (1, 2):
            saver.update_best(step, 0.5, state_at(step).params)
        saver.update_best(3, float("nan"), state_at(3).params)
    assert saver.best == {"step": 1, "accuracy": 0.5}


def test_best_parameters_are_a_copy(tmp_path):
    params = jax.tree.map(jnp.ones_like, PARAMS)
    with Saver(tmp_path, {}, Config()) as saver:
        saver.update_best(1, 0.5, params)
        jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(params)
        saver.save(state_at(2))
    assert same(read_npz(tmp_path / "best.npz"), jax.tree.map(np.ones_like, PARAMS))


@pytest.mark.parametrize("damage", ["bits", "truncated", "missing", "record"])
def test_damaged_newest_state_falls_back_to_the_one_before(tmp_path, damage, caplog):
    saved(tmp_path)
    newest = tmp_path / "checkpoints" / "3"
    files = sorted((path for path in (newest / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "bits":
        for file in files[-3:]:
            content = bytearray(file.read_bytes())
            for place in range(0, len(content), 7):
                content[place] ^= 0x04
            file.write_bytes(content)
    elif damage == "truncated":
        files[-1].write_bytes(files[-1].read_bytes()[:-9])
    elif damage == "missing":
        shutil.rmtree(newest / "state")
    else:
        record = newest / "record" / "metadata"
        record.write_text(record.read_text()[:-9])
    assert same(read_state(tmp_path), state_at(2)) and newest.exists()  # a reader changes nothing
    state, _ = restored(tmp_path)
    assert same(state, state_at(2))
    assert caplog.text.count("the state of step 3 is damaged") == 2
    assert list((tmp_path / "checkpoints").glob("damaged-3-*"))  # set aside, not thrown away
    saved(tmp_path, steps=(3,))  # the step is free to be saved again
    assert same(restored(tmp_path)[0], state_at(3))


def test_silently_changed_value_is_detected(tmp_path, caplog):
    """Orbax restores a state silently whose value was changed under the same hash."""
    saved(tmp_path, steps=(1, 2))
    changed = state_at(9)
    with Saver(tmp_path / "other", {}, Config()) as saver:
        saver.save(changed)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "9" / "state", tmp_path / "checkpoints" / "2" / "state")
    state, _ = restored(tmp_path)
    assert same(state, state_at(1)) and "does not have the SHA-256 of its record" in caplog.text


def test_damage_of_all_states_is_an_error(tmp_path):
    saved(tmp_path)
    for step in ("2", "3"):
        (tmp_path / "checkpoints" / step / "record" / "metadata").write_text("{")
    with pytest.raises(TrainingError, match="no state in .* can be read .* move the working directory away"):
        restored(tmp_path)
    assert (tmp_path / "checkpoints" / "3").exists()  # nothing is thrown away


def test_state_of_another_shape_is_refused(tmp_path):
    saved(tmp_path)
    other = jax.eval_shape(lambda: create({"head": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(2)}}, OPTIMIZER))
    with Saver(tmp_path, {}, Config()) as saver, pytest.raises(TrainingError, match="no state in .* can be read"):
        saver.restore(other)


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_saving import saved, state_at
from vit_jax.errors import ConfigError, TrainingError
workdir = Path({workdir!r})
saved(workdir, steps=(1, 2))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # what a full disk does, without one: every write fails
try:
    saved(workdir, steps=(3,))
except TrainingError as error:
    print("error:", error)
"""


def test_full_disk_damages_no_saved_state(tmp_path):
    here = Path(__file__).parent
    code = FULL.format(tests=str(here), workdir=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here.parents[1])
    assert done.stdout.count("\n") == 1, done.stderr
    assert "error: saving in" in done.stdout and "free some space" in done.stdout
    state, _ = restored(tmp_path)
    assert same(state, state_at(2))
    assert same(read_npz(tmp_path / "best.npz"), state_at(1).params)


def test_permission_error_is_not_reported_as_damage(tmp_path, monkeypatch):
    saved(tmp_path)

    def refuses(*args):
        raise ValueError("Error opening file [OS error 24: EMFILE Too many open files]")  # as TensorStore says it

    with Saver(tmp_path, {}, Config()) as saver, monkeypatch.context() as patch:
        patch.setattr(restore, "_read", refuses)
        with pytest.raises(OSError, match="Too many open files"):
            saver.restore(ABSTRACT)
    assert same(restored(tmp_path)[0], state_at(3))


def test_reader_does_not_touch_an_unfinished_save(tmp_path):
    saved(tmp_path)
    unfinished = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "3", unfinished)
    assert same(read_state(tmp_path), state_at(3))
    assert unfinished.exists()


def test_record_with_any_bit_flipped_falls_back(tmp_path):
    saved(tmp_path)
    path = tmp_path / "checkpoints" / "3" / "record" / "metadata"
    content = path.read_bytes()
    positions = [*range(0, len(content), 97), *range(content.index(b'"best"'), content.index(b'"best"') + 45)]
    for position in positions:
        for bit in (1, 4):
            flipped = bytearray(content)
            flipped[position] ^= bit
            path.write_bytes(flipped)
            try:
                record = restore._read_record(tmp_path / "checkpoints", 3)
            except Exception:
                continue
            assert json.loads(content)["best"] == record["best"]  # white space, or a letter JSON escapes
    assert same(read_state(tmp_path), state_at(3)) or same(read_state(tmp_path), state_at(2))
    path.write_bytes(content.replace(b'"accuracy": 0.9', b'"accuracy": 4.4'))
    assert same(read_state(tmp_path), state_at(2))
    path.write_bytes(content.replace(b'"best": {', b'"bust": {'))
    assert same(read_state(tmp_path), state_at(2))


@pytest.mark.parametrize(
    ("name", "instead", "read"),
    [
        ("record/metadata", "folder", 2),
        ("record/metadata", "nothing", 2),
        ("record", "nothing", 2),
        ("state/_METADATA", "folder", 2),
        ("state/manifest.ocdbt", "folder", 2),
        ("state/manifest.ocdbt", "nothing", 2),
        ("_CHECKPOINT_METADATA", "folder", 3),  # of which nothing is read
    ],
)
def test_folder_or_nothing_in_place_of_a_file_falls_back(tmp_path, name, instead, read):
    saved(tmp_path)
    path = tmp_path / "checkpoints" / "3" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if instead == "folder":
        path.mkdir()
    assert same(restored(tmp_path)[0], state_at(read))


def test_state_that_vanishes_during_reading_is_read_again(tmp_path, monkeypatch, caplog):
    """A training next to the reader saves two states and removes those that the reader has listed."""
    saved(tmp_path, steps=(1, 2))
    original = restore._read_record

    def read_record(folder, step):
        if step == 2:
            saved(tmp_path, steps=(3, 4))
            assert restore.steps(folder) == [4, 3]
        return original(folder, step)

    monkeypatch.setattr(restore, "_read_record", read_record)
    assert same(read_state(tmp_path), state_at(4)) and not caplog.text


def test_states_that_always_vanish_are_an_error(tmp_path, monkeypatch):
    listed = iter(range(100))
    monkeypatch.setattr(restore, "steps", lambda folder: [next(listed)])
    with pytest.raises(TrainingError, match="replaced faster than they can be read; try again"):
        read_state(tmp_path)


def test_states_of_another_configuration_are_refused(tmp_path):
    saved(tmp_path)
    config = Config()
    config.optimizer.learning_rate, config.training.steps = 0.5, 2
    config.run.parallel = "pmap"  # changes no numbers
    with pytest.raises(ConfigError, match=r"optimizer.learning_rate = 0.03 when it was saved, 0.5 now, training.steps = 1000"):
        restore.read_newest(tmp_path / "checkpoints", ABSTRACT, config)


def test_old_states_that_a_killed_process_was_removing_are_removed(tmp_path):
    saved(tmp_path)
    shutil.copytree(tmp_path / "checkpoints" / "2", tmp_path / "checkpoints" / "1")
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "state")
    assert same(restored(tmp_path)[0], state_at(3))
    assert restore.steps(tmp_path / "checkpoints") == [3, 2]


@pytest.mark.parametrize("damage", ["no JSON", "another JSON", "truncated", "other weights", "missing"])
def test_incomplete_weights_are_written_again(tmp_path, damage):
    saved(tmp_path)
    with Saver(tmp_path, {"task": "t"}, Config()) as saver:
        state = saver.restore(ABSTRACT)
        saver.export(state, 0.1)
    expected = {name: (tmp_path / name).read_bytes() for name in ("best.json", "final.json")}
    for name in ("best", "final"):
        weights, description = tmp_path / f"{name}.npz", tmp_path / f"{name}.json"
        if damage == "no JSON":
            description.unlink()
        elif damage == "another JSON":
            description.write_text("{")
        elif damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-30])
        elif damage == "other weights":
            save_npz(weights, state_at(7).params, json.loads(description.read_text()))
        else:
            weights.unlink()
    with Saver(tmp_path, {"task": "t"}, Config()) as saver:
        saver.export(saver.restore(ABSTRACT), 0.1)
    assert same(read_npz(tmp_path / "final.npz"), state_at(3).params) and same(
        read_npz(tmp_path / "best.npz"), state_at(1).params
    )
    assert {name: (tmp_path / name).read_bytes() for name in expected} == expected


def test_weights_always_have_their_description(tmp_path, monkeypatch):
    """A process that is killed between the two renames leaves the description, which then speaks of the weights to come."""
    original, renamed = os.replace, []

    def rename(source, target):
        original(source, target)
        renamed.append(Path(target).name)

    monkeypatch.setattr(os, "replace", rename)
    save_npz(tmp_path / "final.npz", PARAMS, {})
    assert renamed == ["final.json", "final.npz"]


def test_failed_save_does_not_wait_for_its_threads(tmp_path, monkeypatch):
    saved(tmp_path)
    with pytest.raises(TrainingError, match="saving in .* failed .*No space left"), Saver(tmp_path, {}, Config()) as saver:
        saver.restore(ABSTRACT)

        def fails(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(saver._manager, "save", fails)
        monkeypatch.setattr(saver._manager, "close", lambda: pytest.fail("this may wait for minutes"))
        saver.save(state_at(4))
