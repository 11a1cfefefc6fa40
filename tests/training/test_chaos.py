"""A run that is disturbed anywhere and started again ends as an uninterrupted run, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import chaos
from vit_jax.config_files import to_json

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_disturbed_runs_end_bit_equal(tmp_path):
    """Kills, SIGTERM, a damaged state, a host that dies, a folder and a disk that cannot be written; `make chaos` has 100."""
    command = [sys.executable, "-m", "tests.training.chaos", "10", str(tmp_path / "campaign")]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    print(found)
    assert done.returncode == 0 and found["cases"] == 10 and not found["wrong"], found


def test_campaign_goes_on_after_the_finished_cases(tmp_path, monkeypatch, capsys):
    made = []

    def case(number, *rest):
        made.append(number)
        return {"case": number, "kind": "KILL", "moments": ["step, 3 lines"], "wrong": ["final.npz"] * (number == 4)}

    monkeypatch.setattr(chaos, "uninterrupted", lambda folder, hosts: (folder / "config.json", dict.fromkeys(hosts, 1.0)))
    monkeypatch.setattr(chaos, "run_case", case)
    assert chaos.main(3, tmp_path) == 0 and chaos.main(3, tmp_path) == 0 and made == [0, 1, 2]
    assert chaos.main(5, tmp_path) == 1 and made == [0, 1, 2, 3, 4]
    assert chaos.main(5, tmp_path) == 1 and made[5:] == [4]  # what failed is made again
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["cases"] == 5 and found["moments"] == {"step": 5} and [case["case"] for case in found["wrong"]] == [4]


FULL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.slow
def test_full_disk_ends_the_run_with_one_error(config, tmp_path):
    """Files cannot grow beyond a limit, which is what a full disk does, without one."""
    config.training.steps, config.training.save_every = 60, 20
    (tmp_path / "config.json").write_text(to_json(config))
    arguments = ["--config", str(tmp_path / "config.json"), "--workdir", str(tmp_path / "run")]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cut programs")}
    done = subprocess.run([sys.executable, "-c", FULL, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("the run goes on") == 2 and done.stderr.splitlines()[-1].startswith("error: saving step 60")
    done = subprocess.run([sys.executable, "main.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # with space again, the same command resumes
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 61))


def test_case_is_skipped_with_the_reason_if_mount_is_not_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "KINDS", {"disk full": chaos.KINDS["disk full"]})
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "mount").write_text("#!/bin/sh\necho 'mount: must be superuser' >&2\nexit 1\n")
    (tmp_path / "umount").write_text("#!/bin/sh\nexit 1\n")
    for name in ("mount", "umount"):
        (tmp_path / name).chmod(0o755)
    found = chaos.run_case(0, tmp_path, tmp_path / "config.json", {1: 1.0})
    assert found["skipped"] == "mount: must be superuser" and not found["wrong"]
