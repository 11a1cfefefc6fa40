"""Configurations of timm and Hugging Face: accepted fields, and fields that are refused by name."""

import pytest

from vit_jax.errors import CheckpointError
from vit_jax.formats.torch_configs import check_config, describe, heads_of


@pytest.mark.parametrize(
    ("config", "field"),
    [
        *(({"hidden_act": act}, "hidden_act") for act in ("relu", "silu", "quick_gelu", None, 5)),
        *(({"layer_norm_eps": eps}, "layer_norm_eps") for eps in (0.1, 1e-3, "1e-6", -1, float("nan"), 10**400, True)),
        ({"pooler_act": "relu"}, "pooler_act"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"num_channels": 1}, "num_channels"),
        *(({"model_type": kind}, "model_type") for kind in ("vit_mae", "deit", "dinov2", 5)),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        *(({"model_args": {"act_layer": act}}, "model_args.act_layer") for act in ("relu", "silu", "quick_gelu")),
        *(({"model_args": {"global_pool": pool}}, "global_pool") for pool in ("max", "avgmax", "map", "avg")),
        *(({"global_pool": pool}, "global_pool") for pool in ("max", "avg", "", [])),
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
def test_plain_configurations_are_accepted(config, has_class_token):
    check_config(config, has_class_token)


def test_pooling_without_class_token_must_be_the_mean():
    with pytest.raises(CheckpointError, match="global_pool = 'max', expected 'avg'"):
        check_config({"global_pool": "max"}, has_class_token=False)
    with pytest.raises(CheckpointError, match="global_pool = 'token', expected 'avg'"):
        check_config({"global_pool": "token"}, has_class_token=False)


@pytest.mark.parametrize("found", [0, -3, 1.0, "3", True, [3]])
def test_number_of_heads_is_a_positive_integer(found):
    for config in ({"num_attention_heads": found}, {"model_args": {"num_heads": found}}):
        with pytest.raises(CheckpointError, match="attention heads"):
            heads_of(config)
    assert heads_of({"model_args": {"num_heads": 3}}) == 3 and heads_of({}) is None


def test_number_of_heads_that_is_left_out_is_the_default_of_its_library():
    """Not the variant of the same width: a timm model with another `embed_dim` keeps its architecture's heads."""
    for size, heads in (("tiny", 3), ("small", 6), ("base", 12), ("large", 16), ("so400m", 16)):
        assert heads_of({"architecture": f"vit_{size}_patch16_224", "model_args": {"embed_dim": 384}}) == heads
    assert heads_of({"architecture": "vit_small_r26_s32_224"}) == 6
    assert heads_of({"model_type": "vit", "hidden_size": 384}) == heads_of({"architectures": ["ViTModel"]}) == 12
    with pytest.raises(CheckpointError, match="how many attention heads 'vit_odd_patch16_224' has; add model_args.num_heads"):
        heads_of({"architecture": "vit_odd_patch16_224"})


HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
TIMM = {"architecture": "vit_tiny_patch16_224"}


@pytest.mark.parametrize(
    ("config", "processor", "expected"),
    [
        ({}, {}, {}),
        ({"image_size": 64}, {}, {"image_size": 64}),
        ({"eval_crop": "center"}, {}, {"eval_crop": "center"}),
        ({"image_size": [32, 64]}, {"image_mean": 0.2}, {"image_size": [32, 64], "normalization": ([0.2] * 3, [0.5] * 3)}),
        ({}, {"do_normalize": False, "image_mean": [0.2] * 3}, {"normalization": ([0] * 3, [1] * 3)}),
        ({"id2label": {"1": "b", "0": "a"}}, {}, {"class_names": ["a", "b"]}),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, {}, {}),
        (TIMM, {}, {"normalization": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}),
        (TIMM | {"mean": [0.1] * 3, "std": [0.2] * 3, "input_size": [3, 32, 32]}, {},
         {"normalization": ([0.1] * 3, [0.2] * 3), "image_size": 32}),
        ({"model_args": {"img_size": [16, 64]}, "pretrained_cfg": {"input_size": [3, 32, 32]} | HALF},
         {}, {"image_size": [16, 64], "normalization": ([0.5] * 3, [0.5] * 3)}),
        # of timm's copies of Google's models, which were evaluated without a crop
        (TIMM | {"pretrained_cfg": {"crop_pct": 0.875, "crop_mode": "center"} | HALF},
         {}, {"normalization": ([0.5] * 3, [0.5] * 3)}),
    ],
)  # fmt: skip
def test_description_of_the_weights_is_what_the_maker_uses(config, processor, expected):
    if "normalization" in expected:
        expected = expected | {"normalization": dict(zip(("mean", "std"), expected["normalization"], strict=True))}
    assert describe(config, processor) == expected


@pytest.mark.parametrize(
    ("config", "processor", "field"),
    [
        *(({"image_size": size}, {}, "image_size") for size in ([[16], [16]], [[[]]], "64", -64, 0, True, [1, 2, 3], 10**400)),
        *((TIMM | {"input_size": size}, {}, "input_size") for size in (3, [3], [3, [16], 16], [3, 1.5, 16])),
        *(({"model_args": {"img_size": size}}, {}, "img_size") for size in ("64", [64, None], {})),
        *((TIMM | {"mean": mean}, {}, "normalization") for mean in ([10**400] * 3, [1, 2], "abc", {"a": 1}, [[1], 2, 3])),
        *((TIMM | {"std": std}, {}, "normalization") for std in ([0, 1, 1], [1e-320] * 3, [float("nan")] * 3, [True] * 3)),
        *(({}, {"image_mean": mean}, "normalization") for mean in ([10**400] * 3, "0.5", True, [0.5])),
        *(({}, {"rescale_factor": factor}, "rescale_factor") for factor in (1.0, float("nan"), 10**400, "x", None)),
        ({}, {"do_rescale": False}, "do_rescale"),
        *(({"id2label": labels}, {}, "id2label") for labels in (5, {"a": "b"}, {"1": "a", "2": "b"}, {"0": 5}, {"0": [[]]})),
        *(({"label_names": names}, {}, "label_names") for names in (5, [5], {"0": "a"})),
        ({"pretrained_cfg": [1]}, {}, "pretrained_cfg"),
        ({"model_args": [1]}, {}, "model_args"),
    ],
)
def test_field_of_a_wrong_type_is_one_error_line_with_its_name(config, processor, field):
    with pytest.raises(CheckpointError, match=field) as error:
        describe(config, processor)
    assert str(error.value).isprintable() and len(str(error.value)) < 500
