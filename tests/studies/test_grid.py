"""Runs in one folder that several processes share."""

import threading
import time

import jax
import pytest

from vit_jax.errors import UserError
from vit_jax.files import locked
from vit_jax.studies import grid


@pytest.mark.slow
def test_cell_that_another_process_trains_is_waited_for(config, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "_WAIT", 0.1)
    config.training.steps, config.training.eval_every, config.optimizer.warmup_steps = 2, 2, 1
    cells = [grid.Cell("a", config), grid.Cell("b", config)]
    held, released = threading.Event(), []

    def other():
        with locked(tmp_path / "a" / ".lock", "trains"):
            held.set()
            time.sleep(1)
            released.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    order = [(cell.name, bool(released), found["test/accuracy"]) for cell, found in grid.run(cells, tmp_path)]
    thread.join()
    assert [name for name, _, _ in order] == ["b", "a"] and order[1][1]
    assert grid.result(cells[0], tmp_path)["test/accuracy"] == order[1][2]


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_cell_without_enough_memory_fails_and_the_next_one_runs(config, tmp_path, monkeypatch, error):
    class Done:
        finished, signal, metrics = True, 0, {"test/accuracy": 0.5}

    def train(config, workdir):
        if workdir.name == "large":
            raise error
        return Done

    monkeypatch.setattr(grid.loop, "train", train)
    found = {cell.name: value for cell, value in grid.run([grid.Cell(n, config) for n in ("large", "small")], tmp_path)}
    assert found["small"] == Done.metrics
    assert found["large"].__traceback__ is None  # its frames would hold the arrays of the run
    assert isinstance(found["large"], UserError) and "too little memory: raise training.grad_accum_steps" in str(found["large"])


def test_other_errors_of_a_cell_are_raised(config, tmp_path, monkeypatch):
    monkeypatch.setattr(grid.loop, "train", lambda config, workdir: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(grid.run([grid.Cell("a", config)], tmp_path))


def test_signal_at_the_end_of_a_cell_stops_the_study_after_it(config, tmp_path, monkeypatch):
    class Done:
        finished, signal, metrics = True, 15, {"test/accuracy": 0.5}

    monkeypatch.setattr(grid.loop, "train", lambda config, workdir: Done)
    cells = grid.run([grid.Cell(name, config) for name in "ab"], tmp_path)
    assert next(cells)[1] == Done.metrics
    with pytest.raises(grid.Stopped) as stopped:
        next(cells)
    assert stopped.value.number == 15
