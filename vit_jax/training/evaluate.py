"""Evaluation in which every image counts once, whatever the batch size and the number of devices."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.data.sources import Source
from vit_jax.training.feed import Feed


def predictions(predict: Callable[..., Any], params: Any, feed: Feed, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 [N, classes] and labels int32 [N] of a whole split in its order.

    `predict` is of program.build. A batch's result is read when two more are dispatched, so that the device never waits for the
    host and its queue stays short.
    """
    size = feed.layout.round_up(min(batch_size, len(feed)))
    pending: deque[tuple[jax.Array, np.ndarray, np.ndarray]] = deque()
    results, labels = [], []

    def read(keep: int) -> None:
        while len(pending) > keep:
            logits, label, mask = pending.popleft()
            results.append(jax.device_get(logits)[mask])
            labels.append(label[mask])

    for batch, label, mask in feed.evaluation(size):
        pending.append((predict(params, batch, feed.data), label, mask))
        read(keep=2)
    read(keep=0)
    return np.concatenate(results), np.concatenate(labels)


def has_predictions(path: Path, source: Source) -> bool:
    """Whether a file holds predictions for every example of a split, whole: np.load checks the CRC of each array."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            logits, labels = file["logits"], file["labels"]
        shapes = (logits.shape, labels.shape) == ((len(source), source.num_classes), (len(source),))
        return bool(shapes and (logits.dtype, labels.dtype) == (np.float32, np.int32) and np.isfinite(logits).all())
    except Exception:  # a damaged zip raises different errors
        return False


def metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean cross-entropy, accuracy and top-5 accuracy (both in [0, 1]) of logits [N, classes], summed in float64.

    With fewer than five classes top-5 accuracy is 1. Of equal logits the lower class ranks first.
    """
    logits = logits.astype(np.float64)
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    top = logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(logits - top).sum(axis=1)) + (top - own)[:, 0]
    before = np.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(axis=1)
    rank = np.where(np.isfinite(logits).all(axis=1), rank, logits.shape[1])
    return {"loss": float(loss.mean()), "accuracy": float((rank < 1).mean()), "accuracy_top5": float((rank < 5).mean())}
