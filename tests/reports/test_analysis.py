"""The numbers that figures show equal plain computations."""

import numpy as np
import pytest

from vit_jax.reports import figures
from vit_jax.reports.analysis import calibration, principal_components, similarity, wilson


def test_principal_components_are_the_directions_of_largest_variance():
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 64)) * np.linspace(1, 3, 48).reshape(4, 4, 3, 1)
    found = principal_components(kernel, 5)
    values, vectors = np.linalg.eigh(np.cov(kernel.reshape(48, 64)))
    for component, expected in zip(found, vectors.T[::-1], strict=False):
        assert abs(abs(component.ravel() @ expected) - 1) < 1e-6
        assert component.ravel()[np.abs(component).argmax()] > 0
    variances = [np.var(component.ravel() @ kernel.reshape(48, 64), ddof=1) for component in found]
    np.testing.assert_allclose(variances, values[::-1][:5], rtol=1e-6)


def test_principal_components_of_two_kernels_have_equal_signs():
    draw = np.random.default_rng(0)
    before = draw.normal(size=(4, 4, 3, 64)) * np.linspace(1, 9, 48).reshape(4, 4, 3, 1)
    after = -before + draw.normal(scale=0.01, size=before.shape)
    first = principal_components(before, 3)
    second = principal_components(after, 3, like=first)
    assert ((first * second).sum(axis=(1, 2, 3)) > 0.99).all()
    assert len(principal_components(draw.normal(size=(2, 2, 3, 5)), 28)) == 5  # as many as there can be


def test_similarity_is_the_cosine():
    positions = np.random.default_rng(0).normal(size=(6, 16))
    found = similarity(positions, (2, 3))
    for a in range(6):
        for b in range(6):
            expected = positions[a] @ positions[b] / np.sqrt((positions[a] ** 2).sum() * (positions[b] ** 2).sum())
            assert abs(found[a // 3, a % 3, b // 3, b % 3] - expected) < 1e-12


def test_calibration_equals_a_plain_computation(predictions):
    logits, labels = predictions
    mean, accuracy, count, error = calibration(logits, labels, bins=10)
    expected = 0.0
    for number in range(10):
        inside = []
        for row, label in zip(logits.astype(np.float64), labels, strict=True):
            probabilities = np.exp(row) / np.exp(row).sum()
            if number / 10 < probabilities.max() <= (number + 1) / 10:
                inside.append((probabilities.max(), probabilities.argmax() == label))
        assert count[number] == len(inside)
        if inside:
            sure, right = np.mean(inside, axis=0)
            np.testing.assert_allclose((mean[number], accuracy[number]), (sure, right))
            expected += len(inside) / len(labels) * abs(sure - right)
    assert count.sum() == len(labels) and abs(error - expected) < 1e-12
    figure = figures.reliability(logits, labels, bins=10)
    assert f"expected calibration error {100 * expected:.2f} %" in figure.axes[0].get_title(loc="left")
    bars = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(bars, 100 * accuracy[count > 0])


def test_calibration_error_of_certain_predictions():
    labels = np.arange(5, dtype=np.int32)
    assert calibration(1000 * np.eye(5, dtype=np.float32), labels)[3] == 0
    assert calibration(1000 * np.eye(5, dtype=np.float32), labels[::-1])[3] == pytest.approx(0.8)


@pytest.mark.parametrize(("share", "count"), [(0.802, 500), (1.0, 50), (0.0, 50), (0.25, 4)])
def test_wilson_interval_ends_where_the_score_test_rejects(share, count):
    low, high = wilson(share, count)
    assert 0 <= low <= share <= high <= 1
    for end in {float(low), float(high)} - {0.0, 1.0}:
        assert abs(share - end) / np.sqrt(end * (1 - end) / count) == pytest.approx(1.959964, rel=1e-4)
    assert high - low == pytest.approx({500: 0.0697, 50: 0.0713, 4: 0.6530}[count], abs=2e-3)
