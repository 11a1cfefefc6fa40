"""Tables of what is measured on a kind of machine, each part in a process of its own and for a limited time."""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import say
from benchmarks.page import store
from benchmarks.processes import ROOT, environment

_CPU = "train inference --batch 8 --peer timm{,original} --model"
_GPU = "--model B/16 --dtype bfloat16"
_BEST = "timm+bf16+compile+channels_last"
# Suite → part → (arguments, seconds that it may take). What does not fit on a GPU side by side is measured apart.
SUITES: dict[str, dict[str, tuple[str, int]]] = {
    "cpu": {
        "ti16": (f"{_CPU} Ti/16", 900),
        "s16": (f"{_CPU} S/16", 1800),
        "b16": (f"{_CPU} B/16", 3600),
        "input": ("input --model Ti/16 --batch 8", 600),
        "evaluation": ("evaluation --model Ti/16 --batch 16 --images 128", 600),
        "startup": ("startup --model B/16 --batch 1", 900),
        "loop": ("loop", 600),
        "memory": ("memory", 600),
    },
    "gpu": {
        "train-256": (f"train {_GPU} --batch 256 --peer timm+bf16,timm+bf16+compile,{_BEST}", 420),
        "train-512": (f"train {_GPU} --batch 512 --apart --rounds 8 --peer {_BEST}", 420),
        "train-1024": (f"train {_GPU} --batch 1024 --accumulation 2 --apart --rounds 8 --peer {_BEST}", 420),
        "inference-256": (f"inference {_GPU} --batch 256 --peer timm+bf16,timm+bf16+compile,{_BEST}", 300),
        "inference-1024": (f"inference {_GPU} --batch 1024 --peer {_BEST}", 300),
        "run": ("run", 400),
        "attention": (f"train {_GPU} --batch 256 --attention cudnn,xla", 240),
        "input": (f"input {_GPU} --batch 256", 120),
        "evaluation": (f"evaluation {_GPU} --batch 256", 120),
        "loop": ("loop", 120),
        "check": (f"memory {_GPU} --check", 240),
        "startup": (f"startup {_GPU} --batch 64", 240),
        "check-remat": (f"memory {_GPU} --check --remat", 240),
    },
}
TOTAL = {"cpu": 4 * 3600.0, "gpu": 25 * 60.0}  # seconds that a suite may take in all


def run(options: argparse.Namespace) -> int:
    """Measures the parts that the options name, one after the other; returns the exit status."""
    paths = {"peer-python": options.peer_python, "original": options.original, "data-dir": options.data_dir}
    passed = [f"--{name}={path}" for name, path in paths.items() if path]
    failed, output, end = list[str](), options.output, time.monotonic() + TOTAL[options.suite]
    for name in options.only:
        arguments, limit = SUITES[options.suite][name]
        arguments = arguments.replace("{,original}", ",original" if options.original else "")
        say(f"--- {name}: python -m benchmarks {arguments}")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "results.json"
            left = max(0.0, min(limit, end - time.monotonic()))
            problem = _limited([*arguments.split(), *passed, f"--output={file}"], left)
            found = json.loads(file.read_text()) if file.exists() else {}
        where, results = found.get("machine") or _machine(), found.get("results", [])
        if problem:
            failed.append(name)
            say(f"error: {name} {problem}")
            results = results or [{"what": arguments.split()[0], "rows": [], "notes": [f"failed: {problem}"]}]
        output = output or ROOT / "docs" / "benchmarks" / f"{file_name(where['device'])}.json"
        command = f"python -m benchmarks {arguments}"
        store(output, where, [{**result, "command": command} for result in results])
    say(f"results in {output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def file_name(device: str) -> str:
    """What a device's file is called: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _limited(arguments: list[str], limit: float) -> str:
    """Runs a command line of the benchmark and ends it, with all that it has started; returns what went wrong, or ""."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"took more than {limit:.3g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"ended with status {status}" if status else ""


def _machine() -> dict[str, Any]:
    """This machine, described by a process that gives the device back."""
    code = "import json; from benchmarks.page import machine; print(json.dumps(machine()))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
