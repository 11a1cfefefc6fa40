"""Layouts, feeds and evaluation: how the work is shared must not show in the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.config import Augment, Config, Model, Optimizer, Run
from vit_jax.errors import ConfigError
from vit_jax.models.variants import build, shapes
from vit_jax.training import devices, program, restore, saving, tuning
from vit_jax.training import optimizer as optimizers
from vit_jax.training.devices import Layout, nbytes
from vit_jax.training.evaluate import metrics, predictions
from vit_jax.training.feed import Feed
from vit_jax.training.saving import Saver
from vit_jax.training.state import create
from vit_jax.training.transformations import averaged
from vit_jax.transforms.keys import LORA, stream
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
    """The losses of 20 steps on one device, and the parameters after them."""
    found, state = losses(*model_and_params, source_of(50), layout("mesh", 1))
    return found, jax.device_get(state.params)


def layout(parallel: str, count: int, mesh: str = "") -> Layout:
    return Layout(parallel, jax.devices()[:count], mesh)


def losses(
    model,
    params,
    source,
    where: Layout,
    steps=20,
    microbatches=1,
    budget=EVERYTHING,
    seed=0,
    crop="torchvision",
    state=None,
    augment=None,
    smoothing=0.0,
):
    """The losses of a run with crops and flips up to a step, and its state there; it begins or goes on with a state."""
    optimizer = optimizers.build(Optimizer(warmup_steps=5, accumulator_dtype="float32"), 20)
    step = program.build(model, augment or Augment(crop=crop), optimizer, where, seed, 8, None, smoothing).train_step
    feed = Feed(source, where, budget)
    start = int(state.step) if state else 0
    state, found = where.put(state or create(params, optimizer)), []
    batches = feed.train(16, microbatches, seed, start)
    with jax.transfer_guard("disallow"):
        for _ in range(start, steps):
            state, measured = step(state, next(batches), feed.data)
            found.append(float(jax.device_get(measured["loss"])))
    return np.array(found), state


def assert_close(ours, theirs):
    """Arrays agree to 1e-5 of their largest value. That of a bias of keys, whose gradient is 0, is a rounding error."""
    for leaf, like in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(leaf, like, rtol=1e-5, atol=1e-5 * max(np.abs(like).max(), 1e-3))


@pytest.mark.parametrize(
    ("parallel", "count", "mesh", "microbatches"),
    [
        ("mesh", 8, "", 1),
        ("pmap", 8, "", 1),
        ("pmap", 1, "", 1),
        ("mesh", 4, "", 4),
        ("pmap", 4, "", 2),
        ("mesh", 8, "data:4,fsdp:2", 1),
        ("mesh", 8, "fsdp:8", 2),
    ],
)
def test_layouts_give_the_same_losses_and_parameters(
    model_and_params, source_of, on_one_device, parallel, count, mesh, microbatches
):
    expected, params = on_one_device
    where = layout(parallel, count, mesh)
    found, state = losses(*model_and_params, source_of(50), where, microbatches=microbatches)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert_close(where.gather(state.params), params)
    assert found[-1] != found[0]
    for leaf, like in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        assert leaf.shape == like.shape  # no device axis
        assert leaf.sharding.is_fully_replicated or "fsdp" in mesh


@pytest.mark.parametrize(("parallel", "mesh"), [("mesh", ""), ("mesh", "data:2,fsdp:4"), ("pmap", "")])
def test_training_step_is_compiled_once(model_and_params, source_of, parallel, mesh):
    """A state that a step gives back lies on the devices as the first one does; else the second step would be compiled, too."""
    model, params = model_and_params
    where, traced, plain = layout(parallel, 8, mesh), [], optimizers.build(Optimizer(accumulator_dtype="float32"), 3)

    def update(*given, **more):
        traced.append(parallel)
        return plain.update(*given, **more)

    optimizer = optax.GradientTransformationExtraArgs(plain.init, update)
    step = program.build(model, Augment(), optimizer, where, 0, 8).train_step
    state, feed = where.put(create(params, optimizer)), Feed(source_of(50), where, EVERYTHING)
    for _, batch in zip(range(3), feed.train(16, 1, 0, 0), strict=False):
        state, _ = step(state, batch, feed.data)
    assert traced == [parallel]
    assert parallel == "pmap" or step._cache_size() == 1  # with another sharding, jit compiles without tracing again


@pytest.mark.slow
@pytest.mark.parametrize("layers", [0, pytest.param(2, marks=pytest.mark.full)])  # RandAugment is compiled three times
def test_layouts_give_the_same_losses_with_all_augmentations(model_and_params, source_of, layers):
    everything = Augment(crop="pad", randaugment_layers=layers, erasing=0.5, mixup=0.4, cutmix=1.0)
    options = dict(steps=4, augment=everything, smoothing=0.1)
    expected, state = losses(*model_and_params, source_of(50), layout("mesh", 1), **options)
    plain, _ = losses(*model_and_params, source_of(50), layout("mesh", 1), **options | {"augment": Augment()})
    assert np.abs(expected - plain).min() > 1e-3
    for parallel, count, mesh, microbatches in (("pmap", 2, "", 2), ("mesh", 4, "data:2,fsdp:2", 1)):
        where = layout(parallel, count, mesh)
        found, other = losses(*model_and_params, source_of(50), where, microbatches=microbatches, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert_close(where.gather(other.params), jax.device_get(state.params))


@pytest.fixture(scope="module")
def tuned_on_one_device(model_and_params, source_of):
    return tuned_losses(*model_and_params, source_of(50), layout("mesh", 1))


def tuned_losses(model, params, source, where: Layout):
    """The losses of 8 steps of LoRA with SAM and an average, and the weights that these steps yield."""
    settings = Model(tune="lora", lora_rank=4)
    optimizer = optimizers.build(
        Optimizer(warmup_steps=2, accumulator_dtype="float32", sam_rho=0.05, ema=0.7), 8, tuning.mask(settings)
    )
    programs = program.build(model, Augment(), optimizer, where, 0, 8, settings=settings)
    feed = Feed(source, where, EVERYTHING)
    state, found = where.put(create(tuning.initial(params, settings, stream(0, LORA)), optimizer)), []
    batches = feed.train(16, 1, 0, 0)
    with jax.transfer_guard("disallow"):
        for _ in range(8):
            state, measured = programs.train_step(state, next(batches), feed.data)
            found.append(float(jax.device_get(measured["loss"])))
        weights = programs.merge(averaged(state.params, state.opt_state))
    assert nbytes(weights) == nbytes(where.abstract(weights))  # shared as parameters are
    return np.array(found), where.gather(weights)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "count", "mesh"), [("pmap", 8, ""), ("mesh", 8, ""), ("mesh", 8, "data:2,fsdp:4")])
def test_layouts_give_the_same_adapters_averages_and_second_gradients(
    model_and_params, source_of, tuned_on_one_device, parallel, count, mesh
):
    found, weights = tuned_losses(*model_and_params, source_of(50), layout(parallel, count, mesh))
    expected, like = tuned_on_one_device
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert_close(weights, like)
    assert found[-1] != found[0]


@pytest.mark.slow
def test_state_saved_on_a_layout_resumes_on_any_other(model_and_params, source_of, on_one_device, tmp_path):
    """Each layout is resumed from once, and saves for the next."""
    source, state, found = source_of(50), None, []
    for number, where in enumerate(
        [
            layout("mesh", 1),
            layout("mesh", 8, "data:4,fsdp:2"),
            layout("pmap", 8),
            layout("mesh", 8, "fsdp:8"),
            layout("mesh", 8),
        ],
        start=1,
    ):
        more, state = losses(*model_and_params, source, where, steps=4 * number, state=state)
        found += more.tolist()
        with Saver(tmp_path, {}, Config()) as saver:
            saver.save(where.gather(state))
        state = restore.read_newest(tmp_path / "checkpoints", jax.eval_shape(lambda tree: tree, state), Config()).state
    np.testing.assert_allclose(found, on_one_device[0], rtol=1e-5)
    assert_close(state.params, on_one_device[1])


@pytest.mark.parametrize("variant", ["S/16", "B/16", "L/16", "H/14", "R50+B/16", "Nano/8"])
def test_fsdp_puts_an_eighth_of_the_state_on_each_of_eight_devices(variant):
    params = shapes(build(variant, num_classes=100), 224)
    state = jax.eval_shape(lambda tree: create(tree, optimizers.build(Optimizer(), 20)), params)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert total / 8 <= nbytes(layout("mesh", 8, "fsdp:8").abstract(state)) <= 1.1 * total / 8


def test_fsdp_keeps_the_state_where_it_is_described(model_and_params, source_of):
    """Before and after a step; and the copy of the best parameters, too."""
    where = layout("mesh", 8, "fsdp:8")
    _, state = losses(*model_and_params, source_of(50), where, steps=1)
    expected = nbytes(where.abstract(state))
    for tree in (state, where.put(where.gather(state))):
        held = dict.fromkeys(where.devices, 0)
        for shard in (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards):
            held[shard.device] += shard.data.nbytes
        assert set(held.values()) == {expected}
    assert nbytes(saving._copy(state.params)) == nbytes(state.params)
    # An array is shared along its largest dimension, unless no dimension divides.
    block = state.params["Transformer"]["encoderblock_0"]["MlpBlock_3"]
    assert [block[name]["kernel"].addressable_shards[0].data.shape for name in block] == [(16, 4), (4, 16)]
    assert state.params["head"]["bias"].sharding.is_fully_replicated
    assert "as data:1,fsdp:8" in where.describe() and "MiB a device, " in where.describe_sharding(state)


def test_mesh_of_another_number_of_devices_is_refused():
    with pytest.raises(ConfigError, match=r"^run.mesh = 'data:4,fsdp:4' is of 16 devices, and there are 8$"):
        layout("mesh", 8, "data:4,fsdp:4")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["mesh", "pmap"])
def test_streamed_batches_equal_resident_batches(model_and_params, source_of, parallel):
    expected, _ = losses(*model_and_params, source_of(50), layout(parallel, 8), steps=6, crop="none")
    found, _ = losses(*model_and_params, source_of(50), layout(parallel, 8), steps=6, budget=0, crop="none")
    # Of two programs, which may fuse their sums differently; test_feed.py compares the batches to the byte.
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_dropout_differs_between_devices_under_pmap(model_and_params, source_of):
    """Else every device would drop the same values."""
    model, params = model_and_params
    one, many = (
        losses(model.clone(dropout=0.5), params, source_of(50), layout("pmap", count), steps=6, crop="none")[0][0]
        for count in (1, 8)
    )
    assert one != many


@pytest.mark.parametrize(
    ("parallel", "count", "mesh"),
    [("mesh", 1, ""), ("mesh", 8, ""), ("mesh", 8, "data:2,fsdp:4"), ("pmap", 1, ""), ("pmap", 8, "")],
)
@pytest.mark.parametrize("budget", [EVERYTHING, 0])
def test_predictions_count_every_image_once(model_and_params, source_of, parallel, count, mesh, budget):
    model, params = model_and_params
    source, where = source_of(1003), layout(parallel, count, mesh)
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
    said = (
        "training.batch_size = 12 in training.grad_accum_steps = 1 does not divide among 8 devices; the nearest that does is "
    )
    with pytest.raises(ConfigError, match=f"^{said}8 or 16$"):
        layout("mesh", 8).check(12, 1)
    with pytest.raises(ConfigError, match="is 16 or 32$"):
        layout("mesh", 8, "fsdp:8").check(24, 2)
    with pytest.raises(ConfigError, match="is 8$"):
        layout("mesh", 8).check(6, 1)
    layout("mesh", 8).check(32, 2)
    layout("mesh", 8).check(16, 1, "augment.mixup = 0.2")
    said = (
        r"^augment.mixup = 0.2 mixes pairs of images, which must be on one device: training.batch_size = 24 in "
        r"training.grad_accum_steps = 1 gives each of 8 devices 3; the next batch size with an even number is 32$"
    )
    with pytest.raises(ConfigError, match=said):
        layout("mesh", 8).check(24, 1, "augment.mixup = 0.2")


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
    assert devices.start(Run(mesh="fsdp:8")).mesh.shape == {"data": 1, "fsdp": 8}
    assert not caplog.text
