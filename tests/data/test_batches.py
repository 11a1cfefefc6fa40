"""The arithmetic of batches: properties, not examples."""

import itertools
import time

import numpy as np
import pytest

from vit_jax.data import batches
from vit_jax.errors import DataError

SIZES = [(10, 4), (10, 5), (7, 7), (5, 12), (1, 3), (100, 32)]  # examples, batch: dividing or not, smaller or larger


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_an_order_is_a_permutation_that_seed_and_epoch_alone_decide():
    for n in (1, 2, 1000):
        np.testing.assert_array_equal(np.sort(batches.order(n, seed=3, epoch=5)), np.arange(n))
    one = batches.order(1000, 3, 5)
    assert one.dtype == np.int64
    np.testing.assert_array_equal(one, batches.order(1000, 3, 5))
    for seed, epoch in ((3, 6), (4, 5), (5, 3)):
        assert (one != batches.order(1000, seed, epoch)).mean() > 0.9


def test_an_order_stays_what_it_was():
    # A resumed run may meet another NumPy: the order must come from what NumPy promises to keep.
    np.testing.assert_array_equal(batches.order(8, seed=42, epoch=0), [4, 1, 3, 6, 0, 7, 2, 5])


@pytest.mark.parametrize(("n", "size"), SIZES)
def test_every_epoch_holds_every_example_once(n, size):
    stream = np.concatenate(take(batches.train(n, size, seed=1), 3 * n))
    for epoch in range(3):
        np.testing.assert_array_equal(stream[epoch * n : (epoch + 1) * n], batches.order(n, 1, epoch))


@pytest.mark.parametrize(("n", "size"), SIZES)
@pytest.mark.parametrize("start", [1, 2, 9])
def test_starting_anywhere_equals_going_on(n, size, start):
    whole = take(batches.train(n, size, seed=1), start + 6)
    np.testing.assert_array_equal(take(batches.train(n, size, seed=1, start=start), 6), whole[start:])


@pytest.mark.parametrize(("n", "size"), SIZES)
def test_shards_are_the_parts_of_the_whole(n, size):
    for k in (k for k in range(1, size + 1) if size % k == 0):
        whole = take(batches.train(n, size, seed=2, start=3), 5)
        parts = [take(batches.train(n, size, seed=2, start=3, shard=(i, k)), 5) for i in range(k)]
        np.testing.assert_array_equal([np.concatenate(step) for step in zip(*parts, strict=True)], whole)

        whole = list(batches.evaluation(n, size))
        parts = [list(batches.evaluation(n, size, shard=(i, k))) for i in range(k)]
        for step, (index, mask) in zip(zip(*parts, strict=True), whole, strict=True):
            np.testing.assert_array_equal(np.concatenate([i for i, _ in step]), index)
            np.testing.assert_array_equal(np.concatenate([m for _, m in step]), mask)


@pytest.mark.parametrize(("n", "size"), [*SIZES, (10_000, 10_000), (10_000, 64), (10, 10_000)])
def test_an_evaluation_counts_every_example_once_in_batches_of_one_shape(n, size):
    index, mask = map(np.stack, zip(*batches.evaluation(n, size), strict=True))
    assert index.shape == mask.shape == (-(-n // size), size)
    assert (index.dtype, mask.dtype) == (np.int32, np.bool_)
    np.testing.assert_array_equal(index[mask], np.arange(n))
    assert (index[~mask] == 0).all()  # an index that can be fetched


def test_a_batch_is_small_and_new_every_time():
    stream = batches.train(10, 5, seed=0)
    first, second = next(stream), next(stream)
    assert first.dtype == np.int32
    assert not np.shares_memory(first, second)


def test_a_distant_step_costs_nothing_and_the_usual_one_microseconds():
    begin = time.perf_counter()
    stream = batches.train(50_000, 64, seed=0, start=10**9)
    next(stream)
    assert time.perf_counter() - begin < 0.5
    begin = time.perf_counter()
    take(stream, 500)  # within an epoch, but for one passage at most
    assert (time.perf_counter() - begin) / 500 < 1e-3


@pytest.mark.parametrize(
    ("n", "size", "shard"), [(0, 4, (0, 1)), (4, 0, (0, 1)), (8, 6, (0, 4)), (8, 4, (2, 2)), (8, 4, (-1, 2))]
)
def test_what_cannot_be_cut_is_refused_at_once(n, size, shard):
    with pytest.raises(DataError, match="expected"):
        batches.train(n, size, seed=0, shard=shard)
    with pytest.raises(DataError, match="expected"):
        batches.evaluation(n, size, shard=shard)


def test_a_start_before_the_first_step_is_refused():
    with pytest.raises(DataError, match="step -1"):
        batches.train(10, 4, 0, start=-1)
