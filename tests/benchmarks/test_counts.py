"""What is counted by hand, against what XLA counts."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.memory import SHARE, Need, need
from benchmarks.ours import Ours, Work
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
def test_operations_are_those_that_xla_counts(name):
    variant, fields, size = MODELS[name]
    model = build(variant, **{**TINY, **fields})
    height, width = (size, size) if isinstance(size, int) else size
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    counted = jax.jit(model.apply).lower(params, images).cost_analysis()["flops"] / 2
    # XLA counts norms, GELU and the like too, and leaves out what convolutions read beyond the edges.
    assert flops(model, size) == pytest.approx(counted, rel=0.06)


def test_operations_of_the_published_models():
    assert flops(build("B/16"), 224) == 35_126_120_448  # 35.1 GFLOP; a training step 105.4
    table = {name: flops(build(name), 224) for name in VARIANTS if "Mini" not in name}
    assert table["S/32"] < table["Ti/16"] < table["S/16"] < table["B/16"] < table["L/16"] < table["H/14"]


def planned(work):
    """Bytes by XLA, without those of the resident images that `need` does not know of."""
    ours = Ours(work, images=1000)
    memory = ours.step().lower(ours.state(), next(ours.batches()), ours.feed.data).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def test_memory_is_what_xla_plans(pico):
    work = Work("train", "Pico/8", 32, 256, 10)
    counted = need(work)
    assert counted.fixed < 0.1 * counted.total(work.batch)  # so that it is the images that are compared
    assert counted.total(work.batch) == pytest.approx(planned(work), rel=0.15)


def test_memory_of_a_larger_model_and_of_less_to_keep():
    def image(model, size, fused=False, **fields):
        return need(Work("train", model, size, dtype="bfloat16", **fields), fused).image

    plain, fused = image("B/16", 224), image("B/16", 224, fused=True)
    assert image("B/16", 224, remat=True) < fused < plain < image("B/16", 384)
    # Attention's weights, in bfloat16 and in float32, are what a fused kernel does not hold.
    weights = 12 * 12 * 197 * 197
    assert 4 * weights <= plain - fused <= 12 * weights
    assert need(Work("train", "B/16", 224, dtype="bfloat16")).fixed > 4 * 86e6 + 2 * 86e6  # parameters and momentum


def test_the_largest_batch():
    found = Need(fixed=100, image=10)
    assert [found.largest(memory) for memory in (99, 110, 170, 179, 180, 340)] == [0, 1, 7, 7, 8, 24]
    assert found.total(found.largest(1e9 * SHARE)) <= 1e9 * SHARE
