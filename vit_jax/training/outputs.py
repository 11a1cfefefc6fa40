"""Test metrics and predictions of a run. A finished run checks them, and writes those that are missing or damaged."""

import logging
from typing import Any

import numpy as np

from vit_jax.errors import reason
from vit_jax.files import whole_file
from vit_jax.metrics import read
from vit_jax.training import guard, hosts, journal
from vit_jax.training.assemble import Parts
from vit_jax.training.evaluate import has_predictions, metrics, predictions
from vit_jax.training.feed import Feed
from vit_jax.training.saving import Saver

_log = logging.getLogger("vit_jax")
PREDICTIONS = "predictions.npz"
_BEST = "best/test_accuracy"


def evaluate(parts: Parts, params: Any, step: int, saver: Saver | None = None) -> dict[str, float]:
    """Metrics of parameters on the devices, under their names in metrics.jsonl.

    A run with a validation split measures that, and the test split only at its last step. The logits and labels of the test
    split are then written to its folder, and `saver` keeps the best parameters. Without `saver`, every split is measured.
    Raises guard.Diverged if a loss of a run is not finite.
    """
    found = _validate(parts, params)
    if saver and found:
        _keep_best(parts, params, step, saver, found)
        if not saver.finished(step):
            return found
    tested, predicted = _test(parts, params)
    if saver and not found:
        _keep_best(parts, params, step, saver, tested)
    if saver and saver.finished(step):
        try:
            _write(saver, step, tested, predicted)
        except OSError as error:  # the last state comes first; then `complete` tries again
            _log.warning("%s cannot be written yet (%s)", PREDICTIONS, reason(error))
    return found | tested


def _keep_best(parts: Parts, params: Any, step: int, saver: Saver, found: dict[str, float]) -> None:
    guard.check(step, found)
    saver.update_best(step, found[f"{parts.chosen_on}/accuracy"], params)


def _write(saver: Saver, step: int, tested: dict[str, float], predicted: dict[str, np.ndarray]) -> None:
    """Writes the predictions of the last step, unless its metrics are not finite."""
    guard.check(step, tested)

    def write() -> None:
        with whole_file(saver.workdir / PREDICTIONS) as file:
            np.savez(file, logits=predicted["logits"], labels=predicted["labels"])

    hosts.from_first(write)


def _validate(parts: Parts, params: Any) -> dict[str, float]:
    return _measure(parts, params, "validation", parts.validation_feed)[0] if parts.validation_feed else {}


def _test(parts: Parts, params: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The metrics of the test split, and its logits and labels."""
    found, logits, labels = _measure(parts, params, "test", parts.test_feed)
    return found, {"logits": logits, "labels": labels}


def _measure(parts: Parts, params: Any, split: str, feed: Feed) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """The metrics of a split, and its logits and labels."""
    logits, labels = predictions(parts.program.predict, params, feed, parts.config.run.eval_batch_size)
    return {f"{split}/{name}": value for name, value in metrics(logits, labels).items()}, logits, labels


def complete(parts: Parts, params: Any, saver: Saver, step: int, log: journal.Journal) -> dict[str, float]:
    """The metrics of the last evaluation of a run that is at `step`.

    A finished run is evaluated again if its folder has no whole predictions or no line of its last evaluation. With a
    validation split, they include the test accuracy of the best parameters.
    """
    lines = [line for line in hosts.from_first(lambda: read(saver.workdir)) if f"{parts.chosen_on}/accuracy" in line]
    found = {name: value for name, value in (lines[-1] if lines else {}).items() if not name.startswith("train/")}
    if not saver.finished(step):
        return found
    has_line = found.get("step") == step
    path = saver.workdir / PREDICTIONS
    if not (has_line and hosts.from_first(lambda: has_predictions(path, parts.sources.test))):
        # The best state stays what it is: measured again, elsewhere, this one could be better by a rounding error.
        tested, predicted = _test(parts, params)
        found = {"step": step, **_validate(parts, params), **tested}
        _write(saver, step, found, predicted)
        if not has_line:
            log.write(step, {name: value for name, value in found.items() if name != "step"})
    return found | _test_best(parts, saver, found, log)


def _test_best(parts: Parts, saver: Saver, last: dict[str, float], log: journal.Journal) -> dict[str, float]:
    """The test accuracy of the parameters that the validation split chose, measured once, when the run is finished."""
    if not parts.validation_feed or saver.best is None:
        return {}
    step = int(last["step"])
    for line in hosts.from_first(lambda: read(saver.workdir)):
        if _BEST in line:
            return {_BEST: line[_BEST]}
    if saver.best["step"] == step:
        found = {_BEST: last["test/accuracy"]}
    else:
        params = parts.layout.put(saver.best_params)
        found = {_BEST: _measure(parts, params, "test", parts.test_feed)[0]["test/accuracy"]}
    log.write(step, found)
    return found
