"""The arithmetic of batches: properties, not examples."""

import numpy as np
import pytest

from vit_jax.data import batches
from vit_jax.errors import DataError

SIZES = [(10, 4), (10, 5), (7, 7), (5, 12), (1, 3), (100, 32)]  # examples, batch: dividing or not, smaller or larger


def train(n, size, count, seed=1, start=0):
    """`count` training batches from step `start` on."""
    return [batches.train_batch(n, size, seed, step) for step in range(start, start + count)]


def test_order_is_a_permutation_that_seed_and_epoch_decide():
    for n in (1, 2, 1000):
        np.testing.assert_array_equal(np.sort(batches.order(n, seed=3, epoch=5)), np.arange(n))
    one = batches.order(1000, 3, 5)
    assert one.dtype == np.int64
    np.testing.assert_array_equal(one, batches.order(1000, 3, 5))
    for seed, epoch in ((3, 6), (4, 5), (5, 3)):
        assert (one != batches.order(1000, seed, epoch)).mean() > 0.9


def test_order_does_not_depend_on_the_version_of_numpy():
    np.testing.assert_array_equal(batches.order(8, seed=42, epoch=0), [4, 1, 3, 6, 0, 7, 2, 5])


@pytest.mark.parametrize(("n", "size"), SIZES)
def test_every_epoch_holds_every_example_once(n, size):
    stream = np.concatenate(train(n, size, 3 * n))
    for epoch in range(3):
        np.testing.assert_array_equal(stream[epoch * n : (epoch + 1) * n], batches.order(n, 1, epoch))


@pytest.mark.parametrize(("n", "size"), SIZES)
@pytest.mark.parametrize("start", [1, 2, 9])
def test_train_from_a_later_step_continues_the_same_batches(n, size, start):
    whole = train(n, size, start + 6)
    np.testing.assert_array_equal(train(n, size, 6, start=start), whole[start:])


@pytest.mark.parametrize(("n", "size"), [*SIZES, (10_000, 10_000), (10_000, 64), (10, 10_000)])
def test_evaluation_counts_every_example_once_in_batches_of_one_shape(n, size):
    index, mask = map(np.stack, zip(*(batches.evaluation_batch(n, size, k) for k in range(-(-n // size))), strict=True))
    assert index.shape == mask.shape == (-(-n // size), size)
    assert (index.dtype, mask.dtype) == (np.int32, np.bool_)
    np.testing.assert_array_equal(index[mask], np.arange(n))
    assert (index[~mask] == 0).all()  # an index that can be read


def test_batch_is_a_new_array_every_time():
    first, second, again = *train(10, 5, 2), *train(10, 5, 1)
    assert first.dtype == np.int32
    assert not np.shares_memory(first, second) and not np.shares_memory(first, again)


def test_epoch_is_sorted_once_also_when_the_start_is_distant(monkeypatch):
    sorted_epochs, order = [], batches.order
    monkeypatch.setattr(batches, "order", lambda n, seed, epoch: sorted_epochs.append(epoch) or order(n, seed, epoch))
    train(50_000, 64, 1000, seed=0, start=10**9)
    first = 10**9 * 64 // 50_000
    assert sorted_epochs == [first, first + 1]


@pytest.mark.parametrize(("n", "size"), [(0, 4), (4, 0)])
def test_batches_of_nothing_are_refused_at_once(n, size):
    for make in (lambda: batches.train_batch(n, size, 0, 0), lambda: batches.evaluation_batch(n, size, 0)):
        with pytest.raises(DataError, match=f"^batches of {size} from {n} examples: expected at least one of each$"):
            make()


def test_batch_before_the_first_one_is_refused():
    for make in (lambda: batches.train_batch(10, 4, 0, -1), lambda: batches.evaluation_batch(10, 4, -1)):
        with pytest.raises(DataError, match="batch -1: batches are counted from 0"):
            make()
