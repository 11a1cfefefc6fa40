"""`--hosts N`: starts N processes on this machine as the hosts of one run, and says which of them ended it.

Imports neither JAX nor anything slow. When host 0 dies, JAX ends the other hosts inside the runtime, where no Python code can
say why; so this process does.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOST = 75  # the exit status of a host that has lost another one (EX_TEMPFAIL)
# Seconds that the others have after the first has ended; longer than hosts.HEARTBEAT, so that one that hangs is known.
_GRACE = 25.0
# The same after a signal to all. A host that waits for another one to start does not answer signals, and has nothing to save.
_STOP_GRACE = 5.0
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class _Host:
    """A process of the run. The words of all but host 0 go to a file, because they are the same."""

    def __init__(self, command: list[str], index: int):
        self.index, self.words = index, tempfile.TemporaryFile() if index else None  # noqa: SIM115
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if any("_proxy" in name.lower() for name in os.environ):
            environment["no_grpc_proxy"] = "127.0.0.1"  # the hosts talk by gRPC
        # In a new session: a terminal sends Ctrl-C to the parent only, which passes it on once.
        self.process = subprocess.Popen(
            [*command, "--process_id", str(index)],
            env=environment,
            stdout=self.words,
            stderr=self.words,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )

    def status(self) -> int | None:
        """The exit status, or minus the number of the signal that killed it; None while it runs.

        A process that has no handlers yet when a signal asks it to stop has the same status as later.
        """
        status = self.process.poll()
        return 128 - status if status in (-signal.SIGINT, -signal.SIGTERM) else status

    def end(self) -> None:
        """Kills the process if it still runs."""
        self.process.kill()
        self.process.wait()
        if self.words is not None:
            self.words.close()

    def last_words(self) -> str:
        """The last error that it printed, if its words went to a file."""
        if self.words is None:
            return ""
        self.words.seek(0)
        lines = self.words.read().decode(errors="replace").splitlines()
        return next((line.partition("error: ")[2] for line in reversed(lines) if line.startswith("error: ")), "")


def _end_with_parent() -> None:
    """Lets the kernel send SIGTERM to this process when its parent ends, however that happens. Only Linux can do this."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def launch(arguments: list[str], number: int) -> int:
    """Trains with so many processes of this machine as hosts; returns the exit status of the run.

    Args:
      arguments: of `vit_jax train`, with --hosts.
      number: of hosts.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vit_jax", "train", *arguments, "--hosts=1"]
    command += ["--coordinator", f"127.0.0.1:{port}", "--num_processes", str(number)]
    hosts: list[_Host] = []
    received: list[int] = []

    def forward(signum: int, frame: Any) -> None:
        received.append(signum)
        for host in hosts:
            if host.status() is None:
                host.process.send_signal(signum)

    for name in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(name) != signal.SIG_IGN:
            signal.signal(name, forward)
    for index in range(number):
        hosts.append(_Host(command, index))
        for signum in received:  # by the hosts before
            hosts[-1].process.send_signal(signum)
    return _wait(hosts, received)


def _wait(hosts: list[_Host], received: Sequence[int] = ()) -> int:
    """The exit status of the run; ends the hosts that are left when one has ended, after some time.

    `received` are the signals that were passed on to all hosts until now.
    """
    try:
        return _status(hosts, received)
    finally:
        for host in hosts:
            host.end()


def _status(hosts: list[_Host], received: Sequence[int]) -> int:
    """The exit status of the run, with a sentence on standard error if it did not end well."""
    ended: dict[int, int] = {}  # host → status, in the order in which they end
    deadline = float("inf")
    while len(ended) < len(hosts) and time.monotonic() < deadline:
        for host in hosts:
            if host.index not in ended and (status := host.status()) is not None:
                ended[host.index] = status
                if len(ended) == 1:
                    deadline = time.monotonic() + (_STOP_GRACE if received and status in _STOPPED else _GRACE)
        time.sleep(0.05)
    left, statuses = [host for host in hosts if host.index not in ended], set(ended.values())
    together = not left and statuses <= {0, *_STOPPED}
    if len(statuses) == 1 and (together or (received and statuses <= {*_STOPPED})):
        return statuses.pop()
    print(f"\nerror: {_cause(hosts, ended, left)}", file=sys.stderr)  # the line of the progress bar has no end
    return 1


def _cause(hosts: list[_Host], ended: dict[int, int], left: list[_Host]) -> str:
    """The sentence about a run that did not end well: which host ended it, and how."""
    again = "the others were stopped. The same command continues from the newest saved state"
    # The first that did not end because of another host; an ordinary end is the cause if there is no other.
    own = {index: status for index, status in ended.items() if status not in (LOST, -signal.SIGABRT)}
    for index, status in sorted(own.items(), key=lambda item: item[1] in (0, *_STOPPED)):
        if status < 0:
            return f"host {index} of {len(hosts)} was killed ({signal.Signals(-status).name}); {again}"
        words = hosts[index].last_words()
        if status not in (0, *_STOPPED):  # an error, such as a refused setting
            again += ", if there is one and the cause is removed"
        return f"host {index} of {len(hosts)} ended with status {status}{words and ': '}{words}; {again}"
    if left:
        return f"host {left[0].index} of {len(hosts)} did not answer any more; {again}"
    return f"the hosts lost each other; {again}"
