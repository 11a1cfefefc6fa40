"""Exports a model to ONNX, a program that runs without this package."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from vit_jax.errors import CheckpointError, reason
from vit_jax.files import whole_file
from vit_jax.interop.programs import Forward, describe, flat_params, forward_function, input_shape
from vit_jax.models.vit import VisionTransformer

_OPSET = 21  # of ONNX: the first whose GroupNormalization scales channels, not groups
_MAX_WEIGHTS = 2**31 - 2**24  # bytes; a protobuf message holds at most 2 GiB
_TOLERANCE = 1e-3  # of the largest output; rounding stays far below it, a wrong conversion far above


@contextlib.contextmanager
def _converting(path: Path) -> Iterator[None]:
    """Silences jax2onnx (prints, logs of plugins that it cannot load) and turns its errors into CheckpointError."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Its rules for Flax's layers need rank promotion.
        with contextlib.redirect_stdout(io.StringIO()), jax.numpy_rank_promotion("allow"):
            yield
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{path} is not written because {error.name} is not installed: pip install jax2onnx==0.13.0 onnxruntime, "
            "or in a clone pip install .[export]"
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"{path} is not written because jax2onnx failed: {type(error).__name__}: {reason(error)}"
        ) from error
    finally:
        logging.disable(disabled)


def save_onnx(
    path: str | os.PathLike,
    model: VisionTransformer,
    params: Mapping[str, Any],
    meta: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
) -> None:
    """Writes a model as ONNX. The file appears after onnxruntime has computed the model's outputs from it.

    The input is "images", uint8 [B, H, W, 3]; the output is "probabilities", or "features" without a head. `meta` is in the
    file's metadata, each value as JSON unless it is a string. Needs the extra `export`.

    Args:
      path: the file; its name ends in .onnx.
      model, params: as `load` returns them.
      meta: the JSON next to an npz.
      dtype: of the stored weights, float32 or bfloat16; a session casts bfloat16 to float32 when it is created.

    Raises:
      CheckpointError: if `meta` contradicts the model, the converter is missing or fails, or the weights exceed the 2 GiB
        of an ONNX file (H/14 in float32).
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise CheckpointError(f"{path}: the name of an ONNX file must end in .onnx")
    about = describe(path, model, params, meta)
    flat, forward = flat_params(params, dtype), forward_function(model, about)
    if (size := sum(leaf.nbytes for leaf in flat.values())) > _MAX_WEIGHTS:
        raise CheckpointError(
            f"{path} would have {size / 2**30:.1f} GiB, an ONNX file at most 2; bfloat16 takes half, StableHLO has no limit"
        )
    flat = {name: leaf.astype(np.float32, copy=False) for name, leaf in flat.items()}
    with _converting(path):
        from jax2onnx import to_onnx
        from onnx import helper

        proto = to_onnx(
            lambda images: forward(flat, images),
            [input_shape(about)],
            model_name="vit_jax",
            opset=_OPSET,
            input_names=["images"],
            output_names=["probabilities" if model.num_classes else "features"],
        )
        del proto.graph.value_info[:]  # some precede the converter's transpositions; readers infer them
        _store_weights(proto.graph, np.dtype(dtype))
        helper.set_model_props(proto, {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()})
    with whole_file(path) as file:
        file.write(proto.SerializeToString())
        file.flush()
        del proto
        _compare(path, file.name, forward, flat, about)


def _store_weights(graph: Any, dtype: np.dtype) -> None:
    """Removes unused arrays; if `dtype` is bfloat16, stores each array that bfloat16 represents exactly in that type."""
    from onnx import TensorProto, helper, numpy_helper

    used, casts = {name for node in graph.node for name in node.input}, []
    for i in reversed(range(len(graph.initializer))):
        tensor = graph.initializer[i]
        if tensor.name not in used:
            del graph.initializer[i]
        elif dtype == ml_dtypes.bfloat16 and tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if np.array_equal(
                halved := values.astype(dtype), values
            ):  # true for every weight, because they were rounded before
                stored = f"{tensor.name}_bfloat16"
                casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
                tensor.CopyFrom(numpy_helper.from_array(halved, stored))
    nodes = [*casts, *graph.node]  # a node must follow the nodes whose outputs it uses
    del graph.node[:]
    graph.node.extend(nodes)


def _compare(path: Path, scratch: str, forward: Forward, flat: dict[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless onnxruntime computes the model's outputs from the file."""
    with _converting(path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        session = onnxruntime.InferenceSession(scratch, options, providers=["CPUExecutionProvider"])
        images = np.random.default_rng(0).integers(0, 256, (2, *input_shape(about).shape[1:]), np.uint8)
        found = session.run(None, {"images": images})[0]
    expected = np.asarray(jax.jit(forward)(flat, images))
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    if not difference <= _TOLERANCE:
        raise CheckpointError(
            f"{path} is not written: the outputs of the converted model differ by {difference:.1e} of the largest output; try "
            "another version of jax2onnx"
        )
