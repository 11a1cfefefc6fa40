"""Reading prepared data: the arrays, TFDS's rules for splits, and damage."""

import dataclasses
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from vit_jax.data import prepare
from vit_jax.data.places import NotPrepared, find_prepared
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import TASKS
from vit_jax.errors import DataError

EXCERPT = TASKS["cifar100_excerpt"]


def test_embedded_excerpt_has_the_documented_contents():
    names = ["lion", "sunflower", "bicycle", "castle", "dolphin", "orange", "bottle", "butterfly", "mountain", "clock"]
    for split, count in (("train", 100), ("test", 50)):
        source = open_split(EXCERPT, split)
        assert (len(source), source.num_classes, source.image_shape) == (10 * count, 10, (32, 32, 3))
        assert source.nbytes == 10 * count * 3072
        assert source.class_names == names
        images, labels = source.take(np.arange(len(source)))
        assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (10 * count, 32, 32, 3), np.int32)
        assert np.bincount(labels).tolist() == [count] * 10
        # Lions are yellow and dolphins blue: labels belong to their images, channels to their colours.
        red, _, blue = images[labels == 0].mean((0, 1, 2))
        assert red > blue
        red, _, blue = images[labels == 4].mean((0, 1, 2))
        assert blue > red


def test_take_returns_examples_in_the_order_of_the_index():
    source = open_split(EXCERPT, "test")
    images, labels = source.take(np.arange(500))
    index = np.array([3, 499, 0, 3, 77], np.int32)
    images_at, labels_at = source.take(index)
    np.testing.assert_array_equal(images_at, images[index])
    np.testing.assert_array_equal(labels_at, labels[index])
    nothing, none = source.take(np.array([], np.int32))
    assert (nothing.shape, none.shape) == ((0, 32, 32, 3), (0,))
    for outside in (-1, 500):
        with pytest.raises(IndexError, match="out of range for the 500 examples"):
            source.take(np.array([0, outside]))


@pytest.mark.parametrize(
    ("split", "size"),
    [("train[:98%]", 980), ("train[98%:]", 20), ("test[:64]", 64), ("test[-7:]", 7), ("train+test", 1500)],
)
def test_slices_follow_the_language_of_tfds(split, size):
    source = open_split(EXCERPT, split)
    assert len(source) == len(source.take(np.arange(size))[1]) == size


def test_slice_is_the_part_of_the_whole():
    whole, _ = open_split(EXCERPT, "test").take(np.arange(500))
    part, _ = open_split(EXCERPT, "test[100:110]").take(np.arange(10))
    np.testing.assert_array_equal(part, whole[100:110])


@pytest.mark.parametrize("split", ["", "validation", "train[:98", "train[:x]", "train[:9999]", "train[:200%]", "train test"])
def test_unknown_split_is_an_error_that_lists_the_splits(split):
    with pytest.raises(DataError, match="has no split .*expected one of train, test"):
        open_split(EXCERPT, split)


@pytest.mark.parametrize("split", ["train[:0]", "train[5:3]", "test[7:7]"])
def test_empty_split_is_refused(split):
    with pytest.raises(DataError, match="is empty"):
        open_split(EXCERPT, split)


def test_missing_data_are_an_error_that_names_the_command(tmp_path):
    with pytest.raises(NotPrepared, match=f"`python -m vit_jax.data prepare cifar100 --data_dir {tmp_path}`"):
        open_split(TASKS["cifar100"], "train", tmp_path)


def test_data_of_another_shape_than_the_task_are_refused():
    with pytest.raises(DataError, match="of 10 classes, expected 11"):
        open_split(dataclasses.replace(EXCERPT, num_classes=11), "train")


# ---- damage


@pytest.fixture
def copy(tmp_path):
    """The folder of a copy of the excerpt."""
    shutil.copytree(find_prepared(EXCERPT), tmp_path / "cifar100_excerpt" / "1.0.0")
    return tmp_path / "cifar100_excerpt" / "1.0.0"


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 255
    path.write_bytes(content)


RECORDS = "cifar100_excerpt-train.array_record-00000-of-00001"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / RECORDS, 1000),
        lambda folder: flip(folder / RECORDS, 1_000_000),
        lambda folder: os.truncate(folder / RECORDS, 0),
        lambda folder: os.truncate(folder / RECORDS, 2_000_000),
        lambda folder: (folder / RECORDS).unlink(),
        lambda folder: (folder / "dataset_info.json").write_text("{"),
        lambda folder: (folder / "features.json").unlink(),
    ],
)
def test_damaged_data_are_an_error_that_names_the_folder(copy, tmp_path, damage):
    damage(copy)
    with pytest.raises(DataError, match="prepare it again") as caught:
        open_split(EXCERPT, "train", tmp_path).take(np.arange(1000))
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tfrecord_files_are_an_error_that_names_the_command(copy, tmp_path):
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match="holds tfrecord files, expected array_record.*--data_dir DIRECTORY"):
        open_split(EXCERPT, "train", tmp_path)


def test_read_only_folder_and_relative_path_can_be_read(copy, tmp_path, monkeypatch):
    for path in (*copy.iterdir(), copy):
        path.chmod(path.stat().st_mode & ~0o222)
    monkeypatch.chdir(tmp_path)
    try:
        assert len(open_split(EXCERPT, "test", ".").take(np.arange(500))[1]) == 500
        assert prepare.prepare(EXCERPT, data_dir=".").resolve() == copy.resolve()
    finally:
        copy.chmod(0o755)


# ---- imports


def test_importing_loads_no_framework():
    code = (
        "import sys, vit_jax.data.tasks, vit_jax.data.batches, vit_jax.data.sources, vit_jax.data.prepare\n"
        "heavy = {'jax', 'tensorflow', 'tensorflow_datasets', 'PIL', 'tqdm', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_loads_neither_jax_nor_tensorflow_and_prints_nothing():
    code = (
        "import sys, numpy\n"
        "from vit_jax.data import splits, tasks\n"
        "splits.open_split(tasks.task('cifar100_excerpt'), 'test').take(numpy.arange(500))\n"
        "assert not {'jax', 'tensorflow', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == done.stderr == ""
