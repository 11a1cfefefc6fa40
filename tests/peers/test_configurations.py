"""Every field of the peers' configurations is known: used, refused by its value, or without effect."""

import dataclasses
import inspect
import json
import re
from collections import Counter

import jax
import numpy as np
import pytest

from vit_jax.checkpoints.load import load
from vit_jax.errors import CheckpointError
from vit_jax.formats.torch_configs import HUGGINGFACE, TIMM, TIMM_HARMLESS, check_config, heads_of

EXACT = 1e-5
DOCUMENTED = 1e-3  # exact GELU, and the epsilons of timm's hybrids (docs/checkpoints.md)

# Given by the tensors, used (heads, image size, class names), for training only, or about loading.
HUGGINGFACE_HARMLESS = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "encoder_stride", "pooler_output_size"),
}

# Inherited by every configuration of Hugging Face: names, outputs, the type of the weights, training, chunk sizes.
HUGGINGFACE_INHERITED = {
    *("_name_or_path", "architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder", "label2id"),
    *("model_type", "output_attentions", "output_hidden_states", "problem_type", "return_dict", "transformers_version"),
}
# timm's pretrained_cfg: class names, size and scaling (used); cropping; origin of the files.
TIMM_PRETRAINED = {
    *("input_size", "mean", "std", "num_classes", "label_names"),
    *("interpolation", "crop_pct", "test_crop_pct", "crop_mode", "test_input_size", "min_input_size", "fixed_input_size"),
    *("pool_size", "test_pool_size", "first_conv", "classifier", "label_offset", "label_descriptions"),
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag", "custom_load"),
    *("license", "description", "origin_url", "paper_name", "paper_ids", "notes"),
}


def test_every_field_of_a_huggingface_vit_is_known(transformers):
    own = set(transformers.ViTConfig().to_dict()) - set(transformers.PretrainedConfig().to_dict())
    own -= {"model_type"}
    inherited = set(transformers.PretrainedConfig().to_dict())
    assert inherited <= HUGGINGFACE_INHERITED, inherited - HUGGINGFACE_INHERITED
    assert own <= HUGGINGFACE_HARMLESS | HUGGINGFACE.keys(), own - HUGGINGFACE_HARMLESS - HUGGINGFACE.keys()
    assert not HUGGINGFACE_HARMLESS & HUGGINGFACE.keys()


def test_every_argument_of_a_timm_vit_is_known(timm):
    arguments = set(inspect.signature(timm.models.vision_transformer.VisionTransformer.__init__).parameters) - {"self"}
    assert arguments <= TIMM_HARMLESS | TIMM.keys(), arguments - TIMM_HARMLESS - TIMM.keys()
    assert not TIMM_HARMLESS & TIMM.keys()


def test_every_key_of_a_timm_pretrained_cfg_is_known(timm):
    fields = {field.name for field in dataclasses.fields(timm.models.PretrainedCfg)}
    assert fields <= TIMM_PRETRAINED, fields - TIMM_PRETRAINED


def drawn(torch, model):
    """The model with parameters that all have an effect on its output."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim >= 2 and not re.search("token|pos", name):
                parameter.copy_(noise * np.prod(parameter.shape[1:]) ** -0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def verdict(torch, folder, theirs, size) -> str:
    """Reads the folder that the model was saved to; returns "refused", "agrees", "differs as documented" or "wrong"."""
    images = np.random.default_rng(1).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    expected = (expected if isinstance(expected, torch.Tensor) else expected.logits).numpy()
    try:
        model, params = load(folder / "model.safetensors")
    except CheckpointError as error:
        assert "\n" not in str(error)
        return "refused"
    found = np.asarray(jax.jit(model.apply)({"params": params}, images))  # one program instead of one for each operation
    if found.shape != expected.shape:
        return "wrong"
    apart = np.abs(found - expected).max() / np.abs(expected).max()
    return "agrees" if apart < EXACT else "differs as documented" if apart < DOCUMENTED else "wrong"


BASE = dict(depth=1, img_size=32, num_classes=7, act_layer="gelu_tanh")
NO_TOKEN = dict(class_token=False, fc_norm=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "agrees"),
        *(
            (arguments, "agrees")
            for arguments in (dict(embed_dim=384), dict(num_heads=6), dict(mlp_ratio=2), dict(drop_rate=0.1))
        ),
        *((dict(img_size=size), "agrees") for size in ((32, 64), (16, 64))),
        *((dict(act_layer=name), "refused") for name in ("relu", "silu", "quick_gelu")),
        (dict(act_layer="gelu"), "differs as documented"),
        *((dict(global_pool=name), "refused") for name in ("max", "avg", "avgmax", "map", "")),
        (NO_TOKEN | dict(global_pool="avg"), "agrees"),
        *((NO_TOKEN | dict(global_pool=name), "refused") for name in ("max", "")),
        *((arguments, "refused") for arguments in (dict(no_embed_class=True), dict(reg_tokens=2), dict(pre_norm=True))),
        *((arguments, "refused") for arguments in (dict(qkv_bias=False), dict(qk_norm=True), dict(init_values=0.1))),
        *((arguments, "refused") for arguments in (dict(final_norm=False), dict(fc_norm=True), dict(norm_layer="rmsnorm"))),
        (dict(dynamic_img_size=True), "agrees"),
    ],
    ids=str,
)
def test_argument_of_a_timm_vit_is_used_or_refused(arguments, expected, timm, torch, tmp_path):
    arguments = {**BASE, **arguments}
    model = drawn(torch, timm.create_model("vit_tiny_patch16_224", **arguments))
    timm.models.save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    size = arguments["img_size"]
    assert verdict(torch, tmp_path, model, (size, size) if isinstance(size, int) else size) == expected


TINY = dict(hidden_size=96, num_hidden_layers=1, num_attention_heads=4, intermediate_size=200, image_size=32, num_labels=7,
            hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "agrees"),
        *((dict(hidden_act=name), "agrees") for name in ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")),
        *((dict(hidden_act=name), "differs as documented") for name in ("gelu", "gelu_python")),
        *((dict(hidden_act=name), "refused") for name in ("relu", "silu", "quick_gelu", "gelu_10", "mish", "tanh")),
        *((dict(layer_norm_eps=value), "refused") for value in (0.1, 1e-4)),
        (dict(layer_norm_eps=1e-12), "agrees"),
        (dict(qkv_bias=False), "refused"),
        *((fields, "agrees") for fields in (dict(image_size=(32, 64)), dict(patch_size=8), dict(hidden_size=384))),
        *((fields, "agrees") for fields in (dict(hidden_dropout_prob=0.1), dict(problem_type="multi_label_classification"))),
    ],
    ids=str,
)
def test_field_of_a_huggingface_vit_is_used_or_refused(fields, expected, transformers, torch, tmp_path):
    config = transformers.ViTConfig(**{**TINY, **fields})
    model = drawn(torch, transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    size = config.image_size
    assert verdict(torch, tmp_path, model, (size, size) if isinstance(size, int) else size) == expected


def test_huggingface_config_without_heads_means_the_default(transformers, torch, tmp_path):
    model = drawn(
        torch,
        transformers.ViTForImageClassification(transformers.ViTConfig(**TINY | dict(hidden_size=384, num_attention_heads=12))),
    )
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert verdict(torch, tmp_path, model, (32, 32)) == "agrees"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))  # for test processes that share the work
def test_no_stock_timm_vit_is_read_wrongly(timm, torch, tmp_path, part):
    """All architectures of timm's two modules with their own arguments, cut to one block and an image of 2×2 patches."""
    counts: Counter = Counter()
    for name in timm.list_models(module=["vision_transformer", "vision_transformer_hybrid"])[part::4]:
        stride = int((re.search(r"_s(\d+)", name) or re.search(r"patch(\d+)", name) or re.search("()", name))[1] or 32)
        arguments = dict(depth=1, img_size=2 * stride, num_classes=7)
        described = timm.create_model(name, device="meta", **arguments)
        folder = tmp_path / name
        folder.mkdir()
        timm.models._hub.save_config_for_hf(described, folder / "config.json", model_args=arguments)
        config = json.loads((folder / "config.json").read_text())
        try:
            check_config(config, getattr(described, "cls_token", None) is not None)
            heads = heads_of(config)
        except CheckpointError:
            counts["refused"] += 1
            continue
        assert heads == described.blocks[0].attn.num_heads, name
        model = drawn(torch, timm.create_model(name, **arguments))
        timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
        found = verdict(torch, folder, model, (2 * stride, 2 * stride))
        (folder / "model.safetensors").unlink()
        assert found != "wrong", name
        counts[found] += 1
    print(dict(counts))
    assert counts["agrees"] + counts["differs as documented"] >= 8 and sum(counts.values()) >= 18
