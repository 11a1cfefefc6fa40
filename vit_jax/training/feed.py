"""From a data set on the host to batches on the devices."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from vit_jax.data import batches
from vit_jax.data.sources import Source
from vit_jax.training.devices import Layout


def fetch(data: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Images uint8 [B, H, W, 3] and labels int32 [B] of a batch, inside the step: gathered from `data`, or brought along."""
    if data is None:
        return batch["images"], batch["labels"]
    return data["images"][batch["index"]], data["labels"][batch["index"]]


class Feed:
    """A split of a data set as batches on the devices.

    Resident, where the split's images take at most `budget` bytes: they lie on every device as uint8 (`data`, an
    argument of the step, never a constant of the program) and a batch is the indices of its images. Streamed
    otherwise: `data` is None, images are read while the device works on the batch before.
    """

    def __init__(self, source: Source, layout: Layout, budget: int):
        self.source, self.layout, self.data = source, layout, None
        if source.nbytes <= budget:
            images, self._labels = source.take(np.arange(len(source)))
            self.data = layout.put({"images": images, "labels": self._labels})

    def __len__(self) -> int:
        return len(self.source)

    def train(self, size: int, slices: int, seed: int, start: int) -> Iterator[dict[str, jax.Array]]:
        """Endless batches of `size` from step `start` on, leaves [slices, size / slices, …]."""

        def shaped(leaf):
            return leaf.reshape(slices, size // slices, *leaf.shape[1:])

        place = np.arange(size, dtype=np.int32)
        for batch, _, _ in self._batches((index, None) for index in batches.train(len(self), size, seed, start)):
            yield self.layout.put_batch(jax.tree.map(shaped, batch | {"place": place}), axis=1)

    def evaluation(self, size: int) -> Iterator[tuple[dict[str, jax.Array], np.ndarray, np.ndarray]]:
        """Every image once, in order: batches of `size`, their labels int32 [size] and their masks bool [size].

        The mask is False for the padding of the last batch.
        """
        for batch, labels, mask in self._batches(batches.evaluation(len(self), size)):
            yield self.layout.put_batch(batch), labels, mask

    def _batches(self, indices: Iterator[tuple[np.ndarray, Any]]) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, Any]]:
        """What a batch holds, its labels, and what came with its indices."""
        if self.data is not None:
            yield from (({"index": index}, self._labels[index], other) for index, other in indices)
            return

        def read(item):
            images, labels = self.source.take(item[0])
            return {"images": images, "labels": labels}, labels, item[1]

        with ThreadPoolExecutor(1, "feed") as pool:
            ahead = pool.submit(read, next(indices))
            for item in indices:
                ready, ahead = ahead, pool.submit(read, item)
                yield ready.result()
            yield ahead.result()
