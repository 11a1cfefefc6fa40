"""Compares a model with another implementation stage by stage. docs/checkpoints.md gives the layout of an IO.npz."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.errors import CheckpointError, printable, reason
from vit_jax.formats.google import form, save_npz
from vit_jax.formats.npz import Npz
from vit_jax.interop import peers
from vit_jax.interop.torch_models import save_huggingface, save_timm
from vit_jax.models.vit import VisionTransformer

_MAX_IO = 2**31  # bytes; the stages of L/16 for eight images of 384 px take a quarter of it
PEERS = ("timm", "huggingface", "original")
# Peers run on the CPU, because this process may hold the GPU. A traceback has no notes below the error. The original needs
# rank promotion.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
_ENVIRONMENT |= {"JAX_TRACEBACK_FILTERING": "off", "JAX_NUMPY_RANK_PROMOTION": "allow"}


def read_io(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the floating point arrays of an IO.npz. Nothing is unpickled, and at most 2 GiB are read.

    Returns:
      `images` float32 [B, H, W, 3], and the stages, in the machine's byte order.

    Raises:
      CheckpointError: if the file is not an IO.npz.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no file {path}, and no peer of that name; the peers are {', '.join(PEERS)}")
    try:
        with Npz(path, "stages", "write it again", largest=_MAX_IO) as file:
            members = [file.header(name) for name in file.infos]
            arrays = {member.name: file.values(member) for member in members if member.dtype.kind == "f" and member.shape}
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as an IO.npz: {reason(error, 400).removeprefix(f'{path}: ')}") from None
    images = arrays.get("images")
    if images is None or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise CheckpointError(f"{path} should hold `images` as the model receives them, float32 [B, H, W, 3]")
    arrays = {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
    with np.errstate(over="ignore"):
        arrays["images"] = arrays["images"].astype(np.float32, copy=False)
    if not np.isfinite([arrays["images"].min(), arrays["images"].max()]).all():
        raise CheckpointError(f"{path}: `images` holds values that are not finite")
    return arrays


def _order(stage: str) -> tuple[int, int]:
    """Returns a stage's sort key: its position in a model, unknown names last."""
    block = re.fullmatch(r"block_(\d+)", stage)
    known = ("embedding", "block", "features", "pre_logits", "logits")
    name = "block" if block else stage
    return known.index(name) if name in known else len(known), int(block[1]) if block else 0


def compare(stages: Mapping[str, Any], reference: Mapping[str, Any] | str | os.PathLike) -> list[tuple[str, float]]:
    """Compares the stages that both have.

    Args:
      stages: name → array.
      reference: likewise, or the path of an IO.npz.

    Returns:
      (stage, difference) in a model's order. The difference is the largest absolute one divided by the reference's largest
      absolute value; infinite if either is not finite.

    Raises:
      CheckpointError: if a stage's shapes differ, or there is no common stage.
    """
    where = f"{reference}: " if isinstance(reference, str | os.PathLike) else ""
    theirs = read_io(reference) if isinstance(reference, str | os.PathLike) else reference
    result = []
    for name in sorted(stages.keys() & theirs.keys(), key=_order):
        with np.errstate(over="ignore"):  # a long double may become infinite, which never agrees
            a, b = np.asarray(stages[name], np.float64), np.asarray(theirs[name], np.float64)
        if a.shape != b.shape:
            raise CheckpointError(f"{where}{name} has shape {list(b.shape)}, ours has {list(a.shape)}")
        with np.errstate(invalid="ignore"):
            apart, largest = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
        difference = float(apart) / float(largest) if largest > 0 else 0.0 if apart == 0 else np.inf
        result.append((name, difference if np.isfinite(difference) else np.inf))
    if not result:
        names = printable(", ".join(theirs), 400) or "none"
        raise CheckpointError(f"{where}no common stage: ours are {', '.join(stages)}, the reference has {names}")
    return result


def peer_stages(
    name: str,
    model: VisionTransformer,
    params: Mapping[str, Any],
    meta: Mapping[str, Any] | None,
    images: Any,
    *,
    original: str | os.PathLike | None = None,
    source: str | os.PathLike | None = None,
) -> dict[str, np.ndarray]:
    """Runs a peer with the same parameters on the same images and returns its stages.

    The peer runs on the CPU in its own process (vit_jax/interop/peers.py), timm and Hugging Face from an exported folder.
    Stages that the peer's model does not have are left out (pre_logits and head in timm, a head after pre_logits in Hugging
    Face).

    Args:
      name: one of PEERS.
      model, params: as `load` returns them.
      meta: the JSON next to an npz.
      images: float32 [B, H, W, 3], as the model receives them.
      original: a checkout of google-research/vision_transformer, for the peer "original".
      source: the file of the parameters. If it is an npz in the published form, the original reads it directly, so that
        both readers are compared; else it reads a copy.

    Returns:
      Stage → float array.

    Raises:
      CheckpointError: if the peer fails; the message has its error.
    """
    images = np.asarray(images, np.float32)
    meta = {**(meta or {}), "image_size": list(images.shape[1:3])}
    with tempfile.TemporaryDirectory(prefix="vit_jax-") as scratch:
        exported, options = Path(scratch) / "exported", []
        if name in ("timm", "huggingface"):
            missing = () if not model.representation_size else ("pre_logits", "head") if name == "timm" else ("head",)
            save = save_timm if name == "timm" else save_huggingface
            save(exported, {part: leaf for part, leaf in params.items() if part not in missing}, meta)
        elif name == "original":
            if original is None:
                raise CheckpointError("--original DIR is missing: a checkout of github.com/google-research/vision_transformer")
            fields = (field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name", "dtype"))
            options = ["--original", os.fspath(original)]
            options += ["--geometry", json.dumps({field: getattr(model, field) for field in fields})]
            if source is not None and os.fspath(source).endswith(".npz") and form(source) == "published":
                exported = Path(source)
            else:
                exported = exported.with_suffix(".npz")
                save_npz(exported, params)
        else:
            raise ValueError(f"there is no peer {name!r}; the peers are {', '.join(PEERS)}")
        return _run_peer(name, exported, images, options, Path(scratch))


def _run_peer(name: str, weights: Path, images: np.ndarray, options: list[str], scratch: Path) -> dict[str, np.ndarray]:
    """Runs peers.py on weights and images; returns its stages. Files in between are written to the folder `scratch`."""
    inputs, output = scratch / "images.npz", scratch / "io.npz"
    np.savez(inputs, images=images)
    # By its path and with -P, so that Python does not find this package when the original imports its own, also `vit_jax`.
    command = [sys.executable, "-P", peers.__file__, name, str(weights), "--images", str(inputs), "--output", str(output)]
    environment = {**os.environ, **_ENVIRONMENT}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]  # the message may have more lines
        raise CheckpointError(f"{name} failed: {(errors or lines)[-1]}")
    return {stage: array for stage, array in read_io(output).items() if stage != "images"}
