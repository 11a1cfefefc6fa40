"""The same weights give the same features here and in timm, in both directions."""

import json

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.load import load, resize_positions
from vit_jax.formats.google import save_npz
from vit_jax.formats.torch_files import read_safetensors
from vit_jax.interop import peers
from vit_jax.interop.parity import compare
from vit_jax.interop.torch_models import _ARCHITECTURES, save_timm, to_timm
from vit_jax.models.variants import VARIANTS, build, from_tree

TOLERANCE = 1e-5
TINY = dict(hidden_size=96, num_layers=2, num_heads=4, mlp_dim=250, num_classes=7)  # other heads and MLP than timm's own
MODELS = {
    "B/16-shaped": ("B/16", TINY, (64, 64)),
    "S/32-shaped": ("S/32", TINY, (96, 96)),
    "features": ("B/16", {**TINY, "num_classes": 0}, (32, 32)),
    "mean of tokens": ("B/16", {**TINY, "classifier": "gap"}, (64, 64)),
    "rectangle": ("B/16", TINY, (32, 64)),
    "Ti/16": ("Ti/16", dict(num_classes=100), (224, 224)),
    "R+Ti/16-shaped": ("R+Ti/16", {**TINY, "num_classes": 5}, (64, 64)),
    "R26+S/32-shaped": ("R26+S/32", TINY, (64, 64)),
    "R50+B/16-shaped": ("R50+B/16", {**TINY, "num_layers": 1}, (32, 32)),
}
HYBRIDS = [name for name in MODELS if name.startswith("R")]


def made(name, random_params, **fields):
    variant, geometry, size = MODELS[name]
    model = build(variant, **{**geometry, **fields})
    return model, random_params(model, size), size


def from_folder(timm, folder, **options):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def worst(ours, theirs) -> float:
    found = compare(ours, theirs)
    assert len(found) == len(ours)  # every stage of ours
    return max(difference for _, difference in found)


def with_our_epsilons(timm, model):
    """timm's hybrid with Google's epsilons: of GroupNorm, and weight standardisation that divides by std + 1e-5."""
    import torch
    import torch.nn.functional as F
    from timm.layers import GroupNormAct, StdConv2dSame
    from timm.layers.padding import pad_same

    class Convolution(StdConv2dSame):
        def forward(self, x):
            std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
            if self.same_pad:
                x = pad_same(x, self.kernel_size, self.stride, self.dilation)
            weight = (self.weight - mean) / (std + 1e-5)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    for module in model.modules():
        if isinstance(module, GroupNormAct):
            module.eps = 1e-6
        if isinstance(module, StdConv2dSame):
            module.__class__ = Convolution
    return model


@pytest.mark.parametrize("name", [name for name in MODELS if name not in HYBRIDS])
def test_timm_reads_our_folder(name, timm, random_params, random_images, our_stages, tmp_path):
    model, params, size = made(name, random_params)
    save_timm(tmp_path / "x", params, {"image_size": list(size)})
    theirs = from_folder(timm, tmp_path / "x")
    images = random_images(*size)
    assert worst(our_stages(model, params, images), peers.timm_stages(theirs, images)) < TOLERANCE
    assert theirs.num_classes == model.num_classes


@pytest.mark.parametrize("name", HYBRIDS)
def test_timm_reads_our_hybrid(name, timm, random_params, random_images, our_stages, tmp_path):
    model, params, size = made(name, random_params)
    save_timm(tmp_path / "x", params)
    theirs = from_folder(timm, tmp_path / "x")
    images = random_images(*size)
    ours = our_stages(model, params, images)
    stock = worst(ours, peers.timm_stages(theirs, images))
    patched = worst(ours, peers.timm_stages(with_our_epsilons(timm, theirs), images))
    print("stock timm", stock)
    print("with our epsilons", patched)
    assert patched < TOLERANCE and 2 * patched < stock < 1e-3


@pytest.mark.parametrize("name", ["B/16-shaped", "S/32-shaped", "mean of tokens", "R26+S/32-shaped", "R50+B/16-shaped"])
def test_folder_by_timm_is_read(name, timm, torch, random_params, random_images, our_stages, tmp_path):
    """A model that timm built, initialised and saved; the number of heads comes from its config.json."""
    _, params, size = made(name, random_params)
    config = to_timm(params)[1]
    arguments = {**config["model_args"], "num_classes": config["num_classes"]}
    torch.manual_seed(0)
    theirs = timm.create_model(config["architecture"], **arguments).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # timm's initial biases and class token are zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    if name in HYBRIDS:
        theirs = with_our_epsilons(timm, theirs)
    ours = read_safetensors(tmp_path / "model.safetensors")
    assert from_tree(ours).num_heads == 4
    images = random_images(*size)
    assert worst(our_stages(from_tree(ours), ours, images), peers.timm_stages(theirs, images)) < TOLERANCE
    # The way back gives the same tensors, bit for bit.
    again = to_timm(ours)[0]
    state = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    assert again.keys() == state.keys() and all(np.array_equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["B/16-shaped", "S/32-shaped", "R26+S/32-shaped"])
def test_timm_loader_reads_our_npz(name, timm, random_params, random_images, our_stages, tmp_path):
    model, params, size = made(name, random_params)
    save_npz(tmp_path / "x.npz", params)
    config = to_timm(params)[1]
    theirs = timm.create_model(
        config["architecture"],
        checkpoint_path=tmp_path / "x.npz",
        num_classes=config["num_classes"],
        **config["model_args"],
    ).eval()
    if name in HYBRIDS:
        theirs = with_our_epsilons(timm, theirs)
    images = random_images(*size)
    assert worst(our_stages(model, params, images), peers.timm_stages(theirs, images)) < TOLERANCE


def test_resized_positions_are_those_of_the_original(timm, random_params, random_images, our_stages, tmp_path):
    _, params, _ = made("B/16-shaped", random_params)
    save_npz(tmp_path / "x.npz", params)
    model, resized = load(tmp_path / "x.npz", image_size=96)
    images = random_images(96)
    ours = our_stages(model, resized, images)
    save_timm(tmp_path / "resized", resized)
    assert worst(ours, peers.timm_stages(from_folder(timm, tmp_path / "resized"), images)) < TOLERANCE
    # timm resizes differently: half-pixel centres, cubic from safetensors and linear from an npz.
    save_timm(tmp_path / "as it was", params)
    theirs = from_folder(timm, tmp_path / "as it was", img_size=96)
    apart = worst({"features": ours["features"]}, peers.timm_stages(theirs, images))
    print("features where timm resizes", apart)
    assert apart > 100 * TOLERANCE
    rows = theirs.pos_embed.detach().numpy()
    expected = resize_positions(params["Transformer"]["posembed_input"]["pos_embedding"], (6, 6))
    print("positions where timm resizes", worst({"x": expected}, {"x": rows}))
    assert np.array_equal(rows[:, 0], expected[:, 0])


@pytest.mark.parametrize("variant", _ARCHITECTURES)
def test_timm_has_every_architecture_of_the_table(variant, timm):
    theirs = timm.create_model(_ARCHITECTURES[variant], device="meta", num_classes=0)
    block = theirs.blocks[0]
    found = (theirs.embed_dim, len(theirs.blocks), block.attn.num_heads, block.mlp.fc1.out_features)
    row = VARIANTS[variant]
    assert found == tuple(row[field] for field in ("hidden_size", "num_layers", "num_heads", "mlp_dim"))
    assert theirs.patch_embed.proj.kernel_size == 2 * (row["patch_size"],)
    if row["resnet"]:
        assert [len(stage.blocks) for stage in theirs.patch_embed.backbone.stages] == list(row["resnet"])


def test_timm_reads_a_bfloat16_folder(timm, random_params, random_images, our_stages, tmp_path):
    _, params, size = made("B/16-shaped", random_params)
    save_timm(tmp_path / "x", params, dtype=ml_dtypes.bfloat16)
    ours = read_safetensors(tmp_path / "x" / "model.safetensors")
    for key, leaf in flatten_dict(params, sep="/").items():
        assert np.array_equal(flatten_dict(ours, sep="/")[key], leaf.astype(ml_dtypes.bfloat16).astype(np.float32)), key
    images = random_images(*size)
    theirs = from_folder(timm, tmp_path / "x")
    assert worst(our_stages(from_tree(ours), ours, images), peers.timm_stages(theirs, images)) < TOLERANCE


def test_timm_prepares_images_as_in_the_folder(timm, random_params, tmp_path):
    _, params, _ = made("B/16-shaped", random_params)
    names = [f"class {i}" for i in range(7)]
    meta = {"class_names": names, "normalization": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    save_timm(tmp_path / "x", params, meta)
    theirs = from_folder(timm, tmp_path / "x")
    prepared = timm.data.resolve_model_data_config(theirs)
    assert prepared["input_size"] == (3, 64, 64) or prepared["input_size"] == [3, 64, 64]
    assert (list(prepared["mean"]), list(prepared["std"])) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (prepared["interpolation"], prepared["crop_pct"], prepared["crop_mode"]) == ("bilinear", 1.0, "squash")
    assert theirs.pretrained_cfg["label_names"] == names
    assert json.loads((tmp_path / "x" / "config.json").read_text())["model_args"]["act_layer"] == "gelu_tanh"
