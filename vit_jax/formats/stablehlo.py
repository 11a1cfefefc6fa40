"""The description of the weights in a StableHLO file of this package."""

from pathlib import Path
from typing import Any

from vit_jax.errors import CheckpointError
from vit_jax.formats.meta import parse
from vit_jax.formats.npz import Npz

_ABOUT_THE_PROGRAM = ("input", "outputs", "resize", "dtype", "platforms", "calling_convention")


def read_about(path: Path) -> dict[str, Any]:
    """Reads the description of the weights in a StableHLO file.

    Returns:
      The fields of the JSON next to an npz.

    Raises:
      CheckpointError: if the file is not a StableHLO file of this package or is damaged.
    """
    with Npz(path, "a program", "write it again") as file:
        if "about" not in file.infos:
            raise CheckpointError(f"{path} is not a StableHLO file of this package: it has no 'about'")
        about = parse(file.values(file.header("about")).tobytes(), f"{path}: 'about'")
    return {name: value for name, value in about.items() if name not in _ABOUT_THE_PROGRAM}
