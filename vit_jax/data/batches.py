"""Which examples make up which batch: arithmetic on indices, without images.

The order of an epoch is a function of (seed, epoch), and a batch is a function of its step, so that a run that is resumed
anywhere sees what the uninterrupted run sees.
"""

from collections.abc import Iterator

import numpy as np

from vit_jax.errors import DataError


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the examples in one epoch: a permutation of range(n), int64 [n]."""
    # Raw bits and a stable sort: unlike `Generator.permutation`, NumPy promises that they never change (NEP 19).
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


def train(n: int, size: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Returns the endless batches from step `start` on: the orders of the epochs, one after the other, cut into batches.

    Args:
      n: number of examples.
      size: examples in a batch; may be larger than `n`.
      seed: not negative.
      start: the step of the first batch, counted from 0; a late step costs no more than an early one.

    Returns:
      An iterator over indices, int32 [size], each array a new one.

    Raises:
      DataError: if `n` or `size` is less than 1, or `start` is negative.
    """
    _check(n, size)
    if start < 0:
        raise DataError(f"batches from step {start}: expected a step from 0 on")
    return _train(n, size, seed, start * size)


def _train(n: int, size: int, seed: int, position: int) -> Iterator[np.ndarray]:
    epoch, current = -1, np.empty(0, np.int32)  # kept between batches: sorting an epoch costs milliseconds
    while True:
        batch = np.empty(size, np.int32)
        filled = 0
        while filled < size:
            wanted, offset = divmod(position + filled, n)
            if wanted != epoch:
                epoch, current = wanted, order(n, seed, wanted).astype(np.int32)
            piece = current[offset : offset + size - filled]
            batch[filled : filled + len(piece)] = piece
            filled += len(piece)
        yield batch
        position += size


def evaluation(n: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Returns the batches of one pass over all examples in their own order, the last one padded.

    Args:
      n: number of examples.
      size: examples in a batch.

    Returns:
      An iterator over (indices int32 [size], mask bool [size]). The mask is True exactly once for each example; the index is
      0 if the mask is False.

    Raises:
      DataError: if `n` or `size` is less than 1.
    """
    _check(n, size)
    return _evaluation(n, size)


def _evaluation(n: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(0, n, size):
        index = np.arange(first, first + size, dtype=np.int32)
        mask = index < n
        yield np.where(mask, index, np.int32(0)), mask


def _check(n: int, size: int) -> None:
    if n < 1 or size < 1:
        raise DataError(f"batches of {size} from {n} examples: expected at least one of each")
