"""A run that is killed anywhere and started again ends with the parameters of an uninterrupted run, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vit_jax.config_files import to_json

ROOT = Path(__file__).parents[2]


def start(source: Path, workdir: Path) -> subprocess.Popen:
    """Starts main.py in its own process."""
    command = [sys.executable, "main.py", "--config", str(source), "--workdir", str(workdir)]
    # Its own cache of programs, because a kill may leave half an entry, which no other test should find.
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(source.parent / "programs")}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def steps(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_run_ends_like_an_uninterrupted_run(config, tmp_path):
    config.training.steps, config.training.save_every, config.training.eval_every = 80, 2, 5  # nearly always saving
    source = tmp_path / "config.json"
    source.write_text(to_json(config))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(source, whole)

    def unfinished() -> bool:
        """Whether Orbax is saving a state."""
        return steps(killed) > 20 and any(killed.glob("checkpoints/*orbax-checkpoint-tmp*"))

    for moment in (lambda: steps(killed) >= 1, unfinished, lambda: steps(killed) >= 50):
        process = start(source, killed)
        while process.poll() is None and not moment():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(start(source, killed))
    finish(reference)
    assert not list(killed.glob("checkpoints/*orbax-checkpoint-tmp*"))

    for name in ("final.npz", "best.npz", "predictions.npz"):
        with np.load(whole / name) as expected, np.load(killed / name) as found:
            assert expected.files == found.files
            for leaf in expected.files:
                assert expected[leaf].tobytes() == found[leaf].tobytes(), (name, leaf)
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 81))


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_bit_equal(tmp_path):
    """A sample; `make test-full` kills 12 times, VIT_JAX_KILLS=200 runs a whole campaign."""
    kills = os.environ.get("VIT_JAX_KILLS", "4")
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), kills, str(tmp_path / "campaign")]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["kills"] >= int(kills) and not found["failures"], found


FULL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit := int(sys.argv.pop(1)), limit))
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [200, 4_000])
def test_full_disk_ends_the_run_with_one_error(config, tmp_path, limit):
    """Files cannot grow beyond a limit, which is what a full disk does: configuration, journal or a state hits it first."""
    config.training.steps, config.training.save_every = 60, 20
    source = tmp_path / "config.json"
    source.write_text(to_json(config))
    command = [sys.executable, "-c", FULL, str(limit), "--config", str(source), "--workdir", str(tmp_path / "run")]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cut programs")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert [line for line in done.stderr.splitlines() if "error: " in line], done.stderr
    finish(start(source, tmp_path / "run"))  # with space again, the same command resumes
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 61))
