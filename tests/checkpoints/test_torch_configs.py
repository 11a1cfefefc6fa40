"""What a configuration of timm or Hugging Face may ask for, and what is refused by name."""

import pytest

from vit_jax.checkpoints.torch_configs import check_config, heads_of
from vit_jax.errors import CheckpointError


@pytest.mark.parametrize(
    ("config", "field"),
    [
        *(({"hidden_act": act}, "hidden_act") for act in ("relu", "silu", "quick_gelu", None, 5)),
        *(({"layer_norm_eps": eps}, "layer_norm_eps") for eps in (0.1, 1e-3, "1e-6", -1, float("nan"), 10**400, True)),
        ({"pooler_act": "relu"}, "pooler_act"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"num_channels": 1}, "num_channels"),
        *(({"model_args": {"act_layer": act}}, "model_args.act_layer") for act in ("relu", "silu", "quick_gelu")),
        *(({"model_args": {"global_pool": pool}}, "global_pool") for pool in ("max", "avgmax", "map", "avg")),
        *(({"global_pool": pool}, "global_pool") for pool in ("max", "avg", [])),
        ({"model_args": {"class_token": False}}, "model_args.class_token"),
        ({"model_args": {"no_embed_class": True}}, "model_args.no_embed_class"),
        ({"model_args": {"norm_layer": "rmsnorm"}}, "model_args.norm_layer"),
        ({"model_args": {"reg_tokens": 4}}, "model_args.reg_tokens"),
        ({"model_args": {"init_values": 1e-5}}, "model_args.init_values"),
        ({"model_args": {"of_a_later_version": 1}}, "model_args.of_a_later_version"),
        ({"model_args": 5}, "model_args"),
        *(({"architecture": name}, "architecture") for name in ("flexivit_small", "vit_small_patch16_rope_224", 5)),
    ],
)
def test_field_that_changes_the_numbers_is_refused_by_name(config, field):
    with pytest.raises(CheckpointError, match=field):
        check_config(config, has_class_token=True)


@pytest.mark.parametrize(
    ("config", "has_class_token"),
    [
        ({}, True),
        ({"hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True, "pooler_act": "tanh"}, True),
        ({"architecture": "vit_base_patch16_224", "global_pool": "token", "model_args": {"act_layer": "gelu_tanh"}}, True),
        ({"architecture": "vit_small_r26_s32_224", "num_classes": 7}, True),
        ({"architecture": "vit_tiny_r_s16_p8_224"}, True),
        ({"global_pool": "avg", "model_args": {"class_token": False, "global_pool": "avg", "drop_path_rate": 0.1}}, False),
    ],
)
def test_plain_configurations_are_taken(config, has_class_token):
    check_config(config, has_class_token)


def test_pooling_without_class_token_is_the_mean():
    with pytest.raises(CheckpointError, match="'max' pooling"):
        check_config({"global_pool": "max"}, has_class_token=False)
    with pytest.raises(CheckpointError, match="'token' pooling"):
        check_config({"global_pool": "token"}, has_class_token=False)


@pytest.mark.parametrize("found", [0, -3, 1.0, "3", True, [3]])
def test_number_of_heads_is_a_positive_integer(found):
    for config in ({"num_attention_heads": found}, {"model_args": {"num_heads": found}}):
        with pytest.raises(CheckpointError, match="attention heads"):
            heads_of(config)
    assert heads_of({"model_args": {"num_heads": 3}}) == 3 and heads_of({}) is None
