"""Runs in one folder that several processes share."""

import threading
import time

import pytest

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
