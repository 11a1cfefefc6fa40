"""The table of tasks: what can be learnt, where it comes from and where TFDS keeps it.

Standard library only, so that looking something up costs nothing.
"""

import dataclasses
import difflib
import os
import pathlib
import re
import shlex

from vit_jax.errors import DataError


class NotPrepared(DataError):
    """A task that TFDS has no data of in this directory; the message names the command that prepares it."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """A tar file of fixed-size records: a byte for each label, then an image as planes of red, green and blue.

    Attributes:
      url: address of the official file.
      sha256: of the official file, as hexadecimal digits.
      folder: folder inside the tar that holds every file below.
      files: split -> the files whose records, one after the other, are the split.
      labels: in the order of their bytes in a record: TFDS's name for it -> (text file with a name a line, how many).
      examples: split -> number of records.
      digests: split -> SHA-256 over the concatenated, sorted 32-byte SHA-256 digests of the records, which depends
        neither on packing nor on order; empty where it is not known.
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
    """A part of an archive, the same whatever its order: of every class the records of the smallest SHA-256.

    Attributes:
      version: of the data that results.
      classes: names among the archive's "label"s; their places here are the new labels.
      examples: split -> number of records of each class.
    """

    version: str
    classes: tuple[str, ...]
    examples: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learnt from what.

    Attributes:
      name: of the row.
      builder: TFDS's name for the data set, with its configuration where it has several ("sun397/tfds").
      num_classes: number of labels.
      image_shape: (height, width, 3) of every image.
      mean, std: of the training images' channels, pixels scaled to [0, 1].
      train_split, test_split: what is trained and tested on where nothing else is asked for, in TFDS's language.
      data_dir: where TFDS finds the data; "": wherever the user keeps such data, see `data_root`.
      archive: what `vit_jax.data.prepare` makes the data from; None: it cannot.
      excerpt: the part of the archive that is the data; None: all of it.
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
    """Returns the row of this name.

    Raises:
      DataError: if there is none; the message lists those that exist and the nearest.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(f"There is no task {name!r}: expected one of {', '.join(TASKS)}{hint}")


def data_root(task: Task, data_dir: str | os.PathLike = "") -> pathlib.Path:
    """Returns the directory in which TFDS keeps the task's data set, by TFDS's own rules.

    The first of: `data_dir`, the task's own, the environment variable TFDS_DATA_DIR, ~/tensorflow_datasets. DataError where
    that is in the home of nobody.
    """
    chosen = os.fspath(data_dir) or task.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        return pathlib.Path(chosen).expanduser()
    except RuntimeError as error:
        raise DataError(f"{task.name} cannot lie in {chosen} ({error})") from None


def find_prepared(task: Task, data_dir: str | os.PathLike = "") -> pathlib.Path | None:
    """Returns the folder of the newest version there is, `<data_root>/<builder>/<version>`; None: not prepared."""
    found = {}
    for info in (data_root(task, data_dir) / task.builder).glob("*/dataset_info.json"):
        # What is not named as a version is TFDS's unfinished work ("incomplete.XXXXXX_3.0.2").
        if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name):
            found[tuple(int(part) for part in info.parent.name.split("."))] = info.parent
    return found[max(found)] if found else None


def prepare_command(task: Task, data_dir: str | os.PathLike = "", archive: str = "") -> str:
    """Returns the command line that prepares the task, with the options that are given."""
    options = [("--archive", archive), ("--data_dir", os.fspath(data_dir))]
    given = [f"{option} {shlex.quote(value)}" for option, value in options if value]
    return " ".join([f"python -m vit_jax.data prepare {task.name}", *given])
