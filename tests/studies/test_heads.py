"""Classifiers on features, against NumPy and against one head trained by a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.data.batches import train_batch
from vit_jax.studies import heads


@pytest.fixture(scope="module")
def data():
    """Features of 90 training and 40 other rows in 8 columns of 3 classes that overlap, and their labels."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(3, 8))
    labels = draw.integers(0, 3, 130).astype(np.int32)
    features = (centres[labels] + 1.2 * draw.normal(size=(130, 8)) + 5).astype(np.float32)
    return features[:90], labels[:90], features[90:], labels[90:]


def votes(features, labels, queries, k, temperature):
    """Nearest neighbours by loops over the images, in float64."""

    def unit(rows):
        return rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)

    found = []
    for similarity in unit(queries) @ unit(features).T:
        order = np.argsort(-similarity, kind="stable")[:k]
        weight, rank = np.zeros(3), np.zeros(3)
        for place, index in enumerate(order):
            weight[labels[index]] += np.exp(similarity[index] / temperature) if temperature else 1
            rank[labels[index]] += k - place
        found.append(max(range(3), key=lambda label: (round(weight[label], 9), rank[label])))  # noqa: B023
    return np.array(found)


@pytest.mark.parametrize("temperature", [0.0, 0.07])
def test_nearest_neighbours_are_those_of_numpy(data, temperature, monkeypatch):
    features, labels, queries, answers = data
    for most in (2**26, 90 * 7):  # the second in pieces of seven rows
        monkeypatch.setattr(heads, "_SIMILARITIES", most)
        found = heads.nearest(features, labels, queries, (1, 4, 5, 20), 3, temperature)
        for k, predicted in found.items():
            np.testing.assert_array_equal(predicted, votes(features, labels, queries, k, temperature))
            assert (predicted == answers).mean() > 0.4  # of three classes


def test_grid_of_heads_gives_what_each_head_gives_trained_in_a_plain_loop(data):
    features, labels, queries, answers = data
    scale = heads.standardise(features)
    rows, grid, steps = scale(features), [(0.01, 0.0), (0.3, 0.01), (0.1, 0.1)], 70  # more than one call
    np.testing.assert_allclose(rows, (features - features.mean(0)) / features.std(0), atol=1e-5)
    told = []
    found = heads.train(rows, labels, 3, grid, steps, batch_size=16, seed=4, progress=told.append)
    assert told == [50, 70]
    for number, (rate, decay) in enumerate(grid):
        head = {"kernel": jnp.zeros((8, 3)), "bias": jnp.zeros(3)}
        optimizer = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)
        state = optimizer.init(head)

        def loss(head, index):
            logits = rows[index] @ head["kernel"] + head["bias"][None]
            return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(16), labels[index]])

        for step in range(steps):
            gradient = jax.grad(loss)(head, train_batch(90, 16, 4, step))
            gradient["kernel"] += decay * head["kernel"]
            updates, state = optimizer.update(gradient, state, head)
            head = optax.apply_updates(head, updates)
        np.testing.assert_allclose(found.kernel[number], head["kernel"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.bias[number], head["bias"], rtol=1e-4, atol=1e-5)
        predicted = (scale(queries) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])).argmax(1)
        assert heads.accuracies(found, scale(queries), answers)[number] == pytest.approx((predicted == answers).mean())


def test_head_that_is_not_finite_is_wrong_everywhere(data):
    _, _, queries, _ = data
    broken = heads.Head(jnp.full((1, 8, 3), jnp.nan), jnp.zeros((1, 3)))
    assert heads.accuracies(broken, queries, np.zeros(40, np.int32)).tolist() == [0.0]


def test_column_without_deviation_stays_finite():
    rows = np.ones((4, 2), np.float32)
    assert np.isfinite(heads.standardise(rows)(rows)).all()
