"""One update against the original's update function, and what must not change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.config import Augment, Optimizer
from vit_jax.formats.google import read_npz
from vit_jax.models.variants import build, from_tree
from vit_jax.training import optimizer as optimizers
from vit_jax.training.state import create
from vit_jax.training.step import Batch, logits_of, loss_of, train_step
from vit_jax.transforms import geometry
from vit_jax.transforms.preprocess import for_evaluation, for_training

FILES = ["tiny_bf16mom_accum1_head", "tiny_bf16mom_accum2_head", "tiny_f32mom_accum1_head"]


def plain_forward(model):
    """Cross-entropy of images that come scaled, without augmentation."""

    def forward(params, batch, data, step, key):
        logits = model.apply({"params": params}, batch.images, train=True, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    return forward


def largest_difference(ours, theirs) -> float:
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(np.asarray(leaf, np.float32) - theirs[name]).max()) for name, leaf in ours.items())


@pytest.mark.parametrize("name", FILES)
def test_train_step_follows_the_original_trajectory(name, shared, tmp_path):
    oracle = np.load(shared / "oracles" / "train" / f"{name}.npz")

    def tree(prefix):
        """A tree under today's Linen names, brought to the published ones by the reader of files."""
        flat = {key.removeprefix(f"{prefix}/"): oracle[key] for key in oracle.files if key.startswith(f"{prefix}/")}
        np.savez(tmp_path / "tree.npz", **flat)
        return read_npz(tmp_path / "tree.npz")

    microbatches = 2 if "accum2" in name else 1
    settings = Optimizer(
        learning_rate=0.03, warmup_steps=2, clip_norm=1.0, accumulator_dtype="float32" if "f32" in name else "bfloat16"
    )
    rates = [float(optimizers.schedule(settings, 5)(count)) for count in range(5)]
    assert rates == oracle["lr_applied_count_0_to_4"].tolist()

    optimizer = optimizers.build(settings, 5)
    params = tree("init")
    forward = plain_forward(from_tree(params))
    step = jax.jit(functools.partial(train_step, forward=forward, optimizer=optimizer, seed=0))
    state = create(jax.tree.map(jnp.asarray, params), optimizer)
    for i in range(5):
        images = (oracle["images_u8"][i].astype(np.float32) - 127.5) / 127.5
        batch = Batch(
            images=images.reshape(microbatches, -1, *images.shape[1:]), labels=oracle["labels"][i].reshape(microbatches, -1)
        )
        state, metrics = step(state, batch, None)
        assert abs(metrics["loss"] / oracle["losses"][i] - 1) < 1e-5
        assert abs(metrics["gradient_norm"] / oracle["grad_norms_before_clip"][i] - 1) < 1e-5
        if i < 2:
            assert largest_difference(state.params, tree(f"params_after{i + 1}")) < 5e-6
    assert largest_difference(state.params, tree("final")) < 5e-6
    assert int(state.step) == 5
    trace = optax.tree.get(state.opt_state, "trace")
    assert {leaf.dtype for leaf in jax.tree.leaves(trace)} == {jnp.dtype(settings.accumulator_dtype)}


@pytest.fixture
def small():
    """A model without dropout, parameters, and a batch of 8 images on the device."""
    model = build("B/8", hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32, num_classes=4)
    draw = np.random.default_rng(0)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    params["head"]["kernel"] = jnp.asarray(draw.normal(size=(16, 4)), jnp.float32)
    data = {
        "images": jnp.asarray(draw.integers(0, 256, (8, 24, 24, 3)), jnp.uint8),
        "labels": jnp.asarray(draw.integers(0, 4, 8), jnp.int32),
    }
    return model, params, data


def updated(model, params, data, microbatches, settings, seed=0, steps=1, augment=Augment()):  # noqa: B008
    """Parameters and losses after `steps` updates, with random crops and flips unless told otherwise."""
    optimizer = optimizers.build(settings, 10)
    forward = loss_of(model, for_training(augment, 16), seed)
    step = jax.jit(functools.partial(train_step, forward=forward, optimizer=optimizer, seed=seed))
    state, losses = create(params, optimizer), []
    index = jnp.arange(8, dtype=jnp.int32).reshape(microbatches, -1)
    batch = Batch(example_index=index, index=index)
    for _ in range(steps):
        state, metrics = step(state, batch, data)
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1  # traced once
    return state.params, losses


def test_microbatches_change_neither_draws_nor_gradients(small):
    settings = Optimizer(accumulator_dtype="float32")
    whole, losses = updated(*small, 1, settings, steps=3)
    params, found = updated(*small, 4, settings, steps=3)
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    assert largest_difference(params, whole) < 1e-6
    assert len(set(losses)) == 3


def test_augmentation_changes_from_step_to_step(small):
    flips = Augment(crop="none")  # compiles in half the time
    assert len(set(updated(*small, 1, Optimizer(learning_rate=1e-30), steps=3, augment=flips)[1])) > 1


def test_dropout_is_keyed_by_seed_and_step(small):
    model, params, data = small
    still = dict(settings=Optimizer(learning_rate=1e-30), augment=Augment(crop="none", flip=False))
    assert len(set(updated(model, params, data, 1, **still, steps=3)[1])) == 1
    dropping = model.clone(dropout=0.5)
    losses = [updated(dropping, params, data, 1, **still, seed=seed, steps=3)[1] for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert len({*losses[0], *losses[2]}) == 6


@pytest.mark.parametrize("crop", ["none", "center"])
def test_logits_depend_on_the_original_sizes_only_with_a_crop(crop):
    """Of a resident split, whose sizes lie next to the images, and of a streamed one, whose batches hold them."""

    class Model:
        def apply(self, params, images):
            return images

    images = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), np.uint8)
    sizes = np.array([[20, 20], [20, 40], [40, 20], [30, 60], [7, 9], [20, 21]], np.int32)
    forward = jax.jit(logits_of(Model(), for_evaluation(16, crop=crop)))
    index = np.array([1, 4, 5], np.int32)
    resident = forward({}, Batch(index=index), {"images": images, "labels": np.zeros(6, np.int32), "sizes": sizes})
    streamed = forward({}, Batch(images=images[index], labels=np.zeros(3, np.int32), sizes=sizes[index]), None)
    np.testing.assert_array_equal(resident, streamed)
    expected = geometry.center_crop(images[index], 16, sizes[index]) if crop == "center" else geometry.resize(images[index], 16)
    np.testing.assert_allclose(resident, expected / 127.5 - 1, atol=1e-4)
    unsized = forward({}, Batch(index=index), {"images": images, "labels": np.zeros(6, np.int32)})
    assert (np.abs(unsized - resident).max() > 0.1) == (crop == "center")
