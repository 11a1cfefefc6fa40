"""The same weights in timm, Hugging Face transformers and the original: the arrays of their stages, as an IO.npz.

    python -P vit_jax/interop/peers.py timm FOLDER --images IMAGES.npz --output IO.npz
    python -P vit_jax/interop/peers.py huggingface FOLDER --images IMAGES.npz --output IO.npz
    python -P vit_jax/interop/peers.py original WEIGHTS.npz --images IMAGES.npz --output IO.npz --original CHECKOUT
        --geometry JSON

A FOLDER is what `convert --to timm` or `--to huggingface` writes; IMAGES.npz holds `images`, float32 [B, H, W, 3], as a model
gets them. Each command runs in its own process and by the path of this file, because the package of the original is called
vit_jax too: this file imports nothing of ours, and it is the only file of the package that imports these peers, in functions.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

Stages = dict[str, np.ndarray]
_DECLARED: list[Any] = []  # torch.library.Library objects, which keep their declarations


def import_torchvision() -> None:
    """Imports torchvision if it is installed, as timm and transformers do, even if its operators do not load.

    A wheel made for another build of PyTorch than the one installed, such as PyPI's next to PyTorch's CPU build, fails on
    import because its operators have no names; no Vision Transformer calls them, so the names are declared here.
    """
    import torch

    try:
        importlib.import_module("torchvision")
        return
    except ModuleNotFoundError:  # transformers does without
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _DECLARED.append(torch.library.Library("torchvision", "FRAGMENT"))
    for operator in ("nms", "qnms"):
        _DECLARED[-1].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")


def _outputs(modules: dict[str, Any], call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """The result of `call`, and the last output of each of PyTorch's modules during the call."""
    found: dict[str, Any] = {}
    handles = []
    for name, module in modules.items():

        def keep(_module: Any, _inputs: Any, output: Any, name: str = name) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(keep))
    try:
        return call(), found
    finally:
        for handle in handles:
            handle.remove()


def timm_stages(model: Any, images: np.ndarray) -> Stages:
    """The stages of a timm Vision Transformer, in the layout of IO.npz; `images` float32 [B, H, W, 3]."""
    import torch

    inputs = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    modules = {"embedding": model.patch_embed, **{f"block_{i}": block for i, block in enumerate(model.blocks)}}
    with torch.inference_mode():
        tokens, found = _outputs(modules, lambda: model.forward_features(inputs))
        found["embedding"] = found["embedding"].reshape(len(images), *model.patch_embed.grid_size, -1)
        found["features"] = model.forward_head(tokens, pre_logits=True)
        if model.num_classes:
            found["logits"] = model.forward_head(tokens)
    return {name: output.float().numpy() for name, output in found.items()}


def huggingface_stages(model: Any, images: np.ndarray) -> Stages:
    """The stages of a transformers ViTModel or ViTForImageClassification, in the layout of IO.npz; `images` as above."""
    import torch

    inputs = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    encoder = getattr(model, "vit", model)
    layers = (
        encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer
    )  # of transformers 5 and newer, and of older versions
    patches = encoder.embeddings.patch_embeddings
    modules = {"embedding": patches, **{f"block_{i}": layer for i, layer in enumerate(layers)}, "features": encoder.layernorm}
    with torch.inference_mode():
        output, found = _outputs(modules, lambda: model(inputs))
    height, width = (size // patch for size, patch in zip(patches.image_size, patches.patch_size, strict=True))
    found["embedding"] = found["embedding"].reshape(len(images), height, width, -1)
    found["features"] = found["features"][:, 0]
    if getattr(output, "pooler_output", None) is not None:
        found["pre_logits"] = output.pooler_output
    if hasattr(output, "logits"):
        found["logits"] = output.logits
    return {name: array.float().numpy() for name, array in found.items()}


def _timm(arguments: argparse.Namespace, images: np.ndarray) -> Stages:
    import_torchvision()
    timm = importlib.import_module("timm")
    model = timm.create_model(f"local-dir:{Path(arguments.source).resolve()}", pretrained=True)
    return timm_stages(model.eval(), images)


def _huggingface(arguments: argparse.Namespace, images: np.ndarray) -> Stages:
    import_torchvision()
    transformers = importlib.import_module("transformers")
    config = json.loads((Path(arguments.source) / "config.json").read_text())
    options = {} if "pooler_act" in config or "ViTModel" not in config["architectures"] else {"add_pooling_layer": False}
    model = getattr(transformers, config["architectures"][0]).from_pretrained(arguments.source, **options)
    return huggingface_stages(model.eval(), images)


def original_model(checkout: str | None, geometry: dict[str, Any]) -> Any:
    """The original's model, without dropout, of the fields of our VisionTransformer."""
    if not checkout or not (Path(checkout) / "vit_jax" / "models_vit.py").is_file():
        raise SystemExit(
            f"there is no vit_jax/models_vit.py below {checkout or 'the current folder'}: give --original the path "
            "of a checkout of github.com/google-research/vision_transformer"
        )
    sys.path.insert(0, str(Path(checkout).resolve()))
    models_vit = importlib.import_module("vit_jax.models_vit")  # of the original, without TensorFlow
    resnet = geometry["resnet"]
    return models_vit.VisionTransformer(
        num_classes=geometry["num_classes"],
        patches=SimpleNamespace(size=2 * (geometry["patch_size"],)),
        transformer={
            "num_layers": geometry["num_layers"],
            "mlp_dim": geometry["mlp_dim"],
            "num_heads": geometry["num_heads"],
            "dropout_rate": 0.0,
            "attention_dropout_rate": 0.0,
        },
        hidden_size=geometry["hidden_size"],
        resnet=None if resnet is None else SimpleNamespace(num_layers=resnet, width_factor=geometry["resnet_width"] / 64),
        representation_size=geometry["representation_size"] or None,
        classifier=geometry["classifier"],
    )


def _original(arguments: argparse.Namespace, images: np.ndarray) -> Stages:
    geometry = json.loads(arguments.geometry)
    model = original_model(arguments.original, geometry)
    import jax
    import ml_dtypes
    from flax.traverse_util import flatten_dict, unflatten_dict

    jax.config.update("jax_default_matmul_precision", "highest")
    # The published names count the layers of a block as Linen's predecessor did; today's Linen counts those of each kind.
    linen = {"LayerNorm_2": "LayerNorm_1", "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0"}
    linen |= {"MlpBlock_3": "MlpBlock_0"}
    flat = {}
    with np.load(arguments.source) as file:
        for name in file.files:
            path, leaf = tuple(linen.get(part, part) for part in name.split("/")), file[name]
            if leaf.dtype == "V2":  # bfloat16, which NumPy stores as raw bytes and the original does not read
                leaf = leaf.view(ml_dtypes.bfloat16).astype(np.float32)
            flat[path] = leaf.reshape(-1) if leaf.shape[:-1] == (1, 1, 1) and path[-2].startswith("gn") else leaf
    wanted = flatten_dict(jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"])
    for path in sorted(wanted.keys() | flat.keys()):
        if path not in wanted or path not in flat or wanted[path].shape != flat[path].shape:
            raise SystemExit(f"{arguments.source}: {'/'.join(path)} is not in the original's model with this shape")

    def captured(module: Any, _method: str) -> bool:
        name = module.name or ""
        return name in ("embedding", "encoder_norm", "pre_logits") or name.startswith("encoderblock_")

    @jax.jit
    def run(params: Any, images: Any) -> Any:
        return model.apply({"params": params}, images, train=False, capture_intermediates=captured, mutable=["intermediates"])

    logits, state = run(unflatten_dict(flat), images)
    state = state["intermediates"]
    encoder = {name: module["__call__"][0] for name, module in state["Transformer"].items()}
    tokens = encoder.pop("encoder_norm")
    found = {"embedding": state["embedding"]["__call__"][0]}
    found |= {f"block_{i}": encoder[f"encoderblock_{i}"] for i in range(geometry["num_layers"])}
    found["features"] = tokens[:, 0] if geometry["classifier"] == "token" else tokens.mean(axis=1)
    if geometry["representation_size"]:
        found["pre_logits"] = jax.numpy.tanh(state["pre_logits"]["__call__"][0])
    if geometry["num_classes"]:
        found["logits"] = logits
    return {name: np.asarray(array) for name, array in found.items()}


_PEERS = {"timm": _timm, "huggingface": _huggingface, "original": _original}
_INSTALL = {
    "timm": "pip install torch torchvision timm",
    "huggingface": "pip install torch transformers",
    "original": "pip install -r requirements.txt",
}


def main(argv: list[str] | None = None) -> None:
    """Runs the command line, a subcommand for each peer; exits with status 2 if the peer is not installed."""
    parser = argparse.ArgumentParser(description="Computes the stages of a peer from the same weights, as an IO.npz.")
    peers = parser.add_subparsers(dest="peer", required=True)
    for name in _PEERS:
        peer = peers.add_parser(name)
        peer.add_argument("source", help="the weights" if name == "original" else "the exported folder")
        peer.add_argument("--images", required=True, help="an npz with `images`, float32 [B, H, W, 3]")
        peer.add_argument("--output", required=True, help="the IO.npz to write")
        if name == "original":
            peer.add_argument("--original", required=True, help="a checkout of github.com/google-research/vision_transformer")
            peer.add_argument("--geometry", required=True, help="the fields of our VisionTransformer, as JSON")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are in the folder
    name = arguments.peer
    try:
        with np.load(arguments.images) as file:
            images = file["images"]
        found = _PEERS[name](arguments, images)
    except ImportError as error:
        print(f"{name} cannot be imported here ({error}): {_INSTALL[name]}", file=sys.stderr)
        raise SystemExit(2) from None
    np.savez(arguments.output, images=images, maker=np.array(arguments.peer), **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
