"""Classifiers on features: nearest neighbours, and linear heads of a whole grid of settings in one program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vit_jax.data.batches import train_batch

_ROWS = 512  # features that are classified at once, at most
_SIMILARITIES = 2**26  # numbers in memory at once
_STEPS = 50  # of one call of the compiled training
MOMENTUM = 0.9


class Head(NamedTuple):
    """Linear heads of a grid: kernel float32 [G, D, classes], bias float32 [G, classes]."""

    kernel: Any
    bias: Any


def nearest(
    features: np.ndarray, labels: np.ndarray, queries: np.ndarray, ks: Sequence[int], classes: int, temperature: float = 0.0
) -> dict[int, np.ndarray]:
    """Classifies queries by their k nearest features, by cosine similarity.

    Each neighbour has one vote; of classes with equally many, the one whose neighbours are nearer in rank wins. With a
    `temperature`, a vote weighs exp(similarity / temperature), as in the evaluation of DINO (Caron et al. 2021) with 0.07.

    Args:
      features: float32 [N, D], with labels int32 [N].
      queries: float32 [Q, D].
      ks: numbers of neighbours, each at most N.
      classes: number of classes.
      temperature: of the weights; 0: equal weights.

    Returns:
      k → predicted labels int32 [Q].
    """
    most = max(ks)
    known, answers = jnp.asarray(_unit(features)), jnp.asarray(labels)

    @jax.jit
    def predict(rows: jax.Array, known: jax.Array, answers: jax.Array) -> jax.Array:
        similarity, index = jax.lax.top_k(jnp.matmul(rows, known.T, precision="highest"), most)
        votes = jax.nn.one_hot(answers[index], classes)  # [Q, most, classes]
        found = []
        for k in ks:
            # Equal votes, and so much more for a nearer neighbour that it never outweighs one vote.
            ranks = 1 + jnp.arange(k, 0, -1) / (2.0 * k * (k + 1))
            scale = similarity[:, :k] - similarity[:, :1]  # of the largest, so that no weight overflows
            weights = jnp.exp(scale / temperature) if temperature else jnp.broadcast_to(ranks, scale.shape)
            found.append(jnp.argmax(jnp.einsum("qk,qkc->qc", weights, votes[:, :k], precision="highest"), axis=-1))
        return jnp.stack(found)

    size = max(1, min(_ROWS, _SIMILARITIES // len(features)))
    predicted = [jax.device_get(predict(rows, known, answers))[:, :count] for rows, count in _chunks(_unit(queries), size)]
    return dict(zip(ks, np.concatenate(predicted, axis=1).astype(np.int32), strict=True))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))


def _chunks(rows: np.ndarray, size: int = _ROWS) -> Any:
    """Yields pieces of at most `size` rows and the number of rows in each; zeros fill the last to the shape of all."""
    size = min(size, len(rows))
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        yield np.pad(part, ((0, size - len(part)), (0, 0))), len(part)


def standardise(features: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function that subtracts the mean of these features and divides by their deviation, each of a column, from rows."""
    mean, deviation = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = (1 / np.maximum(deviation, 1e-6)).astype(np.float32)
    return lambda rows: (rows - mean.astype(np.float32)) * scale


def optimizer(rate: Any, decay: Any, steps: int) -> optax.GradientTransformation:
    """SGD with momentum, a cosine from `rate` to 0, and weight decay on the kernel that is added to the gradient."""
    schedule = optax.cosine_decay_schedule(1.0, steps)
    return optax.chain(
        optax.add_decayed_weights(decay, mask=Head(kernel=True, bias=False)),
        optax.sgd(lambda count: rate * schedule(count), momentum=MOMENTUM),
    )


def loss(head: Head, rows: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of one head; rows float32 [B, D]."""
    logits = jnp.matmul(rows, head.kernel, precision="highest") + head.bias[None]  # not TF32 on a GPU
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    grid: Sequence[tuple[float, float]],
    steps: int,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] = lambda step: None,
) -> Head:
    """Trains a linear head from zeros for every (rate, decay) of a grid at once: one program, one order of the batches.

    Args:
      features: float32 [N, D], standardised, with labels int32 [N].
      classes: number of classes.
      grid: (learning rate, weight decay) of each head.
      steps: updates.
      batch_size: rows of an update.
      seed: of the order of the rows.
      progress: is told how many steps are done.

    Returns:
      The heads, on the device, in the order of the grid.
    """
    rates, decays = (jnp.asarray(values, jnp.float32) for values in zip(*grid, strict=True))
    heads = Head(jnp.zeros((len(grid), features.shape[1], classes)), jnp.zeros((len(grid), classes)))
    state = jax.vmap(lambda rate, decay, head: optimizer(rate, decay, steps).init(head))(rates, decays, heads)
    rows, answers = jnp.asarray(features), jnp.asarray(labels)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def advance(heads: Head, state: Any, batches: jax.Array, rows: jax.Array, answers: jax.Array) -> tuple[Head, Any]:
        def one(rate: jax.Array, decay: jax.Array, head: Head, state: Any, index: jax.Array) -> tuple[Head, Any]:
            updates, state = optimizer(rate, decay, steps).update(
                jax.grad(loss)(head, rows[index], answers[index]), state, head
            )
            return optax.apply_updates(head, updates), state

        def step(carry: tuple[Head, Any], index: jax.Array) -> tuple[tuple[Head, Any], None]:
            return jax.vmap(one, in_axes=(0, 0, 0, 0, None))(rates, decays, *carry, index), None

        return jax.lax.scan(step, (heads, state), batches)[0]

    for first in range(0, steps, _STEPS):
        numbers = range(first, min(first + _STEPS, steps))
        batches = np.stack([train_batch(len(features), batch_size, seed, number) for number in numbers])
        heads, state = advance(heads, state, jnp.asarray(batches), rows, answers)
        jax.block_until_ready(heads)  # so that Ctrl-C waits for a few steps only
        progress(numbers.stop)
    return heads


@jax.jit
def _predict(heads: Head, rows: jax.Array) -> jax.Array:
    logits = jnp.einsum("bd,gdc->gbc", rows, heads.kernel, precision="highest") + heads.bias[:, None]
    return jnp.where(jnp.isfinite(logits).all(axis=-1), jnp.argmax(logits, axis=-1), -1)


def accuracies(heads: Head, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Accuracy of each head in [0, 1], float64 [G]; a head with logits that are not finite is wrong."""
    predicted = np.concatenate([jax.device_get(_predict(heads, rows))[:, :count] for rows, count in _chunks(features)], axis=1)
    return (predicted == labels).mean(axis=1)
