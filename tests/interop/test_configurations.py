"""Every field of the peers' own configurations is known: honoured, refused by value, or of no consequence."""

import inspect

from vit_jax.checkpoints.torch_configs import HUGGINGFACE, TIMM, TIMM_HARMLESS

# Told by the tensors, honoured (heads, image size, class names), of consequence in training only, or about loading.
HUGGINGFACE_HARMLESS = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "encoder_stride", "pooler_output_size"),
}


def test_every_field_of_a_huggingface_vit_is_known(transformers):
    own = set(transformers.ViTConfig().to_dict()) - set(transformers.PretrainedConfig().to_dict())
    own -= {"model_type"}
    assert own <= HUGGINGFACE_HARMLESS | HUGGINGFACE.keys(), own - HUGGINGFACE_HARMLESS - HUGGINGFACE.keys()
    assert not HUGGINGFACE_HARMLESS & HUGGINGFACE.keys()


def test_every_argument_of_a_timm_vit_is_known(timm):
    arguments = set(inspect.signature(timm.models.vision_transformer.VisionTransformer.__init__).parameters) - {"self"}
    assert arguments <= TIMM_HARMLESS | TIMM.keys(), arguments - TIMM_HARMLESS - TIMM.keys()
    assert not TIMM_HARMLESS & TIMM.keys()
