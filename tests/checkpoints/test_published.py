"""The published architectures with random weights: from a file to logits, at the trained image size and a larger one."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.load import load
from vit_jax.formats.google import save_npz
from vit_jax.models.variants import build, from_tree, shapes

AUGREG = ("Ti/16", "S/32", "S/16", "B/32", "B/16", "L/16", "R+Ti/16", "R26+S/32", "R50+L/32")
ORIGINAL = ("B/32", "B/16", "L/32", "L/16", "H/14", "R50+B/16")
MODELS = [(name, 0) for name in AUGREG] + [(name, build(name).hidden_size) for name in ORIGINAL]
LARGE = ("L/16", "L/32", "H/14", "R50+L/32")  # more than a gigabyte of weights: only their shapes are computed
COMPUTED = [row for row in MODELS if row[0] not in LARGE]
# `make test-full` computes all; the sample is a ViT with pre-logits and a hybrid without.
SAMPLE = [("R+Ti/16", 0), ("B/32", 768)]
CHOSEN = COMPUTED if os.environ.get("VIT_JAX_PUBLISHED") == "all" else SAMPLE


def sizes(name: str) -> tuple[int, int]:
    return 224, 392 if name == "H/14" else 384


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pre_logits"), CHOSEN)
def test_random_weights_give_finite_logits(name, pre_logits, tmp_path):
    model, draw = build(name, num_classes=21843, representation_size=pre_logits), np.random.default_rng(0)
    flat = flatten_dict(shapes(model), sep="/")
    flat = {path: draw.standard_normal(leaf.shape, np.float32) * np.float32(0.02) for path, leaf in flat.items()}
    save_npz(tmp_path / "x.npz", unflatten_dict(flat, sep="/"))
    for size in sizes(name):
        found, params = load(tmp_path / "x.npz", image_size=size)
        assert found == model
        assert all(
            np.array_equal(leaf, flat[path])
            for path, leaf in flatten_dict(params, sep="/").items()
            if size == 224 or "pos_embedding" not in path
        )
        images = draw.uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
        logits = np.asarray(
            jax.jit(lambda params, images, model=found: model.apply({"params": params}, images))(params, images)
        )
        assert logits.shape == (1, 21843) and np.isfinite(logits).all() and logits.std() > 0
    (tmp_path / "x.npz").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pre_logits"), [row for row in MODELS if row not in CHOSEN])
def test_shapes_of_other_models(name, pre_logits):
    model = build(name, num_classes=21843, representation_size=pre_logits)
    cut = model.clone(num_layers=2)  # all blocks are alike, and tracing takes the time
    for size in sizes(name):
        assert from_tree(shapes(model, size)) == model
        images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
        logits = jax.eval_shape(cut.apply, {"params": shapes(cut, size)}, images)
        assert (logits.shape, logits.dtype) == ((1, 21843), np.float32)


MEASURE = """
import json, re, sys
from pathlib import Path
import jax
from vit_jax.checkpoints.load import load

def peak():  # getrusage would count what the parent had before this program was started
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

jax.block_until_ready(jax.numpy.zeros(1))
before = peak()
load(sys.argv[1])
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_loading_needs_little_more_memory_than_the_file(tmp_path):
    """B/16 with a head of 21,843 classes: peak memory above that of the imports."""
    model, path = build("B/16", num_classes=21843), tmp_path / "x.npz"
    draw = np.random.default_rng(0)
    flat = {name: draw.standard_normal(leaf.shape, np.float32) for name, leaf in flatten_dict(shapes(model), sep="/").items()}
    save_npz(path, flat)
    command = [sys.executable, "-c", MEASURE, str(path)]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert measured < 1.3 * path.stat().st_size
    path.unlink()
