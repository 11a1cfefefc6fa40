"""Test metrics and predictions of a run. A finished run checks them, and writes those that are missing or damaged."""

from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.files import whole_file
from vit_jax.metrics import read
from vit_jax.training import journal
from vit_jax.training.assemble import Parts
from vit_jax.training.evaluate import has_predictions, metrics, predictions
from vit_jax.training.guard import Guard

PREDICTIONS = "predictions.npz"


def evaluate(parts: Parts, params: Any, step: int, workdir: Path | None = None) -> dict[str, float]:
    """Test metrics of parameters on the devices, under their names in metrics.jsonl.

    At the last step of a run, its logits and labels are written to `workdir`. Raises guard.Diverged if the loss is not finite.
    """
    logits, labels = predictions(parts.program.predict, params, parts.test_feed, parts.config.run.eval_batch_size)
    found = {f"test/{name}": value for name, value in metrics(logits, labels).items()}
    if workdir:
        Guard.check(step, found)
        if step == parts.config.training.steps:
            with whole_file(workdir / PREDICTIONS) as file:
                np.savez(file, logits=logits, labels=labels)
    return found


def complete(parts: Parts, params: Any, step: int, workdir: Path, log: journal.Journal) -> dict[str, float]:
    """The metrics of the last evaluation of a run that is at `step`.

    A finished run is evaluated again if its folder has no whole predictions or no line of its last evaluation.
    """
    lines = [line for line in read(workdir) if "test/accuracy" in line]
    last = {name: value for name, value in (lines[-1] if lines else {}).items() if not name.startswith("train/")}
    if step < parts.config.training.steps:
        return last
    has_line = last.get("step") == step
    if has_line and has_predictions(workdir / PREDICTIONS, parts.sources[1]):
        return last
    found = evaluate(parts, params, step, workdir)
    if not has_line:
        log.write(step, found)
    return {"step": step, **found}
