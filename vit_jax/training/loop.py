"""The training loop: evaluate → save → next batch → dispatch → read the metrics of the step before."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.config import Config, ConfigError, check
from vit_jax.training import devices, journal, saving
from vit_jax.training.assemble import assemble
from vit_jax.training.evaluate import metrics, predictions
from vit_jax.training.guard import Guard


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to: the metrics of its last evaluation and of its best one, and its last parameters."""

    metrics: dict[str, float]  # "step", "test/loss", "test/accuracy", "test/accuracy_top5", "best/step", "best/accuracy"
    params: Any
    finished: bool = True  # False where a signal ended the run before its last step


def _write_predictions(path: Path, logits: np.ndarray, labels: np.ndarray) -> None:
    scratch = path.with_suffix(".tmp.npz")
    np.savez(scratch, logits=logits, labels=labels)
    os.replace(scratch, path)


def train(config: Config, workdir: str | os.PathLike) -> Result:
    """Runs a configuration in a working directory, or goes on with what an earlier start left there.

    Leaves config.json, metrics.jsonl, TensorBoard events, checkpoints/, best.npz, final.npz (each with a JSON of the same
    name) and predictions.npz (logits float32 [N, classes] and labels int32 [N] of the last evaluation). A SIGINT or
    SIGTERM saves and ends it. Raises ConfigError, CheckpointError, DataError or TrainingError, each one sentence.
    """
    check(config)
    workdir, settings = Path(workdir), config.training
    layout = devices.start(config.run)
    saving.check(workdir, config)
    parts = assemble(config, layout)  # before anything is written: a folder is claimed for what can run
    with saving.claim(workdir, config), Guard() as guard, saving.Saver(workdir, parts.meta) as saver:
        restored = saver.restore(parts.abstract())
        state = layout.put(parts.state() if restored is None else restored)
        start = step = int(jax.device_get(state.step))
        batches = parts.train_feed.train(settings.batch_size, settings.accumulation, config.seed, start)
        with journal.Journal(workdir, start, settings.steps) as log, jax.transfer_guard("disallow"):
            if start:
                log.say(f"going on from step {start} of {settings.steps} in {workdir}")
            pending, began = None, time.perf_counter()

            def read(step: int, found: dict[str, jax.Array]) -> dict[str, float]:
                nonlocal began
                values = {f"train/{name}": float(value) for name, value in jax.device_get(found).items()}
                guard.check(step, values["train/loss"])
                seconds, began = time.perf_counter() - began, time.perf_counter()
                rates = {"learning_rate": float(parts.rates[step - 1]), "images_per_second": settings.batch_size / seconds}
                return values | {f"train/{name}": value for name, value in rates.items()}

            for step in range(start + 1, settings.steps + 1):
                state, current = parts.step(state, next(batches), parts.train_feed.data)
                if pending is not None:
                    log.write(step - 1, read(step - 1, pending))
                pending, last = current, step == settings.steps
                evaluates = last or step % settings.eval_every == 0
                saves = last or step % settings.save_every == 0 or guard.stop
                if not (evaluates or saves):
                    continue
                line, pending = read(step, pending), None
                if evaluates:
                    logits = predictions(parts.predict, state.params, parts.test_feed, settings.eval_batch_size)
                    found = metrics(logits, parts.test_feed.labels)
                    line |= {f"test/{name}": value for name, value in found.items()}
                    saver.keep(step, found["accuracy"], state.params)
                log.write(step, line)
                if last:
                    _write_predictions(workdir / "predictions.npz", logits, parts.test_feed.labels)
                if saves:
                    log.flush()
                    saver.save(layout.gather(state))
                if guard.stop:
                    break
                began = time.perf_counter()

        lines = [line for line in journal.read(workdir) if "test/accuracy" in line]
        found = {name: value for name, value in (lines[-1] if lines else {}).items() if not name.startswith("train/")}
        if saver.best is not None:
            found |= {f"best/{name}": value for name, value in saver.best.items()}
        state = layout.gather(state)
        if step == settings.steps:
            saver.export(state, found.get("test/accuracy"))
        return Result(found, state.params, step == settings.steps)


def evaluate(config: Config, workdir: str | os.PathLike) -> dict[str, float]:
    """Test metrics of the newest state in a run's folder or, where there is none, of the configuration's checkpoint.

    Names as in metrics.jsonl, with "step" (0 for a checkpoint). Raises as `train`, and ConfigError where there is neither.
    """
    check(config)
    workdir = Path(workdir)
    has_state = (workdir / "checkpoints").is_dir()
    if not has_state and not config.model.checkpoint:
        raise ConfigError(f"there is nothing to evaluate: no state in {workdir}, and model.checkpoint is not set")
    if has_state:
        saving.check(workdir, config)
    parts = assemble(config, devices.start(config.run), own_head=not has_state)
    step, params = 0, parts.params
    if has_state:
        with saving.Saver(workdir, parts.meta) as saver:
            state = saver.restore(parts.abstract())
        if state is None:
            raise ConfigError(f"{workdir} holds no saved state yet")
        step, params = int(state.step), state.params
    params = parts.test_feed.layout.put(params)
    logits = predictions(parts.predict, params, parts.test_feed, config.training.eval_batch_size)
    return {"step": step} | {f"test/{name}": value for name, value in metrics(logits, parts.test_feed.labels).items()}
