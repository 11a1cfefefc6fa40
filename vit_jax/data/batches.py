"""Which examples make up which batch: arithmetic on indices, without images.

The order of an epoch is a function of (seed, epoch), and a batch is a function of its step, so that a run that is resumed
anywhere sees what the uninterrupted run sees.
"""

import functools

import numpy as np

from vit_jax.errors import DataError


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the examples in one epoch: a permutation of range(n), int64 [n]."""
    # Raw bits and a stable sort: unlike `Generator.permutation`, NumPy promises that they never change (NEP 19).
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


def train_batch(n: int, size: int, seed: int, step: int) -> np.ndarray:
    """Returns the batch of a step: the orders of the epochs, one after the other, are cut into batches.

    Args:
      n: number of examples.
      size: examples in a batch; may be larger than `n`.
      seed: not negative.
      step: counted from 0; a late step costs no more than an early one.

    Returns:
      Indices, int32 [size], in a new array.

    Raises:
      DataError: if `n` or `size` is less than 1, or `step` is negative.
    """
    _check(n, size, step)
    batch, filled = np.empty(size, np.int32), 0
    while filled < size:
        epoch, offset = divmod(step * size + filled, n)
        piece = _kept_order(n, seed, epoch)[offset : offset + size - filled]
        batch[filled : filled + len(piece)] = piece
        filled += len(piece)
    return batch


@functools.lru_cache(maxsize=2)  # sorting an epoch costs milliseconds
def _kept_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return order(n, seed, epoch).astype(np.int32)


def evaluation_batch(n: int, size: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns one of the ⌈n / size⌉ batches of a pass over all examples in their own order, the last one padded.

    Args:
      n: number of examples.
      size: examples in a batch.
      number: of the batch, counted from 0.

    Returns:
      Indices int32 [size] and a mask bool [size]. Over all batches the mask is True exactly once for each example; the index
      is 0 if the mask is False.

    Raises:
      DataError: if `n` or `size` is less than 1, or `number` is negative.
    """
    _check(n, size, number)
    index = np.arange(number * size, (number + 1) * size, dtype=np.int32)
    mask = index < n
    return np.where(mask, index, np.int32(0)), mask


def _check(n: int, size: int, number: int) -> None:
    if n < 1 or size < 1:
        raise DataError(f"batches of {size} from {n} examples: expected at least one of each")
    if number < 0:
        raise DataError(f"batch {number}: batches are counted from 0")
