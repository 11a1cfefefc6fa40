"""The table of tasks: data sets, where they come from and where TFDS keeps them.

It imports only the standard library, so that a lookup is quick.
"""

import dataclasses
import difflib
import os
import pathlib
import re
import shlex

from vit_jax.errors import DataError, UserError
from vit_jax.files import expand_user


class NotPrepared(DataError):
    """There is no TFDS data of a task in the directory; the message names the command that prepares it."""


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
      digests: split -> SHA-256 over the concatenated, sorted 32-byte SHA-256 digests of the records, which depends
        neither on packing nor on order; empty if it is not known.
    """

    url: str
    sha256: str
    folder: str
    files: dict[str, tuple[str, ...]]
    labels: dict[str, tuple[str, int]]
    examples: dict[str, int]
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
      builder: TFDS's name of the data set, with the configuration if it has several ("sun397/tfds").
      num_classes: number of labels.
      image_shape: (height, width, 3) of every image.
      mean, std: of the channels of the training images, pixels scaled to [0, 1].
      train_split, test_split: the default splits, in TFDS's language.
      data_dir: the directory with the data if they come with the package; "" otherwise.
      archive: the archive that `vit_jax.data.prepare` makes the data from; None if it cannot make them.
      excerpt: the part of the archive that is used; None for all of it.
    """

    name: str
    builder: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train_split: str = "train"
    test_split: str = "test"
    data_dir: str = ""
    archive: Archive | None = None
    excerpt: Excerpt | None = None


# Layouts: https://www.cs.toronto.edu/~kriz/cifar.html. Hashes of the files: TFDS's url_checksums/cifar{10,100}.txt.
_CIFAR10 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    folder="cifar-10-batches-bin",
    files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
    labels={"label": ("batches.meta.txt", 10)},
    examples={"train": 50_000, "test": 10_000},
)
_CIFAR100 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    folder="cifar-100-binary",
    files={"train": ("train.bin",), "test": ("test.bin",)},
    labels={"coarse_label": ("coarse_label_names.txt", 20), "label": ("fine_label_names.txt", 100)},
    examples={"train": 50_000, "test": 10_000},
    digests={
        "train": "7077d87fc363f92dbf1245f13ba80561d7b33a96c79ad57168d49dc172aaa92b",
        "test": "96adb3db8da7632dbb350559a17b9f585fab5b17675de5fc8f6761384196b294",
    },
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
    ),
)
TASKS: dict[str, Task] = {row.name: row for row in _ROWS}


def task(name: str) -> Task:
    """Returns the task of this name.

    Raises:
      DataError: if there is none; the message lists the tasks and suggests the nearest name.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"there is no task {name!r}: expected one of {', '.join(TASKS)}{hint}")


def examples(task: Task, split: str) -> int:
    """Returns the number of examples of a split by the table, without the data; 0 if the table does not know it.

    A slice such as "train[:98%]" counts as the whole split, a sum of splits as their sum.
    """
    counts = dict(task.archive.examples) if task.archive else {}
    if task.excerpt:
        counts = {name: number * len(task.excerpt.classes) for name, number in task.excerpt.examples.items()}
    return sum(counts.get(part.partition("[")[0].strip(), 0) for part in split.split("+"))


def data_root(task: Task, data_dir: str | os.PathLike = "") -> pathlib.Path:
    """Returns the directory in which TFDS keeps the task's data set.

    The first of: `data_dir`, the task's own directory, the environment variable TFDS_DATA_DIR, ~/tensorflow_datasets.

    Raises:
      DataError: if that is the home of a user who does not exist.
    """
    if chosen := os.fspath(data_dir) or task.data_dir:
        name = "data_dir"
    elif chosen := os.environ.get("TFDS_DATA_DIR", ""):
        name = "TFDS_DATA_DIR"
    else:
        chosen, name = "~/tensorflow_datasets", "HOME"
    try:
        return expand_user(chosen, name)
    except UserError as error:
        raise DataError(str(error)) from None


def find_prepared(task: Task, data_dir: str | os.PathLike = "") -> pathlib.Path | None:
    """Returns the folder of the task's prepared data, or None if they are not prepared.

    The folder is `<data_root>/<builder>/<newest version>`. Data that come with the package are found with any `data_dir`; a
    version in `data_dir` comes first.
    """
    return find_version(task, data_root(task, data_dir)) or (find_version(task, data_root(task)) if task.data_dir else None)


def find_version(task: Task, root: pathlib.Path) -> pathlib.Path | None:
    """Returns the folder of the newest version of the task's data set in one directory; None if there is none."""
    found = {}
    for info in (root / task.builder).glob("*/dataset_info.json"):
        # A folder with another name than a version is TFDS's unfinished work ("incomplete.XXXXXX_3.0.2").
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name):
            found[tuple(int(part) for part in info.parent.name.split("."))] = info.parent
    return found[max(found)] if found else None


def prepare_command(task: Task, data_dir: str | os.PathLike = "", archive: str = "") -> str:
    """Returns the command line that prepares the task, with the given options."""
    options = [("--archive", archive), ("--data_dir", os.fspath(data_dir))]
    given = [f"{option} {shlex.quote(value)}" for option, value in options if value]
    return " ".join([f"python -m vit_jax.data prepare {task.name}", *given])
