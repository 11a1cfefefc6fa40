"""The training loop: next batch → dispatch → read the metrics of the step before → evaluate → save."""

import contextlib
import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any

import jax

from vit_jax.config import Config
from vit_jax.config_rules import check, mixing_fields
from vit_jax.errors import ConfigError, TrainingError
from vit_jax.training import devices, hosts, journal, outputs, restore
from vit_jax.training.assemble import Parts, assemble
from vit_jax.training.guard import Guard, Interrupted
from vit_jax.training.meter import Meter
from vit_jax.training.saving import Saver
from vit_jax.training.state import TrainState
from vit_jax.training.workdir import check_workdir, lock_workdir, record_environment


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a run: the metrics of its last evaluation and of its best one, and the parameters that it yields."""

    metrics: dict[str, float]  # "step", "test/loss", "test/accuracy", "best/step", "best/accuracy", …, as in metrics.jsonl
    params: Any
    finished: bool = True  # False if a signal ended the run before its last step
    signal: int = 0  # the number of the signal that arrived, if one did


def train(config: Config, workdir: str | os.PathLike) -> Result:
    """Runs a configuration in a working directory, or resumes the run that is there.

    Leaves config.json, environment.json, metrics.jsonl, TensorBoard events, checkpoints/, best.npz, final.npz (each with a
    JSON of the same name) and predictions.npz (logits float32 [N, classes] and labels int32 [N] of the last evaluation).
    A finished run only checks these files, and writes those that are missing or damaged. SIGINT and SIGTERM save and end it.
    On several hosts, each calls this; only host 0 uses the working directory (see hosts.py).

    Raises:
      ConfigError, CheckpointError, DataError, TrainingError: each a message of one line.
    """
    check(config)
    workdir = Path(workdir)
    # Assembled before anything is written, so that a configuration that cannot run leaves no folder.
    parts = _assemble(workdir, hosts.from_first(lambda: check_workdir(workdir, config)))
    with hosts.on_first(lock_workdir(workdir, parts.config)), Guard(parts.config) as guard:
        parts = dataclasses.replace(parts, program=parts.program._replace(predict=guard.interruptible(parts.program.predict)))
        return guard.attempt(lambda: _train(parts, workdir, guard))


def _train(parts: Parts, workdir: Path, guard: Guard) -> Result:
    """Trains from the newest saved state to the last step."""
    settings, layout = parts.config.training, parts.layout
    with Saver(workdir, parts.meta, parts.config, guard.skipped, layout.gather) as saver:
        state = _first_state(parts, saver, workdir)
        step = start = int(jax.device_get(state.step))
        feed = functools.partial(parts.train_feed.train, settings.batch_size, settings.grad_accum_steps, parts.config.seed)
        writing = journal.open_journal(workdir, start, settings.steps, saver.unfinished is not None)
        with contextlib.closing(guard.batches(feed, start)) as batches, writing as log, jax.transfer_guard("disallow"):
            meter = Meter(parts.rate, settings.batch_size, start, guard.step_finished)
            if saver.unfinished is not None and (line := _evaluate(parts, state, start, saver, saver.unfinished)):
                log.write(start, line)
                saver.save(layout.gather(state), log.flush, last=saver.finished(start))
            for step in range(start + 1, start + 1 if saver.finished(start) or guard.interrupted else settings.steps + 1):
                state, metrics = parts.program.train_step(state, next(batches), parts.train_feed.data)
                if before := meter.dispatched(step, metrics):
                    log.write(*before)
                evaluates, saves = (step % every == 0 for every in (settings.eval_every, settings.save_every))
                last = step == settings.steps
                if not (last or evaluates or saves or guard.stops(step)):
                    continue
                line = meter.read()
                if last or evaluates:
                    line = _evaluate(parts, state, step, saver, line)
                if line:
                    log.write(step, line)
                stop = guard.stops(step) or saver.finished(step)  # once: a signal between two reads would end the run unsaved
                if saves or stop:
                    saver.wait()
                    saver.save(layout.gather(state), log.flush, last=stop)
                if stop:
                    break
                meter.restart()
            found: dict[str, float] = {}
            with contextlib.suppress(Interrupted):
                found = outputs.complete(parts, state, saver, step, log)
        params, finished = layout.gather(parts.weights(state)), saver.finished(step) and not guard.interrupted
        if finished:
            saver.export(step, params, found["test/accuracy"])
        best = {f"best/{name}": value for name, value in (saver.best or {}).items()}
        return Result(found | best, params, finished, guard.signal)


def _evaluate(parts: Parts, state: TrainState, step: int, saver: Saver, line: dict[str, float]) -> dict[str, float]:
    """The line of a step with the metrics of its evaluation; empty if a signal ends that, which the saver then records."""
    try:
        found = outputs.evaluate(parts, state, step, saver)
    except Interrupted:
        saver.unfinished = line
        return {}
    saver.unfinished = None
    return line | found


def _assemble(workdir: Path, config: Config) -> Parts:
    """The parts of a run; a run that resumes takes its model from its newest state and needs no checkpoint."""
    journal.say(f"loading {config.model.checkpoint or config.model.variant} and {config.data.task}")
    layout = devices.start(config.run)
    layout.check(config.training.batch_size, config.training.grad_accum_steps, mixing_fields(config.augment))
    parts = assemble(config, layout, saved=hosts.from_first(lambda: restore.newest_record(workdir / "checkpoints")))
    journal.say(parts.describe())
    return parts


def _first_state(parts: Parts, saver: Saver, workdir: Path) -> TrainState:
    """The newest saved state or, if there is none, the state before the first update; on the devices."""
    restored = saver.restore(parts.abstract())
    if restored is None and parts.saved:
        raise TrainingError(f"{workdir}/checkpoints was removed while this command started; give the command again")
    hosts.from_first(lambda: record_environment(workdir, parts.layout.describe(), parts.warnings))
    return parts.layout.put(parts.state() if restored is None else restored)


def evaluate(config: Config, workdir: str | os.PathLike) -> dict[str, float]:
    """Test metrics of the newest state in a run's folder or, if there is none, of the configuration's checkpoint.

    Names as in metrics.jsonl, with "step" (0 for a checkpoint). Changes nothing in the workdir, and may run next to a
    training there.

    Raises:
      ConfigError: if there is neither a state nor a checkpoint, and as `train`.
      TrainingError: if the loss is not finite, and as `train`.
    """
    check(config)
    workdir = Path(workdir)
    states = workdir / "checkpoints"
    has_state = bool(restore.steps(states))
    if has_state:
        config = check_workdir(workdir, config)
    elif not config.model.checkpoint:
        raise ConfigError(f"there is nothing to evaluate: no state in {workdir}, and model.checkpoint is not set")
    else:  # the checkpoint's own head is evaluated
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, keep_head="true"))
    layout = devices.start(config.run)
    parts = assemble(config, layout, saved=restore.newest_record(states) if has_state else None)
    raw = None
    if has_state:
        saved = restore.read_newest(states, parts.abstract(), parts.config)
        if saved is None:
            raise TrainingError(f"{states} was removed while this command started; give the command again")
        params, raw = parts.weights(saved.state), parts.raw_weights(saved.state)
        step, source = int(saved.state.step), f"step {int(saved.state.step)} in {workdir}"
    else:
        step, params, source = 0, parts.params, config.model.checkpoint
        journal.say(f"there is no saved state in {workdir}")
    journal.say(f"evaluating {source}")
    journal.say(parts.describe())
    found = outputs.measure(parts, layout.put(params), raw and layout.put(raw))
    for name, value in found.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name} of {source} is {value}: these parameters give logits that are not finite")
    return {"step": step} | found
