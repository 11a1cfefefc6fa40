"""timm and the original as contestants; `make test-interop` installs what these tests need."""

import importlib.util
import json
import os
import sys

import pytest

from benchmarks.contestants import CONTESTANTS
from benchmarks.measure import Process, environment
from vit_jax.errors import UserError

GEOMETRY = dict(patch_size=8, hidden_size=48, num_layers=1, num_heads=2, mlp_dim=64, classifier="token", num_classes=5)
GEOMETRY |= dict(representation_size=0, resnet=None, resnet_width=64)


def needs_timm():
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("timm")):
        pytest.skip("needs torch and timm: make test-interop installs them")


def start(name, kind, checkout="", **fields):
    work = {"kind": kind, "size": 16, "batch": 2, "geometry": GEOMETRY | fields}
    command = [sys.executable, *CONTESTANTS[name.split("+")[0]][0], name, json.dumps(work), checkout]
    return Process(name, command, environment(XLA_FLAGS="", JAX_NUMPY_RANK_PROMOTION="allow"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("timm+bf16+channels_last", "train"), ("timm", "inference"), ("original", "train"), ("original", "inference")],
)
def test_peer_runs(name, kind):
    checkout = os.environ.get("VIT_JAX_ORIGINAL", "")
    if name == "original" and not checkout:
        pytest.skip("needs a checkout of github.com/google-research/vision_transformer: set VIT_JAX_ORIGINAL to its path")
    if name != "original":
        needs_timm()
    process = start(name, kind, checkout)
    try:
        assert process(1) > 0 and process(2) > 0
        about = process.ask("about")
        assert about["memory"] > 2**20 and about["device"] == "cpu"
        assert about["versions"].keys() == ({"jax", "flax"} if name == "original" else {"torch", "timm"})
    finally:
        process.close()


def test_timm_refuses_a_hybrid():
    needs_timm()
    process = start("timm", "train", resnet=[1])
    with pytest.raises(UserError, match="timm is timed only on Vision Transformers without ResNet"):
        process(1)
    process.close()


def test_original_needs_its_checkout(tmp_path):
    process = start("original", "train", str(tmp_path))
    with pytest.raises(UserError, match="there is no vit_jax/models_vit.py below .*--original"):
        process(1)
    process.close()
