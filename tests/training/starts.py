"""A small run in other processes, and its folder compared with another one."""

import collections
import ctypes
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax import cli
from vit_jax.config import Config
from vit_jax.config_files import to_json

ROOT = Path(__file__).parents[2]
STEPS, EVAL_EVERY, SAVE_EVERY = 12, 3, 2


def small_run(checkpoint: Path) -> Config:
    """A run of one block that saves at nearly every moment; writes the checkpoint it starts from."""
    from flax.traverse_util import flatten_dict

    from vit_jax.models.variants import build, shapes

    model = build("B/8", hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32, num_classes=5)
    values = np.random.default_rng(0)
    flat = {name: values.normal(scale=0.2, size=leaf.shape) for name, leaf in flatten_dict(shapes(model, 16), sep="/").items()}
    np.savez(checkpoint, **{name: leaf.astype(np.float32) for name, leaf in flat.items()})
    config = Config(seed=5)
    config.model.checkpoint, config.model.dropout = str(checkpoint), 0.1
    config.data.task, config.data.image_size = "cifar100_excerpt", 16
    config.data.train_split, config.data.test_split = "train[:64]", "test[:50]"
    config.optimizer.warmup_steps, config.optimizer.accumulator_dtype = 2, "bfloat16"
    config.training.steps, config.training.batch_size = STEPS, 16
    config.training.eval_every, config.training.save_every = EVAL_EVERY, SAVE_EVERY
    return config


def _end_with_parent() -> None:
    """Lets the system kill this process when the campaign is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <sys/prctl.h>


class Start:
    """One start of the run: a fork of this process, whose libraries are imported but unused, or main.py itself.

    On several hosts, it is the process that starts them.
    """

    def __init__(self, config: Path, workdir: Path, fork: bool = True, hosts: int = 1):
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self.workdir, self.log = workdir, workdir.parent.with_suffix(".log")  # not on the disk of the run
        with open(self.log, "ab") as log:
            if not fork or hosts > 1:
                command = [sys.executable, "main.py", "--config", str(config), "--workdir", str(workdir), f"--hosts={hosts}"]
                self.pid = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, preexec_fn=_end_with_parent).pid
            elif not (pid := os.fork()):
                _end_with_parent()
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                self._train(config, workdir)
            else:
                self.pid = pid
        self.status: int | None = None

    def _train(self, config: Path, workdir: Path) -> None:
        from vit_jax import runtime
        from vit_jax.config_files import read
        from vit_jax.training import loop

        def train() -> int:
            runtime.prepare()  # as main.py does; here, because the process that forks must not touch JAX
            result = loop.train(read(str(config)), workdir)
            return 0 if result.finished else 128 + result.signal

        logging.getLogger().handlers.clear()  # of libraries, for the standard error that cli.run replaces
        cli.run(lambda: cli.call(train))

    def log_text(self) -> str:
        """What this start and those before it have printed."""
        return self.log.read_text(errors="replace")

    def ended(self) -> bool:
        """Whether the process has ended; `status` is then its exit status, negative for a signal."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self, until: Callable[[], bool] = lambda: False, seconds: float = 300) -> int | None:
        """Waits until something is so, the process has ended or the time is over; returns the exit status if it has ended."""
        limit = time.monotonic() + seconds
        while not self.ended() and not until() and time.monotonic() < limit:
            time.sleep(0.0005)
        return self.status

    def send(self, number: int) -> None:
        if self.status is None:
            os.kill(self.pid, number)

    def send_to_host(self, index: int, number: int) -> None:
        """Sends a signal to one of the hosts, as soon as it is there and unless it has ended."""
        children, found = Path(f"/proc/{self.pid}/task/{self.pid}/children"), []
        while not self.ended() and not found:
            commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in children.read_text().split()}
            found = [pid for pid, path in commands.items() if path.read_bytes().endswith(f"--process_id\0{index}\0".encode())]
        for pid in found:
            os.kill(int(pid), number)


def metrics(workdir: Path) -> str:
    path = workdir / "metrics.jsonl"
    return path.read_text(errors="replace") if path.exists() else ""


def reached(workdir: Path, step: int) -> bool:
    return f'"step": {step},' in metrics(workdir)


def files(workdir: Path) -> dict[str, int]:
    """The sizes of all files, with those of the states as one; without those of TensorBoard, of which every start makes one."""
    sizes: collections.Counter[str] = collections.Counter()
    for path in workdir.rglob("*"):
        name = path.relative_to(workdir).as_posix()
        if not re.match("tensorboard/|figures|report.html", name):  # the page is drawn by main.py only
            sizes[re.sub(r"^checkpoints/(\d+)(/.*)?$", "states", name)] += path.stat().st_size * path.is_file()
    return dict(sizes)


def differences(expected: Path, found: Path, extra: list[str]) -> list[str]:
    """The differences between what a disturbed run and an uninterrupted run left; files that begin with `extra` may be more."""
    ours, theirs = files(expected), files(found)
    more = {name for name in theirs.keys() - ours.keys() if not name.startswith(tuple(extra))}
    wrong = [f"file {name}" for name in sorted((ours.keys() - theirs.keys()) | more)]
    wrong += [f"size of {n}: {theirs[n]}, not {ours[n]}" for n in ours.keys() & theirs.keys() if theirs[n] > 1.5 * ours[n] + 99]
    for name in ("final.npz", "best.npz", "predictions.npz"):
        with np.load(expected / name) as before, np.load(found / name) as after:
            wrong += [f"{name} holds other arrays"] * (before.files != after.files)
            wrong += [f"{name}: {leaf}" for leaf in before.files if before[leaf].tobytes() != after[leaf].tobytes()]
    for name in ("final.json", "best.json", "config.json", "environment.json"):
        before, after = (json.loads((workdir / name).read_text()) for workdir in (expected, found))
        if any(before.get(key) != after.get(key) for key in {*before, *after} - {"started", "command"}):
            wrong.append(name)

    def numbers(workdir: Path) -> list[dict]:
        lines = map(json.loads, metrics(workdir).splitlines())
        return [{name: value for name, value in line.items() if "per_second" not in name} for line in lines]

    return wrong + ["metrics.jsonl"] * (numbers(expected) != numbers(found))


if __name__ == "__main__":  # writes the configuration: `python -m tests.training.starts CHECKPOINT CONFIG`
    Path(sys.argv[2]).write_text(to_json(small_run(Path(sys.argv[1]))))
