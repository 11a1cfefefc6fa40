"""Exports a model to StableHLO, a program that runs without this package."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import CheckpointError
from vit_jax.files import whole_file
from vit_jax.interop.programs import describe, flat_params, forward_function, input_shape
from vit_jax.models.vit import VisionTransformer

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def save_stablehlo(
    path: str | os.PathLike,
    model: VisionTransformer,
    params: Mapping[str, Any],
    meta: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
) -> None:
    """Writes a model as a program that needs only jax, lowered for CPUs, NVIDIA's and AMD's GPUs, and TPUs.

    The file is an npz with three parts: "module", the StableHLO portable bytecode of a function of weights and images;
    "about", the description as JSON; and the weights under names that `read_npz` reads. The weights are arguments, because
    constants would be compiled again for each batch size. JAX's own serialisation needs flatbuffers, which jax does not
    install.

    Args:
      path: the file; its name ends in .stablehlo.
      model, params: as `load` returns them.
      meta: the JSON next to an npz.
      dtype: of the stored weights, float32 or bfloat16.

    Raises:
      CheckpointError: if `meta` contradicts the model, or for another file name.
      OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".stablehlo":
        raise CheckpointError(f"{path}: the name of a StableHLO file must end in .stablehlo")
    about = describe(path, model, params, meta)
    flat, forward = flat_params(params, dtype), forward_function(model, about)

    def widened(flat, images):
        return forward({name: leaf.astype(jnp.float32) for name, leaf in flat.items()}, images)

    export = jax.export.export(jax.jit(widened, keep_unused=True), platforms=_PLATFORMS)
    frames = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)  # keeps this machine's paths out of the file
    try:
        exported = export(flat, input_shape(about))
    finally:
        jax.config.update("jax_traceback_in_locations_limit", frames)
    about |= {"dtype": np.dtype(dtype).name, "platforms": exported.platforms}
    about |= {"calling_convention": exported.calling_convention_version}
    flat["module"] = np.frombuffer(exported.mlir_module_serialized, np.uint8)
    flat["about"] = np.frombuffer(json.dumps(about, indent=2).encode(), np.uint8)
    with whole_file(path) as file:
        np.savez(file, **flat)  # type: ignore[arg-type]
