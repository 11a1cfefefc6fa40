"""Killed anywhere and started again, a run ends with the parameters of one that was left alone, bit for bit."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vit_jax.config import to_json

ROOT = Path(__file__).parents[2]


def start(source: Path, workdir: Path) -> subprocess.Popen:
    """main.py itself, in a process of its own."""
    command = [sys.executable, "main.py", "--config", str(source), "--workdir", str(workdir)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def steps(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_and_started_again(config, tmp_path):
    config.training.steps, config.training.save_every, config.training.eval_every = 150, 2, 5  # nearly always saving
    source = tmp_path / "config.json"
    source.write_text(to_json(config))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(source, whole)

    draw, kills = random.Random(0), 0
    for until in (1, 30, 75, 120):
        process = start(source, killed)
        while process.poll() is None and steps(killed) < until:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
    finish(start(source, killed))
    finish(reference)
    assert kills >= 3

    with np.load(whole / "final.npz") as expected, np.load(killed / "final.npz") as found:
        assert expected.files == found.files
        for name in expected.files:
            assert expected[name].tobytes() == found[name].tobytes(), name
    for name in ("best.npz", "predictions.npz"):
        with np.load(whole / name) as expected, np.load(killed / name) as found:
            assert all(expected[leaf].tobytes() == found[leaf].tobytes() for leaf in expected.files)
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 151))


@pytest.mark.slow
def test_killed_while_a_state_is_being_saved(config, tmp_path):
    """The kill comes when Orbax's unfinished folder is there to be seen."""
    config.training.steps, config.training.save_every = 12, 3
    source = tmp_path / "config.json"
    source.write_text(to_json(config))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(source, whole)
    process = start(source, killed)
    unfinished: list[Path] = []
    while process.poll() is None and not unfinished:
        unfinished = list(killed.glob("checkpoints/*orbax-checkpoint-tmp*"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert unfinished and process.returncode == -signal.SIGKILL
    finish(start(source, killed))
    finish(reference)
    assert not list(killed.glob("checkpoints/*orbax-checkpoint-tmp*"))
    with np.load(whole / "final.npz") as expected, np.load(killed / "final.npz") as found:
        assert all(expected[name].tobytes() == found[name].tobytes() for name in expected.files)
