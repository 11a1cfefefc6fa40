"""A model as StableHLO, a program that runs without this package."""

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
    """Writes a model for a Python that has only jax, lowered for CPUs, NVIDIA's and AMD's GPUs, and TPUs.

    The file is an npz: "module", StableHLO's portable bytecode of a function of weights and images; "about", in JSON, what
    its user has to know; the weights, as arguments, under the names that `read_npz` knows (constants would be compiled anew
    for each batch size). JAX's own serialisation is not used: it wants flatbuffers, on which jax does not depend.

    `meta` is what lies beside an npz (`google.read_meta`). CheckpointError where it contradicts the model.
    """
    path = Path(path)
    if path.suffix != ".stablehlo":
        raise CheckpointError(f"StableHLO is saved in a file whose name ends in .stablehlo, got {path}")
    about = describe(path, model, params, meta)
    flat, forward = flat_params(params, dtype), forward_function(model, about)

    def widened(flat, images):
        return forward({name: leaf.astype(jnp.float32) for name, leaf in flat.items()}, images)

    export = jax.export.export(jax.jit(widened, keep_unused=True), platforms=_PLATFORMS)
    frames = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)  # else the paths of this machine would travel
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
