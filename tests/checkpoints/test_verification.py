"""A file is accepted only as what its row of the table describes."""

import hashlib

import pytest

from vit_jax.checkpoints.catalogue import PUBLISHED, Published
from vit_jax.checkpoints.verification import check_hash, check_tree, max_bytes
from vit_jax.errors import CheckpointError
from vit_jax.models.variants import build, count, shapes

ROW = Published("imagenet21k/Nano_8", "Nano/8", 16, 3, (), mib=3.1)


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        ({}, 16, None),
        ({"num_layers": 2}, 16, "is not the Nano/8 of .*: num_layers is 2, expected 4"),
        ({"num_heads": 2}, 16, "is not the Nano/8 of .*: num_heads is 2, expected 4"),
        ({"num_classes": 4}, 16, "has a head of 4 classes, .* has 3"),
        ({"num_classes": 0}, 16, "has a head of 0 classes, .* has 3"),
        ({}, 32, "has positions for 16 patches, .* was trained at 16 pixels"),
    ],
)
def test_tree_of_another_model_is_refused(tmp_path, fields, size, message):
    tree = shapes(build("Nano/8", **{"num_classes": 3, **fields}), size)
    if message is None:
        return check_tree(tmp_path, tree, ROW)
    with pytest.raises(CheckpointError, match=message):
        check_tree(tmp_path, tree, ROW)
    if fields == {"num_classes": 0}:
        check_tree(tmp_path, tree, ROW, headless=True)


def test_tree_of_no_vision_transformer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a Vision Transformer: .*embedding/kernel is missing"):
        check_tree(tmp_path, {"conv": {"kernel": shapes(build("Nano/8"), 16)["embedding"]["kernel"]}}, ROW)


def test_hash_is_checked_if_one_is_expected(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"weights")
    right = hashlib.sha256(b"weights").hexdigest()
    assert check_hash(path, None) == check_hash(path, right) == path
    with pytest.raises(CheckpointError, match=f"has the SHA-256 {right}, expected {'0' * 64}"):
        check_hash(path, "0" * 64)


@pytest.mark.parametrize("name", ["imagenet21k+imagenet2012/ViT-B_16", "imagenet21k+imagenet2012/ViT-B_32"])
def test_largest_accepted_size_holds_the_parameters(name):
    row = PUBLISHED[name]
    needed = 4 * count(build(row.variant, num_classes=row.num_classes), row.image_size)
    assert needed < max_bytes(row) < 1.2 * needed
