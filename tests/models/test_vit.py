"""Properties of the model that no oracle of numbers shows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.intermediates import attention_maps, features, stages
from vit_jax.models.layers import dot_product_attention
from vit_jax.models.variants import build, shapes

TINY = dict(hidden_size=32, num_layers=2, num_heads=2, mlp_dim=64)


def make(variant: str = "B/16", size: int = 32, **fields):
    model = build(variant, **{**TINY, "num_classes": 3, **fields})
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(scale=0.2, size=leaf.shape), leaf.dtype), shapes(model, size))
    return model, params, jnp.asarray(draw.normal(size=(2, size, size, 3)), jnp.float32)


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


def test_attention_maps_cost_nothing_unless_requested(monkeypatch):
    model, params, images = make()

    def lowered() -> str:
        return jax.jit(lambda *args: model.apply({"params": args[0]}, args[1])).lower(params, images).as_text()

    with_weights = lowered()
    monkeypatch.setattr(nn.Module, "sow", None)
    monkeypatch.setattr(nn, "dot_product_attention", None)
    assert lowered() == with_weights


def test_attention_rows_sum_to_one():
    maps = attention_maps(*make())
    assert maps.shape == (2, 2, 2, 5, 5)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)


def test_features_are_what_the_head_sees():
    model, params, images = make(representation_size=16)
    seen = features(model, params, images)
    assert seen.shape == (2, 16)
    logits = seen @ params["head"]["kernel"] + params["head"]["bias"].reshape(1, -1)
    np.testing.assert_allclose(model.apply({"params": params}, images), logits, rtol=1e-5)
    # To show their weights, the stages take another way through attention.
    np.testing.assert_allclose(stages(model, params, images)["pre_logits"], seen, rtol=1e-6, atol=1e-7)


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
        seen.append((type(self.parent).__name__, inputs.shape[-1]))
        return original(self, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Dropout, "__call__", spy)
        model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
    assert seen == [("Encoder", 32), ("EncoderBlock", 32), ("MlpBlock", 64), ("MlpBlock", 32)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_is_the_softmax_of_products(dtype):
    draw = np.random.default_rng(0)
    query, key, value = (jnp.asarray(draw.normal(size=(2, 5, 3, 8)), dtype) for _ in range(3))
    found = dot_product_attention(query, key, value, implementation="xla", precision=jax.lax.Precision.HIGHEST)
    assert found.dtype == dtype and found.shape == (2, 5, 3, 8)
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8))
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=1e-6 if dtype == jnp.float32 else 0.02)


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


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")])
@pytest.mark.parametrize("variant", ["B/16", "R+Ti/16"])
def test_precision_of_products_is_explicit(variant, dtype, precision):
    model, params, images = make(variant, 32, dtype=dtype)
    text = jax.jit(lambda p, x: model.apply({"params": p}, x)).lower(params, images).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot" in line or "stablehlo.convolution" in line]
    assert len(products) > 10
    if precision == "HIGHEST":
        assert all("[HIGHEST, HIGHEST]" in line or line.count("HIGHEST") == 2 for line in products)
    else:
        assert not any("HIGHEST" in line for line in products)


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="attention must be 'xla' or 'cudnn', got 'flash'"):
        make(attention="flash")
