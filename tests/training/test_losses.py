"""The training loss against its formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.training import losses

LOGITS = np.random.default_rng(0).normal(scale=3, size=(8, 5)).astype(np.float32)
LABELS = np.array([0, 4, 2, 2, 1, 3, 0, 4], np.int32)
SOFT = np.random.default_rng(1).dirichlet(np.ones(5), 8).astype(np.float32)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    logits = logits.astype(np.float64)
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - (labels * logits).sum(axis=1)))


def test_integer_labels_without_smoothing_are_the_loss_of_optax():
    loss = losses.build()
    expected = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS))
    assert loss(LOGITS, LABELS) == expected
    lowered = [jax.jit(f).lower(LOGITS, LABELS).as_text() for f in (
        lambda x, y: losses.build()(x, y),
        lambda x, y: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, y)),
    )]  # fmt: skip
    assert lowered[0] == lowered[1]  # the same program


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("labels", [LABELS, SOFT], ids=["integers", "soft"])
def test_smoothing_spreads_a_part_of_each_label(smoothing, labels):
    soft = np.eye(5)[labels] if labels.ndim == 1 else labels
    expected = cross_entropy(LOGITS, (1 - smoothing) * soft + smoothing / 5)
    assert jax.jit(losses.build(smoothing))(LOGITS, labels) == pytest.approx(expected, rel=1e-6)


def test_soft_labels_of_one_class_are_integer_labels():
    loss = losses.build(0.1)
    assert loss(LOGITS, jax.nn.one_hot(LABELS, 5)) == pytest.approx(float(loss(LOGITS, LABELS)), rel=1e-6)
