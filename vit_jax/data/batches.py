"""Which examples make up which batch: arithmetic on indices, knowing nothing of images.

The order of an epoch derives from (seed, epoch) alone, and a batch from its step alone, so that a run that is resumed
anywhere, or shared by any number of processes, sees what the uninterrupted run sees.
"""

from collections.abc import Iterator

import numpy as np

from vit_jax.errors import DataError


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the examples in one epoch: a permutation of range(n), int64 [n]."""
    # Raw bits and a stable sort: unlike `Generator.permutation`, NumPy promises that they never change (NEP 19).
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


def train(n: int, size: int, seed: int, start: int = 0, shard: tuple[int, int] = (0, 1)) -> Iterator[np.ndarray]:
    """Returns the endless batches from step `start` on: the epochs' orders one after the other, cut into `size`s.

    Args:
      n: number of examples.
      size: examples in a batch over all shards; may be larger than `n`.
      seed: not negative.
      start: the step that the first batch belongs to, counted from 0; costs nothing to reach.
      shard: (i, k): only the i-th of k equal contiguous parts of every batch.

    Returns:
      An iterator over indices, int32 [size / k], each array a new one.

    Raises:
      DataError: if there is nothing to draw from, or `k` does not divide `size`.
    """
    part = _part(n, size, shard)
    if start < 0:
        raise DataError(f"Batches from step {start}: expected a step from 0 on")
    return _stream(n, size, seed, start * size + shard[0] * part, part)


def _stream(n: int, size: int, seed: int, position: int, part: int) -> Iterator[np.ndarray]:
    epoch, current = -1, np.empty(0, np.int32)  # kept between batches: sorting an epoch costs milliseconds
    while True:
        batch = np.empty(part, np.int32)
        filled = 0
        while filled < part:
            wanted, offset = divmod(position + filled, n)
            if wanted != epoch:
                epoch, current = wanted, order(n, seed, wanted).astype(np.int32)
            piece = current[offset : offset + part - filled]
            batch[filled : filled + len(piece)] = piece
            filled += len(piece)
        yield batch
        position += size


def evaluation(n: int, size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Returns the batches of one pass over all examples in their own order, the last one filled up.

    Args:
      n: number of examples.
      size: examples in a batch over all shards.
      shard: (i, k): only the i-th of k equal contiguous parts of every batch.

    Returns:
      An iterator over (indices int32 [size / k], mask bool [size / k]). Over all shards the mask is True exactly once
      for each example; where it is False the index is 0. Every shard gets the same number of batches.

    Raises:
      DataError: as `train`.
    """
    part = _part(n, size, shard)
    return _pass(n, size, shard[0] * part, part)


def _pass(n: int, size: int, offset: int, part: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first in range(offset, offset + n, size):
        index = np.arange(first, first + part, dtype=np.int32)
        mask = index < n
        yield np.where(mask, index, np.int32(0)), mask


def _part(n: int, size: int, shard: tuple[int, int]) -> int:
    """Returns the number of examples that each shard has in a batch."""
    index, count = shard
    if n < 1 or size < 1:
        raise DataError(f"Batches of {size} from {n} examples: expected at least one of each")
    if not 0 <= index < count or size % count:
        raise DataError(f"Part {index} of {count} of a batch of {size}: expected a part in [0, {count}) and a batch it divides")
    return size // count
