"""Checks that a file is the one that a row of the table describes."""

from pathlib import Path
from typing import Any

from vit_jax.checkpoints.catalogue import Published
from vit_jax.errors import CheckpointError
from vit_jax.files import sha256
from vit_jax.formats.google import read_shapes
from vit_jax.models.variants import build, from_tree, patches


def max_bytes(row: Published) -> int:
    """Returns the largest accepted size of a file of unknown size: a tenth and 1 MiB more than its parameters need."""
    return int(1.1 * row.mib * 2**20) + 2**20


def check_hash(path: Path, expected: str | None) -> Path:
    """Returns the path; raises CheckpointError if a SHA-256 is expected and the file has another one."""
    if expected and (found := sha256(path)) != expected:
        raise CheckpointError(f"{path} has the SHA-256 {found}, expected {expected}")
    return path


def check_file(path: Path, row: Published) -> None:
    """Raises CheckpointError unless the npz is the row's: size and hash if they are known, and what the headers show."""
    if row.size and (size := path.stat().st_size) != row.size:
        raise CheckpointError(f"{path} has {size} bytes, expected {row.size}")
    check_hash(path, row.sha256)
    check_hash(path, row.demanded)
    check_tree(path, read_shapes(path), row)


def check_tree(path: Path, tree: dict[str, Any], row: Published, headless: bool = False) -> None:
    """Raises CheckpointError unless architecture, classes (or none, if `headless`) and resolution are the row's."""
    wanted = build(row.variant)
    try:
        model = from_tree(tree)
        rows = patches(model, tree)
    except (ValueError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is not a Vision Transformer: {error}") from None
    for field in ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim", "resnet"):
        found, expected = getattr(model, field), getattr(wanted, field)
        if found != expected:
            raise CheckpointError(f"{path} is not the {row.variant} of {row.name}: {field} is {found}, expected {expected}")
    if model.num_classes != row.num_classes and not (headless and not model.num_classes):
        raise CheckpointError(f"{path} has a head of {model.num_classes} classes, {row.name} has {row.num_classes}")
    if rows != (row.image_size // model.stride) ** 2:
        raise CheckpointError(f"{path} has positions for {rows} patches, {row.name} was trained at {row.image_size} pixels")
