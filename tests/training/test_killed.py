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


FULL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit := int(sys.argv.pop(1)), limit))
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [200, 4_000, 10_000])
def test_a_disk_that_fills_up_ends_the_run_in_a_sentence(config, tmp_path, limit):
    """Files cannot grow beyond a limit, which is what a full disk does: configuration, journal or a state hits it first."""
    config.training.steps, config.training.save_every = 60, 20
    source = tmp_path / "config.json"
    source.write_text(to_json(config))
    command = [sys.executable, "-c", FULL, str(limit), "--config", str(source), "--workdir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert [line for line in done.stderr.splitlines() if "error: " in line], done.stderr
    finish(start(source, tmp_path / "run"))  # with space again, the same command goes on
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 61))
