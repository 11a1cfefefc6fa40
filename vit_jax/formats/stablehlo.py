"""What a StableHLO file of this package says of its weights."""

from pathlib import Path
from typing import Any

from vit_jax.errors import CheckpointError
from vit_jax.formats.meta import parse
from vit_jax.formats.npz import Npz

_ABOUT_THE_PROGRAM = ("input", "outputs", "resize", "dtype", "platforms", "calling_convention")


def read_about(path: Path) -> dict[str, Any]:
    """What a StableHLO file says of its weights, in the terms of the JSON beside an npz; CheckpointError where it cannot."""
    with Npz(path, "a program", "write it again") as file:
        if "about" not in file.infos:
            raise CheckpointError(f"{path} is no StableHLO file of ours: it has no 'about'")
        about = parse(file.values(file.header("about")).tobytes(), f"{path}: 'about'")
    return {name: value for name, value in about.items() if name not in _ABOUT_THE_PROGRAM}
