"""`--hosts N`: how the parent answers the ends of its hosts. Small scripts are the hosts here; test_hosts.py has real ones."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vit_jax.training import launch

# The parent forks, and other tests of this process have used JAX; `--hosts` itself does not.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork")

# What a host does; sys.argv is ["-c", "--process_id", index].
PRELUDE = "import os, signal, sys, time; index = int(sys.argv[2])\n"
SLEEP = "time.sleep(60)"


def ended(script: str, number: int = 2) -> tuple[int, float]:
    """The status of a run of such hosts, and how long it took."""
    began = time.monotonic()
    hosts = [launch._Host([sys.executable, "-c", PRELUDE + script], index) for index in range(number)]
    return launch._wait(hosts), time.monotonic() - began


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(launch, "_GRACE", 3.0)
    monkeypatch.setattr(launch, "_STOP_GRACE", 1.0)


@pytest.mark.parametrize("status", [0, 143, 130])
def test_hosts_that_end_together_have_one_status(capsys, status):
    assert ended(f"sys.exit({status})")[0] == status and capsys.readouterr().err == ""


def test_host_that_a_signal_stops_before_it_has_handlers_has_the_same_status(capsys):
    script = "sys.exit(143) if index == 0 else os.kill(os.getpid(), signal.SIGTERM)"
    assert ended(script)[0] == 143 and capsys.readouterr().err == ""


def test_host_that_does_not_answer_a_signal_to_all_is_killed(capsys):
    hosts = [launch._Host([sys.executable, "-c", f"{PRELUDE}sys.exit(143) if index else {SLEEP}"], index) for index in range(2)]
    assert launch._wait(hosts, [signal.SIGTERM]) == 143 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL) if index == 1 else time.sleep(60)", "host 1 of 2 was killed (SIGKILL); the"),
        ("os.kill(os.getpid(), signal.SIGKILL) if index == 0 else os.abort()", "host 0 of 2 was killed (SIGKILL); the"),
        ("os.kill(os.getpid(), signal.SIGKILL) if index == 1 else sys.exit(75)", "host 1 of 2 was killed (SIGKILL); the"),
        (f"{SLEEP} if index == 1 else os.abort()", "host 1 of 2 did not answer any more; the"),
        ("print('error: no disk', file=sys.stderr); sys.exit(index and 1)", "host 1 of 2 ended with status 1: no disk; the"),
        (f"sys.exit(143) if index == 0 else {SLEEP}", "host 0 of 2 ended with status 143; the"),
        ("sys.exit(75)", "the hosts lost each other; the"),
    ],
)
def test_host_that_ends_the_run_is_named_in_one_line(capfd, script, said):
    status, seconds = ended(script)
    assert status == 1 and seconds < 10
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {said} others were stopped. The same command continues from the newest saved state")
    assert error.endswith(", if there is one and the cause is removed") == ("status 1:" in said)


def test_signals_are_passed_on_to_every_host_once(tmp_path):
    """The parent has its own process here, because a signal is sent to it."""
    script = PRELUDE + (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"open(os.path.join({str(tmp_path)!r}, str(index)), 'w').close(); {SLEEP}"
    )
    parent = f"""
import sys
from vit_jax.training import launch
host = launch._Host
launch._Host = lambda command, index: host([sys.executable, "-c", {script!r}], index)
sys.exit(launch.launch([], 2))
"""
    process = subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    finally:
        process.kill()


def test_hosts_end_with_their_parent():
    parent = """
import sys
from vit_jax.training import launch
host = launch._Host([sys.executable, "-c", "import time; time.sleep(60)"], 1)
print(host.process.pid, flush=True)
"""
    found = subprocess.run(
        [sys.executable, "-c", parent], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stdout=-1
    )
    for _ in range(100):
        try:
            os.kill(int(found.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the host goes on")
