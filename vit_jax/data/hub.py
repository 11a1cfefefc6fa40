"""Data sets of the Hugging Face hub and local ones in its formats, memory-mapped, without TensorFlow; needs the extra `hub`."""

import functools
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import images
from vit_jax.data.archives import Names, Splits, digests
from vit_jax.data.sources import Decoded, Source, resolve, stored_shape
from vit_jax.data.tasks import Archive, Task
from vit_jax.errors import DataError, reason
from vit_jax.files import expand_user

_log = logging.getLogger("vit_jax")
_SPLITS = ("train", "test", "validation", "val", "valid", "dev")
_SAMPLE = 1000  # images whose sizes are looked at before those of all


def open_split(task: Task, split: str, image_size: int) -> Source:
    """Opens a split of a task such as "hub:uoft-cs/cifar100"; arguments and errors as of `splits.open_split`.

    The columns are those with the types Image and ClassLabel, or as named: "hub:uoft-cs/cifar100@img,fine_label". Of several
    labels the one called "label" is taken, else the one with the most classes. A column of text or of whole numbers can be
    named as the label, too.
    """
    found = _load(task.builder)
    import datasets

    parts = resolve(task, split, {name: len(part) for name, part in found.items()})
    image, label, names, numbers = _columns(task, found)
    joined = datasets.concatenate_datasets([found[name].select(range(start, stop)) for name, start, stop in parts])
    joined = joined.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    shape, resized = _shape(found, image, image_size)
    decode = functools.partial(_decode, image=image, label=label, numbers=numbers)
    ranges = [(name, start, stop - start) for name, start, stop in parts]
    return Source(joined, f"{task.name} ({split})", names, shape, ranges, decode, resized)


def read_records(archive: Archive) -> tuple[Splits, Names]:
    """The records and the names of an official archive from its copy on the hub, as `archives.read_archive` returns them.

    Raises:
      DataError: if the copy cannot be read or, as far as it is known, holds other images or labels than the archive.
    """
    from tqdm import tqdm

    name, image, labels = archive.hub
    found = _load(name)
    splits, names = {}, {}
    for split in archive.files:
        if split not in found or missing_columns(found[split].features, image, *labels.values()):
            raise DataError(f"{name} has other splits or columns than expected: {split}, {image}, {', '.join(labels.values())}")
        rows = found[split]
        columns = [np.asarray(rows[labels[label]], np.uint8).reshape(-1, 1) for label in archive.labels]
        pixels = [
            np.asarray(example.convert("RGB")).transpose(2, 0, 1).ravel()
            for example in tqdm(rows[image], desc=f"Reading {name} ({split})", unit=" images", delay=2, disable=None)
        ]
        splits[split] = np.concatenate([*columns, np.stack(pixels)], axis=1)
        names = {label: list(rows.features[labels[label]].names) for label in archive.labels}
    if not archive.digests:
        _log.warning("the content of %s is not known to be that of %s; results may not be comparable", name, archive.url)
    elif digests(splits) != archive.digests:
        raise DataError(f"{name} on the hub holds other images or labels than {archive.url}: prepare the archive instead")
    return splits, names


def missing_columns(features: Any, *wanted: str) -> list[str]:
    """The columns that a data set does not have."""
    return [name for name in wanted if name not in features]


@functools.lru_cache(2)
def _load(location: str) -> Any:
    """The splits of a data set: name → datasets.Dataset."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"hub:{location} needs the package datasets: pip install 'vit_jax[hub]', or pip install datasets"
        ) from None
    name = location.partition("@")[0]
    path = expand_user(name, "hub")
    datasets.disable_progress_bars()
    try:
        if path.is_dir() and any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(path))
        elif path.exists():
            found = datasets.load_dataset("parquet", data_files=_parquet_files(path))
        else:
            repository, _, configuration = name.partition(":")
            found = datasets.load_dataset(repository, configuration or None)
    except DataError:
        raise
    except Exception as error:  # of the network, the server and the files: they share no type
        raise DataError(
            f"hub:{location} cannot be opened ({reason(error)}): expected the name of a data set on the Hugging Face hub, a "
            "parquet file, a folder of these, or a folder of save_to_disk"
        ) from None
    finally:
        datasets.enable_progress_bars()
    return found if isinstance(found, dict) else {"train": found}


def _parquet_files(path: Path) -> dict[str, list[str]]:
    """Split → parquet files, by their names or folders: "train-00000-of-00002.parquet", "train/0000.parquet"; else "train"."""
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files or any(file.suffix != ".parquet" for file in files):
        raise DataError(f"hub:{path}: there is no parquet file; a folder of images is folder:{path}")
    splits: dict[str, list[str]] = {}
    for file in files:  # the split is the folder's name or the first word of the file's
        words = [re.split(r"[-_.]", file.name)[0], *(reversed(file.relative_to(path).parts[:-1]) if path.is_dir() else ())]
        known = [word for word in words if word in _SPLITS and len(files) > 1]
        splits.setdefault(known[0] if known else "train", []).append(str(file))
    return splits


def _columns(task: Task, found: Any) -> tuple[str, str, list[str], dict[Any, int] | None]:
    """The columns of the image and of the label, the names of the classes, and value → label if it is not the label itself."""
    import datasets

    features = next(iter(found.values())).features
    named = [name for name in task.builder.partition("@")[2].split(",") if name]
    missing = missing_columns(features, *named)
    if missing or len(named) not in (0, 2):
        wrong = f"there is no column {', '.join(missing)}" if missing else f"{len(named)} columns are named"
        raise DataError(
            f"{task.name}: {wrong}; after @ give two columns, that of the image and that of the label, among "
            f"{', '.join(features)}"
        )
    pictured = named[:1] or [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = {name: kind.num_classes for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    labelled = named[1:] or [name for name in labels if name == "label"] or sorted(labels, key=lambda name: -labels[name])
    if len(pictured) != 1 or not labelled:
        raise DataError(
            f"{task.name} has {len(pictured)} columns of images and {len(labels)} of class labels: name one of each, as in "
            f"hub:NAME@image,label, among {', '.join(features)}"
        )
    image, label = pictured[0], labelled[0]
    if not isinstance(features[image], datasets.Image):
        raise DataError(f"{task.name}: the column {image} does not hold images, but {features[image]}")
    if label in labels:
        return image, label, list(features[label].names), None
    values = sorted(
        {value for part in found.values() for value in part.unique(label)}, key=lambda value: (str(type(value)), value)
    )
    if not all(isinstance(value, str | int) for value in values):
        raise DataError(f"{task.name}: the column {label} holds neither classes, text nor whole numbers, but {features[label]}")
    return image, label, list(map(str, values)), {value: number for number, value in enumerate(values)}


def _shape(found: Any, column: str, image_size: int) -> tuple[tuple[int, int, int], bool]:
    """The shape in which images are held, and whether some are resized to it; reads only the heads of the files."""
    import datasets

    sizes: list[tuple[int, int]] = []
    for limit in (_SAMPLE, None):
        for part in found.values():
            part = part.select_columns([column]).cast_column(column, datasets.Image(decode=False))
            for number, row in enumerate(part.select(range(min(limit or len(part), len(part))))):
                try:
                    sizes.append(images.shown_size(_bytes(row[column])))
                except Exception as error:  # Pillow's decoders raise errors of many types
                    raise DataError(f"row {number} of {column} holds no image that can be read ({reason(error)})") from None
        if len(set(sizes)) > 1:
            return stored_shape(None, image_size), True
    shape = stored_shape(np.array(sizes), image_size)
    return shape, shape[:2] != sizes[0]


def _bytes(value: dict[str, Any]) -> bytes:
    if value is None:
        raise DataError("there is no image")
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()


def _decode(
    example: dict[str, Any], shape: tuple[int, int, int], image: str, label: str, numbers: dict[Any, int] | None
) -> Decoded:
    content, value = _bytes(example[image]), example[label]
    if value is None:
        raise DataError(f"a row has no value in the column {label}: leave such rows out")
    pixels = images.fitted(content, shape[:2], "an image")
    return pixels, images.shown_size(content), numbers[value] if numbers else value
