"""Contestants in processes of their own, driven by lines over their standard input and output (see peers.serve)."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vit_jax
from benchmarks.measure import ContestantError
from vit_jax.interop import peers

ROOT = Path(vit_jax.__file__).resolve().parents[1]  # of the repository, where main.py lies


def environment(**more: str) -> dict[str, str]:
    """This process's variables, in which `python -m vit_jax…` finds this package from any folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def peer(name: str, work: Mapping[str, Any], python: str = "", original: str = "") -> list[str]:
    """The command of a peer such as "timm+bf16"."""
    command = [python or sys.executable, "-P", peers.__file__, "time", name, "--work", json.dumps(work)]
    return command + (["--original", original] if original else [])


class Process:
    """A contestant that runs somewhere else: a call does n units there. ContestantError when it is not there any more."""

    def __init__(self, name: str, command: list[str], limit: float = 600.0, env: Mapping[str, str] | None = None):
        """Starts it and waits until it is ready; every answer is waited for `limit` seconds."""
        self._name, self._limit = name, limit
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=env
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(self._limit):
                raise ContestantError(f"{self._name} did not answer within {self._limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        return json.loads(line)

    def _gone(self) -> ContestantError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        if self._process.returncode == 2 and lines:  # a sentence of its own: it is not installed
            return ContestantError(lines[-1])
        said = next((line for line in reversed(lines) if "Error" in line or "error" in line), lines[-1] if lines else "")
        status = self._process.returncode
        ended = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        return ContestantError(f"{self._name} {ended}" + (f": {said[:300]}" if said else ""))

    def __call__(self, n: int) -> float:
        return float(self._ask(str(n))["seconds"])

    def about(self) -> dict[str, Any]:
        """What it says of itself: device, versions, memory in bytes."""
        return self._ask("about")

    def close(self) -> None:
        """Ends it."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream:
                    stream.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
