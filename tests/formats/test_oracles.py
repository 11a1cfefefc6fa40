"""Against the original implementation's own outputs: largest difference over largest value, float32 on the CPU."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from vit_jax.checkpoints.load import load
from vit_jax.models.intermediates import attention_maps, features, stages
from vit_jax.transforms.preprocess import preprocess

FOLDERS = ["tiny-augreg", "tiny-i21k", "tiny-rstem-i21k", "tiny-r3-augreg", "tiny-linen", "tiny-params"]
TOLERANCE = 1e-5


def difference(ours, theirs) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.fixture(params=FOLDERS)
def oracle(request, shared):
    """The checkpoint's path, and inputs with the original's outputs; tiny-params has tiny-augreg's."""
    folder = shared / "oracles" / request.param
    outputs = folder if (folder / "io.npz").exists() else shared / "oracles" / "tiny-augreg"
    return folder / "ckpt.npz", np.load(outputs / "io.npz")


def sizes(io) -> list[int]:
    return [int(name.rsplit("_", 1)[1]) for name in io.files if name.startswith("images_u8")]


def test_published_model_agrees_with_the_original(oracle):
    path, io = oracle
    model, params = load(path)
    size = sizes(io)[0]
    images = preprocess(io[f"images_u8_{size}"], size)

    @jax.jit
    def compute(params, images):  # compiled once: far faster than op by op
        logits = model.apply({"params": params}, images)
        return stages(model, params, images), logits, features(model, params, images), attention_maps(model, params, images)

    found, logits, pre_logits, maps = compute(params, images)
    assert difference(found["logits"], io["up_logits"]) < TOLERANCE
    assert difference(logits, io["up_logits"]) < TOLERANCE
    assert difference(pre_logits, io["up_pre_logits"]) < TOLERANCE
    assert difference(found["embedding"][:1], io["up_embedding"]) < TOLERANCE
    classes = np.stack([found[f"block_{i}"][:, 0] for i in range(model.num_layers)])
    assert difference(classes, io["up_block_cls"]) < TOLERANCE
    assert difference(maps, io["up_attn"]) < TOLERANCE


def test_model_for_fine_tuning_agrees_with_the_original(oracle):
    path, io = oracle
    for size in sizes(io):
        model, params = load(path, num_classes=100, image_size=size)
        images = preprocess(io[f"images_u8_{size}"], size)
        positions = params["Transformer"]["posembed_input"]["pos_embedding"]
        first_row = 1 if path.parent.name == "tiny-params" else 0  # the class token contains it
        assert difference(positions[:, first_row:], io[f"ft_posemb_{size}"][:, first_row:]) < TOLERANCE

        @jax.jit
        def compute(params, images, model=model):
            return features(model, params, images), model.apply({"params": params}, images)

        found, logits = compute(params, images)
        assert difference(found, io[f"ft_features_{size}"]) < TOLERANCE
        assert not logits.any()
        params["head"]["kernel"] = io["ft_head_kernel"]
        assert difference(compute(params, images)[1], io[f"ft_logits_headed_{size}"]) < TOLERANCE


def test_forms_of_one_model_agree_bit_for_bit(shared):
    io = np.load(shared / "oracles" / "tiny-augreg" / "io.npz")
    images = preprocess(io["images_u8_64"], 64)
    logits = []
    for folder in ("tiny-augreg", "tiny-linen", "tiny-params"):
        model, params = load(shared / "oracles" / folder / "ckpt.npz")
        logits.append(np.asarray(jax.jit(model.apply)({"params": params}, images)))
    assert (logits[0] == logits[1]).all() and (logits[0] == logits[2]).all()


def test_exact_gelu_is_distinguished(shared, monkeypatch):
    folder = shared / "oracles" / "tiny-augreg"
    io = np.load(folder / "io.npz")
    model, params = load(folder / "ckpt.npz")
    monkeypatch.setattr(nn, "gelu", lambda x, approximate: jax.nn.gelu(x, approximate=False))
    logits = model.apply({"params": params}, preprocess(io["images_u8_64"], 64))
    assert difference(logits, io["up_logits"]) > 10 * TOLERANCE
