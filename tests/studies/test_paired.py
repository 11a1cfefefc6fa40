"""Paired differences and their intervals, against published quantiles and a computation by hand."""

import math

import numpy as np
import pytest

from vit_jax.studies import paired


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # two-sided 95 %; any table of Student's t
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (11, 2.201), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_printed_table(freedom, quantile):
    assert paired.t_quantile(freedom) == pytest.approx(quantile, abs=6e-4)


def test_quantile_of_another_confidence():
    assert paired.t_quantile(10, 0.99) == pytest.approx(3.169, abs=6e-4)


def test_two_rows_give_the_paired_t_test():
    found = paired.compare({"base": {0: 70.0, 1: 72.0, 2: 71.0}, "change": {0: 73.0, 1: 73.5, 2: 74.0}})
    # Differences 3, 1.5, 3: mean 2.5, deviation sqrt(0.75), standard error 0.5.
    row = found.rows["change"]
    assert row.mean == pytest.approx(73.5) and row.deviation == pytest.approx(0.5)
    assert row.difference == pytest.approx(2.5) and row.error == pytest.approx(0.5)
    assert found.freedom == 2 and row.margin == pytest.approx(0.5 * 4.30265, abs=1e-4)
    assert found.rows["base"].difference is None and found.rows["base"].margin is None


def test_noise_is_that_of_all_rows_without_the_effects_of_seeds():
    table = np.array([[70.0, 75.0], [71.0, 76.4], [72.2, 76.8]])  # two seeds, 5 points apart
    found = paired.compare({str(number): dict(enumerate(row)) for number, row in enumerate(table.tolist())})
    residual = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    noise = math.sqrt((residual**2).sum() / 2)
    assert found.freedom == 2 and found.noise == pytest.approx(noise)
    for name in "12":
        assert found.rows[name].margin == pytest.approx(4.30265 * noise, rel=1e-4)  # 2/n is 1


def test_intervals_cover_the_true_difference_as_often_as_they_say():
    draw, covered = np.random.default_rng(0), 0
    for _ in range(400):
        scores = draw.normal(size=(4, 2)) + 5 * draw.normal(size=2) + np.array([0, 1, 2, 3])[:, None]
        row = paired.compare({str(n): dict(enumerate(values)) for n, values in enumerate(scores.tolist())}).rows["2"]
        covered += abs(row.difference - 2) < row.margin
    assert 0.92 < covered / 400 < 0.98


def test_incomplete_rows_use_the_seeds_they_have_and_the_noise_of_the_others():
    rows = {"base": {0: 1.0, 1: 2.0}, "a": {0: 2.0, 1: 3.5}, "b": {1: 5.0}, "c": {}}
    found = paired.compare(rows)
    assert found.freedom == 1 and found.rows["b"].difference == 3.0 and found.rows["b"].error is None
    assert found.rows["b"].margin == pytest.approx(12.7062 * found.noise * math.sqrt(2), rel=1e-4)
    assert found.rows["c"] == paired.Summary({}) and found.rows["b"].deviation is None
    assert found.noise == paired.compare({name: rows[name] for name in ("base", "a")}).noise


def test_noise_is_of_the_seeds_that_all_rows_of_several_seeds_have():
    rows = {"base": {0: 1.0, 1: 2.0, 2: 9.0}, "a": {0: 2.0, 1: 3.5}, "b": {2: 5.0}}
    found = paired.compare(rows)
    assert found.noise == paired.compare({"base": {0: 1.0, 1: 2.0}, "a": rows["a"]}).noise and found.freedom == 1
    assert found.rows["a"].margin == pytest.approx(12.7062 * found.noise, rel=1e-4)


@pytest.mark.parametrize(
    "scores", [{"base": {0: 1.0}, "a": {0: 2.0}}, {"base": {0: 1.0, 1: 2.0}, "a": {0: 2.0}}, {"base": {}, "a": {}}]
)
def test_no_interval_without_two_complete_rows_of_two_seeds(scores):  # fmt: skip
    found = paired.compare(scores)
    assert found.noise is None and found.rows["a"].margin is None
