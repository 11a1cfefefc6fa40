"""cuDNN's attention of an odd number of tokens: the padding changes no number, and is there only as long as JAX needs it.

XLA's attention takes the place of cuDNN's, called by the same public function with the same lengths.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused_attention

from vit_jax.models import vit
from vit_jax.models.intermediates import attention_maps, attention_rollout, features, stages
from vit_jax.models.layers import pad_tokens
from vit_jax.models.variants import build, shapes

TINY = dict(hidden_size=32, num_layers=2, num_heads=2, mlp_dim=64, num_classes=3)
PUBLIC = jax.nn.dot_product_attention


@pytest.fixture
def calls(monkeypatch):
    """(number of tokens, whether some are masked) of each call of cuDNN's attention, which XLA computes here."""
    found = []

    def attention(query, key, value, *, key_value_seq_lengths=None, implementation):
        assert implementation == "cudnn"
        found.append((query.shape[1], key_value_seq_lengths is not None))
        return PUBLIC(query, key, value, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    return found


def make(size: int, **fields):
    """The same model with XLA's and with cuDNN's attention, its parameters and images."""
    model = build("B/16", **{**TINY, **fields})
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(scale=0.2, size=leaf.shape), leaf.dtype), shapes(model, size))
    return model, model.clone(attention="cudnn"), params, jnp.asarray(draw.normal(size=(2, size, size, 3)), jnp.float32)


def assert_equal(ours, theirs) -> None:
    """Every leaf, to 1e-6 of its norm; a key's bias, whose gradient is 0 but for rounding, to 1e-6 of the largest norm."""
    norms = jax.tree.map(lambda leaf: np.linalg.norm(np.asarray(leaf, np.float64)), theirs)
    largest = max(jax.tree.leaves(norms))
    leaves = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), jax.tree.leaves(norms), strict=True)
    for (path, a), b, norm in leaves:
        scale = largest if "['key']['bias']" in jax.tree_util.keystr(path) else norm
        assert np.linalg.norm(np.asarray(a - b, np.float64)) <= 1e-6 * scale, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("size", "fields", "tokens"),
    [
        (32, dict(), (6, True)),
        (32, dict(remat=True), (6, True)),
        (48, dict(classifier="gap", num_layers=1), (10, True)),
        (48, dict(num_layers=1), (10, False)),
    ],
    ids=["token", "remat", "gap", "even"],
)
def test_padding_changes_neither_loss_nor_gradients_nor_logits(calls, size, fields, tokens):
    xla, cudnn, params, images = make(size, **fields)

    def run(model):
        def loss(params, images):
            logits = model.apply({"params": params}, images, train=True)
            return -jax.nn.log_softmax(logits)[:, 0].mean(), logits

        train = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        return train(params, images), model.apply({"params": params}, images)

    assert_equal(run(cudnn), run(xla))
    assert set(calls) == {tokens}
    assert jax.tree.structure(shapes(cudnn, size)) == jax.tree.structure(shapes(xla, size))


def test_padding_is_not_seen_from_outside(calls):
    xla, cudnn, params, images = make(32)
    maps = attention_maps(cudnn, params, images)
    assert maps.shape == (2, 2, 2, 5, 5) and not calls
    assert_equal(maps, attention_maps(xla, params, images))
    assert_equal(attention_rollout(maps), attention_rollout(attention_maps(xla, params, images)))
    assert_equal(stages(cudnn, params, images), stages(xla, params, images))
    assert_equal(features(cudnn, params, images), features(xla, params, images))
    assert calls == [(6, True)] * 2


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_content_of_the_padding_reaches_no_number(calls, monkeypatch, classifier):
    """Also with dropout, whose draws are the same for the same number of tokens."""
    _, model, params, images = make(32 if classifier == "token" else 48, dropout=0.3, classifier=classifier, num_layers=1)

    def gradient():
        def loss(params):
            return model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})[:, 0].sum()

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = gradient()
    monkeypatch.setattr(vit, "pad_tokens", lambda x, how: pad_tokens(x, how).at[:, x.shape[1] :].set(100.0))
    assert_equal(gradient(), expected)
    assert all(masked for _, masked in calls)


def test_dropout_of_attention_is_not_padded(calls):
    xla, cudnn, params, images = make(32, attention_dropout=0.5)
    for train in (True, False):
        ours, theirs = (
            model.apply({"params": params}, images, train, rngs={"dropout": jax.random.key(0)}) for model in (cudnn, xla)
        )
        assert_equal(ours, theirs)
    assert calls == [(6, True)] * 2  # of evaluation


def lowered(loss, *args) -> str:
    """The program of a gradient for an NVIDIA GPU, which is lowered on any machine."""
    return jax.jit(jax.grad(loss)).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def cudnn_version(monkeypatch):
    """The version of a library that JAX looks for before it lowers attention and that may not be installed."""
    monkeypatch.setattr(fused_attention, "check_cudnn_version", lambda: 92800)


@pytest.mark.parametrize(
    ("variant", "size", "tokens"), [("B/16", 224, 198), ("B/16", 384, 578), ("L/14", 224, 258), ("S/32", 384, 146)]
)
def test_training_is_lowered_to_cudnn(cudnn_version, variant, size, tokens):
    letter, patch = variant.split("/")
    model = build(f"{letter}/{16}", patch_size=int(patch), num_layers=1, dtype=jnp.bfloat16, attention="cudnn")
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    text = lowered(
        lambda params, images: model.apply({"params": params}, images, train=True).sum(), shapes(model, size), images
    )
    assert "fmhaSoftmax(" in text and "fmhaSoftmaxBackward(" in text
    assert f"tensor<2x{tokens}x{model.num_heads}x64xbf16>" in text


def test_jax_still_refuses_an_odd_number_of_tokens(cudnn_version):
    """If this fails, JAX is mended: remove `pad_tokens` and the argument `tokens`, and the example in docs/performance.md."""

    def loss(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn").astype(jnp.float32).mean()

    even, odd = (jax.ShapeDtypeStruct((2, tokens, 12, 64), jnp.bfloat16) for tokens in (198, 197))
    assert "fmhaSoftmax" in lowered(loss, even, even, even)
    with pytest.raises(NotImplementedError, match="Unsupported sequence length Q 197, KV 197"):
        lowered(loss, odd, odd, odd)
