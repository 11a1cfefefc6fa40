"""The same weights give the same features here and in transformers, in both directions, and its pipeline our classes."""

import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax.formats.torch_files import read_safetensors
from vit_jax.interop import peers
from vit_jax.interop.parity import compare
from vit_jax.interop.torch_models import save_huggingface, save_timm
from vit_jax.models.variants import build, from_tree
from vit_jax.transforms.preprocess import preprocess

TOLERANCE = 1e-5
TINY = dict(hidden_size=96, num_layers=2, num_heads=4, mlp_dim=250, num_classes=7)
MODELS = {
    "B/16-shaped": ("B/16", TINY, (64, 64)),
    "S/32-shaped": ("S/32", TINY, (96, 96)),
    "rectangle": ("B/16", TINY, (32, 64)),
    "Ti/16": ("Ti/16", dict(num_classes=100), (224, 224)),
}
NAMES = ["tench", "goldfish", "shark", "ray", "cock", "hen", "ostrich"]


def made(name, random_params, **fields):
    variant, geometry, size = MODELS[name]
    model = build(variant, **{**geometry, **fields})
    return model, random_params(model, size), size


def differences(ours, theirs) -> float:
    found = compare(ours, theirs)
    assert len(found) == len(ours)
    return max(difference for _, difference in found)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_our_folder(name, transformers, random_params, random_images, our_stages, tmp_path):
    model, params, size = made(name, random_params)
    save_huggingface(tmp_path / "x", params, {"image_size": list(size)})
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "x").eval()
    images = random_images(*size)
    assert differences(our_stages(model, params, images), peers.huggingface_stages(theirs, images)) < TOLERANCE
    assert theirs.config.num_labels == model.num_classes


def test_pre_logits_become_the_pooler(transformers, random_params, random_images, our_stages, tmp_path):
    model, params, size = made("B/16-shaped", random_params, representation_size=40)
    save_huggingface(tmp_path / "x", params)
    theirs, info = transformers.ViTModel.from_pretrained(tmp_path / "x", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    images = random_images(*size)
    ours = our_stages(model, params, images)
    del ours["logits"]
    assert differences(ours, peers.huggingface_stages(theirs.eval(), images)) < TOLERANCE


def test_model_without_a_head_agrees(transformers, random_params, random_images, our_stages, tmp_path):
    model, params, size = made("B/16-shaped", random_params, num_classes=0)
    save_huggingface(tmp_path / "x", params)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "x", add_pooling_layer=False).eval()
    images = random_images(*size)
    assert differences(our_stages(model, params, images), peers.huggingface_stages(theirs, images)) < TOLERANCE


@pytest.mark.parametrize("generation", ["names on disk", "names since 5"])
@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
def test_folder_by_transformers_is_read(kind, generation, transformers, torch, random_images, our_stages, tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=250, image_size=64, num_labels=7,
        hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, pooler_output_size=40, initializer_range=0.1,
    )  # fmt: skip
    theirs = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # initial biases are zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, save_original_format=generation == "names on disk")
    ours = read_safetensors(tmp_path / "model.safetensors")
    model = from_tree(ours)
    assert (model.num_heads, model.representation_size) == (4, 40 if kind == "ViTModel" else 0)
    images = random_images(64)
    assert differences(our_stages(model, ours, images), peers.huggingface_stages(theirs, images)) < TOLERANCE


def test_pipeline_gives_our_classes(transformers, random_params, tmp_path):
    model, params, (size, _) = made("B/16-shaped", random_params)
    params["head"]["kernel"] = params["head"]["kernel"] * 3
    save_huggingface(tmp_path / "x", params, {"class_names": NAMES})
    u8 = np.random.default_rng(2).integers(0, 256, (4, size, size, 3), np.uint8)
    logits = jax.jit(lambda params, images: model.apply({"params": params}, images))(params, preprocess(u8, size))
    ours = np.asarray(jax.nn.softmax(logits))
    pipeline = transformers.pipeline("image-classification", model=str(tmp_path / "x"), device="cpu")
    found = pipeline([Image.fromarray(image) for image in u8], top_k=7, function_to_apply="softmax")
    for mine, theirs in zip(ours, found, strict=True):
        assert [entry["label"] for entry in theirs] == [NAMES[i] for i in np.argsort(-mine)]
        np.testing.assert_allclose([entry["score"] for entry in theirs], -np.sort(-mine), atol=1e-5)


def test_resizing_differs_as_documented(transformers, tmp_path, random_params):
    """transformers antialiases when it shrinks an image and Google's resizing does not, so only the model's size is equal."""
    _, params, (size, _) = made("B/16-shaped", random_params)
    save_huggingface(tmp_path / "x", params)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "x")
    ramp = np.linspace(0, 255, 96).astype(np.uint8)
    smooth = np.stack([np.broadcast_to(ramp, (96, 96)), np.broadcast_to(ramp[:, None], (96, 96)), np.full((96, 96), 9)], -1)
    noise = np.random.default_rng(3).integers(0, 256, (96, 96, 3), np.uint8)
    for name, image, least, most in (
        ("same size", noise[:size, :size], 0, 1e-6),
        ("smooth, larger", smooth.astype(np.uint8), 1e-4, 0.02),
        ("noise, larger", noise, 0.1, 2),
        ("noise, smaller", noise[:48, :48], 0, 0.02),
    ):
        theirs = processor(Image.fromarray(image), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
        apart = float(np.abs(theirs - np.asarray(preprocess(image[None], size))).max())
        print(name, apart)
        assert least <= apart <= most, name


def test_exact_gelu_is_distinguished(transformers, random_params, random_images, our_stages, tmp_path):
    """The config's activation is what makes them agree: Hugging Face's default is told apart."""
    model, params, size = made("B/16-shaped", random_params)
    save_huggingface(tmp_path / "x", params)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "x", hidden_act="gelu").eval()
    images = random_images(*size)
    assert differences(our_stages(model, params, images), peers.huggingface_stages(theirs, images)) > TOLERANCE


def test_folders_for_timm_and_transformers_are_read_equally(random_params, tmp_path):
    pytest.importorskip("safetensors")
    _, params, _ = made("B/16-shaped", random_params)
    save_huggingface(tmp_path / "h", params)
    save_timm(tmp_path / "t", params)
    one, other = (read_safetensors(tmp_path / name / "model.safetensors") for name in "ht")
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
