"""Errors of the ONNX export that need no converter; tests/peers/test_onnx.py tests the export."""

import sys

import jax
import numpy as np
import pytest

from vit_jax.errors import CheckpointError
from vit_jax.interop.onnx import save_onnx
from vit_jax.models.variants import build, shapes


def test_missing_converter_is_an_error_with_the_command(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    model, params, _, _, _ = made("pre_logits")
    with pytest.raises(
        CheckpointError,
        match=r"x.onnx is not written because jax2onnx is not installed: pip install jax2onnx==.* onnxruntime, ",
    ):
        save_onnx(tmp_path / "x.onnx", model, params)
    assert not any(tmp_path.iterdir())


def test_weights_beyond_two_gib_are_refused(tmp_path):
    model = build("H/14", num_classes=1000)
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes(model))  # takes no memory
    with pytest.raises(CheckpointError, match="x.onnx would have 2.4 GiB, an ONNX file at most 2; bfloat16 takes half"):
        save_onnx(tmp_path / "x.onnx", model, params)
