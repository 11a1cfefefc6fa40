"""The user's own images: what an index holds, which pixels come out, and what is refused."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax import images
from vit_jax.config import Data
from vit_jax.data import folders
from vit_jax.data.splits import Splits, open_split, shared_examples, warnings
from vit_jax.data.tasks import TASKS, task
from vit_jax.errors import DataError
from vit_jax.images import open_image

MODES = ("RGB", "L", "P", "RGBA", "CMYK", "I;16", "1", "LA")
SUFFIX = {"CMYK": ".jpg", "RGB": ".webp", "I;16": ".tiff"}  # else PNG


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(folders, "_known", {})


def save(path: Path, seed: int = 0, size: tuple[int, int] = (24, 16), mode: str = "RGB", **options) -> Path:
    """Writes noise of a size (width, height) in a mode of Pillow."""
    draw = np.random.default_rng(seed)
    if mode == "I;16":
        image = Image.fromarray(draw.integers(0, 2**16, size[::-1]).astype(np.uint16))
    else:
        image = Image.fromarray(draw.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder of three classes with 10 images each, of mixed sizes and modes."""
    root = tmp_path / "photos"
    for label, name in enumerate(("ant", "bee", "cat")):
        for number in range(10):
            mode = MODES[number % len(MODES)]
            size = 20 + 3 * number, 16 + label
            save(root / name / f"{number}{SUFFIX.get(mode, '.png')}", 10 * label + number, size, mode)
    return root


def everything(source):
    return source.take(np.arange(len(source)))


def test_classes_are_the_folders_and_a_fifth_of_each_is_the_test_split(photos):
    row = task(f"folder:{photos}")
    train, test = open_split(row, "train"), open_split(row, "test")
    assert train.class_names == ["ant", "bee", "cat"] and train.num_classes == 3
    assert np.bincount(everything(train)[1]).tolist() == [8] * 3 and np.bincount(everything(test)[1]).tolist() == [2] * 3
    index = folders.index(row)
    found = [path for split in index.splits.values() for path in split.paths]
    assert sorted(found) == sorted(map(str, photos.rglob("*.*"))) and shared_examples(train, test) == 0
    assert all(
        Path(path).parent.name == "bee" for path in np.array(index.splits["test"].paths)[index.splits["test"].labels == 1]
    )


def test_seeded_split_does_not_depend_on_the_place_and_keeps_what_it_had(photos, tmp_path):
    row = task(f"folder:{photos}")
    before = {os.path.relpath(path, photos) for path in folders.index(row).splits["train"].paths}
    moved = photos.rename(tmp_path / "elsewhere")
    save(moved / "ant" / "new.png")
    after = {os.path.relpath(path, moved) for path in folders.index(task(f"folder:{moved}")).splits["train"].paths}
    assert len(before - after) <= 1  # 9 of 11 images instead of 8 of 10


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_split_folders_are_used_and_the_one_to_evaluate_is_found(tmp_path, name):
    for split, count in (("train", 3), (name, 2)):
        for label in ("7", "10"):
            for number in range(count):
                save(tmp_path / split / label / "deep" / f"{number}.png", number)
    (tmp_path / "train" / "7" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    row = task(f"folder:{tmp_path}")
    assert row.test_split == name
    source = open_split(row, f"train+{name}[:1]")
    assert source.class_names == ["7", "10"]  # numbers, in their order
    labels = everything(source)[1].tolist()
    assert len(labels) == 7 and labels[:6] not in ([0] * 3 + [1] * 3, [1] * 3 + [0] * 3)  # classes are mixed


def test_only_a_train_folder_is_divided(tmp_path):
    for label in "ab":
        for number in range(5):
            save(tmp_path / "train" / label / f"{number}.png")
    row = task(f"folder:{tmp_path}")
    assert (len(open_split(row, "train")), len(open_split(row, "test"))) == (8, 2)


@pytest.mark.parametrize("split", [True, False])
def test_csv_names_images_labels_and_splits(photos, tmp_path, split):
    rows = [(path.relative_to(tmp_path), path.parent.name.upper()) for path in sorted(photos.rglob("*.*"))]
    with open(tmp_path / "photos.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "path"] + ["split"] * split)
        writer.writerows(
            [label, path] + ["val" if number % 3 == 0 else "train"] * split for number, (path, label) in enumerate(rows)
        )
    row = task(f"csv:{tmp_path / 'photos.csv'}")
    train, test = open_split(row, row.train_split), open_split(row, row.test_split)
    assert (row.test_split, len(train), len(test)) == (("val", 20, 10) if split else ("test", 24, 6))
    assert train.class_names == ["ANT", "BEE", "CAT"]


def test_pixels_of_every_mode_are_those_that_prediction_sees(photos):
    row = task(f"folder:{photos}")
    source = open_split(row, "train", image_size=64)
    found, _, sizes = source.read(np.arange(len(source)))
    paths = folders.index(row).splits["train"].paths
    assert found.shape[1:] == source.image_shape == (47, 47, 3)  # the longest side of all images
    for pixels, path, size in zip(found, paths, sizes, strict=True):
        image = open_image(path, (47, 47), path)
        assert image.size == tuple(size[::-1])
        np.testing.assert_array_equal(pixels, np.asarray(image.resize((47, 47), Image.Resampling.BILINEAR)))


def test_large_images_of_mixed_sizes_are_held_at_twice_the_size_of_the_model(photos):
    assert open_split(task(f"folder:{photos}"), "train", image_size=16).image_shape == (32, 32, 3)


def test_images_of_one_size_are_held_as_they_are(tmp_path):
    """The embedded images as PNG files give the arrays that they give as TFDS data."""
    tfds = open_split(TASKS["cifar100_excerpt"], "test[:200]")
    pixels, labels = everything(tfds)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = tmp_path / "train" / tfds.class_names[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    source = open_split(task(f"folder:{tmp_path}"), "train+test")
    assert not source.resized and source.image_shape == (32, 32, 3)
    found, numbers = everything(source)
    names = [source.class_names[number] for number in numbers]
    for image, label in zip(pixels, labels, strict=True):
        (same,) = np.flatnonzero((found == image).all((1, 2, 3)))
        assert names[same] == tfds.class_names[label]


def test_orientation_tag_turns_image_and_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    for label in "ab":
        for number in range(2):
            save(tmp_path / label / f"{number}.jpg", number, (30, 20), exif=exif)
    source = open_split(task(f"folder:{tmp_path}"), "train")
    assert source.image_shape == (30, 20, 3)
    expected = np.asarray(open_image(tmp_path / "a" / "0.jpg", (99, 99), "it"))
    assert any((image == expected).all() for image in everything(source)[0]) or any(
        (image == expected).all() for image in everything(open_split(task(f"folder:{tmp_path}"), "test"))[0]
    )


def test_unreadable_image_is_named_and_can_be_left_out(photos):
    broken = photos / "bee" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (photos / "cat" / "empty.jpg").touch()
    row = task(f"folder:{photos}")
    with pytest.raises(
        DataError, match=r"2 of the 31 images of folder:.* cannot be read: .*3\.png \(.*\); .*empty\.jpg \(is empty\)"
    ):
        open_split(row, "train")
    source = open_split(row, "train+test", on_error="skip")
    assert len(source) == 29 and len(source.skipped) == 2 and "3.png" in source.skipped[0]


def test_index_decodes_only_files_that_changed(photos, monkeypatch):
    row = task(f"folder:{photos}")
    folders.index(row)
    decoded = []

    def checked_size(path):
        decoded.append(Path(path).name)
        return 1, 1

    monkeypatch.setattr(images, "checked_size", checked_size)
    folders.index(row)
    assert not decoded
    os.utime(photos / "ant" / "1.png", (1, 1))
    folders.index(row)
    assert decoded == ["1.png"]


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'{"a": 3}', b"{", b"\xff"])
def test_damaged_cache_of_the_index_is_replaced(photos, content):
    row = task(f"folder:{photos}")
    before = folders.index(row)
    (file,) = Path(os.environ["VIT_JAX_CACHE"]).rglob("*.json")
    file.write_bytes(content)
    folders._known.clear()  # as in another process
    after = folders.index(row)
    assert after.splits["train"].paths == before.splits["train"].paths and len(json.loads(file.read_text())) == 30


def test_file_that_disappears_after_indexing_is_an_error_that_names_it(photos):
    source = open_split(task(f"folder:{photos}"), "train")
    for file in photos.rglob("*.png"):
        file.unlink()
    with pytest.raises(Exception, match=r"photos/.*\.png does not exist"):
        everything(source)


def empty_class(root):
    (root / "dog").mkdir()


def class_only_in_test(root):
    for label in ("a", "b"):
        save(root / "train" / label / "0.png")
    save(root / "test" / "c" / "0.png")


def two_spellings(root):
    save(root / "Hot_Dog" / "0.png")
    save(root / "hot dog" / "0.png")


def one_class(root):
    save(root / "a" / "0.png")
    save(root / "a" / "1.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_class, "class 'dog' is empty: there is no image below"),
        (class_only_in_test, "c has no training images"),
        (two_spellings, "'Hot_Dog' and 'hot dog' are two spellings of one class"),
        (one_class, "has one class, 'a'"),
        (lambda root: None, "has no images; files with these suffixes are used"),
    ],
)
def test_folder_that_cannot_be_trained_on_is_refused(tmp_path, make, message):
    root = tmp_path / "photos"
    root.mkdir()
    make(root)
    with pytest.raises(DataError, match=message):
        open_split(task(f"folder:{root}"), "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has no column label and path: its first line must name"),
        ("path,label\nx.png,\n", "line 2: path, label and split must not be empty"),
        ("path,label,split\nx.png,a,\n", "line 2: path, label and split must not be empty"),
        (
            "path,label\nx.png,a\ny.png,b\n",
            r"2 of the 2 images of csv:.* cannot be read: .*x\.png \(does not exist|No such file",
        ),
        ('path,label\n"x.png,a\n', "line 1: unexpected end of data"),
        ("path,label,split\nant.png,a,other\nbee.png,b,other\n", "has no split 'train', only 'other'"),
    ],
)
def test_csv_that_cannot_be_used_is_refused(tmp_path, text, message):
    for name in ("ant", "bee"):
        save(tmp_path / f"{name}.png")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_split(task(f"csv:{tmp_path / 'list.csv'}"), "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder:", "there is no folder ''; expected folder:PATH"),
        ("folder:/no/such", "there is no folder '/no/such'; expected folder:PATH"),
        ("folder:~no-such-user/x", "the user '~no-such-user' does not exist"),
        ("csv:/no/such.csv", "there is no file '/no/such.csv'; expected csv:PATH"),
        ("csv:/", "there is no file '/'; expected csv:PATH.*; / is not one"),
        ("fodler:x", "there is no task 'fodler:x': `vit_jax data list` shows all"),
    ],
)
def test_images_that_do_not_exist_are_an_error(name, message):
    with pytest.raises(DataError, match=message):
        task(name)


@pytest.mark.parametrize("split", ["", "validation", "train[:x]", "train[:9999]"])
def test_unknown_split_is_an_error_that_lists_the_splits(photos, split):
    with pytest.raises(DataError, match="has no split .*expected one of .*test"):
        open_split(task(f"folder:{photos}"), split)


def test_empty_slice_is_refused(photos):
    with pytest.raises(DataError, match="is empty"):
        open_split(task(f"folder:{photos}"), "train[5:5]")


def test_split_folders_are_found_in_any_case_and_a_class_may_be_called_train(tmp_path):
    for split in ("Train", "TEST", "val"):
        for label in "ab":
            save(tmp_path / "one" / split / label / "0.png")
    row = task(f"folder:{tmp_path / 'one'}")
    assert row.test_split == "test" and row.validation == ("train", "val")
    assert [len(open_split(row, split)) for split in ("train", "test", "val")] == [2, 2, 2]
    for label in ("train", "car"):
        for number in range(3):
            save(tmp_path / "two" / label / f"{number}.png", number)
    assert open_split(task(f"folder:{tmp_path / 'two'}"), "train").class_names == ["car", "train"]
    save(tmp_path / "three" / "validation" / "a" / "0.png")
    with pytest.raises(DataError, match="has validation with folders of classes, but no train"):
        task(f"folder:{tmp_path / 'three'}")


def test_file_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "link.png").symlink_to(save(tmp_path / "ant.png"))
    save(tmp_path / "bee.png", 1)
    for lines in ("ant.png,a\nant.png,b\nbee.png,b\n", "ant.png,a\nlink.png,a\nbee.png,b\n"):
        (tmp_path / "list.csv").write_text("path,label\n" + lines)
        with pytest.raises(DataError, match=r"png is there twice \(no split, a and no split, [ab]\); an image has one class"):
            open_split(task(f"csv:{tmp_path / 'list.csv'}"), "train")
    (tmp_path / "list.csv").write_text("path,label\nant.png,red, cat\n")
    with pytest.raises(
        DataError, match="line 2: there are more values than columns; put a value with a comma in double quotes"
    ):
        open_split(task(f"csv:{tmp_path / 'list.csv'}"), "train")


def test_files_that_are_no_images_are_counted(photos):
    for name in ("a.heic", "b.heic", "c.txt"):
        (photos / "ant" / name).write_text("x")
    source = open_split(task(f"folder:{photos}"), "train")
    assert source.ignored == "3 files (.heic, .txt)"
    assert any(
        "3 files (.heic, .txt) of folder:" in text
        for text in warnings(task(f"folder:{photos}"), Data(), Splits(source, source, None), 1)
    )


def test_digest_changes_with_the_images(photos):
    row = task(f"folder:{photos}")
    before = open_split(row, "train").digest
    assert before == open_split(row, "train").digest != open_split(row, "test").digest
    (photos / "ant").rename(photos / "zebra")
    assert open_split(row, "train").digest != before


def test_index_that_cannot_be_written_is_kept_in_the_process(photos, monkeypatch, caplog):
    monkeypatch.setenv("VIT_JAX_CACHE", str(photos / "ant" / "0.webp"))  # a file
    row = task(f"folder:{photos}")
    folders.index(row)
    monkeypatch.setattr(images, "checked_size", None)
    folders.index(row)  # decodes nothing
    assert "all images are decoded at every start because their index cannot be written" in caplog.text
