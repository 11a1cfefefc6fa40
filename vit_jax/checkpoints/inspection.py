"""A readable description of a file of weights."""

from pathlib import Path
from typing import Any

import jax

from vit_jax.checkpoints.catalogue import PUBLISHED
from vit_jax.checkpoints.load import meta_of, model_of_file
from vit_jax.errors import printable
from vit_jax.files import sha256
from vit_jax.formats.google import form
from vit_jax.formats.meta import grid_of
from vit_jax.formats.torch_files import stored_types
from vit_jax.models.variants import name_of, patches
from vit_jax.models.vit import VisionTransformer


def inspect(path: Path) -> str:
    """Describes a file: form, architecture, parameters, trained resolution, head, types, hash, JSON and problems.

    Of an npz only the headers and the hash are read (`check` reads the values); safetensors are read completely.

    Returns:
      A printable text of several lines.

    Raises:
      CheckpointError: if the file does not hold a Vision Transformer.
    """
    model, shapes = model_of_file(path)
    leaves = jax.tree.leaves(shapes)
    meta = meta_of(path)
    rows = patches(model, shapes)
    grid = grid_of(meta, model.stride, rows)
    digest = sha256(path)
    types = stored_types(path) if path.suffix == ".safetensors" else sorted({str(leaf.dtype) for leaf in leaves})
    problems = _problems(path, model, meta, grid, types)
    resolution = (
        f"{grid[0] * model.stride}×{grid[1] * model.stride} px, {grid[0]}×{grid[1]} patches" if grid else f"{rows} patches"
    )
    hybrid = "" if model.resnet is None else f" after a ResNet of {model.resnet or 'the root only'}, width {model.resnet_width}"
    known = [name for name, row in PUBLISHED.items() if row.sha256 == digest]
    lines = {
        "file": f"{path}, {path.stat().st_size / 2**20:.1f} MiB",
        "form": f"{_form(path)}, {len(leaves)} arrays of {' and '.join(types)}",
        "model": f"{name_of(model) or 'not a published size'}: {model.num_layers} blocks of {model.hidden_size}, "
        f"{model.num_heads} heads, MLP {model.mlp_dim}, patches of {model.patch_size}{hybrid}",
        "parameters": f"{sum(leaf.size for leaf in leaves):,}",
        "resolution": f"{resolution}, {'with a class token' if model.classifier == 'token' else 'mean of all tokens'}",
        "head": f"{model.num_classes:,} classes" if model.num_classes else "none",
        "pre_logits": str(model.representation_size or "none"),
        "sha256": digest + (f", published as {known[0]}" if known else ""),
        "JSON": ", ".join(f"{printable(key, 60)} {printable(value, 60)}" for key, value in meta.items())
        or "none: Google's scaling is assumed",
        "problems": "; ".join(problems) or "none",
    }
    return "\n".join(f"{key:12}{printable(value, 4000)}" for key, value in lines.items())


def _form(path: Path) -> str:
    return "safetensors" if path.suffix == ".safetensors" else form(path)


def _problems(
    path: Path, model: VisionTransformer, meta: dict[str, Any], grid: tuple[int, int] | None, types: list[str]
) -> list[str]:
    names = meta.get("class_names")
    found = []
    if not name_of(model):
        found.append("the architecture is not in the table of variants")
    if grid is None:
        found.append("the positions do not form a square, and no JSON gives their rectangle")
    if len(types) > 1:
        found.append("arrays of several types")
    if types and types[0] not in ("float32", "bfloat16"):
        found.append(f"{types[0]} is not a type that Google publishes")
    if names is not None and (not isinstance(names, list) or len(names) != model.num_classes):
        found.append("the number of class names differs from the number of classes")
    if meta.get("lacks"):
        found.append(f"a copy without {' and '.join(meta['lacks'])}")
    if path.suffix == ".npz" and form(path) != "published":
        found.append("the names are not in the published form (timm reads only that form)")
    return found
