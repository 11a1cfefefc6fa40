"""Layouts, feeds and evaluation: how the work is shared must not show in the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.config import Augment, Optimizer, Run
from vit_jax.errors import ConfigError
from vit_jax.models.variants import build
from vit_jax.training import devices, program
from vit_jax.training import optimizer as optimizers
from vit_jax.training.devices import Layout
from vit_jax.training.evaluate import metrics, predictions
from vit_jax.training.feed import Feed
from vit_jax.training.state import create
from vit_jax.transforms.preprocess import for_evaluation

EVERYTHING = 2**30  # a budget that every split fits in


@pytest.fixture(scope="module")
def model_and_params():
    model = build("B/8", hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32, num_classes=10)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 10))
    return model, params


@pytest.fixture(scope="module")
def on_one_device(model_and_params, source_of):
    """The losses of 20 steps on one device."""
    return losses(*model_and_params, source_of(50), layout("mesh", 1))[0]


def layout(parallel: str, count: int) -> Layout:
    return Layout(parallel, jax.devices()[:count])


def losses(model, params, source, where: Layout, steps=20, microbatches=1, budget=EVERYTHING, seed=0, crop="torchvision"):
    """The losses of a run with crops and flips, and its last state."""
    optimizer = optimizers.build(Optimizer(warmup_steps=5), steps)
    step = program.build(model, Augment(crop=crop), optimizer, where, seed, 8).train_step
    feed = Feed(source, where, budget)
    state, found = where.put(create(params, optimizer)), []
    batches = feed.train(16, microbatches, seed, 0)
    with jax.transfer_guard("disallow"):
        for _ in range(steps):
            state, measured = step(state, next(batches), feed.data)
            found.append(float(jax.device_get(measured["loss"])))
    return np.array(found), state


@pytest.mark.parametrize(
    ("parallel", "count", "microbatches"), [("mesh", 8, 1), ("pmap", 8, 1), ("pmap", 1, 1), ("mesh", 4, 4), ("pmap", 4, 2)]
)
def test_layouts_give_the_same_losses(model_and_params, source_of, on_one_device, parallel, count, microbatches):
    expected = on_one_device
    found, state = losses(*model_and_params, source_of(50), layout(parallel, count), microbatches=microbatches)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[-1] != found[0]
    for leaf, like in zip(jax.tree.leaves(state.params), jax.tree.leaves(model_and_params[1]), strict=True):
        assert leaf.shape == like.shape  # no device axis
        assert leaf.sharding.is_fully_replicated


@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_streamed_batches_equal_resident_batches(model_and_params, source_of, parallel):
    expected, _ = losses(*model_and_params, source_of(50), layout(parallel, 8), steps=6, crop="none")
    found, _ = losses(*model_and_params, source_of(50), layout(parallel, 8), steps=6, budget=0, crop="none")
    assert found.tolist() == expected.tolist()


def test_dropout_differs_between_devices_under_pmap(model_and_params, source_of):
    """Else every device would drop the same values."""
    model, params = model_and_params
    one, many = (
        losses(model.clone(dropout=0.5), params, source_of(50), layout("pmap", count), steps=6, crop="none")[0][0]
        for count in (1, 8)
    )
    assert one != many


@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("budget", [EVERYTHING, 0])
def test_predictions_count_every_image_once(model_and_params, source_of, parallel, count, budget):
    model, params = model_and_params
    source, where = source_of(1003), layout(parallel, count)
    feed = Feed(source, where, budget)
    predict = program.build(model, Augment(), optimizers.build(Optimizer(), 1), where, 0, 8).predict
    images = for_evaluation(8)(source.images)
    expected = metrics(np.asarray(model.apply({"params": params}, images)), source.labels)
    for size in (1, 7, 64, 10_000):
        logits, labels = predictions(predict, where.put(params), feed, size)
        assert logits.shape == (1003, 10) and np.array_equal(labels, source.labels)
        found = metrics(logits, labels)
        assert round(found["accuracy"] * 1003) == round(expected["accuracy"] * 1003)
        assert round(found["accuracy_top5"] * 1003) == round(expected["accuracy_top5"] * 1003)
        assert abs(found["loss"] / expected["loss"] - 1) < 1e-6


@pytest.mark.parametrize("count", [1, 8])
def test_put_shares_no_memory_with_its_argument(count):
    raw, on_device = np.zeros(1024 + 16, np.float32), jnp.zeros(1024)
    on_host = raw[(-raw.ctypes.data % 64) // 4 :][:1024]  # aligned, so that it could be shared
    placed = layout("mesh", count).put([on_host, on_device])
    on_host += 1
    assert not placed[0].any()
    jax.jit(lambda leaf: leaf + 1, donate_argnums=0)(placed[1])
    assert placed[1].is_deleted() and not on_device.is_deleted()


def test_batch_that_devices_do_not_divide_is_refused():
    with pytest.raises(
        ConfigError, match="training.batch_size = 12 in training.grad_accum_steps = 1 does not divide among 8 devices; .* 8"
    ):
        layout("mesh", 8).check(12, 1)
    with pytest.raises(ConfigError, match="a multiple of 16"):
        layout("mesh", 8).check(24, 2)
    layout("mesh", 8).check(32, 2)


def test_driver_without_a_gpu_build_gives_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert devices.start(Run()).pmap is False
    assert '-m pip install "jax[cuda12]==' in caplog.text
    caplog.clear()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # asked for, so nothing to say
    assert devices.start(Run(parallel="pmap")).pmap is True
    assert not caplog.text
