"""The search for the largest batch, on memory that grows as given."""

import pytest

from vit_jax.training.capacity import largest_batch, round_down


@pytest.mark.parametrize(("size", "unit", "expected"), [(100, 8, 96), (7, 8, 0), (8, 8, 8), (1000.5, 1, 992), (255, 1, 248)])
def test_batch_sizes_are_multiples_with_few_bits(size, unit, expected):
    assert round_down(size, unit) == expected


@pytest.mark.parametrize("limit", [3e9, 20e9, 63.7e9, 300e9])
@pytest.mark.parametrize("curve", [1.0, 1.05, 0.95])
@pytest.mark.parametrize("known", [64, 4096])
def test_largest_batch_was_compiled_and_is_nearly_the_largest(limit, curve, known):
    compiled = {}

    def needed(size):
        compiled[size] = 1e9 + 2e6 * 64 * (size / 64) ** curve * 40
        return compiled[size]

    size, bytes_ = largest_batch(needed, limit, 8, (known, needed(known)), 1.2e9)
    assert bytes_ == compiled[size] <= limit and size % 8 == 0 and len(compiled) <= 4
    assert needed(round(1.1 * size) + 8) > limit


def test_no_batch_fits_a_model_that_is_too_large():
    assert largest_batch(lambda size: 10 + size, 9, 1, (4, 14), 10) is None
    assert largest_batch(lambda size: 10 + size, 10.5, 1, (4, 14), 2) is None
