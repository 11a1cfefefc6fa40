"""Data sets in the formats of the Hugging Face hub: the same images as the same data in other formats."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.prepare import prepare
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import TASKS, task
from vit_jax.errors import DataError

datasets = pytest.importorskip("datasets", reason="needs the extra `hub`: pip install datasets")


def everything(source):
    return source.take(np.arange(len(source)))


def excerpt(split):
    return everything(open_split(TASKS["cifar100_excerpt"], split))


def table(split, **columns):
    """The embedded images as a data set with the columns img and fine_label."""
    pixels, labels = excerpt(split)
    names = open_split(TASKS["cifar100_excerpt"], split).class_names
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict(
        {"img": [Image.fromarray(image) for image in pixels], "fine_label": labels.tolist()}, features=features
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with train-….parquet and test-….parquet, and one of save_to_disk with the same."""
    root = tmp_path_factory.mktemp("hub")
    parts = datasets.DatasetDict({"train": table("train[:60]"), "test": table("test[:40]")})
    for name, part in parts.items():
        (root / "parquet").mkdir(exist_ok=True)
        part.to_parquet(root / "parquet" / f"{name}-00000-of-00001.parquet")
    parts.save_to_disk(root / "disk")
    return root


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("form", ["parquet", "disk"])
@pytest.mark.parametrize(("split", "same"), [("train", "train[:60]"), ("test[10:30]", "test[10:30]")])
def test_local_copy_gives_the_arrays_of_the_tfds_data(folder, form, split, same):
    source = open_split(task(f"hub:{folder / form}"), split)
    assert source.class_names == open_split(TASKS["cifar100_excerpt"], "test").class_names
    assert source.image_shape == (32, 32, 3) and not source.resized
    for found, expected in zip(everything(source), excerpt(same), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_single_parquet_file_is_the_training_split(folder):
    source = open_split(task(f"hub:{folder / 'parquet' / 'test-00000-of-00001.parquet'}"), "train[:5]+train[38:]")
    np.testing.assert_array_equal(everything(source)[0], excerpt("test[:5]+test[38:40]")[0])


def mixed(path, label=("ant", "bee", "ant", "bee"), **features):
    """Four images of different sizes; the third is grey."""
    draw, rows = np.random.default_rng(0), []
    for number in range(4):
        file = io.BytesIO()
        image = Image.fromarray(draw.integers(0, 256, (20 + number, 30, 3), np.uint8))
        (image.convert("L") if number == 2 else image).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    kinds = {"photo": datasets.Image(), "thumbnail": datasets.Image(), "kind": datasets.Value("string"), **features}
    made = {"photo": rows, "thumbnail": rows, "kind": list(label), **{name: [0, 1, 0, 1] for name in features}}
    datasets.Dataset.from_dict(made, features=datasets.Features(kinds)).to_parquet(path)


def test_named_columns_text_labels_and_mixed_sizes(tmp_path):
    mixed(tmp_path / "photos.parquet")
    source = open_split(task(f"hub:{tmp_path / 'photos.parquet'}@photo,kind"), "train", image_size=16)
    images, labels, sizes = source.read(np.arange(4))
    assert source.class_names == ["ant", "bee"] and labels.tolist() == [0, 1, 0, 1]
    assert images.shape == (4, 32, 32, 3) and sizes.tolist() == [[20, 30], [21, 30], [22, 30], [23, 30]]


def test_label_column_is_label_or_the_one_with_most_classes(tmp_path):
    few, many = datasets.ClassLabel(names=["x", "y"]), datasets.ClassLabel(names=["p", "q", "r"])
    mixed(tmp_path / "a.parquet", coarse=few, fine=many)
    assert open_split(task(f"hub:{tmp_path / 'a.parquet'}@photo,fine"), "train").class_names == ["p", "q", "r"]
    table("test[:4]").add_column("label", [0, 1, 0, 1]).cast_column("label", few).to_parquet(tmp_path / "b.parquet")
    assert open_split(task(f"hub:{tmp_path / 'b.parquet'}"), "train").class_names == ["x", "y"]


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("", "has 2 columns of images and 0 of class labels: name one of each, as in hub:NAME@image,label, among photo"),
        (
            "@photo,sort",
            "there is no column sort; after @ give two columns, that of the image and that of the label, among photo",
        ),
        ("@kind,photo", "the column kind does not hold images"),
    ],
)
def test_columns_that_cannot_be_used_are_named(tmp_path, ending, message):
    mixed(tmp_path / "photos.parquet")
    with pytest.raises(DataError, match=message):
        open_split(task(f"hub:{tmp_path / 'photos.parquet'}{ending}"), "train")


def test_labels_of_an_unlabelled_split_are_refused(tmp_path):
    part = table("test[:4]").remove_columns("fine_label").add_column("label", [-1] * 4)
    part.cast_column("label", datasets.ClassLabel(names=["x", "y"])).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match="has labels from -1 to -1, expected 0 to 1: the split is not labelled"):
        everything(open_split(task(f"hub:{tmp_path / 'test.parquet'}"), "train"))


@pytest.mark.parametrize("split", ["test", "train[:x]", "train[3:3]"])
def test_split_that_does_not_exist_or_is_empty_is_refused(tmp_path, split):
    table("test[:4]").to_parquet(tmp_path / "photos.parquet")
    with pytest.raises(DataError, match="has no split .* expected one of train|is empty"):
        open_split(task(f"hub:{tmp_path / 'photos.parquet'}"), split)


def test_missing_data_set_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no parquet file"):
        open_split(task(f"hub:{tmp_path / 'empty'}"), "train")
    with pytest.raises(DataError, match="hub:no/such cannot be opened .*: expected the name of a data set"):
        open_split(task("hub:no/such"), "train")


@pytest.fixture
def copy(tiny, records, files, tmp_path):
    """The small archive of the other tests as a data set of the hub, and the task that names it."""
    labels = {"coarse_label": "coarse_label", "fine_label": "label"}
    names = {"coarse_label": "cifar-100-binary/coarse_label_names.txt", "fine_label": "cifar-100-binary/fine_label_names.txt"}
    kinds = {name: datasets.ClassLabel(names=files[names[name]].decode().split()) for name in labels}
    parts = {}
    for split, rows in records.items():
        made = {name: rows[:, column].tolist() for column, name in enumerate(labels)}
        made["img"] = [Image.fromarray(row[2:].reshape(3, 32, 32).transpose(1, 2, 0)) for row in rows]
        parts[split] = datasets.Dataset.from_dict(made, features=datasets.Features({"img": datasets.Image(), **kinds}))
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "copy")
    archive = dataclasses.replace(tiny.archive, hub=(str(tmp_path / "copy"), *tiny.archive.hub[1:]))
    return dataclasses.replace(tiny, archive=archive)


def test_copy_on_the_hub_is_prepared_as_the_archive_is(copy, pack, tmp_path):
    folders = [prepare(copy, pack(), tmp_path / "one"), prepare(copy, data_dir=tmp_path / "other", from_hub=True)]
    one, other = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert one == other and any("array_record" in name for name in one)


def test_copy_with_other_content_is_refused(copy, tmp_path):
    archive = dataclasses.replace(copy.archive, digests={"train": "0" * 64, "test": "0" * 64})
    with pytest.raises(DataError, match="on the hub holds other images or labels than http://127"):
        prepare(dataclasses.replace(copy, archive=archive), data_dir=tmp_path / "data", from_hub=True)
    assert not list((tmp_path / "data").glob("cifar100*"))


def test_parquet_files_in_folders_of_splits(tmp_path):
    for split, rows in (("train", "train[:6]"), ("test", "test[:4]")):
        (tmp_path / split).mkdir()
        table(rows).to_parquet(tmp_path / split / "0000.parquet")
    assert [len(open_split(task(f"hub:{tmp_path}"), split)) for split in ("train", "test")] == [6, 4]


def test_row_without_an_image_is_named(tmp_path):
    rows = table("test[:3]").to_list()
    rows[1]["img"] = None
    datasets.Dataset.from_list(rows, features=table("test[:3]").features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 1 of img holds no image that can be read"):
        open_split(task(f"hub:{tmp_path / 'a.parquet'}"), "train")
