"""From a data set on the host to batches on the devices."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from vit_jax.data import batches
from vit_jax.data.sources import Source
from vit_jax.training.devices import Layout
from vit_jax.training.step import Batch


class Feed:
    """A split of a data set as batches on the devices.

    Resident, if the split's images take at most `budget` bytes: they lie on every device as uint8 (`data`, an argument of
    the step, never a constant of the program), and a batch is the indices of its images. Otherwise streamed: `data` is
    None, and images are read while the device works on the batch before.
    """

    def __init__(self, source: Source, layout: Layout, budget: int):
        self.source, self.layout, self.data = source, layout, None
        if source.nbytes <= budget:
            images, self._labels, sizes = source.read(np.arange(len(source)))
            self.data = layout.put({"images": images, "labels": self._labels} | ({} if sizes is None else {"sizes": sizes}))

    def __len__(self) -> int:
        return len(self.source)

    def train(self, size: int, microbatches: int, seed: int, start: int) -> Iterator[Batch]:
        """Endless batches of `size` from step `start` on, leaves [microbatches, size / microbatches, …]."""

        def split(leaf):
            return leaf.reshape(microbatches, size // microbatches, *leaf.shape[1:])

        example_index = np.arange(size, dtype=np.int32)
        for batch, _, _ in self._batches((index, None) for index in batches.train(len(self), size, seed, start)):
            batch = batch._replace(example_index=example_index)
            yield self.layout.put_batch(jax.tree.map(split, batch), axis=1)

    def evaluation(self, size: int) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
        """Every image once, in order: batches of `size`, their labels int32 [size] and their masks bool [size].

        The mask is False for the padding of the last batch.
        """
        for batch, labels, mask in self._batches(batches.evaluation(len(self), size)):
            yield self.layout.put_batch(batch), labels, mask

    def _batches(self, indices: Iterator[tuple[np.ndarray, Any]]) -> Iterator[tuple[Batch, np.ndarray, Any]]:
        """Batches on the host, their labels, and the second element that came with their indices."""
        if self.data is not None:
            yield from ((Batch(index=index), self._labels[index], other) for index, other in indices)
            return

        def read(item):
            images, labels, sizes = self.source.read(item[0])
            return Batch(images=images, labels=labels, sizes=sizes), labels, item[1]

        with ThreadPoolExecutor(1, "feed") as pool:
            ahead = pool.submit(read, next(indices))
            for item in indices:
                ready, ahead = ahead, pool.submit(read, item)
                yield ready.result()
            yield ahead.result()
