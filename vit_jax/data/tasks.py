"""The table of tasks: data sets and where they come from; and the user's own images.

It imports only the standard library, so that a lookup is quick.
"""

import csv
import dataclasses
import difflib
import pathlib
import re
from typing import Any

from vit_jax.errors import DataError, UserError
from vit_jax.files import expand_user


@dataclasses.dataclass(frozen=True)
class Archive:
    """A tar file of fixed-size records: a byte for each label, then an image as planes of red, green and blue.

    Attributes:
      url: address of the official file.
      sha256: of the official file, as hexadecimal digits.
      folder: the folder inside the tar that holds all files.
      files: split -> the files whose concatenated records are the split.
      labels: TFDS's name of a label -> (text file with one name a line, number of names), in the order of the labels' bytes
        in a record.
      examples: split -> number of records.
      hub: (name of a copy on the Hugging Face hub, column of its images, label -> its column).
      digests: split -> SHA-256 over the concatenated, sorted 32-byte SHA-256 digests of the records, which depends
        neither on packing nor on order; empty if it is not known.
    """

    url: str
    sha256: str
    folder: str
    files: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[str, int]]
    examples: dict[str, int]
    hub: tuple[str, str, dict[str, str]]
    digests: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """A part of an archive, which does not depend on its order: of each class the records with the smallest SHA-256.

    Attributes:
      version: of the data that results.
      classes: names among the archive's "label"s; their positions here are the new labels.
      examples: split -> number of records of each class.
    """

    version: str
    classes: tuple[str, ...]
    examples: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set to train on and how it is split.

    Attributes:
      name: what the user calls it.
      builder: TFDS's name of the data set, with the configuration if it has several ("sun397/tfds"); of own images, the path
        of the folder or file that lists them.
      num_classes: number of labels; of own images 0: it is found when they are indexed.
      image_shape: (height, width, 3) of every image; of own images empty.
      mean, std: of the channels of the training images, pixels scaled to [0, 1]; of own images empty: they are not known.
      train_split, test_split: the default splits, in TFDS's language.
      validation: (the part of train_split to train on, the part to validate on) where hyper-parameters are chosen.
      label: the feature of TFDS that is the label, or the name of a rule of `labels.RULES` that derives it.
      group: of VTAB's tasks: "natural", "specialized" or "structured"; "" of others.
      manual: what the user must download by hand before TFDS can prepare the data; "" if nothing.
      data_dir: the directory with the data if they come with the package; "" otherwise.
      archive: the archive that `vit_jax.data.prepare` makes the data from; None if it cannot make them.
      excerpt: the part of the archive that is used; None for all of it.
      kind: "tfds", "hub", or for own images "folder" or "csv".
    """

    name: str
    builder: str
    num_classes: int = 0
    image_shape: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    train_split: str = "train"
    test_split: str = "test"
    validation: tuple[str, str] = ("train[:90%]", "train[90%:]")
    label: str = "label"
    group: str = ""
    manual: str = ""
    data_dir: str = ""
    archive: Archive | None = None
    excerpt: Excerpt | None = None
    kind: str = "tfds"


# Layouts: https://www.cs.toronto.edu/~kriz/cifar.html. Hashes of the files: TFDS's url_checksums/cifar{10,100}.txt.
_CIFAR10 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    folder="cifar-10-batches-bin",
    files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    labels={"label": ("batches.meta.txt", 10)},
    examples={"train": 50_000, "test": 10_000},
    hub=("uoft-cs/cifar10", "img", {"label": "label"}),
)
_CIFAR100 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    folder="cifar-100-binary",
    files={"train": ("train.bin",), "test": ("test.bin",)},
    labels={"coarse_label": ("coarse_label_names.txt", 20), "label": ("fine_label_names.txt", 100)},
    examples={"train": 50_000, "test": 10_000},
    hub=("uoft-cs/cifar100", "img", {"coarse_label": "coarse_label", "label": "fine_label"}),
    digests={
        "train": "7077d87fc363f92dbf1245f13ba80561d7b33a96c79ad57168d49dc172aaa92b",
        "test": "96adb3db8da7632dbb350559a17b9f585fab5b17675de5fc8f6761384196b294",
    },
)

_TRAIN_VALIDATION = ("train", "validation")
# Data sets with one split, of which the last part is the test.
_SIXTY_TWENTY_TWENTY: dict[str, Any] = dict(
    train_split="train[:80%]", test_split="train[80%:]", validation=("train[:60%]", "train[60%:80%]")
)
_EIGHTY_TEN_TEN: dict[str, Any] = dict(
    train_split="train[:90%]", test_split="train[90%:]", validation=("train[:80%]", "train[80%:90%]")
)
_NORB: dict[str, Any] = dict(train_split="train+test[:50%]", test_split="test[50%:]", validation=("train", "test[:50%]"))


def _vtab(name: str, builder: str, num_classes: int, group: str, **fields: Any) -> Task:
    """A row of VTAB: one task of a data set, with its images at any size; `fields` are those of Task."""
    if fields.get("validation") == _TRAIN_VALIDATION:
        fields["train_split"] = "train+validation"
    return Task(name, builder, num_classes, group=group, **fields)


# VTAB's other 18 tasks. Splits and derived labels: google-research/task_adaptation, task_adaptation/data/*.py, of which
# "trainval" is the training split here; TFDS's percentages give the same numbers of images. Metric of all: accuracy.
_VTAB = (
    _vtab("caltech101", "caltech101", 102, "natural"),
    _vtab("dtd", "dtd", 47, "natural", validation=_TRAIN_VALIDATION),
    _vtab("flowers102", "oxford_flowers102", 102, "natural", validation=_TRAIN_VALIDATION),
    _vtab("pets", "oxford_iiit_pet", 37, "natural", validation=("train[:80%]", "train[80%:]")),
    _vtab("sun397", "sun397/tfds", 397, "natural", validation=_TRAIN_VALIDATION),
    _vtab("svhn", "svhn_cropped", 10, "natural"),
    _vtab("camelyon", "patch_camelyon", 2, "specialized", validation=_TRAIN_VALIDATION),
    _vtab("eurosat", "eurosat/rgb", 10, "specialized", **_SIXTY_TWENTY_TWENTY),
    _vtab("resisc45", "resisc45", 45, "specialized", manual="NWPU-RESISC45.rar", **_SIXTY_TWENTY_TWENTY),
    _vtab(
        "retinopathy",
        "diabetic_retinopathy_detection/btgraham-300",
        5,
        "specialized",
        validation=_TRAIN_VALIDATION,
        manual="train.zip.*, test.zip.* and the labels of Kaggle's diabetic-retinopathy-detection",
    ),
    _vtab("clevr_count", "clevr", 8, "structured", label="clevr_count", test_split="validation"),
    _vtab("clevr_distance", "clevr", 6, "structured", label="clevr_distance", test_split="validation"),
    _vtab("dmlab", "dmlab", 6, "structured", validation=_TRAIN_VALIDATION),
    _vtab("dsprites_location", "dsprites", 16, "structured", label="dsprites_location", **_EIGHTY_TEN_TEN),
    _vtab("dsprites_orientation", "dsprites", 16, "structured", label="dsprites_orientation", **_EIGHTY_TEN_TEN),
    _vtab("kitti_distance", "kitti", 4, "structured", label="kitti_distance", validation=_TRAIN_VALIDATION),
    _vtab("smallnorb_azimuth", "smallnorb", 18, "structured", label="label_azimuth", **_NORB),
    _vtab("smallnorb_elevation", "smallnorb", 9, "structured", label="label_elevation", **_NORB),
)

_ROWS = (
    Task(
        name="cifar100_excerpt",
        builder="cifar100_excerpt",
        num_classes=10,
        image_shape=(32, 32, 3),
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        data_dir=str(pathlib.Path(__file__).parents[1] / "assets"),
        archive=_CIFAR100,
        excerpt=Excerpt(
            version="1.0.0",
            classes=(
                *("lion", "sunflower", "bicycle", "castle", "dolphin"),
                *("orange", "bottle", "butterfly", "mountain", "clock"),
            ),
            examples={"train": 100, "test": 50},
        ),
    ),
    Task(
        name="cifar10",
        builder="cifar10",
        num_classes=10,
        image_shape=(32, 32, 3),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        archive=_CIFAR10,
    ),
    Task(
        name="cifar100",
        builder="cifar100",
        num_classes=100,
        image_shape=(32, 32, 3),
        mean=(0.5071, 0.4867, 0.4408),  # as the report's; measured: 0.50708 0.48655 0.44092
        std=(0.2675, 0.2565, 0.2761),
        archive=_CIFAR100,
        group="natural",
    ),
    *_VTAB,
    Task(
        "imagenet2012",
        "imagenet2012",
        1000,
        test_split="validation",
        validation=("train[:99%]", "train[99%:]"),
        manual="ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of https://image-net.org",
    ),
)
TASKS: dict[str, Task] = {row.name: row for row in _ROWS}


OTHERS = {
    "hub": "hub:NAME[:CONFIGURATION], a data set of the Hugging Face hub such as hub:uoft-cs/cifar100, or a local parquet file "
    "or folder; needs the extra `hub`",
    "tfds": "tfds:NAME, any data set of TFDS with an image and a label, such as tfds:stanford_dogs",
    "folder": "folder:PATH, a folder with a folder of images for each class, or with such folders in train/ and test/",
    "csv": "csv:PATH, a CSV file with the columns path, label and, optionally, split",
}
# Names of the folders of splits, in any case.
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val", "valid": "valid"}
_SPLITS |= {"validation": "validation"}
TEST_SPLITS = ("test", "val", "valid", "validation")  # names of what is evaluated, the first that exists by default


def task(name: str) -> Task:
    """Returns the task of this name: a row of TASKS, or one of OTHERS, such as "folder:photos" or "tfds:stanford_dogs".

    Raises:
      DataError: if there is none; the message suggests the nearest name.
    """
    if name in TASKS:
        return TASKS[name]
    kind, _, location = name.partition(":")
    if kind == "tfds" and re.fullmatch(r"[a-z0-9_]+(/[\w.-]+)?", location):
        return Task(name, location)
    if kind == "hub" and location:
        return Task(name, location, kind="hub")
    if kind in ("folder", "csv"):
        return _own_images(name, kind, location)
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"there is no task {name!r}{hint}: `vit_jax data list` shows all, and how to name your own images")


def split_folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The folders of splits in a folder of images: split → folder; empty if it holds the folders of classes.

    Raises:
      DataError: if there is a folder of a split that holds classes, but none to train on, or two of one split.
    """
    found: dict[str, pathlib.Path] = {}
    for entry in sorted(root.iterdir()):
        split = _SPLITS.get(entry.name.lower(), "")
        if split and entry.is_dir() and any(child.is_dir() for child in entry.iterdir()):  # a class holds images
            if split in found:
                raise DataError(f"{root} has two folders of the split {split!r}: {found[split].name} and {entry.name}")
            found[split] = entry
    if found and "train" not in found:
        names = ", ".join(folder.name for folder in found.values())
        raise DataError(
            f"{root} has {names} with folders of classes, but no train: name the folder with the training images train"
        )
    return found


def _own_images(name: str, kind: str, location: str) -> Task:
    """The task of a folder or a CSV file that exists; its splits' names are read, its images are not."""
    try:
        path = expand_user(location, "the path") if location else None
    except UserError as error:
        raise DataError(f"{name}: {error}") from None
    if path is None or not (path.is_dir() if kind == "folder" else path.is_file()):
        here = f"; {path} is not one" if path is not None and path.exists() else ""
        raise DataError(
            f"{name}: there is no {'folder' if kind == 'folder' else 'file'} {location!r}; expected {OTHERS[kind]}{here}"
        )
    if kind == "folder":
        names = set(split_folders(path))
    else:
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                names = {(row.get("split") or "").strip() for row in csv.DictReader(file)}
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{name}: {path} is not a CSV file in UTF-8 ({error})") from None
    evaluated = [split for split in TEST_SPLITS if split in names]
    validation = ("train", evaluated[1]) if len(evaluated) > 1 else Task.validation
    return Task(name, str(path), kind=kind, test_split=[*evaluated, TEST_SPLITS[0]][0], validation=validation)


def examples(task: Task, split: str) -> int:
    """Returns the number of examples of a split by the table, without the data; 0 if the table does not know it.

    A slice such as "train[:98%]" counts as the whole split, a sum of splits as their sum.
    """
    counts = dict(task.archive.examples) if task.archive else {}
    if task.excerpt:
        counts = {name: number * len(task.excerpt.classes) for name, number in task.excerpt.examples.items()}
    return sum(counts.get(part.partition("[")[0].strip(), 0) for part in split.split("+"))
