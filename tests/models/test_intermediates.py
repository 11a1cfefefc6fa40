"""Features, attention maps and the stages of a model."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.models.small import make
from vit_jax.models.intermediates import attention_maps, attention_rollout, features, stages


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


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 1, 2, 16, 16), None, "16 tokens are no class token and a square of patches"),
        ((2, 1, 2, 10, 10), (2, 4), "10 tokens are no class token and a grid of 2×4"),
        ((2, 1, 2, 1, 1), None, "1 tokens are no class token"),
        ((1, 2, 10, 10), None, "attention maps are [layers, B, heads, tokens, tokens], got [1, 2, 10, 10]"),
    ],
)
def test_rollout_without_class_row_is_an_error(shape, grid, message):
    with pytest.raises(ValueError, match="attention maps|tokens") as error:
        attention_rollout(np.ones(shape, np.float32), grid)
    assert message in str(error.value)


def test_rollout_of_a_class_token_that_attends_only_to_itself_is_zero():
    maps = np.broadcast_to(np.eye(5), (2, 1, 3, 5, 5))
    assert not attention_rollout(maps).any()
