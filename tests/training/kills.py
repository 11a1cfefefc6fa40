"""Kills a small run at random moments and starts it again, many times: `python tests/training/kills.py KILLS FOLDER [SEED]`.

Prints one JSON object. Each run is killed up to eight times, started again until it ends, and compared with a run that was
not interrupted: parameters, predictions, metrics, descriptions and the names of all files.
"""

import collections
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from vit_jax import cli  # noqa: E402
from vit_jax.config import Config  # noqa: E402
from vit_jax.config_files import to_json  # noqa: E402, F401

STEPS = 12


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
    config.training.eval_every, config.training.save_every = 3, 2
    return config


class Start:
    """One start of the run: a fork of this process, whose libraries are imported but unused, or main.py itself."""

    def __init__(self, config: Path, workdir: Path, fork: bool):
        self.log = workdir.with_suffix(".log")
        with open(self.log, "ab") as log:
            if not fork:
                command = [sys.executable, "main.py", "--config", str(config), "--workdir", str(workdir)]
                self.pid = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log).pid
            elif not (pid := os.fork()):
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

        cli.run(lambda: cli.call(train))

    def ended(self) -> bool:
        """Whether the process has ended; `status` is then its exit status, negative for a signal."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self, until) -> None:
        while not self.ended() and not until():
            time.sleep(0.0005)

    def send(self, number: int) -> None:
        if self.status is None:
            os.kill(self.pid, number)


def metrics(workdir: Path) -> str:
    path = workdir / "metrics.jsonl"
    return path.read_text(errors="replace") if path.exists() else ""


def files(workdir: Path) -> list[str]:
    """The names of all files without those inside a state, and a "state" for each: a run that saved when it was told to end
    may keep another one before the last."""
    found = [path.relative_to(workdir).as_posix() for path in workdir.rglob("*")]
    left_out = r"tensorboard/|checkpoints/\d+/|figures|report.html"  # the page is drawn by main.py only
    return sorted(re.sub(r"checkpoints/\d+$", "state", name) for name in found if not re.match(left_out, name))


def differences(expected: Path, found: Path) -> list[str]:
    """The differences between what a killed run and an uninterrupted run left."""
    ours, theirs = collections.Counter(files(expected)), collections.Counter(files(found))
    wrong = [f"file {name}" for name in (ours - theirs) + (theirs - ours)]
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


def kill(start: Start, workdir: Path, duration: float, draw: random.Random) -> tuple[str, str]:
    """Sends signals at a random moment; returns how and when."""
    moment = draw.choice(["any", "any", "saving", "writing", "end"])
    if moment == "any":
        until = time.monotonic() + draw.uniform(0, duration)
        start.wait(lambda: time.monotonic() > until)
    else:
        first = draw.randrange(STEPS)
        last = f'"step": {STEPS - 1 if moment == "end" else first}'
        start.wait(lambda: last in metrics(workdir))
        if moment == "saving":
            start.wait(
                lambda: any(workdir.glob("checkpoints/*orbax-checkpoint-tmp*")) or f'"step": {STEPS},' in metrics(workdir)
            )
        elif moment == "writing":
            start.wait(lambda: any(workdir.glob(".*.tmp")) or f'"step": {STEPS},' in metrics(workdir))
        until = time.monotonic() + draw.choice([0, draw.uniform(0, 0.02), draw.uniform(0, 0.3)])
        start.wait(lambda: time.monotonic() > until)
    how = draw.choices(["KILL", "STOP KILL", "TERM", "INT", "TERM TERM"], [6, 1, 1, 1, 1])[0]
    for name in how.split():
        start.send(getattr(signal, f"SIG{name}"))
        time.sleep(draw.uniform(0, 0.1) if " " in how else 0)
    limit = time.monotonic() + 60
    start.wait(lambda: time.monotonic() > limit)
    if start.status is None:
        start.send(signal.SIGKILL)
        start.wait(lambda: False)
        return how, "did not end"
    # Before its handlers are set, a signal ends a process by itself, which a shell reports as the same status.
    allowed = {"KILL": {-9}, "STOP KILL": {-9}, "TERM": {143, -15}, "INT": {130, -2}, "TERM TERM": {143, -15}}[how]
    return how, moment if start.status in allowed | {0} else f"status {start.status}"


def campaign(kills: int, folder: Path, seed: int) -> dict:
    draw, sent, moments, failures, runs = random.Random(seed), collections.Counter(), collections.Counter(), [], 0
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    write = "import sys, kills; print(kills.to_json(kills.small_run(kills.Path(sys.argv[1]))))"  # not here: see below
    command = [sys.executable, "-c", write, str(folder / "tiny.npz")]
    config.write_text(subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True).stdout)
    reference = folder / "reference"
    for workdir in (reference, folder / "warm"):  # the second one finds what the first one compiled
        start, began = Start(config, workdir, fork=True), time.monotonic()
        start.wait(lambda: False)
        assert start.status == 0, start.log.read_text()
    duration = time.monotonic() - began
    while sum(sent.values()) < kills:
        runs += 1
        workdir = folder / f"run-{runs}"
        for _ in range(min(draw.randint(1, 8), kills - sum(sent.values()))):
            start = Start(config, workdir, fork=draw.random() > 0.08)
            how, moment = kill(start, workdir, duration * 0.9, draw)
            if start.status == 0:
                break
            sent[how] += 1
            moments[moment] += 1
            if moment.startswith(("status", "did")):
                failures.append(f"{workdir.name}: {how}: {moment}")
        for _ in range(draw.choice([1, 1, 2])):  # the second one is a finished run that is started again
            start = Start(config, workdir, fork=True)
            start.wait(lambda: False)
            if start.status:
                failures.append(f"{workdir.name}: exit status {start.status} when started again")
                break
            if wrong := differences(reference, workdir):
                failures.append(f"{workdir.name}: {', '.join(wrong)}")
        if any(word in start.log.read_text(errors="replace") for word in ("Traceback", "damaged")):
            failures.append(f"{workdir.name}: a traceback or a damaged file")
        if not any(failure.startswith(f"{workdir.name}:") for failure in failures):
            shutil.rmtree(workdir)
        print(f"{sum(sent.values())} kills, {runs} runs, failures: {failures}", file=sys.stderr, flush=True)
    return {"kills": sum(sent.values()), "runs": runs, "signals": sent, "moments": moments, "failures": failures}


if __name__ == "__main__":
    # Imported, not used: a fork of a process that has touched a device does not work.
    import orbax.checkpoint  # noqa: F401
    import tensorflow_datasets  # noqa: F401
    from tensorboardX.proto import event_pb2  # noqa: F401

    from vit_jax.training import loop  # noqa: F401

    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    place = Path(sys.argv[2])
    os.environ |= {"JAX_PLATFORMS": "cpu", "VIT_JAX_CACHE": str(place / "cache")}
    print(json.dumps(campaign(int(sys.argv[1]), place, int(sys.argv[3]) if len(sys.argv) > 3 else 0)))
