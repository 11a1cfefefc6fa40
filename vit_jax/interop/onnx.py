"""A model as ONNX, a program that runs without this package."""

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
_LARGEST = 2**31 - 2**24  # bytes of weights: a protobuf message ends at 2 GiB
_TOLERANCE = 1e-3  # of the largest output: wide enough for any rounding, and a wrong conversion is off by far more


@contextlib.contextmanager
def _converting(path: Path) -> Iterator[None]:
    """jax2onnx at work: no debugging prints, no log of the plugins it cannot load, and its errors in a sentence."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Its rules for Flax's layers add vectors to images.
        with contextlib.redirect_stdout(io.StringIO()), jax.numpy_rank_promotion("allow"):
            yield
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{path} is not written, for {error.name} is not installed: pip install jax2onnx==0.13.0 onnxruntime, "
            "or from a clone pip install .[export]"
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"{path} is not written, because jax2onnx failed: {type(error).__name__}: {reason(error)}"
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
    """Writes a model as ONNX: "images" in, "probabilities" out ("features" without a head), `meta` among the metadata.

    A value of the metadata is JSON unless it is a string. With dtype bfloat16, a session casts the weights to float32 when
    it is made. The file is put in place once onnxruntime has computed from it what the model does. Needs the extra `export`.

    CheckpointError where `meta` contradicts the model, where the converter is missing or errs, and for weights of more than
    the 2 GiB that an ONNX file holds (H/14 in float32).
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise CheckpointError(f"ONNX is saved in a file whose name ends in .onnx, got {path}")
    about = describe(path, model, params, meta)
    flat, forward = flat_params(params, dtype), forward_function(model, about)
    if (size := sum(leaf.nbytes for leaf in flat.values())) > _LARGEST:
        raise CheckpointError(
            f"{path} would take {size / 2**30:.1f} GiB, and an ONNX file holds 2: bfloat16 takes half, StableHLO has no limit"
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
        del proto.graph.value_info[:]  # some are of before the converter moved axes; readers infer them
        _store(proto.graph, np.dtype(dtype))
        helper.set_model_props(proto, {k: v if isinstance(v, str) else json.dumps(v) for k, v in about.items()})
    with whole_file(path) as file:
        file.write(proto.SerializeToString())
        file.flush()
        del proto
        _compare(path, file.name, forward, flat, about)


def _store(graph: Any, dtype: np.dtype) -> None:
    """Drops the arrays that no node takes; of the others, stores as bfloat16 what it holds exactly, if that is the dtype."""
    from onnx import TensorProto, helper, numpy_helper

    used, casts = {name for node in graph.node for name in node.input}, []
    for i in reversed(range(len(graph.initializer))):
        tensor = graph.initializer[i]
        if tensor.name not in used:
            del graph.initializer[i]
        elif dtype == ml_dtypes.bfloat16 and tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            if np.array_equal(halved := values.astype(dtype), values):  # every weight, for they were rounded before
                stored = f"{tensor.name}_bfloat16"
                casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
                tensor.CopyFrom(numpy_helper.from_array(halved, stored))
    nodes = [*casts, *graph.node]  # a node stands behind those whose outputs it takes
    del graph.node[:]
    graph.node.extend(nodes)


def _compare(path: Path, scratch: str, forward: Forward, flat: dict[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """CheckpointError unless onnxruntime computes from the file what the model does."""
    with _converting(path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        session = onnxruntime.InferenceSession(scratch, options, providers=["CPUExecutionProvider"])
        images = np.random.default_rng(0).integers(0, 256, (2, *input_shape(about).shape[1:]), np.uint8)
        found = session.run(None, {"images": images})[0]
    expected = np.asarray(jax.jit(forward)(flat, images))
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    if not difference <= _TOLERANCE:
        raise CheckpointError(
            f"{path} is not written: what jax2onnx has made of the model differs from it by {difference:.1e} of the largest "
            "output; another version of jax2onnx may do better"
        )
