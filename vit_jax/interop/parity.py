"""Parity with another implementation, stage by stage: its outputs come as an IO.npz, whose layout docs/checkpoints.md gives."""

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

_LARGEST_IO = 2**31  # bytes; the stages of L/16 for eight images of 384 px take a quarter of it
PEERS = ("timm", "huggingface", "original")
# On the CPU, beside a process that may hold the GPU; a traceback without notes below the error; the original promotes ranks.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
_ENVIRONMENT |= {"JAX_TRACEBACK_FILTERING": "off", "JAX_NUMPY_RANK_PROMOTION": "allow"}


def read_io(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The floating point arrays of an IO.npz in the machine's byte order: `images` float32 [B, H, W, 3], and stages.

    Nothing is ever unpickled, and no more than 2 GiB are read.

    Raises:
      CheckpointError: if it is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no file {path}, and no peer of that name: {', '.join(PEERS)}")
    try:
        with Npz(path, "stages", "write it again", largest=_LARGEST_IO) as file:
            members = [file.header(name) for name in file.infos]
            arrays = {member.name: file.values(member) for member in members if member.dtype.kind == "f" and member.shape}
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as an IO.npz: {reason(error, 400).removeprefix(f'{path}: ')}") from None
    images = arrays.get("images")
    if images is None or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise CheckpointError(f"{path} should hold `images` as a model gets them, float32 [B, H, W, 3]")
    arrays = {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
    with np.errstate(over="ignore"):
        arrays["images"] = arrays["images"].astype(np.float32, copy=False)
    if not np.isfinite([arrays["images"].min(), arrays["images"].max()]).all():
        raise CheckpointError(f"{path}: `images` holds values that are not finite")
    return arrays


def _order(stage: str) -> tuple[int, int]:
    """Where a stage stands in a model; those of unknown names last."""
    block = re.fullmatch(r"block_(\d+)", stage)
    known = ("embedding", "block", "features", "pre_logits", "logits")
    name = "block" if block else stage
    return known.index(name) if name in known else len(known), int(block[1]) if block else 0


def compare(stages: Mapping[str, Any], reference: Mapping[str, Any] | str | os.PathLike) -> list[tuple[str, float]]:
    """(stage, difference) for each stage that both have, in a model's order; `reference` may be the path of an IO.npz.

    The difference is the largest one over the largest value of the reference; infinite where either is not finite.
    CheckpointError where a stage has two shapes, or where they have no stage in common.
    """
    where = f"{reference}: " if isinstance(reference, str | os.PathLike) else ""
    theirs = read_io(reference) if isinstance(reference, str | os.PathLike) else reference
    result = []
    for name in sorted(stages.keys() & theirs.keys(), key=_order):
        with np.errstate(over="ignore"):  # of a long double: infinite, which never agrees
            a, b = np.asarray(stages[name], np.float64), np.asarray(theirs[name], np.float64)
        if a.shape != b.shape:
            raise CheckpointError(f"{where}{name} has shape {list(b.shape)}, ours has {list(a.shape)}")
        with np.errstate(invalid="ignore"):
            apart, largest = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
        difference = float(apart) / float(largest) if largest > 0 else 0.0 if apart == 0 else np.inf
        result.append((name, difference if np.isfinite(difference) else np.inf))
    if not result:
        names = printable(", ".join(theirs), 400) or "none"
        raise CheckpointError(f"{where}no stage in common: ours are {', '.join(stages)}, the reference has {names}")
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
    """What a peer's stages give for the same parameters and images (float32 [B, H, W, 3], as the model gets them).

    `name` is one of PEERS. Each runs on the CPU in a process of its own (vit_jax/interop/peers.py), timm and Hugging Face on an
    export; where theirs has no place for a part (timm for pre_logits, Hugging Face for a head behind them) its stages are
    left out. The original runs from the checkout at `original`, on the npz `source` itself where that is one in the
    published form, so that two readers of it are compared; else on one that is saved for it. CheckpointError with what the
    peer said where it fails.
    """
    environment = {**os.environ, **_ENVIRONMENT}
    images = np.asarray(images, np.float32)
    meta = {**(meta or {}), "image_size": list(images.shape[1:3])}
    with tempfile.TemporaryDirectory(prefix="vit_jax-") as scratch:
        exported = Path(scratch) / "exported"
        options: list[str] = []
        left_out: tuple[str, ...] = ()
        if name == "timm":
            if model.representation_size:
                left_out = ("pre_logits", "head")
            save_timm(exported, {part: leaf for part, leaf in params.items() if part not in left_out}, meta)
        elif name == "huggingface":
            if model.representation_size:
                left_out = ("head",)
            save_huggingface(exported, {part: leaf for part, leaf in params.items() if part not in left_out}, meta)
        elif name == "original":
            if original is None:
                raise CheckpointError(
                    "the original is run from a checkout of github.com/google-research/vision_transformer: give its path"
                )
            fields = (field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name", "dtype"))
            options = ["--original", os.fspath(original)]
            options += ["--geometry", json.dumps({field: getattr(model, field) for field in fields})]
            if source is not None and os.fspath(source).endswith(".npz") and form(source) == "published":
                exported = Path(source)
            else:
                exported = exported.with_suffix(".npz")
                save_npz(exported, params)
        else:
            raise ValueError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
        inputs, output = Path(scratch) / "images.npz", Path(scratch) / "io.npz"
        np.savez(inputs, images=images)
        # By its path and with -P, so that no folder of ours is where the original's package, also called vit_jax, is sought.
        command = [sys.executable, "-P", peers.__file__, name, str(exported), "--images", str(inputs), "--output", str(output)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]  # a message may go on below
            raise CheckpointError(f"{name} did not run: {(errors or lines)[-1]}")
        return {stage: array for stage, array in read_io(output).items() if stage != "images"}
