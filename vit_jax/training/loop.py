"""The training loop: evaluate → save → next batch → dispatch → read the metrics of the step before."""

import dataclasses
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.config import Config, check
from vit_jax.errors import ConfigError, TrainingError
from vit_jax.files import whole_file
from vit_jax.training import devices, journal, restore, saving
from vit_jax.training import workdir as folders
from vit_jax.training.assemble import Parts, assemble
from vit_jax.training.evaluate import has_predictions, metrics, predictions
from vit_jax.training.guard import Guard

_log = logging.getLogger("vit_jax")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to: the metrics of its last evaluation and of its best one, and its last parameters."""

    metrics: dict[str, float]  # "step", "test/loss", "test/accuracy", "test/accuracy_top5", "best/step", "best/accuracy"
    params: Any
    finished: bool = True  # False if a signal ended the run before its last step
    signal: int = 0  # the number of the signal that arrived, if one did


def train(config: Config, workdir: str | os.PathLike) -> Result:
    """Runs a configuration in a working directory, or goes on with what an earlier start left there.

    Leaves config.json, environment.json, metrics.jsonl, TensorBoard events, checkpoints/, best.npz, final.npz (each with a
    JSON of the same name) and predictions.npz (logits float32 [N, classes] and labels int32 [N] of the last evaluation).
    A finished run only checks these files, and writes those that are missing or damaged.
    A SIGINT or SIGTERM saves and ends it. Raises ConfigError, CheckpointError, DataError or TrainingError, each one sentence.
    """
    check(config)
    workdir, settings = Path(workdir), config.training
    config = folders.check(workdir, config)
    journal.say(f"loading {config.model.checkpoint or config.model.variant} and {config.data.task}")
    layout = devices.start(config.run)
    layout.check(settings.batch_size, settings.grad_accum_steps)
    # Assembled before anything is written: a folder is used for what can run. A run that goes on needs no checkpoint.
    parts = assemble(config, layout, saved=restore.newest_record(workdir / "checkpoints"))
    config = parts.config
    journal.say(parts.describe())
    with folders.lock_workdir(workdir, config), Guard() as guard, saving.Saver(workdir, parts.meta, config) as saver:
        restored = saver.restore(parts.abstract())
        if restored is None and parts.saved:
            raise TrainingError(f"{workdir}/checkpoints was removed while this command started; give the command again")
        folders.record_environment(workdir, layout.describe(), parts.warnings)
        state = layout.put(parts.state() if restored is None else restored)
        start = step = int(jax.device_get(state.step))
        batches = parts.train_feed.train(settings.batch_size, settings.grad_accum_steps, config.seed, start)
        with journal.Journal(workdir, start, settings.steps) as log, jax.transfer_guard("disallow"):
            for text in journal.gaps(workdir, log.found, start, settings.steps):
                log.say(text)
            if start < settings.steps:
                log.say("compiling the training step; the first step takes longer than the others")
            pending, began = None, time.perf_counter()
            ended: float | None = None  # when the pending step did, if its dispatch computed it, as a CPU's does

            def read(step: int, found: dict[str, jax.Array], ended: float | None) -> dict[str, float]:
                nonlocal began
                values = {f"train/{name}": float(value) for name, value in jax.device_get(found).items()}
                values["train/learning_rate"] = parts.rate(step - 1)
                guard.check(step, values)
                ended = ended or time.perf_counter()
                seconds, began = ended - began, ended
                if step > start + 1:  # the first step's time is the compiler's
                    values["train/images_per_second"] = settings.batch_size / seconds
                return values

            def evaluated() -> dict[str, float]:
                """Test metrics of the state, whose predictions are written at the last step."""
                found, logits, labels = _evaluate(parts, state.params)
                guard.check(step, found)
                if step == settings.steps:
                    with whole_file(workdir / "predictions.npz") as file:
                        np.savez(file, logits=logits, labels=labels)
                return found

            for step in range(start + 1, settings.steps + 1):
                state, current = parts.step(state, next(batches), parts.train_feed.data)
                now = time.perf_counter() if current["loss"].is_ready() else None
                if pending is not None:
                    log.write(step - 1, read(step - 1, pending, ended))
                pending, ended, last = current, now, step == settings.steps
                evaluates = last or step % settings.eval_every == 0
                saves = last or step % settings.save_every == 0
                if not (evaluates or saves or guard.stop):
                    continue
                line, pending = read(step, pending, ended), None
                if evaluates:
                    line |= evaluated()
                    saver.update_best(step, line["test/accuracy"], state.params)
                log.write(step, line)
                stop = guard.stop  # once, so that what is left is what was saved
                if saves or stop:
                    log.flush()
                    saver.save(layout.gather(state))
                if stop:
                    break
                began = time.perf_counter()

            lines = [line for line in journal.read(workdir) if "test/accuracy" in line]
            found = {name: value for name, value in (lines[-1] if lines else {}).items() if not name.startswith("train/")}
            finished = step == settings.steps
            if finished and not (found.get("step") == step and has_predictions(workdir / "predictions.npz", parts.sources[1])):
                has_line, values = found.get("step") == step, evaluated()
                found = {"step": step, **values}
                if not has_line:
                    log.write(step, values)
        if saver.best is not None:
            found |= {f"best/{name}": value for name, value in saver.best.items()}
        state = layout.gather(state)
        if finished:
            saver.export(state, found["test/accuracy"])
        return Result(found, state.params, finished, guard.signal)


def _evaluate(parts: Parts, params: Any) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Test metrics under their names in metrics.jsonl, logits and labels."""
    logits, labels = predictions(parts.predict, params, parts.test_feed, parts.config.run.eval_batch_size)
    return {f"test/{name}": value for name, value in metrics(logits, labels).items()}, logits, labels


def evaluate(config: Config, workdir: str | os.PathLike) -> dict[str, float]:
    """Test metrics of the newest state in a run's folder or, if there is none, of the configuration's checkpoint.

    Names as in metrics.jsonl, with "step" (0 for a checkpoint). Changes nothing in the folder, and may run next to a training
    there. Raises as `train`, ConfigError if there is neither state nor checkpoint, TrainingError if the loss is not finite.
    """
    check(config)
    workdir = Path(workdir)
    states = workdir / "checkpoints"
    has_state = bool(restore.steps(states))
    if has_state:
        config = folders.check(workdir, config)
    elif not config.model.checkpoint:
        raise ConfigError(f"there is nothing to evaluate: no state in {workdir}, and model.checkpoint is not set")
    layout = devices.start(config.run)
    if not has_state:  # the checkpoint's own head answers
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, keep_head="true"))
    parts = assemble(config, layout, saved=restore.newest_record(states) if has_state else None)
    saved = restore.read_newest(states, parts.abstract(), parts.config) if has_state else None
    if saved is None and has_state:
        raise TrainingError(f"{states} was removed while this command started; give the command again")
    if saved is None:
        journal.say(f"there is no saved state in {workdir}: evaluating {config.model.checkpoint}")
    else:
        journal.say(f"evaluating step {int(saved.state.step)} in {workdir}")
    journal.say(parts.describe())
    step, params = (0, parts.params) if saved is None else (int(saved.state.step), saved.state.params)
    found, _, _ = _evaluate(parts, layout.put(params))
    for name, value in found.items():
        if not math.isfinite(value):
            source = f"step {step} in {workdir}" if saved else config.model.checkpoint
            raise TrainingError(f"{name} of {source} is {value}: these parameters give logits that are not finite")
    return {"step": step} | found
