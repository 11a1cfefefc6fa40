"""Models as programs that run without this package, ONNX and StableHLO, each in one file.

Both take pictures uint8 [B, H, W, 3] of the model's size, for any B, and give probabilities float32 [B, classes], or
features float32 [B, D] where the model has no head: scaling and softmax are inside. Weights are stored in float32 or
bfloat16; the computation is in float32. docs/deployment.md says how each is served.
"""

import contextlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.meta import class_names, image_size, parse, statistics
from vit_jax.checkpoints.npz import Npz
from vit_jax.errors import CheckpointError, reason
from vit_jax.files import whole_file
from vit_jax.models.variants import patches
from vit_jax.models.vit import VisionTransformer
from vit_jax.transforms.preprocess import scale

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_OPSET = 21  # of ONNX: the first whose GroupNormalization scales channels, not groups
_ONNX_LARGEST = 2**31 - 2**24  # bytes of weights: a protobuf message ends at 2 GiB
_ONNX_TOLERANCE = 1e-3  # of the largest output: wide enough for any rounding, and a wrong conversion is off by far more

_ABOUT_THE_PROGRAM = ("input", "outputs", "resize", "dtype", "platforms", "calling_convention")

Forward = Callable[[Mapping[str, Any], Any], jax.Array]


def _describe(
    path: Path, model: VisionTransformer, params: Mapping[str, Any], meta: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`meta` with its defaults, and what a server has to know besides; CheckpointError where it contradicts the model."""
    about = {name: value for name, value in (meta or {}).items() if value is not None}
    try:
        mean, deviation = statistics(about)
        names = class_names(about, model.num_classes)
        sides = image_size(about, model.stride, patches(model, params))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    about |= {
        "normalization": {"mean": mean, "std": deviation},
        "image_size": sides[0] if sides[0] == sides[1] else list(sides),
    }
    if names:
        about["class_names"] = names
    return about | {
        "input": f"B, {sides[0]}, {sides[1]}, 3",
        "outputs": model.num_classes or model.representation_size or model.hidden_size,
        "resize": "bilinear, half-pixel centres, no antialiasing, straight to image_size whatever the aspect ratio",
    }


def _images(about: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(about["input"]), np.uint8)


def _flat(params: Mapping[str, Any], dtype: Any) -> dict[str, np.ndarray]:
    leaves = flatten_dict({"params": params}, sep="/")
    return {name: np.asarray(leaf).astype(dtype, copy=False) for name, leaf in leaves.items()}


def _forward(model: VisionTransformer, about: Mapping[str, Any]) -> Forward:
    """The function of flat float32 parameters and uint8 pictures that both formats hold."""
    model = model.clone(dtype=jnp.float32, dropout=0.0, attention_dropout=0.0)
    scaling = (about["normalization"]["mean"], about["normalization"]["std"])

    def forward(flat, images):
        outputs: Any = model.apply(unflatten_dict(flat, sep="/"), scale(images, scaling))
        return jax.nn.softmax(outputs) if model.num_classes else outputs

    return forward


def save_stablehlo(
    path: str | os.PathLike,
    model: VisionTransformer,
    params: Mapping[str, Any],
    meta: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
) -> None:
    """Writes a model for a Python that has only jax, lowered for CPUs, NVIDIA's and AMD's GPUs, and TPUs.

    The file is an npz: "module", StableHLO's portable bytecode of a function of weights and pictures; "about", in JSON, what
    its user has to know; the weights, as arguments, under the names that `read_npz` knows (constants would be compiled anew
    for each batch size). JAX's own serialisation is not used: it wants flatbuffers, on which jax does not depend.

    `meta` is what lies beside an npz (`google.read_meta`). CheckpointError where it contradicts the model.
    """
    path = Path(path)
    if path.suffix != ".stablehlo":
        raise CheckpointError(f"StableHLO is saved in a file whose name ends in .stablehlo, got {path}")
    about = _describe(path, model, params, meta)
    flat, forward = _flat(params, dtype), _forward(model, about)

    def widened(flat, images):
        return forward({name: leaf.astype(jnp.float32) for name, leaf in flat.items()}, images)

    export = jax.export.export(jax.jit(widened, keep_unused=True), platforms=_PLATFORMS)
    frames = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined]
    jax.config.update("jax_traceback_in_locations_limit", 0)  # else the paths of this machine would travel
    try:
        exported = export(flat, _images(about))
    finally:
        jax.config.update("jax_traceback_in_locations_limit", frames)
    about |= {"dtype": np.dtype(dtype).name, "platforms": exported.platforms}
    about |= {"calling_convention": exported.calling_convention_version}
    flat["module"] = np.frombuffer(exported.mlir_module_serialized, np.uint8)
    flat["about"] = np.frombuffer(json.dumps(about, indent=2).encode(), np.uint8)
    with whole_file(path) as file:
        np.savez(file, **flat)  # type: ignore[arg-type]


def read_about(path: Path) -> dict[str, Any]:
    """What a StableHLO file says of its weights, in the terms of the JSON beside an npz; CheckpointError where it cannot."""
    with Npz(path, "a program", "write it again") as file:
        if "about" not in file.infos:
            raise CheckpointError(f"{path} is no StableHLO file of ours: it has no 'about'")
        about = parse(file.values(file.header("about")).tobytes(), f"{path}: 'about'")
    return {name: value for name, value in about.items() if name not in _ABOUT_THE_PROGRAM}


@contextlib.contextmanager
def _converting(path: Path) -> Iterator[None]:
    """jax2onnx at work: no debugging prints, no log of the plugins it cannot load, and its errors in a sentence."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Its rules for Flax's layers add vectors to pictures.
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
    about = _describe(path, model, params, meta)
    flat, forward = _flat(params, dtype), _forward(model, about)
    if (size := sum(leaf.nbytes for leaf in flat.values())) > _ONNX_LARGEST:
        raise CheckpointError(
            f"{path} would take {size / 2**30:.1f} GiB, and an ONNX file holds 2: bfloat16 takes half, StableHLO has no limit"
        )
    flat = {name: leaf.astype(np.float32, copy=False) for name, leaf in flat.items()}
    with _converting(path):
        from jax2onnx import to_onnx
        from onnx import helper

        proto = to_onnx(
            lambda images: forward(flat, images),
            [_images(about)],
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
        images = np.random.default_rng(0).integers(0, 256, (2, *_images(about).shape[1:]), np.uint8)
        found = session.run(None, {"images": images})[0]
    expected = np.asarray(jax.jit(forward)(flat, images))
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    if not difference <= _ONNX_TOLERANCE:
        raise CheckpointError(
            f"{path} is not written: what jax2onnx has made of the model differs from it by {difference:.1e} of the largest "
            "output; another version of jax2onnx may do better"
        )
