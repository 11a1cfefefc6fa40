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
from vit_jax.training.state import TrainState

_log = logging.getLogger("vit_jax")
PREDICTIONS = "predictions.npz"
_BEST = "best/test_accuracy"


def evaluate(parts: Parts, state: TrainState, step: int, saver: Saver) -> dict[str, float]:
    """Metrics of a state on the devices, under their names in metrics.jsonl.

    They are of the parameters that it yields and, if these are averaged, "raw_loss" and "raw_accuracy" of those that are not.
    A run with a validation split measures that, and the test split only at its last step. The logits and labels of the test
    split are then written to its folder, and `saver` keeps the best parameters.
    Raises guard.Diverged if a loss of a run is not finite.
    """
    params, raw = parts.weights(state), parts.raw_weights(state)
    found = _validate(parts, params, raw)
    if found:
        _keep_best(parts, params, step, saver, found)
        if not saver.finished(step):
            return found
    tested, predicted = _test(parts, params, raw)
    if not found:
        _keep_best(parts, params, step, saver, tested)
    # If the predictions cannot be written, the last state comes first; then `complete` tries again.
    if saver.finished(step) and (failure := _write(saver, step, tested, predicted)):
        _log.warning("%s cannot be written yet (%s)", PREDICTIONS, reason(failure))
    return found | tested


def measure(parts: Parts, params: Any, raw: Any = None) -> dict[str, float]:
    """Metrics of parameters on the devices, and of those before averaging if they are given, on every split."""
    return _validate(parts, params, raw) | _test(parts, params, raw)[0]


def _keep_best(parts: Parts, params: Any, step: int, saver: Saver, found: dict[str, float]) -> None:
    guard.check(step, found)
    saver.update_best(step, found[f"{parts.chosen_on}/accuracy"], params)


def _write(saver: Saver, step: int, tested: dict[str, float], predicted: dict[str, np.ndarray]) -> OSError | None:
    """Writes the predictions of the last step, unless its metrics are not finite; returns the error of host 0 on every host."""
    guard.check(step, tested)

    def write() -> OSError | None:
        try:
            with whole_file(saver.workdir / PREDICTIONS) as file:
                np.savez(file, logits=predicted["logits"], labels=predicted["labels"])
        except OSError as error:
            return error
        return None

    return hosts.from_first(write)


def _validate(parts: Parts, params: Any, raw: Any) -> dict[str, float]:
    return _measure(parts, params, "validation", parts.validation_feed, raw)[0] if parts.validation_feed else {}


def _test(parts: Parts, params: Any, raw: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The metrics of the test split, and its logits and labels."""
    found, logits, labels = _measure(parts, params, "test", parts.test_feed, raw)
    return found, {"logits": logits, "labels": labels}


def _measure(
    parts: Parts, params: Any, split: str, feed: Feed, raw: Any = None
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """The metrics of a split, and its logits and labels."""
    predict, size = parts.program.predict, parts.config.run.eval_batch_size
    logits, labels = predictions(predict, params, feed, size)
    found = {f"{split}/{name}": value for name, value in metrics(logits, labels).items()}
    if raw is not None:
        others = metrics(*predictions(predict, raw, feed, size))
        found |= {f"{split}/raw_{name}": others[name] for name in ("loss", "accuracy")}
    return found, logits, labels


def complete(parts: Parts, state: TrainState, saver: Saver, step: int, log: journal.Journal) -> dict[str, float]:
    """The metrics of the last evaluation of a run that is at `step` and in a state on the devices.

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
        params, raw = parts.weights(state), parts.raw_weights(state)
        tested, predicted = _test(parts, params, raw)
        found = {"step": step, **_validate(parts, params, raw), **tested}
        if failure := _write(saver, step, found, predicted):
            raise failure
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
