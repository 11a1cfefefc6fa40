"""The loss that is trained on, chosen when the program of a run is built."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[Any, Any], jax.Array]


def build(label_smoothing: float = 0.0) -> Loss:
    """Builds the mean cross-entropy.

    Args:
      label_smoothing: the part of each label that is spread evenly over all classes, in [0, 1) (arXiv:1512.00567, section 7).

    Returns:
      A function of logits float32 [B, classes] and labels, int32 [B] or float32 [B, classes] that sum to one, which returns
      float32 [].
    """

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        if labels.ndim == 1 and not label_smoothing:
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        if labels.ndim == 1:
            labels = jax.nn.one_hot(labels, logits.shape[-1])
        if label_smoothing:
            labels = optax.smooth_labels(labels, label_smoothing)
        return jnp.mean(optax.softmax_cross_entropy(logits, labels))

    return loss
