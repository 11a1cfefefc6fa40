"""Loading a model from a file: heads, image sizes, and files of other models."""

import os

import numpy as np
import pytest
import scipy.ndimage
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.catalogue import PUBLISHED, resolve
from vit_jax.checkpoints.download import find
from vit_jax.checkpoints.load import load, resize_positions
from vit_jax.errors import CheckpointError
from vit_jax.formats.google import save_npz
from vit_jax.models.variants import VARIANTS, build, count, shapes

# Damaged trees; 20 seeds make 300.
TREES = 15 * int(os.environ.get("VIT_JAX_FUZZ_SEEDS", "2"))


@pytest.fixture(scope="module")
def tree():
    """A tiny ViT's arrays under their published names: patch 8, trained at 32 px (a 4×4 grid), 5 classes."""
    model = build("B/8", hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32, num_classes=5, representation_size=8)
    draw = np.random.default_rng(0)
    flat = flatten_dict(shapes(model, 32), sep="/")
    return {name: draw.normal(size=leaf.shape).astype(np.float32) for name, leaf in flat.items()}


@pytest.fixture
def saved(tree, tmp_path):
    """A function that writes the tree with changes (None drops a leaf) and returns the path."""

    def write(**changes):
        flat = {name: leaf for name, leaf in {**tree, **changes}.items() if leaf is not None}
        np.savez(tmp_path / "x.npz", **flat)
        return str(tmp_path / "x.npz")

    return write


def test_load_keeps_the_published_head(saved, tree):
    model, params = load(saved())
    assert (model.num_classes, model.representation_size, model.patch_size, model.num_heads) == (5, 8, 8, 2)
    assert all(np.array_equal(leaf, tree[name]) for name, leaf in flatten_dict(params, sep="/").items())


def test_num_classes_replaces_head_and_pre_logits(saved, tree):
    model, params = load(saved(), num_classes=7, dropout=0.1)
    assert (model.num_classes, model.representation_size, model.dropout) == (7, 0, 0.1)
    assert "pre_logits" not in params and params["head"]["kernel"].shape == (16, 7)
    assert not params["head"]["kernel"].any() and not params["head"]["bias"].any()


def test_file_without_head_needs_num_classes(saved):
    path = saved(**{"head/kernel": None, "head/bias": None})
    with pytest.raises(CheckpointError, match="x.npz has no head; give num_classes"):
        load(path)
    model, params = load(path, num_classes=0)
    assert model.num_classes == 0 and "head" not in params


@pytest.mark.parametrize("grid", [(4, 4), (2, 2), (7, 7), (24, 24), (3, 9), (1, 5)])
@pytest.mark.parametrize("class_row", [True, False])
def test_positions_are_resized_as_in_the_original(grid, class_row):
    positions = np.random.default_rng(1).normal(size=(1, 16 + class_row, 3)).astype(np.float32)
    found = resize_positions(positions, grid, class_row)
    body = positions[0, int(class_row) :].reshape(4, 4, 3)
    expected = scipy.ndimage.zoom(body, (grid[0] / 4, grid[1] / 4, 1), order=1).reshape(1, -1, 3)
    assert found.dtype == np.float32 and found.shape == (1, grid[0] * grid[1] + class_row, 3)
    np.testing.assert_allclose(found[:, int(class_row) :], expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(found[:, : int(class_row)], positions[:, : int(class_row)])


def test_rectangular_images_are_accepted(saved):
    model, params = load(saved(), image_size=(16, 48))
    logits = model.apply({"params": params}, np.zeros((1, 16, 48, 3), np.float32))
    assert logits.shape == (1, 5)


@pytest.mark.parametrize("image_size", [30, (32, 20), 0, -8])
def test_image_size_must_be_divisible_into_patches(saved, image_size):
    with pytest.raises(ValueError, match="is not divisible into patches: .*x.npz needs multiples of 8 pixels"):
        load(saved(), image_size=image_size)


BLOCK = "Transformer/encoderblock_"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"embedding/kernel": None, "embedding/bias": None}, "embedding/kernel is missing"),
        ({"embedding/bias": None}, "embedding/bias is missing"),
        ({f"{BLOCK}1/LayerNorm_0/scale": None}, f"{BLOCK}1/LayerNorm_0/scale is missing"),
        ({f"{BLOCK}3/LayerNorm_0/scale": np.ones(16, np.float32)}, f"{BLOCK}2 is missing while there is .*_3"),
        ({f"{BLOCK}2/LayerNorm_0/scale": np.ones(16, np.float32)}, f"{BLOCK}2/.* is missing"),
        (
            {f"{BLOCK}0/extra/scale": np.ones(16, np.float32)},
            f"'{BLOCK}0/extra/scale' is not part of such a Vision Transformer",
        ),
        ({"Transformer/posembed_input/pos_embedding": None}, "pos_embedding is missing"),
        ({"Transformer/posembed_input/pos_embedding": np.ones(3, np.float32)}, "pos_embedding should have"),
        (
            {"Transformer/posembed_input": np.ones(3, np.float32), "Transformer/posembed_input/pos_embedding": None},
            "is missing",
        ),
        ({"cls": None}, "cls is missing while there are positions for it and 16 patches"),
        ({"embedding/kernel": np.ones((0, 0, 3, 16), np.float32)}, "embedding/kernel should have 4 axes, none of them empty"),
        (
            {f"{BLOCK}0/MultiHeadDotProductAttention_1/query/kernel": np.ones((16, 3, 8), np.float32)},
            "3 heads do not divide 16 values",
        ),
        ({"block1": np.ones(3, np.float32), "conv_root/kernel": np.ones((7, 7, 3, 32), np.float32)}, "block1/? should hold"),
        ({"conv_root/kernel": np.ones((7, 7, 3, 8), np.float32)}, "conv_root/kernel makes 8 channels"),
        ({"Transformer/posembed_input/pos_embedding": np.ones((1, 0, 16), np.float32)}, "pos_embedding should have shape"),
        ({"cls": np.ones((1, 1, 8), np.float32)}, r"cls should have shape \(1, 1, 16\), has \(1, 1, 8\)"),
        ({f"{BLOCK}1/MlpBlock_3/Dense_0/kernel": np.ones((16, 8), np.float32)}, r"Dense_0/kernel should have shape"),
        ({"head/kernel": np.ones(3, np.float32)}, "head/kernel should have 2 axes"),
        ({"head/bias": np.ones(4, np.float32)}, r"head/bias should have shape \(5,\), has \(4,\)"),
    ],
)
def test_file_of_another_model_is_one_error_line(saved, changes, expected):
    with pytest.raises(CheckpointError, match=f"x.npz.*{expected}") as error:
        load(saved(**changes))
    assert "\n" not in str(error.value)


def test_positions_without_a_square_need_their_grid(saved):
    path = saved(**{"Transformer/posembed_input/pos_embedding": np.ones((1, 1 + 12, 16), np.float32)})
    load(path)  # without a new image size any number of positions is accepted
    load(path, image_size=(16, 48))
    with pytest.raises(CheckpointError, match="x.npz: 12 positions form neither a square grid nor one of 4×4"):
        load(path, image_size=32)


@pytest.mark.parametrize("size", [(16, 64), (64, 16), (8, 24)])
def test_grid_of_a_rectangle_comes_from_its_json(saved, tmp_path, size):
    _, params = load(saved(), image_size=size)
    save_npz(tmp_path / "rectangle.npz", params, {"image_size": list(size)})
    _, again = load(tmp_path / "rectangle.npz", image_size=size)
    for name, leaf in flatten_dict(again, sep="/").items():
        assert np.array_equal(leaf, flatten_dict(params, sep="/")[name]), name
    _, resized = load(tmp_path / "rectangle.npz", image_size=32)
    expected = resize_positions(
        np.asarray(params["Transformer"]["posembed_input"]["pos_embedding"]), (4, 4), old=(size[0] // 8, size[1] // 8)
    )
    assert np.array_equal(resized["Transformer"]["posembed_input"]["pos_embedding"], expected)


def test_numpy_integers_are_accepted(saved):
    assert load(saved(), np.int64(7), np.int64(64))[1]["Transformer"]["posembed_input"]["pos_embedding"].shape[1] == 65
    with pytest.raises(ValueError, match="num_classes must not be negative"):
        load(saved(), num_classes=-1)


def test_fields_of_the_file_are_not_arguments(saved):
    with pytest.raises(TypeError, match="num_layers"):
        load(saved(), num_layers=1)


def test_damaged_tree_is_read_correctly_or_refused(tree, tmp_path):
    """Members are removed, renamed, reshaped or cast."""
    draw, refused = np.random.default_rng(0), 0
    for _ in range(TREES):
        flat = dict(tree)
        for name in draw.choice(list(tree), draw.integers(1, 3), replace=False):
            leaf = flat.pop(name)
            action = draw.integers(6)
            if action == 0:
                flat[name.rpartition("/")[0] or "x"] = leaf
            elif action == 1:
                flat[name + draw.choice(["/deeper", "2", " "])] = leaf
            elif action == 2:
                flat[name] = leaf.reshape(-1)
            elif action == 3:
                flat[name] = leaf[..., :0]
            elif action == 4:
                flat[name] = leaf.astype(draw.choice([np.float16, np.int8, np.complex64]))
        np.savez(tmp_path / "x.npz", **flat)
        try:
            model, params = load(tmp_path / "x.npz")
        except CheckpointError as error:
            assert "x.npz" in str(error) and "\n" not in str(error)
            refused += 1
        else:  # all arrays, of which some may be in half precision
            found = flatten_dict(params, sep="/")
            assert {name: leaf.shape for name, leaf in found.items()} == {n: leaf.shape for n, leaf in tree.items()} or (
                model.num_classes == 5 and model.representation_size == 0
            )
    assert refused > 2 / 3 * TREES


def test_embedded_file_is_the_first_row_and_loads_by_name():
    name, row = next(iter(PUBLISHED.items()))
    model, params = load(name)
    assert (name, model.num_classes) == ("mini_8", row.num_classes)
    assert model == build(row.variant, num_classes=row.num_classes)
    assert sum(leaf.size for leaf in flatten_dict(params).values()) == count(model, row.image_size) == 2_757_896


def test_rows_name_known_variants():
    assert all(row.variant in VARIANTS for row in PUBLISHED.values())


def test_file_takes_precedence_over_a_name_but_not_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini_8").mkdir()
    assert find("mini_8").parent.name == "assets" and find("mini_8.npz") == find("mini_8")
    (tmp_path / "mini_8").rmdir()
    (tmp_path / "mini_8").write_bytes(b"")
    assert str(find("mini_8")) == "mini_8"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/mini_8") == tmp_path / "mini_8"


def test_unknown_name_is_an_error():
    with pytest.raises(CheckpointError, match="there is no file nothing.npz, and no checkpoint is published as 'nothing"):
        find("nothing.npz")
    with pytest.raises(CheckpointError, match="nearest names: ViT-B_"):
        resolve("ViT-B_61")
    with pytest.raises(CheckpointError, match="there is no file xxx"):
        find("x" * 300)
