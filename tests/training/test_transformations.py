"""SAM, rates by depth and averages of parameters, against NumPy and steps written out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from tests.models.small import make
from vit_jax.config import Optimizer
from vit_jax.training import optimizer as optimizers
from vit_jax.training.state import create
from vit_jax.training.step import Batch, train_step
from vit_jax.training.transformations import average, averaged, sam, scale_by_depth


def random_like(tree, seed=0):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), tree)


PARAMS = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_average_is_the_normalised_sum_of_what_updates_made(decay):
    """By the definition in float64; the parameters before the first update have no weight."""
    optimizer = optax.chain(optax.sgd(0.1), average(decay))
    params, state, history = PARAMS, optimizer.init(PARAMS), []
    for step in range(6):
        updates, state = optimizer.update(random_like(params, step), state, params)
        params = optax.apply_updates(params, updates)
        history.append(np.asarray(params["head"]["kernel"], np.float64))
        weights = [(1 - decay) * decay ** (step - i) for i in range(step + 1)]
        np.testing.assert_allclose(sum(weights), 1 - decay ** (step + 1), rtol=1e-9)
        expected = sum(w * p for w, p in zip(weights, history, strict=True)) / sum(weights)
        found = averaged(params, state)
        np.testing.assert_allclose(found["head"]["kernel"], expected, rtol=1e-6, atol=1e-6)
    assert not np.allclose(found["head"]["kernel"], params["head"]["kernel"])


def test_average_agrees_with_optax_ema():
    """optax.ema(debias=True) of the parameters as if they were updates."""
    optimizer, reference = optax.chain(optax.sgd(0.1), average(0.7)), optax.ema(0.7, debias=True)
    params, state, other = PARAMS, optimizer.init(PARAMS), reference.init(PARAMS)
    for step in range(4):
        updates, state = optimizer.update(random_like(params, step), state, params)
        params = optax.apply_updates(params, updates)
        expected, other = reference.update(params, other)
    for ours, theirs in zip(jax.tree.leaves(averaged(params, state)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_average_is_absent_from_other_states_and_leaves():
    plain = optax.sgd(0.1).init(PARAMS)
    assert averaged(PARAMS, plain)["head"]["kernel"] is PARAMS["head"]["kernel"]
    mask = {"head": {"kernel": True, "bias": False}}
    state = optax.masked(average(0.5), mask).init({"head": {"kernel": jnp.full((3, 2), 7.0), "bias": jnp.zeros(2)}})
    found = averaged(PARAMS, state)
    assert float(found["head"]["kernel"][0, 0]) == 7 and found["head"]["bias"] is PARAMS["head"]["bias"]


def test_first_average_is_a_copy():
    """A step gives away the memory of its state, which must not hold an array twice."""
    state = average(0.5).init(PARAMS)
    assert state.params["head"]["kernel"].unsafe_buffer_pointer() != PARAMS["head"]["kernel"].unsafe_buffer_pointer()


def test_rates_by_depth_follow_beit():
    """A table by hand for two blocks: 0 for embedding, class token and positions, 3 for the last LayerNorm and the head."""
    _, params, _ = make(representation_size=8)
    ones = jax.tree.map(jnp.ones_like, params)
    transformation = scale_by_depth(0.5)
    updates, _ = transformation.update(ones, transformation.init(params))
    for name, leaf in flatten_dict(updates, sep="/").items():
        powers = {"embedding/": 3, "cls": 3, "posembed": 3, "encoderblock_0/": 2, "encoderblock_1/": 1}
        power = next((power for part, power in powers.items() if part in name), 0)
        np.testing.assert_array_equal(leaf, np.full(leaf.shape, 0.5**power, np.float32), err_msg=name)
    assert float(updates["head"]["kernel"][0, 0]) == float(updates["pre_logits"]["bias"][0]) == 1


def test_rates_by_depth_scale_the_whole_update_of_adamw():
    """Its decay included, as if each layer had its own learning rate."""
    _, params, _ = make()
    settings = dict(name="adamw", learning_rate=0.1, weight_decay=0.3, clip_norm=0.0, accumulator_dtype="float32")
    plain, decayed = (optimizers.build(Optimizer(**settings, layer_decay=decay), 10**9) for decay in (1.0, 0.5))
    gradients = random_like(params)
    expected, found = (optimizer.update(gradients, optimizer.init(params), params)[0] for optimizer in (plain, decayed))
    block = ("Transformer", "encoderblock_0", "MlpBlock_3", "Dense_0", "kernel")
    ours, theirs = (functools.reduce(dict.__getitem__, block, tree) for tree in (found, expected))
    np.testing.assert_allclose(ours, 0.25 * theirs, rtol=1e-6)
    np.testing.assert_allclose(found["head"]["kernel"], expected["head"]["kernel"], rtol=1e-6)


def test_rates_by_depth_without_blocks_are_refused():
    with pytest.raises(ValueError, match="needs parameters of blocks"):
        scale_by_depth(0.5).init(PARAMS)


def test_sam_takes_the_gradient_up_the_slope():
    """A quadratic function, whose gradient is known: ½ pᵀ A p."""
    draw = np.random.default_rng(0)
    matrix, params = draw.normal(size=(4, 4)), draw.normal(size=4)
    matrix = matrix + matrix.T
    ours = sam(0.3)
    found, _ = ours.update(
        {"p": jnp.asarray(matrix @ params, jnp.float32)},
        ours.init(None),
        {"p": jnp.asarray(params, jnp.float32)},
        gradient_at=lambda tree: {"p": jnp.asarray(matrix, jnp.float32) @ tree["p"]},
    )
    gradient = matrix @ params
    np.testing.assert_allclose(found["p"], matrix @ (params + 0.3 * gradient / np.linalg.norm(gradient)), rtol=1e-5)


def test_sam_keeps_the_first_gradient_if_the_second_is_not_finite():
    first, ours = {"p": jnp.array([3.0, 4.0])}, sam(0.3)
    found, _ = ours.update(first, ours.init(None), first, gradient_at=lambda tree: {"p": tree["p"] * jnp.nan})
    np.testing.assert_array_equal(found["p"], first["p"])


def test_sam_of_a_flat_loss_is_finite():
    ours = sam(0.3)
    zero = {"p": jnp.zeros(3)}
    found, _ = ours.update(zero, ours.init(None), {"p": jnp.ones(3)}, gradient_at=lambda tree: tree)
    np.testing.assert_array_equal(found["p"], np.ones(3))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_step_with_sam_equals_two_gradients_by_hand(microbatches):
    """SGD with momentum, clipping and an average, three steps of a loss that depends on the step."""
    draw = np.random.default_rng(0)
    params = {"head": {"kernel": jnp.asarray(draw.normal(size=(3, 2)), jnp.float32)}}
    images, labels = draw.normal(size=(4, 3)).astype(np.float32), np.array([0, 1, 1, 0], np.int32)

    def loss(params, images, labels, step):
        logits = images @ params["head"]["kernel"] * (1 + step)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def forward(params, batch, data, step, key):
        return loss(params, batch.images, batch.labels, step)

    settings = Optimizer(
        learning_rate=0.5, decay="linear", momentum=0.9, clip_norm=0.4, accumulator_dtype="float32", sam_rho=0.2, ema=0.6
    )
    optimizer = optimizers.build(settings, 10**9)
    step = jax.jit(functools.partial(train_step, forward=forward, optimizer=optimizer, seed=0))
    batch = Batch(images=images.reshape(microbatches, -1, 3), labels=labels.reshape(microbatches, -1))
    state, kernel, trace, mean = create(params, optimizer), params["head"]["kernel"], 0.0, 0.0
    for number in range(3):
        state, metrics = step(state, batch, None)

        def gradient(kernel, number=number):
            return jax.grad(loss)({"head": {"kernel": kernel}}, images, labels, number)["head"]["kernel"]

        first = gradient(kernel)
        np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(first), rtol=1e-5)  # of the loss that is reported
        second = gradient(kernel + 0.2 * first / np.linalg.norm(first))
        trace = 0.9 * trace + second * min(1.0, 0.4 / np.linalg.norm(second))
        kernel = kernel - 0.5 * trace
        mean = 0.6 * mean + 0.4 * kernel
        np.testing.assert_allclose(state.params["head"]["kernel"], kernel, rtol=1e-5)
        average_now = averaged(state.params, state.opt_state)["head"]["kernel"]
        np.testing.assert_allclose(average_now, mean / (1 - 0.6 ** (number + 1)), rtol=1e-5)
