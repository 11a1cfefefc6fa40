"""A CIFAR archive of a few records, which tests may damage, and the task that expects it."""

import dataclasses
import io
import tarfile

import numpy as np
import pytest

from vit_jax.data.tasks import TASKS

CLASSES = {"coarse_label": 20, "label": 100}
TRAIN, TEST = "cifar-100-binary/train.bin", "cifar-100-binary/test.bin"
FINE = "cifar-100-binary/fine_label_names.txt"


def files_below(folder):
    """The relative paths of all files below the folder except lock files, which stay."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.fixture
def tiny():
    """CIFAR-100 with 120 + 40 records, at an address without a server and without known digests."""
    archive = dataclasses.replace(
        TASKS["cifar100"].archive, url="http://127.0.0.1:9/cifar-100-binary.tar.gz", sha256="", digests={}
    )
    archive = dataclasses.replace(archive, examples={"train": 120, "test": 40})
    return dataclasses.replace(TASKS["cifar100"], archive=archive)


@pytest.fixture
def records():
    """Split -> records uint8 [n, 3074]: random pixels, labels in turn."""
    rng = np.random.default_rng(0)
    made = {}
    for split, n in (("train", 120), ("test", 40)):
        made[split] = rng.integers(0, 256, (n, 3074), np.uint8)
        made[split][:, 1] = np.arange(n) % 100
        made[split][:, 0] = made[split][:, 1] % 20
    return made


@pytest.fixture
def files(records):
    """Name -> content of the files in the archive; tests change it before they call `pack`."""
    names = {label: "".join(f"{label}_{i}\n" for i in range(n)).encode() for label, n in CLASSES.items()}
    return {
        TRAIN: records["train"].tobytes(),
        TEST: records["test"].tobytes(),
        "cifar-100-binary/coarse_label_names.txt": names["coarse_label"],
        FINE: names["label"],
    }


@pytest.fixture
def pack(files, tmp_path):
    """A function that writes the archive in a compression of `tarfile` and returns its path."""

    def write(compression="gz", name="archive"):
        path = tmp_path / name
        with tarfile.open(path, f"w:{compression}") as tar:
            for member, content in files.items():
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return path

    return write
