"""Properties of the model that no oracle of numbers shows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small import TINY, make
from vit_jax.models.variants import build, shapes


@pytest.mark.parametrize(("variant", "size"), [("B/16", 32), ("R+Ti/16", 64), ("R26+S/32", 32)])
def test_dtype_reaches_every_layer(variant, size):
    fields = dict(resnet=(1, 1), resnet_width=32) if variant.startswith("R26") else {}
    model = build(variant, **{**TINY, "num_classes": 3, "dtype": jnp.bfloat16, "representation_size": 16, **fields})
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    params = shapes(model, size)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}

    def inside(params, images):
        return model.apply({"params": params}, images, mutable="intermediates", capture_intermediates=True)

    logits, state = jax.eval_shape(inside, params, images)
    assert logits.dtype == jnp.float32
    outputs = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    assert len(outputs) > 20
    for path, leaf in outputs:
        # Softmax is float32 by promise, and so is the result of the whole, which has no name in its path.
        by_promise = path[-2].key == "attention_weights" or (len(path) == 2 and leaf.shape == logits.shape)
        assert leaf.dtype == (jnp.float32 if by_promise else jnp.bfloat16), path


def test_gap_without_positions_ignores_the_order_of_patches():
    model, params, images = make(classifier="gap")
    params["Transformer"]["posembed_input"]["pos_embedding"] *= 0
    swapped = jnp.concatenate([images[:, 16:], images[:, :16]], axis=1)
    np.testing.assert_allclose(
        model.apply({"params": params}, images), model.apply({"params": params}, swapped), rtol=1e-4, atol=1e-5
    )


def test_head_is_initialised_with_zeros():
    model = build("B/16", **TINY, num_classes=3)
    images = jnp.ones((1, 32, 32, 3))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    assert not params["head"]["kernel"].any() and not model.apply({"params": params}, images).any()


def test_dropout_is_active_only_in_training():
    model, params, images = make(dropout=0.5, attention_dropout=0.5, num_classes=0)
    apply = lambda train, key: model.apply({"params": params}, images, train, rngs={"dropout": jax.random.key(key)})  # noqa: E731
    assert (apply(False, 0) == apply(False, 1)).all()
    assert (apply(True, 0) != apply(True, 1)).any()


@pytest.mark.parametrize("name", ["dropout", "attention_dropout"])
def test_each_dropout_is_read(name):
    model, params, images = make(num_classes=0, **{name: 0.5})
    dropped = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
    assert (dropped != model.apply({"params": params}, images)).any()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 40, 32, 3), "40×32 pixels do not divide into patches of 16"),
        ((1, 32, 32, 4), r"expected images \[B, H, W, 3\]"),
        ((1, 48, 32, 3), "make 7 tokens of 32 values, the parameters hold positions for 5 of 32"),
    ],
)
def test_images_of_a_wrong_shape_are_refused(shape, message):
    model, params, _ = make()
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, jnp.zeros(shape))


def test_uint8_images_are_refused():
    model, params, _ = make()
    with pytest.raises(ValueError, match="floating point numbers, got uint8: vit_jax.preprocess"):
        model.apply({"params": params}, jnp.zeros((1, 32, 32, 3), jnp.uint8))


def test_unknown_classifier_is_refused():
    with pytest.raises(ValueError, match="classifier must be 'token' or 'gap', got 'tok'"):
        shapes(build("B/16", classifier="tok"), 32)


def test_dropout_is_in_the_places_of_the_original():
    """After the positions, the attention's output, and both layers of the MLP."""
    model, params, images = make(dropout=0.5, num_layers=1)
    seen = []
    original = nn.Dropout.__call__

    def spy(self, inputs, *args, **kwargs):
        if self.rate:  # stochastic depth is off
            seen.append((type(self.parent).__name__, inputs.shape[-1]))
        return original(self, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Dropout, "__call__", spy)
        model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
    assert seen == [("Encoder", 32), ("EncoderBlock", 32), ("MlpBlock", 64), ("MlpBlock", 32)]


def test_attention_dropout_is_active_only_in_training():
    model, params, images = make(attention_dropout=0.5)
    asked = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
    plain = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(1)})
    assert np.abs(asked - plain).max() > 1e-3
    np.testing.assert_allclose(model.apply({"params": params}, images), make()[0].apply({"params": params}, images), rtol=1e-6)


def test_remat_gives_the_same_gradient_with_less_memory():
    model, params, images = make(num_layers=4, dropout=0.1)
    again = model.clone(remat=True)

    def loss(model, params):
        return model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})[:, 0].sum()

    def kept(model) -> int:  # size of what the backward pass holds in addition to parameters
        back = jax.eval_shape(lambda params: jax.vjp(lambda p: loss(model, p), params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(back))

    ours, theirs = (jax.jit(jax.grad(lambda p, m=m: loss(m, p)))(params) for m in (model, again))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 3 * (kept(again) - weights) < kept(model) - weights
    assert jax.tree.structure(shapes(again, 32)) == jax.tree.structure(shapes(model, 32))


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="attention must be 'xla' or 'cudnn', got 'flash'"):
        make(attention="flash")


def branches(depth=4, rate=0.6, count=400, key=0):
    """Per block and image, how much of an image's residual branches is added in training: attention and MLP, [2, depth, B]."""
    model, params, _ = make(num_layers=depth, classifier="gap")
    model = model.clone(stochastic_depth=rate)
    images = jnp.broadcast_to(jnp.linspace(-1, 1, 32 * 32 * 3).reshape(1, 32, 32, 3), (count, 32, 32, 3))
    found, inputs = [], []

    def interceptor(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.module.name == "stochastic_depth" and context.method_name == "__call__":
            found.append(np.asarray(y)[:, :, :])
            inputs.append(np.asarray(args[0]))
        return y

    with nn.intercept_methods(interceptor):
        model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(key)})
    share = [np.median(y / x, axis=(1, 2)) for x, y in zip(inputs, found, strict=True)]
    for x, y, value in zip(inputs, found, share, strict=True):  # of whole images: all tokens and values alike
        np.testing.assert_allclose(y, x * value[:, None, None], rtol=1e-5, atol=1e-6)
    return np.array(share).reshape(depth, 2, count)


def test_stochastic_depth_rises_linearly_and_keeps_the_mean():
    """The share of images that skip a branch, from 0 to the rate; the others are divided by the probability to be kept."""
    shares = branches()
    for block, both in enumerate(shares):
        rate = 0.6 * block / 3
        for branch in both:
            assert set(np.round(branch, 4)) == ({1.0} if not block else {0.0, np.round(1 / (1 - rate), 4).astype(np.float32)})
            assert abs((branch == 0).mean() - rate) < 4 * np.sqrt(0.25 / 400)
    assert (shares[3, 0] != shares[3, 1]).any() and (shares[3] != shares[2]).any()
    np.testing.assert_array_equal(shares, branches())
    assert (shares != branches(key=1)).any()


def test_stochastic_depth_is_off_in_evaluation():
    model, params, images = make()
    expected = model.apply({"params": params}, images)
    np.testing.assert_array_equal(model.clone(stochastic_depth=0.9).apply({"params": params}, images), expected)
