"""Learning rates and updates, compared with the original and with arithmetic by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.config import Optimizer
from vit_jax.training import optimizer as optimizers


def sgd(gradient, settings, params, state):
    """One update by hand, in NumPy: clip, decay of kernels, momentum."""
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in gradient.values()))
    scale = min(1.0, settings.clip_norm / norm) if settings.clip_norm else 1.0
    for name in params:
        decay = settings.weight_decay * params[name] if name.endswith("kernel") else 0
        state[name] = settings.momentum * state[name] + scale * gradient[name] + decay
        params[name] = params[name] - settings.learning_rate * state[name]


def adamw(gradient, settings, params, state, count):
    for name in params:
        first, second = state.setdefault((name, 1), 0.0), state.setdefault((name, 2), 0.0)
        state[name, 1] = first = settings.momentum * first + (1 - settings.momentum) * gradient[name]
        state[name, 2] = second = settings.b2 * second + (1 - settings.b2) * gradient[name] ** 2
        step = (first / (1 - settings.momentum**count)) / (np.sqrt(second / (1 - settings.b2**count)) + 1e-8)
        decay = settings.weight_decay * params[name] if name.endswith("kernel") else 0
        params[name] = params[name] - settings.learning_rate * (step + decay)


@pytest.mark.parametrize(
    "settings",
    [
        Optimizer(momentum=0.8, clip_norm=0.5, weight_decay=0.1),
        Optimizer(momentum=0.5, clip_norm=0.0),
        Optimizer(name="adamw", momentum=0.7, b2=0.8, clip_norm=0.0, weight_decay=0.2),
    ],
)
def test_updates_agree_with_hand_computation(settings):
    settings.accumulator_dtype = "float32"
    settings.decay, settings.learning_rate = "linear", 0.05
    steps = 10**9  # so long that the rate does not move
    draw = np.random.default_rng(0)
    params = {"a/kernel": draw.normal(size=(3, 2)), "a/bias": draw.normal(size=2)}
    optimizer = optimizers.build(settings, steps)
    tree = unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in params.items()}, sep="/")
    state, ours = optimizer.init(tree), dict.fromkeys(params, 0.0)
    for count in range(1, 4):
        gradient = {name: draw.normal(size=leaf.shape) for name, leaf in params.items()}
        updates, state = optimizer.update(
            unflatten_dict({k: jnp.asarray(v, jnp.float32) for k, v in gradient.items()}, sep="/"), state, tree
        )
        tree = optax.apply_updates(tree, updates)
        if settings.name == "sgd":
            sgd(gradient, settings, params, ours)
        else:
            adamw(gradient, settings, params, ours, count)
        for name, leaf in flatten_dict(tree, sep="/").items():
            np.testing.assert_allclose(leaf, params[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedule_equals_the_original(decay, warmup):
    """create_learning_rate_schedule of its vit_jax/utils.py, whose linear decay ends at 1e-5."""
    rate = optimizers.schedule(Optimizer(learning_rate=0.5, warmup_steps=warmup, decay=decay), 11)
    for count in range(12):
        progress = np.clip((count - warmup) / (11 - warmup), 0, 1)
        decayed = 0.5 * (1 + np.cos(np.pi * progress)) / 2 if decay == "cosine" else 1e-5 + (0.5 - 1e-5) * (1 - progress)
        expected = decayed * (min(1, count / warmup) if warmup else 1)
        np.testing.assert_allclose(rate(count), expected, rtol=1e-6, atol=1e-7)


def test_schedule_of_the_last_update_is_as_documented():
    """T = 11 updates, w = 3 of them warm-up; a rate below 1e-5 does not rise."""
    of = {
        decay: optimizers.schedule(Optimizer(learning_rate=0.5, warmup_steps=3, decay=decay), 11)
        for decay in ("cosine", "linear")
    }
    assert of["cosine"](10) == pytest.approx(0.5 * (1 + np.cos(np.pi * 7 / 8)) / 2, rel=1e-5)
    assert of["linear"](10) == pytest.approx(1e-5 + (0.5 - 1e-5) / 8, rel=1e-5)
    small = optimizers.schedule(Optimizer(learning_rate=1e-6, decay="linear"), 10)
    assert small(0) == small(9) == pytest.approx(1e-6)


def tree_of(names, seed=0):
    """Random float32 leaves of given names and shapes."""
    draw = np.random.default_rng(seed)
    return unflatten_dict(
        {name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in sorted(names.items())}, sep="/"
    )


def trajectory(optimizer, params, steps=4):
    """The parameters after some updates with random gradients."""
    state = optimizer.init(params)
    for step in range(1, steps + 1):
        gradients = tree_of({name: leaf.shape for name, leaf in flatten_dict(params, sep="/").items()}, step)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return flatten_dict(params, sep="/")


KERNELS = {"a/kernel": (3, 2), "b/kernel": (4, 3)}
CONSTANT = dict(learning_rate=0.1, decay="linear", clip_norm=0.0, accumulator_dtype="float32", weight_decay=0.2)


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (dict(name="lamb", momentum=0.8, b2=0.9), optax.lamb(0.1, 0.8, 0.9, weight_decay=0.2)),
        (dict(name="lars", momentum=0.8), optax.lars(0.1, weight_decay=0.2, momentum=0.8)),
    ],
)
def test_lamb_and_lars_of_kernels_are_those_of_optax(settings, reference):
    params = tree_of(KERNELS)
    ours = trajectory(optimizers.build(Optimizer(**CONSTANT, **settings), 10**9), params)
    for name, leaf in trajectory(reference, params).items():
        np.testing.assert_allclose(ours[name], leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_trust_ratio_and_decay_are_of_kernels_only(name):
    """A bias has the update of Adam or of SGD with momentum, by hand."""
    params = tree_of({"a/kernel": (3, 2), "a/bias": (2,)})
    ours = trajectory(optimizers.build(Optimizer(name=name, **CONSTANT), 10**9), params)
    reference = optax.adam(0.1, eps=1e-6) if name == "lamb" else optax.sgd(0.1, 0.9)
    np.testing.assert_allclose(ours["a/bias"], trajectory(reference, params)["a/bias"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_new_head_is_trained_without_a_trust_ratio(name):
    """Its kernel is zero, and with the ratio its norm could grow only by the factor 1 + rate a step."""
    params = {module: {"kernel": jnp.zeros((3, 2))} for module in ("head", "a")}
    optimizer = optimizers.build(Optimizer(name=name, learning_rate=0.01, warmup_steps=5, clip_norm=0.0), 50)
    state, gradient = optimizer.init(params), {module: {"kernel": jnp.ones((3, 2))} for module in params}
    for _ in range(50):
        updates, state = optimizer.update(gradient, state, params, gradient_at=None)
        params = optax.apply_updates(params, updates)
    head, other = (float(jnp.abs(params[module]["kernel"]).max()) for module in ("head", "a"))
    assert head > 0.1 and other < head / 10


BLOCK = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
MUON = {
    f"{BLOCK}/query/kernel": (6, 2, 3),
    f"{BLOCK}/out/kernel": (2, 3, 6),
    f"{BLOCK}/out/bias": (6,),
    "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": (6, 8),
    "Transformer/posembed_input/pos_embedding": (1, 5, 6),
    "embedding/kernel": (2, 2, 3, 6),
    "head/kernel": (6, 4),
}


@pytest.mark.slow
def test_muon_of_attention_is_that_of_its_matrices():
    """optax.contrib.muon of the same values as matrices [D, heads · K] and [heads · K, D], Adam for all outside the blocks."""
    params = tree_of(MUON)
    settings = CONSTANT | dict(weight_decay=0.0)
    ours = trajectory(optimizers.build(Optimizer(name="muon", momentum=0.8, b2=0.9, **settings), 10**9), params)
    matrices = {"query/kernel": (6, 6), "out/kernel": (6, 6)}

    def flat(tree):
        found = {}
        for name, leaf in flatten_dict(tree, sep="/").items():
            shape = next((shape for end, shape in matrices.items() if name.endswith(end)), leaf.shape)
            found[name] = leaf.reshape(shape)
        return found

    def dimensions(tree):
        return {
            name: optax.contrib.MuonDimensionNumbers() if "encoderblock" in name and name.endswith("kernel") else None
            for name in tree
        }

    fields = dict(beta=0.8, adam_b1=0.8, adam_b2=0.9, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions)
    reference = optax.contrib.muon(0.1, **fields)
    theirs, state = flat(params), reference.init(flat(params))
    for step in range(1, 5):
        updates, state = reference.update(flat(tree_of(MUON, step)), state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for name, leaf in theirs.items():
        np.testing.assert_allclose(ours[name].reshape(leaf.shape), leaf, rtol=1e-5, atol=1e-5, err_msg=name)


def test_muon_makes_updates_of_one_size_orthogonal():
    """One update by hand: a product of orthonormal columns, to what five Newton-Schulz steps reach, of AdamW's size."""
    params = tree_of(MUON)
    settings = Optimizer(name="muon", **CONSTANT | dict(learning_rate=1.0, weight_decay=0.0))
    optimizer = optimizers.build(settings, 10**9)
    updates, _ = optimizer.update(tree_of(MUON, 1), optimizer.init(params), params)
    query = np.asarray(flatten_dict(updates, sep="/")[f"{BLOCK}/query/kernel"]).reshape(6, 6)
    values = np.linalg.svd(query / (0.2 * np.sqrt(6)), compute_uv=False)
    assert (0.5 < values).all() and (values < 1.5).all()


def test_muon_decays_kernels_inside_and_outside_of_blocks():
    params = tree_of(MUON)
    plain, decayed = (
        trajectory(optimizers.build(Optimizer(name="muon", **CONSTANT | dict(weight_decay=decay)), 10**9), params, steps=1)
        for decay in (0.0, 0.2)
    )
    before = flatten_dict(params, sep="/")
    for name, leaf in decayed.items():
        expected = plain[name] - (0.1 * 0.2 * before[name] if name.endswith("kernel") else 0.0)
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("scaling", "batch", "base", "peak"), [("linear", 512, 128, 0.4), ("sqrt", 512, 128, 0.2), ("linear", 64, 128, 0.05)]
)
def test_peak_rate_follows_the_batch_size(scaling, batch, base, peak):
    settings = optimizers.scaled(Optimizer(learning_rate=0.1, base_batch_size=base, rate_scaling=scaling), batch)
    assert settings.learning_rate == pytest.approx(peak, rel=1e-12)
    assert optimizers.schedule(settings, 10)(0) == pytest.approx(peak)
    assert optimizers.scaled(settings, 4096) == settings  # it is scaled once


def test_rate_without_a_base_batch_size_is_as_given():
    settings = Optimizer(learning_rate=0.1)
    assert optimizers.scaled(settings, 4096) is settings


def test_plain_optimizers_keep_the_structure_of_their_states():
    """Else a run of an earlier version could not go on."""
    params = tree_of(KERNELS)
    assert [type(part).__name__ for part in optimizers.build(Optimizer(), 10).init(params)] == [
        "EmptyState", "TraceState", "ScaleByScheduleState",
    ]  # fmt: skip


def test_frozen_parameters_have_no_state_and_do_not_change():
    params = tree_of(KERNELS)
    optimizer = optimizers.build(
        Optimizer(ema=0.5), 10, lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "a", tree)
    )
    assert {leaf.shape for leaf in jax.tree.leaves(optimizer.init(params))} == {(), (3, 2)}
    after = trajectory(optimizer, params)
    np.testing.assert_array_equal(after["b/kernel"], params["b"]["kernel"])
    assert not np.array_equal(after["a/kernel"], params["a"]["kernel"])
