"""What the head of a model sees in the images of a split: computed once, and kept on disk in parts."""

import hashlib
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.errors import CheckpointError
from vit_jax.files import whole_file
from vit_jax.training.feed import Feed

_BATCHES = 8  # of a part


def folder_name(split: str, **content: Any) -> str:
    """The name of the folder for the features of a split: it changes with everything that the features depend on."""
    digest = hashlib.sha256(json.dumps({"split": split} | content, sort_keys=True, default=str).encode()).hexdigest()
    return f"{''.join(letter if letter.isalnum() else '_' for letter in split)[:40]}-{digest[:16]}"


def _read(path: Path, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """A part of `count` images; None if it is not there or damaged."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:  # checks the CRC of each array
            features, labels = file["features"], file["labels"]
        whole = features.ndim == 2 and len(features) == count and labels.shape == (count,)
        return (features, labels) if whole and (features.dtype, labels.dtype) == (np.float32, np.int32) else None
    except Exception:  # a damaged zip raises different errors
        return None


def compute(
    apply: Callable[..., Any], params: Any, feed: Feed, size: int, folder: Path, progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, D] and labels int32 [N] of a split in its order; parts that are in the folder are not computed.

    Args:
      apply: apply(params, batch, data) → features [B, D], compiled, for batches of the feed.
      params: of the model, on the devices.
      feed: of the split.
      size: images in a batch; a part is eight batches, which are the only ones in memory besides the result.
      folder: of the parts, each of which is written when it is whole.
      progress: is told how many images are done.

    Raises:
      CheckpointError: if features are not finite.
      OSError: if a part cannot be written.
    """
    each = _BATCHES * size
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    while (done := len(parts) * each) < len(feed):
        found = _read(folder / f"{len(parts):05}.npz", min(each, len(feed) - done))
        if found is None:
            break
        parts.append(found)
        progress(min(len(feed), done + each))
    pending: deque[tuple[jax.Array, np.ndarray, np.ndarray]] = deque()
    rows: list[np.ndarray] = []
    labels: list[np.ndarray] = []

    def write_part() -> None:
        """Writes the batches that are there as a part."""
        part = np.concatenate(rows), np.concatenate(labels)
        if not np.isfinite(part[0]).all():
            raise CheckpointError("the features of these weights are not finite")
        with whole_file(folder / f"{len(parts):05}.npz") as file:
            np.savez(file, features=part[0], labels=part[1])
        parts.append(part)
        rows.clear()
        labels.clear()
        progress(min(len(feed), len(parts) * each))

    def read(ahead: int) -> None:
        while len(pending) > ahead:
            values, label, mask = pending.popleft()
            rows.append(np.asarray(jax.device_get(values), np.float32)[mask])
            labels.append(label[mask].astype(np.int32))
            if len(rows) == _BATCHES:
                write_part()

    if len(parts) * each < len(feed):
        for batch, label, mask in feed.evaluation(size, start=len(parts) * _BATCHES):
            pending.append((apply(params, batch, feed.data), label, mask))
            read(ahead=2)  # the device never waits for the host
        read(ahead=0)
        if rows:
            write_part()
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
