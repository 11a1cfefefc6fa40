"""What survives: saved states, damaged ones, full disks, working directories."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.checkpoints.google import read_meta, read_npz
from vit_jax.config import Optimizer
from vit_jax.errors import TrainingError
from vit_jax.training import optimizer as optimizers
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
    with Saver(workdir, {"task": "t"}) as saver:
        for step in steps:
            saver.keep(step, 0.9 if step == best_at else 0.1, state_at(step).params)
            saver.save(state_at(step))


def restored(workdir):
    with Saver(workdir, {}) as saver:
        return saver.restore(ABSTRACT), saver.best


def test_nothing_to_restore(tmp_path):
    assert restored(tmp_path) == (None, None)


def test_two_newest_states_and_the_best_parameters(tmp_path):
    saved(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    state, best = restored(tmp_path)
    assert same(state, state_at(3)) and best == {"step": 1, "accuracy": 0.9}
    assert same(read_npz(tmp_path / "best.npz"), state_at(1).params)
    assert read_meta(tmp_path / "best.npz") == {"task": "t", "step": 1, "accuracy": 0.9}
    with Saver(tmp_path, {"task": "t"}) as saver:  # the best of an earlier start is not forgotten
        saver.restore(ABSTRACT)
        (tmp_path / "best.npz").unlink()
        saver.export(state, 0.1)
    assert same(read_npz(tmp_path / "best.npz"), state_at(1).params)
    assert same(read_npz(tmp_path / "final.npz"), state_at(3).params)
    assert read_meta(tmp_path / "final.npz") == {"task": "t", "step": 3, "accuracy": 0.1}


def test_the_first_of_equal_evaluations_is_the_best(tmp_path):
    with Saver(tmp_path, {}) as saver:
        for step in (1, 2):
            saver.keep(step, 0.5, state_at(step).params)
        saver.keep(3, float("nan"), state_at(3).params)
    assert saver.best == {"step": 1, "accuracy": 0.5}


def test_the_best_parameters_are_a_copy(tmp_path):
    params = jax.tree.map(jnp.ones_like, PARAMS)
    with Saver(tmp_path, {}) as saver:
        saver.keep(1, 0.5, params)
        jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(params)
        saver.save(state_at(2))
    assert same(read_npz(tmp_path / "best.npz"), jax.tree.map(np.ones_like, PARAMS))


@pytest.mark.parametrize("damage", ["bits", "truncated", "missing", "record"])
def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, damage, caplog):
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
    with Saver(tmp_path, {}, read_only=True) as saver:  # a reader leaves all as it is
        assert same(saver.restore(ABSTRACT), state_at(2))
        assert newest.exists()
    state, _ = restored(tmp_path)
    assert same(state, state_at(2))
    assert "the state of step 3 is damaged" in caplog.text
    assert list((tmp_path / "checkpoints").glob("damaged-3-*"))  # set aside, not thrown away
    saved(tmp_path, steps=(3,))  # the step is free to be saved again
    assert same(restored(tmp_path)[0], state_at(3))


def test_a_value_that_changed_silently_is_noticed(tmp_path, caplog):
    """Orbax restores it without a word: written again with one value changed, the hash beside it being the old one."""
    saved(tmp_path, steps=(1, 2))
    changed = state_at(9)
    with Saver(tmp_path / "other", {}) as saver:
        saver.save(changed)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "9" / "state", tmp_path / "checkpoints" / "2" / "state")
    state, _ = restored(tmp_path)
    assert same(state, state_at(1)) and "is not what was saved" in caplog.text


def test_all_states_damaged(tmp_path):
    saved(tmp_path)
    for step in ("2", "3"):
        (tmp_path / "checkpoints" / step / "record" / "metadata").write_text("{")
    with pytest.raises(TrainingError, match="no state in .* can be read; move the working directory away"):
        restored(tmp_path)
    assert (tmp_path / "checkpoints" / "3").exists()  # nothing is thrown away


def test_a_state_of_another_shape_is_refused(tmp_path):
    saved(tmp_path)
    other = jax.eval_shape(lambda: create({"head": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(2)}}, OPTIMIZER))
    with Saver(tmp_path, {}) as saver, pytest.raises(TrainingError, match="no state in .* can be read"):
        saver.restore(other)


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_saving import saved, state_at
from vit_jax.errors import TrainingError
workdir = Path({workdir!r})
saved(workdir, steps=(1, 2))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # what a full disk does, without one: every write fails
try:
    saved(workdir, steps=(3,))
except TrainingError as error:
    print("error:", error)
"""


def test_a_disk_that_is_full_harms_nothing_that_was_saved(tmp_path):
    here = Path(__file__).parent
    code = FULL.format(tests=str(here), workdir=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here.parents[1])
    assert done.stdout.count("\n") == 1, done.stderr
    assert "error: saving in" in done.stdout and "free some space" in done.stdout
    state, _ = restored(tmp_path)
    assert same(state, state_at(2))
    assert same(read_npz(tmp_path / "best.npz"), state_at(1).params)


def test_what_the_machine_refuses_is_no_damage(tmp_path, monkeypatch):
    saved(tmp_path)

    def refuses(*args):
        raise PermissionError(13, "Permission denied")

    with Saver(tmp_path, {}) as saver, monkeypatch.context() as patch:
        patch.setattr(saver, "_read", refuses)
        with pytest.raises(PermissionError):
            saver.restore(ABSTRACT)
    assert same(restored(tmp_path)[0], state_at(3))


def test_a_reader_leaves_an_unfinished_save_alone(tmp_path):
    saved(tmp_path)
    unfinished = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "3", unfinished)
    with Saver(tmp_path, {}, read_only=True) as saver:
        assert same(saver.restore(ABSTRACT), state_at(3))
    assert unfinished.exists()
