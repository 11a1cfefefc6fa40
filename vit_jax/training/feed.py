"""From a data set on the host to batches on the devices."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterator

import jax
import numpy as np

from vit_jax.data import batches, stream
from vit_jax.data.sources import Source
from vit_jax.training.devices import Layout
from vit_jax.training.step import Batch

_AHEAD = 32  # batches of indices that are copied to the devices at once


class Feed:
    """A split of a data set as batches on the devices.

    Resident, if the split's images take at most `budget` bytes: they lie on every device as uint8 (`data`, an argument of
    the step, never a constant of the program), and a batch is the indices of its images. Otherwise streamed: `data` is
    None, and images are read while the device works on the batches before, by `workers` processes; 0: by this one.
    """

    def __init__(self, source: Source, layout: Layout, budget: int, workers: int = 0):
        self.source, self.layout, self.data, self._workers = source, layout, None, stream.number_of_workers(workers)
        if source.nbytes <= budget:
            images, self._labels, sizes = source.read(np.arange(len(source)))
            self.data = layout.put_data(
                {"images": images, "labels": self._labels} | ({} if sizes is None else {"sizes": sizes})
            )

    def __len__(self) -> int:
        return len(self.source)

    def train(self, size: int, microbatches: int, seed: int, start: int) -> Generator[Batch]:
        """Endless batches of `size` from step `start` on, leaves [microbatches, size / microbatches, …].

        Every host reads its own rows only.
        """
        rows = self.layout.rows(size // microbatches)

        def own(leaf):
            return leaf.reshape(microbatches, -1)[:, rows].reshape(-1)

        def shaped(leaf):
            return leaf.reshape(microbatches, len(rows), *leaf.shape[1:])

        example_index = self.layout.put_batch(shaped(own(np.arange(size, dtype=np.int32))), axis=1)
        batch_at = functools.partial(batches.train_batch, len(self), size, seed)
        found = self._batches(lambda number: own(batch_at(number)), start, None)
        ahead = 1 if self.data is None else _AHEAD
        with contextlib.closing(found):
            while True:
                block = [jax.tree.map(shaped, batch) for batch, _ in itertools.islice(found, ahead)]
                for batch in self.layout.put_batches(block):
                    yield batch._replace(example_index=example_index)

    def evaluation(self, size: int, start: int = 0) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
        """Every image once, in order: batches of `size`, their labels int32 [size] and their masks bool [size].

        The first is batch number `start`. The mask is False for the padding of the last batch. Every host reads its own rows,
        and gets the labels of all.
        """
        rows, batch_at = self.layout.rows(size), functools.partial(batches.evaluation_batch, len(self), size)
        found = self._batches(lambda number: batch_at(number)[0][rows], start, -(-len(self) // size) - start)
        for number, (batch, labels) in enumerate(found, start):
            yield self.layout.put_batch(batch), self.layout.all_rows(labels), batch_at(number)[1]

    def _batches(
        self, indices: Callable[[int], np.ndarray], first: int, count: int | None
    ) -> Generator[tuple[Batch, np.ndarray]]:
        """Batches on the host and their labels: `count` of them from number `first` on."""
        if self.data is None:
            for images, labels, sizes in stream.read(self.source, indices, self._workers, first, count):
                yield Batch(images=images, labels=labels, sizes=sizes), labels
            return
        for number in itertools.count(first) if count is None else range(first, first + count):
            index = indices(number)
            yield Batch(index=index), self._labels[index]
