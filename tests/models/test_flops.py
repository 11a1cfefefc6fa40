"""The number of floating-point operations of a forward pass, against XLA's count."""

import jax
import jax.numpy as jnp
import pytest

from vit_jax.models.variants import VARIANTS, build, flops

TINY = dict(hidden_size=48, num_layers=2, num_heads=4, mlp_dim=100, num_classes=7)
MODELS = {
    "plain": ("B/16", {}, 64),
    "mean of tokens": ("B/16", dict(classifier="gap"), 64),
    "pre_logits": ("B/16", dict(representation_size=40), 32),
    "no head": ("B/16", dict(num_classes=0), 32),
    "rectangle": ("B/16", {}, (32, 64)),
    "bare root": ("R+Ti/16", {}, 64),
    "R26": ("R26+S/32", {}, 64),
    "R50, three stages": ("R50+B/16", dict(resnet=(2, 1, 1), resnet_width=32), (32, 64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_flops_agree_with_xla(name):
    variant, fields, size = MODELS[name]
    model = build(variant, **{**TINY, **fields})
    height, width = (size, size) if isinstance(size, int) else size
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    counted = jax.jit(model.apply).lower(params, images).cost_analysis()["flops"] / 2
    # XLA also counts norms, GELU and the like, and leaves out what convolutions read beyond the edges.
    assert flops(model, size) == pytest.approx(counted, rel=0.06)


def test_flops_of_published_models():
    assert flops(build("B/16"), 224) == 35_126_120_448  # 35.1 GFLOP; a training step 105.4
    table = {name: flops(build(name), 224) for name in VARIANTS if "Mini" not in name}
    assert table["S/32"] < table["Ti/16"] < table["S/16"] < table["B/16"] < table["L/16"] < table["H/14"]
