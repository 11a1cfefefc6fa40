"""Which parameters are trained, and adapters, against the same computed on activations."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import vit_jax
from tests.models.small import make
from vit_jax import metrics as metrics_file
from vit_jax.config import Config, Model, Optimizer
from vit_jax.config_rules import CHOICES
from vit_jax.errors import ConfigError
from vit_jax.formats.google import read_npz, save_npz
from vit_jax.training import loop, restore, tuning
from vit_jax.training import optimizer as optimizers
from vit_jax.training.state import create
from vit_jax.training.step import Batch, train_step
from vit_jax.training.target import Target
from vit_jax.transforms.keys import LORA, stream

ATTENTION = "MultiHeadDotProductAttention_1"


def settings_of(tune, **fields) -> Model:
    return Model(checkpoint="x.npz", tune=tune, **fields)


def drawn(tree, settings):
    """A tree with adapters that training has moved away from their start."""
    draw, params = np.random.default_rng(1), tuning.initial(tree, settings, stream(0, LORA))
    moved = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * draw.normal(size=leaf.shape), jnp.float32), params["adapters"])
    return {**params, "adapters": moved}


def trained_names(tune, **fields):
    _, params, _ = make(**fields)
    settings = settings_of(tune)
    tree = tuning.initial(params, settings, stream(0, LORA))
    flat = flatten_dict(tuning.trainable(tree, settings), sep="/")
    return {name for name, is_trained in flat.items() if is_trained}, set(flat)


def test_parts_are_those_of_the_papers():
    head = {"head/kernel", "head/bias"}
    names, every = trained_names("all")
    assert names == every
    assert trained_names("head")[0] == head
    names, _ = trained_names("attention")
    parts = [f"{part}/{leaf}" for part in ("query", "key", "value", "out") for leaf in ("kernel", "bias")]
    attention = {f"Transformer/encoderblock_{i}/{ATTENTION}/{part}" for i in (0, 1) for part in parts}
    assert names == head | attention | {"Transformer/posembed_input/pos_embedding"}
    names, every = trained_names("frozen_embedding")
    assert every - names == {"embedding/kernel", "embedding/bias"}
    names, every = trained_names("frozen_embedding", variant="R26+S/32", size=32, resnet=(1,), patch_size=1)
    assert {name.split("/")[0] for name in every - names} == {"embedding", "conv_root", "gn_root", "block1"}
    for tune in ("lora", "ssf"):
        names, every = trained_names(tune)
        assert names == head | {name for name in every if name.startswith("adapters/")}


@pytest.mark.parametrize("tune", CHOICES["model.tune"])
def test_head_and_something_is_always_trained(tune):
    """So no choice freezes everything."""
    assert {"head/kernel", "head/bias"} <= trained_names(tune)[0]


@pytest.mark.parametrize("tune", ["lora", "ssf"])
def test_first_logits_are_those_of_the_checkpoint(tune):
    model, params, images = make()
    settings = settings_of(tune)
    merged = tuning.plain(tuning.initial(params, settings, stream(0, LORA)), settings)
    expected = model.apply({"params": params}, images)
    np.testing.assert_array_equal(model.apply({"params": merged}, images), expected)
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_lora_starts_with_random_factors_of_their_own():
    _, params, _ = make()
    adapters = tuning.initial(params, settings_of("lora", lora_rank=4), stream(3, LORA))["adapters"]
    flat = flatten_dict(adapters, sep="/")
    assert {name.split(f"{ATTENTION}/")[1] for name in flat} == {f"{n}/{f}/kernel" for n in ("query", "value") for f in "ab"}
    firsts = [leaf for name, leaf in flat.items() if name.endswith("a/kernel")]
    assert all(leaf.shape == (32, 4) and 0 < np.abs(leaf).max() <= 32**-0.5 for leaf in firsts)
    assert len({leaf.tobytes() for leaf in map(np.asarray, firsts)}) == 4
    assert not any(leaf.any() for name, leaf in flat.items() if name.endswith("b/kernel"))


def with_activations(model, params, settings, images):
    """Logits of the unmerged model: adapters applied to what modules return, with the model's own parameters."""
    adapters = params["adapters"]

    def interceptor(call, args, kwargs, context):
        y, node = call(*args, **kwargs), adapters
        for name in context.module.path:
            node = node.get(name, {})
        if context.method_name == "__call__" and "a" in node:  # x W + s (x A) B
            product = jnp.matmul(args[0] @ node["a"]["kernel"], node["b"]["kernel"])
            y = y + (settings.lora_alpha or settings.lora_rank) / settings.lora_rank * product.reshape(y.shape)
        if context.method_name == "__call__" and "shift" in node:  # γ y + δ
            broadcast = (1,) * (y.ndim - node["scale"].ndim)
            y = node["scale"].reshape(broadcast + node["scale"].shape) * y + node["shift"].reshape(
                broadcast + node["shift"].shape
            )
        return y

    with nn.intercept_methods(interceptor):
        return model.apply({"params": tuning.model_tree(params)}, images)


@pytest.mark.parametrize(
    "fields", [dict(tune="lora", lora_rank=3), dict(tune="lora", lora_rank=3, lora_alpha=6.0), dict(tune="ssf")]
)
def test_exported_weights_give_the_logits_of_the_unmerged_model(fields, tmp_path):
    model, params, images = make()
    settings = settings_of(**fields)
    params = drawn(params, settings)
    expected = with_activations(model, params, settings, images)
    assert np.abs(expected - model.apply({"params": tuning.model_tree(params)}, images)).max() > 1e-3
    save_npz(tmp_path / "merged.npz", tuning.plain(params, settings))
    loaded, weights = vit_jax.load(str(tmp_path / "merged.npz"))
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(loaded.apply({"params": weights}, images), expected, atol=1e-6 * scale, rtol=0)


def test_ssf_is_after_each_dense_layer_and_layernorm():
    _, params, _ = make()
    flat = flatten_dict(tuning.initial(params, settings_of("ssf"), stream(0, LORA))["adapters"], sep="/")
    block = {"LayerNorm_0", "LayerNorm_2", "MlpBlock_3/Dense_0", "MlpBlock_3/Dense_1"}
    block |= {f"{ATTENTION}/{name}" for name in ("query", "key", "value", "out")}
    modules = {f"Transformer/encoderblock_{i}/{name}" for i in (0, 1) for name in block}
    modules |= {"embedding", "Transformer/encoder_norm"}
    assert set(flat) == {f"{module}/{kind}" for module in modules for kind in ("scale", "shift")}


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["head", "attention", "frozen_embedding", "lora", "ssf"])
def test_frozen_parameters_have_no_gradient_and_keep_their_values(tune):
    """And the gradients of the others are those of a run that trains everything."""
    model, params, images = make()
    settings = settings_of(tune)
    params["head"]["kernel"] = params["head"]["kernel"] + 0.1
    params = tuning.initial(params, settings, stream(0, LORA))
    trained = tuning.trainable(params, settings)

    def loss(tree):
        return jnp.sum(model.apply({"params": tree}, images) ** 2)

    def forward(tree, batch, data, step, key):
        return loss(tuning.plain(tree, settings))

    gradients = jax.jit(jax.grad(lambda tree: loss(tuning.plain(tree, settings))))(params)
    for is_trained, leaf in zip(jax.tree.leaves(trained), jax.tree.leaves(gradients), strict=True):
        assert is_trained or not np.any(leaf)
    expected = jax.jit(jax.grad(loss))(tuning.model_tree(params))
    np.testing.assert_allclose(gradients["head"]["kernel"], expected["head"]["kernel"], rtol=1e-5)
    optimizer = optimizers.build(Optimizer(name="adamw", weight_decay=0.1, ema=0.9), 10, tuning.mask(settings))
    step = jax.jit(functools.partial(train_step, forward=forward, optimizer=optimizer, seed=0))
    state, metrics = step(create(params, optimizer), Batch(images=images[None]), None)
    own = [leaf for is_, leaf in zip(jax.tree.leaves(trained), jax.tree.leaves(gradients), strict=True) if is_]
    np.testing.assert_allclose(metrics["gradient_norm"], np.sqrt(sum(np.square(leaf).sum() for leaf in own)), rtol=1e-4)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, params)
    flat, may = flatten_dict(moved, sep="/"), flatten_dict(trained, sep="/")
    assert not {name for name in flat if flat[name] and not may[name]} and flat["head/kernel"]
    sizes = [leaf.size for is_, leaf in zip(jax.tree.leaves(trained), jax.tree.leaves(params), strict=True) if is_]
    held = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(held) == 3 * sum(sizes)  # two moments and the average, of what is trained


def test_description_counts_what_is_trained():
    _, params, _ = make()
    tree = tuning.initial(params, settings_of("lora", lora_rank=2), stream(0, LORA))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    added = 2 * 2 * (32 * 2 + 2 * 32)
    assert tuning.describe(tree, settings_of("lora")) == f"{added + 99:,} of {total + added:,} parameters trained"
    assert tuning.describe(params, settings_of("all")) == f"{total:,} parameters"


# Runs, which resume to the byte.


def tuned(config: Config, tune: str) -> Config:
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, tune=tune, lora_rank=4, dropout=0.1),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5, ema=0.7, sam_rho=0.05),
    )
    if tune == "attention":
        muon = dict(name="muon", learning_rate=0.05, layer_decay=0.75, weight_decay=0.1)
        config.optimizer = dataclasses.replace(config.optimizer, **muon)
    config.data.validation_split = "train[64:96]"
    return config


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", pytest.param("ssf", marks=pytest.mark.full), "attention"])
def test_tuned_run_resumes_exactly(config, tmp_path, monkeypatch, tune):
    """Ended after the state of step 5, it leaves the arrays and numbers of the run that was not."""
    config = tuned(config, tune)
    whole = loop.train(config, tmp_path / "whole")
    original = loop.Guard.stops
    with monkeypatch.context() as patched:
        patched.setattr(loop.Guard, "stops", lambda guard, step: step == 5 or original(guard, step))
        assert not loop.train(config, tmp_path / "cut").finished
    assert restore.steps(tmp_path / "cut" / "checkpoints") == [5]
    again = loop.train(config, tmp_path / "cut")
    assert again.metrics == whole.metrics and again.finished
    for name in ("final.npz", "best.npz", "predictions.npz"):
        with np.load(tmp_path / "whole" / name) as expected, np.load(tmp_path / "cut" / name) as found:
            assert expected.files == found.files
            assert all(expected[key].tobytes() == found[key].tobytes() for key in expected.files)

    def lines(workdir):
        return [
            {name: value for name, value in line.items() if "per_second" not in name} for line in metrics_file.read(workdir)
        ]

    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert loop.train(config, tmp_path / "cut").metrics == whole.metrics  # a finished run changes nothing
    # What is evaluated is averaged, merged and exported; the parameters before averaging are next to it.
    last = metrics_file.read(tmp_path / "whole")[-2]
    assert last["step"] == 12 and last["test/raw_loss"] != last["test/loss"] and "validation/raw_accuracy" in last
    found = loop.evaluate(config, tmp_path / "whole")
    assert {name: whole.metrics[name] for name in found} == found and "test/raw_accuracy" in found
    weights = read_npz(tmp_path / "whole" / "final.npz")
    assert "adapters" not in weights and json.loads((tmp_path / "whole" / "final.json").read_text())["step"] == 12
    for ours, theirs in zip(jax.tree.leaves(weights), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_frozen_weights_of_a_run_are_those_of_its_checkpoint(config, tmp_path):
    config = tuned(config, "head")
    before, after = read_npz(config.model.checkpoint), loop.train(config, tmp_path).params
    flat = flatten_dict(after, sep="/")
    for name, leaf in flatten_dict(before, sep="/").items():
        assert name.startswith("head/") or np.array_equal(leaf, flat[name])
    assert np.any(flat["head/kernel"])


def test_rank_above_the_width_is_refused_before_training(config, tmp_path, capsys):
    config.model.tune, config.model.lora_rank = "lora", 17
    with pytest.raises(ConfigError, match=r"^model.lora_rank = 17 is above 16, the width of model.checkpoint = '.*tiny.npz'$"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="^model.lora_rank = 17 is above 16"):
        Target(config, jax.devices("cpu")[:1])
    config.model.lora_rank = 16
    config.training.steps = 3
    loop.train(config, tmp_path / "run")
    assert "parameters trained at 16 px" in capsys.readouterr().err


def test_rank_above_the_width_is_refused_before_a_checkpoint_is_downloaded(config, tmp_path):
    config.model.tune, config.model.checkpoint, config.model.lora_rank = "lora", "B_16", 769
    with pytest.raises(ConfigError, match="^model.lora_rank = 769 is above 768, the width of model.checkpoint = 'B_16'$"):
        loop.train(config, tmp_path / "run")


def test_merging_leaves_a_tree_without_adapters_as_it_is():
    _, params, _ = make()
    flat = flatten_dict(tuning.plain(params, settings_of("all")), sep="/")
    assert all(leaf is flat[name] for name, leaf in flatten_dict(params, sep="/").items())
    assert unflatten_dict(flat, sep="/").keys() == params.keys()
