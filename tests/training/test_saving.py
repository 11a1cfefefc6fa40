"""What a run saves: its newest states, the best parameters, and weights; also on a full disk."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.states import ABSTRACT, PARAMS, restored, same, saved, state_at
from vit_jax.config import Config
from vit_jax.errors import TrainingError
from vit_jax.formats.google import read_meta, read_npz, save_npz
from vit_jax.training import restore
from vit_jax.training.saving import Saver


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
        saver.export(int(state.step), state.params, 0.1)
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


FULL = """
import os, resource, signal, sys
from pathlib import Path
from tests.training.states import ABSTRACT, saved, state_at
from vit_jax.config import Config
from vit_jax.errors import TrainingError
from vit_jax.training.saving import Saver
workdir = Path({workdir!r})
saved(workdir, steps=(1, 2))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Saver(workdir, {{}}, Config()) as saver:
    saver.restore(ABSTRACT)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, -1))  # what a full disk does, without one: writing fails
    saver.save(state_at(3))
    saver.save(state_at(4))
    try:
        saver.save(state_at(5), last=True)
    except TrainingError as error:
        print("error:", error)
    # A thread of TensorStore may still write to an unfinished state, which the next save removes.
    print(sorted(name for name in os.listdir(workdir / "checkpoints") if name.isdecimal()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    saver.save(state_at(6))
print(sorted(os.listdir(workdir / "checkpoints")))
"""


@pytest.mark.parametrize("limit", [64, 700])  # the first file, and one after it
def test_full_disk_costs_only_the_states_of_its_time(tmp_path, limit):
    code = FULL.format(workdir=str(tmp_path), limit=limit)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    error, full, free = done.stdout.splitlines()
    assert error.startswith(f"error: saving step 5 in {tmp_path} failed (") and "when the cause is removed" in error
    assert (full, free) == ("['1', '2']", "['2', '6']"), done.stderr
    for step in (3, 4):
        assert f"saving step {step} in {tmp_path} failed (File too large" in done.stderr and "the run goes on" in done.stderr
    assert same(restored(tmp_path)[0], state_at(6))
    assert same(read_npz(tmp_path / "best.npz"), state_at(1).params)


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
        saver.export(int(state.step), state.params, 0.1)
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
        state = saver.restore(ABSTRACT)
        saver.export(int(state.step), state.params, 0.1)
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


def test_save_waits_for_what_must_not_be_older(tmp_path, caplog):
    """Without the lines of metrics.jsonl, a state would resume a run whose lines are lost."""

    def flush():
        raise OSError(28, "No space left on device", "metrics.jsonl")

    with Saver(tmp_path, {}, Config()) as saver:
        saver.save(state_at(1), flush)
        assert not restore.steps(tmp_path / "checkpoints") and "saving step 1" in caplog.text
        with pytest.raises(TrainingError, match="saving step 2 in .* failed .*No space left"):
            saver.save(state_at(2), flush, last=True)


def test_save_does_not_wait_until_the_state_is_durable(tmp_path, monkeypatch):
    began, may_end = threading.Event(), threading.Event()
    original = restore.make_record

    def slow(*args):
        began.set()
        assert may_end.wait(60)
        return original(*args)

    monkeypatch.setattr(restore, "make_record", slow)
    with Saver(tmp_path, {}, Config()) as saver:
        saver.save(state_at(1))
        assert began.wait(60) and not restore.steps(tmp_path / "checkpoints")
        may_end.set()
    assert same(restored(tmp_path)[0], state_at(1))


def test_state_that_is_replaced_stays_until_the_new_one_is_durable(tmp_path, monkeypatch):
    """That of an interrupted evaluation, which is saved again when the evaluation is made."""
    with Saver(tmp_path, {}, Config()) as saver:
        saver.unfinished = {"train/loss": 2.0}
        saver.save(state_at(1), last=True)
    folder = tmp_path / "checkpoints"
    for ended in (False, True):  # the save fails, or the process ends while it writes
        with Saver(tmp_path, {}, Config()) as saver:
            assert same(saver.restore(state_at(0)), state_at(1)) and saver.unfinished == {"train/loss": 2.0}
            saver.unfinished = None
            monkeypatch.setattr(saver, "_open", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(TrainingError, match="saving step 1 in .* failed .*No space left.*Earlier states are unchanged"):
                saver.save(state_at(1), last=True)
        assert [path.name for path in folder.iterdir()] == ["1"]
        if ended:
            (folder / "1").rename(folder / "replaced-1")
    with Saver(tmp_path, {}, Config()) as saver:
        saver.restore(state_at(0))
        saver.unfinished = None
        saver.save(state_at(1), last=True)
        assert [path.name for path in folder.iterdir()] == ["1"]
    with Saver(tmp_path, {}, Config()) as saver:
        assert same(saver.restore(state_at(0)), state_at(1)) and saver.unfinished is None
