"""Metrics of logits, compared with arithmetic by hand."""

import numpy as np
import pytest

from vit_jax.training.evaluate import metrics


def test_metrics_agree_with_hand_computation():
    logits = np.array([[3, 2, 1, 0, -1, -2], [0, 0, 0, 0, 0, 0], [9, 8, 7, 6, 5, 4]], np.float32)
    found = metrics(logits, np.array([0, 1, 5]))
    soft = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["loss"] == pytest.approx(-np.log(soft[[0, 1, 2], [0, 1, 5]]).mean(), rel=1e-6)
    assert found["accuracy"] == 1 / 3  # of equal logits the first class is the answer
    assert found["accuracy_top5"] == 2 / 3


def test_metrics_count_nan_logits_as_wrong():
    logits = np.array([[np.nan, 0.0], [0.0, np.nan]], np.float32)
    assert metrics(logits, np.array([0, 0]))["accuracy"] == 0
