"""The table of published checkpoints."""

import dataclasses
import difflib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vit_jax.checkpoints.google import CheckpointError

_ASSETS = Path(__file__).parents[1] / "assets"
_BUCKET = "https://storage.googleapis.com/vit_models"


@dataclasses.dataclass(frozen=True)
class Published:
    """A file of weights and where it lies."""

    variant: str  # a row of vit_jax.models.variants.VARIANTS
    image_size: int  # pixels it was trained at
    num_classes: int
    addresses: tuple[str, ...]  # URLs, in the order to try them


def _imagenet21k(variant: str, name: str) -> Published:
    return Published(variant, 224, 21843, (f"{_BUCKET}/imagenet21k/{name}.npz",))


# ImageNet-21k files of the ViT paper (README of google-research/vision_transformer, "Available ViT models").
PUBLISHED: dict[str, Published] = {
    "mini_8": Published("Mini/8", 64, 200, ((_ASSETS / "mini_8.npz").as_uri(),)),
    "ViT-B_16": _imagenet21k("B/16", "ViT-B_16"),
    "ViT-B_32": _imagenet21k("B/32", "ViT-B_32"),
    "ViT-L_16": _imagenet21k("L/16", "ViT-L_16"),
    "ViT-L_32": _imagenet21k("L/32", "ViT-L_32"),
    "ViT-H_14": _imagenet21k("H/14", "ViT-H_14"),
    "R50+ViT-B_16": _imagenet21k("R50+B/16", "R50+ViT-B_16"),
}


def resolve(name: str) -> Published:
    """The row of a published name; CheckpointError with the nearest names for any other."""
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name, PUBLISHED, n=3) or list(PUBLISHED)
        raise CheckpointError(f"no checkpoint is published as {name!r}; the nearest names: {', '.join(near)}")
    return PUBLISHED[name]


def find(source: str) -> Path:
    """The file that `source` stands for: an existing path, else a published name whose file is on this machine.

    CheckpointError says where to get the file where it is not.
    """
    path = Path(source).expanduser()
    name = path.name.removesuffix(".npz")
    try:
        if path.is_file() or (path.exists() and name not in PUBLISHED):
            return path
    except OSError:  # a name too long to be one
        pass
    if name not in PUBLISHED:
        raise CheckpointError(f"{source} is neither a file nor a published name; published here are {', '.join(PUBLISHED)}")
    addresses = PUBLISHED[name].addresses
    for address in addresses:
        parts = urlsplit(address)
        local = Path(unquote(parts.path))
        if parts.scheme == "file" and local.is_file() and name == source.removesuffix(".npz"):
            return local
    raise CheckpointError(
        f"there is no file {path}; download {addresses[0]} and give its path as model.checkpoint "
        "(--config.model.checkpoint=PATH on the command line)"
    )
