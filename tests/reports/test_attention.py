"""Attention rollout and distances equal plain computations and the original, and show what a model attends to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.checkpoints.load import load
from vit_jax.models.intermediates import attention_maps, attention_rollout
from vit_jax.models.variants import build
from vit_jax.reports.attention import distances
from vit_jax.transforms.preprocess import preprocess

# Compilation takes most of the time of these tests.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def maps_of(layers, batch, heads, tokens, seed=0):
    draw = np.random.default_rng(seed)
    return draw.dirichlet(np.full(tokens, 0.3), size=(layers, batch, heads, tokens)).astype(np.float32)


def plain_rollout(maps, grid):
    """Rollout of one image and one layer at a time, with whole matrices."""
    images = []
    for at in range(maps.shape[1]):
        product = np.eye(maps.shape[-1])
        for layer in maps[:, at].astype(np.float64):
            mixed = layer.mean(axis=0) + np.eye(maps.shape[-1])
            product = (mixed / mixed.sum(axis=-1)[:, None]) @ product
        row = product[0, 1:].reshape(grid)
        images.append(row / row.max())
    return np.stack(images)


def plain_distances(maps, stride, grid, first):
    """The mean over images and queries of the mean distance to the keys, weighted by the attention."""
    layers, batch, heads, tokens, _ = maps.shape
    result = np.zeros((layers, heads))
    for layer in range(layers):
        for head in range(heads):
            total = 0.0
            for image in range(batch):
                for query in range(tokens - first):
                    weights, sums = 0.0, 0.0
                    for key in range(tokens - first):
                        weight = float(maps[layer, image, head, first + query, first + key])
                        far = np.hypot(query // grid[1] - key // grid[1], query % grid[1] - key % grid[1])
                        weights, sums = weights + weight, sums + weight * far
                    total += stride * sums / weights
            result[layer, head] = total / batch / (tokens - first)
    return result


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (5, 2), (1, 1)])
def test_rollout_and_distances_equal_plain_computations(grid):
    maps = maps_of(3, 2, 2, grid[0] * grid[1] + 1)
    found = attention_rollout(maps, grid)
    assert found.dtype == np.float32 and found.shape == (2, *grid) and (found.max(axis=(1, 2)) == 1).all()
    np.testing.assert_allclose(found, plain_rollout(maps, grid), atol=1e-6, rtol=0)
    for first in (0, 1):  # without a class token and with one
        maps = maps_of(3, 2, 2, grid[0] * grid[1] + first, seed=1)
        found = distances(maps, 16, grid)
        assert found.dtype == np.float32 and found.shape == (3, 2)
        np.testing.assert_allclose(found, plain_distances(maps, 16, grid, first), rtol=1e-6, atol=1e-6)


def test_default_grid_is_square():
    maps = maps_of(2, 3, 2, 17)
    assert (attention_rollout(maps) == attention_rollout(maps, (4, 4))).all()
    assert (distances(maps, 8) == distances(maps, 8, (4, 4))).all()
    assert (attention_rollout(jnp.asarray(maps)) == attention_rollout(maps)).all()


def test_bfloat16_maps_are_computed_in_float64():
    maps = jnp.asarray(maps_of(2, 2, 2, 10), jnp.bfloat16)
    exact = np.asarray(maps, np.float32)
    np.testing.assert_allclose(attention_rollout(maps), attention_rollout(exact), atol=1e-6)
    np.testing.assert_allclose(distances(maps, 8), distances(exact, 8), rtol=1e-6)


def test_distance_of_attention_to_itself_is_zero():
    identity = np.broadcast_to(np.eye(10, dtype=np.float32), (2, 1, 2, 10, 10))
    assert (distances(identity, 16) == 0).all()
    # Patches that attend only to the class token have no other weights.
    to_class = np.zeros((1, 1, 1, 10, 10), np.float32)
    to_class[..., 0] = 1
    assert (distances(to_class, 16) == 0).all()


def test_distances_without_grid_are_an_error():
    with pytest.raises(ValueError, match="12 tokens are not a square of patches"):
        distances(np.ones((1, 1, 1, 12, 12), np.float32), 16)


@pytest.mark.parametrize("name", ["tiny-augreg", "tiny-i21k", "tiny-rstem-i21k", "tiny-r3-augreg", "tiny-linen"])
def test_rollout_and_distances_equal_the_original(shared, name):
    folder = shared / "oracles" / name
    io = np.load(folder / "io.npz")
    size = min(int(key.rsplit("_", 1)[1]) for key in io.files if key.startswith("images_u8_"))
    model, params = load(folder / "ckpt.npz")
    maps = _jit(attention_maps, static_argnums=0)(model, params, preprocess(io[f"images_u8_{size}"], size))
    theirs = io["up_attn"]
    np.testing.assert_allclose(maps, theirs, atol=1e-5 * theirs.max(), rtol=0)
    grid = (size // model.stride,) * 2
    np.testing.assert_allclose(attention_rollout(maps), plain_rollout(theirs, grid), atol=1e-5, rtol=0)
    expected = plain_distances(theirs, model.stride, grid, 1)
    np.testing.assert_allclose(distances(maps, model.stride), expected, atol=1e-5 * expected.max(), rtol=0)


_PATCH, _GRID, _SQUARE = 4, 6, 2  # pixels; patches a side; patches a side of the square


def squares(count, seed):
    """Returns images, classes and positions of a bright square among noise.

    Every patch has a tint, and the class is the tint of the square: the class token has to attend to the bright patches.
    """
    draw = np.random.default_rng(seed)
    tints = np.array([[r, g, b] for r in (-0.5, 0.5) for g in (-0.5, 0.5) for b in (-0.5, 0.5)], np.float32)
    patches = tints[draw.integers(0, 8, (count, _GRID, _GRID))] - 0.3
    classes, positions = draw.integers(0, 8, count), draw.integers(0, _GRID - _SQUARE + 1, (count, 2))
    for patch, tint, (y, x) in zip(patches, tints[classes], positions, strict=True):
        patch[y : y + _SQUARE, x : x + _SQUARE] = 1 + tint
    images = patches.repeat(_PATCH, axis=1).repeat(_PATCH, axis=2)
    return images + draw.normal(scale=0.2, size=images.shape).astype(np.float32), classes, positions


@pytest.mark.slow
def test_rollout_peaks_at_what_a_trained_model_uses():
    model = build("B/8", patch_size=_PATCH, hidden_size=32, num_layers=2, num_heads=4, mlp_dim=64, num_classes=8)
    optimizer = optax.adam(3e-3)
    blank = jnp.zeros((1, _GRID * _PATCH, _GRID * _PATCH, 3))
    start = _jit(lambda key: model.init(key, blank)["params"])(jax.random.key(1))

    @_jit
    def step(params, state, images, classes):
        def loss(params):
            logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    trained, state = start, _jit(optimizer.init)(start)
    images, classes, _ = squares(150 * 64, seed=1)
    for at in range(0, len(images), 64):
        trained, state = step(trained, state, images[at : at + 64], classes[at : at + 64])

    images, classes, positions = squares(256, seed=2)
    predict = _jit(lambda params: (model.apply({"params": params}, images), attention_maps(model, params, images)))

    def shares(params):
        """Returns the shares of images with the correct class and with the peak of rollout in the square."""
        logits, maps = predict(params)
        peaks = np.stack(
            np.unravel_index(attention_rollout(maps).reshape(len(images), -1).argmax(axis=1), (_GRID, _GRID)), axis=1
        )
        inside = ((peaks >= positions) & (peaks < positions + _SQUARE)).all(axis=1)
        return np.mean(logits.argmax(axis=1) == classes), inside.mean()

    accuracy, inside = shares(trained)
    assert accuracy > 0.98
    assert inside >= 0.9
    assert shares(start)[1] < 0.4  # before training it does not
