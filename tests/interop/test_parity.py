"""The files and differences of the parity check; tests/peers runs the peers."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from vit_jax.errors import CheckpointError
from vit_jax.interop import parity, peers
from vit_jax.interop.parity import compare, peer_stages, read_io
from vit_jax.models.variants import build

IMAGES = np.zeros((1, 4, 4, 3), np.float32)


def test_difference_is_relative_to_the_largest_value(tmp_path):
    ours = {"logits": np.float32([1, -4.5]), "embedding": np.float32([[1]]), "block_10": np.ones(1), "block_2": np.ones(1)}
    theirs = {name: array + 0 for name, array in ours.items()} | {"logits": np.float32([1, -4]), "else": np.ones(1)}
    np.savez(tmp_path / "io.npz", images=IMAGES, maker="another tool", **theirs)
    for reference in (theirs, tmp_path / "io.npz", str(tmp_path / "io.npz")):
        assert compare(ours, reference) == [("embedding", 0), ("block_2", 0), ("block_10", 0), ("logits", 0.125)]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [(np.nan, 1, np.inf), (1, np.nan, np.inf), (0, 0, 0), (1, 0, np.inf), (np.inf, np.inf, np.inf)],
)
def test_values_not_finite_or_zero_are_never_equal(ours, theirs, expected):
    assert compare({"logits": np.full(3, ours)}, {"logits": np.full(3, theirs)}) == [("logits", expected)]


def test_different_shapes_or_names_are_errors(tmp_path):
    np.savez(tmp_path / "io.npz", images=IMAGES, logits=np.zeros((1, 3), np.float32))
    with pytest.raises(CheckpointError, match=r"io.npz: logits has shape \[1, 3\], ours has \[1, 4\]"):
        compare({"logits": np.zeros((1, 4))}, tmp_path / "io.npz")
    with pytest.raises(CheckpointError, match="io.npz: no common stage: ours are features, the reference has images, logits"):
        compare({"features": np.zeros((1, 4))}, tmp_path / "io.npz")


class Trap:
    """Unpickling this writes a file, which proves that it happened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["missing", "a folder", "text", "truncated", "pickled", "one array", "no images", "images"])
def test_file_that_is_not_an_io_npz_is_refused_and_not_unpickled(kind, tmp_path):
    path, expected = tmp_path / "io.npz", "cannot be read as an IO.npz"
    np.savez(path, images=IMAGES, logits=np.zeros(3, np.float32))
    if kind == "missing":
        path.unlink()
        expected = "there is no file"
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "text":
        path.write_text("<html>403</html>")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "pickled":
        np.savez(path, images=IMAGES, logits=np.array([Trap(tmp_path / "sprung")], object))
    elif kind == "one array":
        with open(path, "wb") as file:
            np.save(file, IMAGES)
    elif kind == "no images":
        np.savez(path, logits=np.zeros(3, np.float32))
        expected = "should hold `images` as the model receives them"
    else:
        np.savez(path, images=IMAGES.astype(np.uint8))
        expected = "should hold `images` as the model receives them"
    with pytest.raises(CheckpointError, match=expected) as error:
        read_io(path)
    assert "io.npz" in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "sprung").exists()
    assert "allow_pickle" not in str(error.value)


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">f8", "<f2", np.longdouble])
def test_io_npz_of_any_floating_type_and_byte_order_is_read(dtype, tmp_path):
    draw = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float16)
    np.savez(tmp_path / "io.npz", images=draw.astype(dtype), logits=draw.astype(dtype))
    found = read_io(tmp_path / "io.npz")
    assert found["images"].dtype == np.float32 and found["images"].dtype.isnative and found["logits"].dtype.isnative
    assert np.array_equal(found["images"], draw) and np.array_equal(found["logits"], draw)
    assert jax.jit(lambda images: images + 0)(found["images"]).shape == draw.shape
    assert compare({"logits": draw}, tmp_path / "io.npz") == [("logits", 0)]


def test_values_beyond_float32_are_refused_as_images_and_never_agree_as_stages(tmp_path):
    huge = np.full(IMAGES.shape, np.finfo(np.longdouble).max / 2)
    np.savez(tmp_path / "io.npz", images=huge)
    with pytest.raises(CheckpointError, match="io.npz: `images` holds values that are not finite"):
        read_io(tmp_path / "io.npz")
    np.savez(tmp_path / "io.npz", images=IMAGES, logits=huge)
    assert compare({"logits": IMAGES}, tmp_path / "io.npz") == [("logits", np.inf)]


def test_size_of_an_io_npz_is_bounded_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_MAX_IO", 10_000)
    np.savez_compressed(tmp_path / "io.npz", images=IMAGES, logits=np.zeros(10_000, np.float32))
    with pytest.raises(CheckpointError, match="io.npz.* has .* bytes and would unpack to 40"):
        read_io(tmp_path / "io.npz")


def test_names_in_an_io_npz_are_printed_without_control_characters(tmp_path):
    np.savez(tmp_path / "io.npz", images=IMAGES, **{"\x1b[2J": np.zeros(3)})
    with pytest.raises(CheckpointError, match="the reference has images, .*x1b") as error:
        compare({"logits": np.zeros(3)}, tmp_path / "io.npz")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(("peer", "needs"), [("timm", "torch torchvision timm"), ("huggingface", "torch transformers")])
def test_missing_peer_is_one_error_line_with_the_command(peer, needs, tmp_path):
    np.savez(tmp_path / "images.npz", images=IMAGES)
    argv = ["peers.py", peer, "x", "--images", str(tmp_path / "images.npz"), "--output", str(tmp_path / "io.npz")]
    code = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = {argv}; "
    code += f"runpy.run_path({peers.__file__!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "io.npz").exists()
    assert done.stderr.startswith(f"{peer} cannot be imported here (") and done.stderr.endswith(f"): pip install {needs}\n")
    assert done.stderr.count("\n") == 1


def test_unknown_peer_or_missing_checkout_is_an_error():
    model = build("B/16", hidden_size=24, num_layers=1, num_heads=3, mlp_dim=8)
    with pytest.raises(ValueError, match="there is no peer 'torch'; the peers are timm, huggingface, original"):
        peer_stages("torch", model, {}, None, IMAGES)
    with pytest.raises(CheckpointError, match="--original DIR is missing: a checkout of "):
        peer_stages("original", model, {}, None, IMAGES)
