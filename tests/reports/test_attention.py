"""Attention added up: equal to the plain computation, to the original's maps, and meaning what it shows."""

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


def maps_of(layers, batch, heads, tokens, seed=0):
    draw = np.random.default_rng(seed)
    return draw.dirichlet(np.full(tokens, 0.3), size=(layers, batch, heads, tokens)).astype(np.float32)


def plain_rollout(maps, grid):
    """As the report words it, an image and a layer at a time, with whole matrices."""
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
def test_equal_to_the_plain_computation(grid):
    maps = maps_of(3, 2, 2, grid[0] * grid[1] + 1)
    found = attention_rollout(maps, grid)
    assert found.dtype == np.float32 and found.shape == (2, *grid) and (found.max(axis=(1, 2)) == 1).all()
    np.testing.assert_allclose(found, plain_rollout(maps, grid), atol=1e-6, rtol=0)
    for first in (0, 1):  # without a class token and with one
        maps = maps_of(3, 2, 2, grid[0] * grid[1] + first, seed=1)
        found = distances(maps, 16, grid)
        assert found.dtype == np.float32 and found.shape == (3, 2)
        np.testing.assert_allclose(found, plain_distances(maps, 16, grid, first), rtol=1e-6, atol=1e-6)


def test_a_square_grid_needs_no_telling():
    maps = maps_of(2, 3, 2, 17)
    assert (attention_rollout(maps) == attention_rollout(maps, (4, 4))).all()
    assert (distances(maps, 8) == distances(maps, 8, (4, 4))).all()
    assert (attention_rollout(jnp.asarray(maps)) == attention_rollout(maps)).all()


def test_maps_of_a_model_that_computes_in_bfloat16():
    maps = jnp.asarray(maps_of(2, 2, 2, 10), jnp.bfloat16)
    exact = np.asarray(maps, np.float32)
    np.testing.assert_allclose(attention_rollout(maps), attention_rollout(exact), atol=1e-6)
    np.testing.assert_allclose(distances(maps, 8), distances(exact, 8), rtol=1e-6)


def test_attention_that_stays_where_it_is():
    still = np.broadcast_to(np.eye(10, dtype=np.float32), (2, 1, 2, 10, 10))
    assert (distances(still, 16) == 0).all()
    # Patches that give the class token all their attention are left with nothing to weigh.
    away = np.zeros((1, 1, 1, 10, 10), np.float32)
    away[..., 0] = 1
    assert (distances(away, 16) == 0).all()


@pytest.mark.parametrize(
    ("shape", "grid", "said"),
    [
        ((2, 1, 2, 16, 16), None, "16 tokens are no class token and a square of patches"),
        ((2, 1, 2, 10, 10), (2, 4), "10 tokens are no class token and a grid of 2×4"),
        ((2, 1, 2, 1, 1), None, "1 tokens are no class token"),
        ((1, 2, 10, 10), None, "attention maps are [layers, B, heads, tokens, tokens], got [1, 2, 10, 10]"),
    ],
)
def test_rollout_is_refused_where_there_is_no_class_row(shape, grid, said):
    with pytest.raises(ValueError, match="attention maps|tokens") as error:
        attention_rollout(np.ones(shape, np.float32), grid)
    assert said in str(error.value)


def test_distances_are_refused_where_there_is_no_grid():
    with pytest.raises(ValueError, match="12 tokens make no grid"):
        distances(np.ones((1, 1, 1, 12, 12), np.float32), 16)


@pytest.mark.parametrize("name", ["tiny-augreg", "tiny-i21k", "tiny-rstem-i21k", "tiny-r3-augreg", "tiny-linen"])
def test_equal_to_the_originals(shared, name):
    folder = shared / "oracles" / name
    io = np.load(folder / "io.npz")
    size = min(int(key.rsplit("_", 1)[1]) for key in io.files if key.startswith("images_u8_"))
    model, params = load(folder / "ckpt.npz")
    maps = jax.jit(attention_maps, static_argnums=0)(model, params, preprocess(io[f"images_u8_{size}"], size))
    theirs = io["up_attn"]
    np.testing.assert_allclose(maps, theirs, atol=1e-5 * theirs.max(), rtol=0)
    grid = (size // model.stride,) * 2
    np.testing.assert_allclose(attention_rollout(maps), plain_rollout(theirs, grid), atol=1e-5, rtol=0)
    expected = plain_distances(theirs, model.stride, grid, 1)
    np.testing.assert_allclose(distances(maps, model.stride), expected, atol=1e-5 * expected.max(), rtol=0)


_PATCH, _GRID, _SQUARE = 4, 6, 2  # pixels; patches a side; patches a side of the square
# Compiling in a hurry: it is what takes the time here.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def squares(count, seed):
    """Images, classes and places of a bright square among noise. Every patch is tinted; the class is the square's tint.

    So a tint alone tells nothing, and the class token has to look at what is bright.
    """
    draw = np.random.default_rng(seed)
    tints = np.array([[r, g, b] for r in (-0.5, 0.5) for g in (-0.5, 0.5) for b in (-0.5, 0.5)], np.float32)
    patches = tints[draw.integers(0, 8, (count, _GRID, _GRID))] - 0.3
    classes, places = draw.integers(0, 8, count), draw.integers(0, _GRID - _SQUARE + 1, (count, 2))
    for patch, tint, (y, x) in zip(patches, tints[classes], places, strict=True):
        patch[y : y + _SQUARE, x : x + _SQUARE] = 1 + tint
    images = patches.repeat(_PATCH, axis=1).repeat(_PATCH, axis=2)
    return images + draw.normal(scale=0.2, size=images.shape).astype(np.float32), classes, places


def test_a_model_that_finds_a_bright_square_attends_to_it():
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

    images, classes, places = squares(256, seed=2)
    look = _jit(lambda params: (model.apply({"params": params}, images), attention_maps(model, params, images)))

    def found(params):
        """The shares of images whose class is right and of those whose peak lies in the square."""
        logits, maps = look(params)
        peaks = np.stack(
            np.unravel_index(attention_rollout(maps).reshape(len(images), -1).argmax(axis=1), (_GRID, _GRID)), axis=1
        )
        inside = ((peaks >= places) & (peaks < places + _SQUARE)).all(axis=1)
        return np.mean(logits.argmax(axis=1) == classes), inside.mean()

    right, inside = found(trained)
    assert right > 0.98
    assert inside >= 0.9
    assert found(start)[1] < 0.4  # it is training that makes it look there


def test_a_class_token_that_looks_at_itself_alone_gives_zeros():
    maps = np.broadcast_to(np.eye(5), (2, 1, 3, 5, 5))
    assert not attention_rollout(maps).any()
