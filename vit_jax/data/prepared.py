"""Opening data that TFDS prepared, without TensorFlow."""

import functools
import io
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.labels import RULES
from vit_jax.data.places import NotPrepared, data_root, find_prepared, prepare_command
from vit_jax.data.sources import Decoded, Source, empty_split, no_split, stored_shape
from vit_jax.data.tasks import Task
from vit_jax.errors import DataError, reason

_RECORDS = 1000  # examples read at once


def open_split(task: Task, split: str, data_dir: str | os.PathLike, image_size: int) -> Source:
    """Opens a split of a task's prepared data; arguments and errors as of `splits.open_split`."""
    folder = find_prepared(task, data_dir)
    if folder is None:
        raise NotPrepared(f"{task.name} is not prepared in {data_root(task, data_dir)}: {how_to_prepare(task, data_dir)}")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # the type depends on the damage
        raise DataError(f"{folder} is damaged ({reason(error)}): delete it and prepare it again") from error
    info = builder.info
    if info.file_format.value != "array_record":
        raise DataError(
            f"{folder} holds {info.file_format.value} files, expected array_record, which can be read without TensorFlow: "
            f"{how_to_prepare(task, 'DIRECTORY')}, and set data_dir to that directory"
        )
    try:
        examples = info.splits[split].num_examples
    except Exception as error:  # KeyError, ValueError or AssertionError
        raise no_split(task, split, info.splits) from error
    if examples <= 0:
        raise empty_split(task, split)
    names, decode = _labels(task, info.features, folder)
    shape = tuple(info.features["image"].shape)
    if task.image_shape and shape != task.image_shape:
        raise DataError(f"{folder} holds images {shape}, expected {task.image_shape}")
    try:
        # The source decodes: TFDS's decoder logs a warning if OpenCV is not installed, which is not needed.
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:
        raise DataError(f"{folder} cannot be read ({reason(error)}): delete it and prepare it again") from error
    ranges = [
        (part.filename, part.skip, part.take if part.take >= 0 else part.examples_in_shard - part.skip)
        for part in info.splits[split].file_instructions
    ]
    fixed = np.array([shape[:2]]) if None not in shape else None
    stored = stored_shape(fixed, image_size)
    resized, advice = fixed is None or stored[:2] != shape[:2], ": delete the folder and prepare it again"
    return Source(records, f"{folder} ({split})", names, stored, ranges, decode, resized, advice=advice)


def superclasses(
    task: Task, split: str, data_dir: str | os.PathLike, num_classes: int
) -> tuple[list[str], dict[int, int]] | None:
    """Reads the data set's own coarser classes: the feature "coarse_label" of TFDS's cifar100.

    Args:
      task, split, data_dir: of data that `open_split` opens.
      num_classes: after so many classes no further example is read.

    Returns:
      (names of the superclasses, class → superclass as in the split); None if the data set has none.
    """
    import tensorflow_datasets as tfds

    if task.kind != "tfds":
        return None
    builder = tfds.builder_from_directory(find_prepared(task, data_dir))
    if "coarse_label" not in builder.info.features:
        return None
    records: Any = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    found: dict[int, int] = {}
    for first in range(0, len(records), _RECORDS):
        batch = records.__getitems__(range(first, min(first + _RECORDS, len(records))))
        found |= {int(example["label"]): int(example["coarse_label"]) for example in batch}
        if len(found) == num_classes:
            break
    return list(builder.info.features["coarse_label"].names), found


def how_to_prepare(task: Task, data_dir: str | os.PathLike = "", archive: str = "") -> str:
    """The command that prepares a task, as an error message gives it."""
    if task.archive:
        hint = "" if archive else " (offline, give it the downloaded archive with --archive FILE)"
        return f"run `{prepare_command(task, data_dir, archive)}`{hint}"
    option = f" --data_dir {shlex.quote(os.fspath(data_dir))}" if data_dir else ""
    manual = f"; first put {task.manual} into {data_root(task, data_dir) / 'downloads' / 'manual'}" if task.manual else ""
    return (
        f"run `tfds build {task.builder} --file_format=array_record{option}` in a separate environment with TensorFlow "
        f"(pip install -r requirements-prepare.txt){manual}"
    )


def _labels(task: Task, features: Any, folder: Path) -> tuple[list[str], Callable[..., Decoded]]:
    """The names of a task's classes, and the function that decodes an example."""
    rule = RULES.get(task.label)
    feature = rule.feature if rule else task.label
    missing = [name for name in ("image", feature) if name not in features]
    if missing:
        raise DataError(f"{folder} has no feature {' and '.join(missing)}, only {', '.join(features)}")
    if rule:
        return list(rule.class_names), functools.partial(_decode, feature=feature, label=rule.label, factor=rule.factor)
    number = getattr(features[feature], "num_classes", None)
    if number is None:
        raise DataError(f"the feature {feature!r} of {folder} is not a class label")
    if task.num_classes and number != task.num_classes:
        raise DataError(f"{folder} holds images of {number} classes, expected {task.num_classes}")
    return list(features[feature].names or map(str, range(number))), functools.partial(_decode, feature=feature, label=int)


def _decode(
    example: dict[str, Any], shape: tuple[int, int, int], feature: str, label: Callable[[Any], int], factor: int = 1
) -> Decoded:
    """Decodes as TFDS does, which does not apply EXIF orientation; `factor` multiplies the pixels."""
    from PIL import Image

    height, width, _ = shape
    with Image.open(io.BytesIO(example["image"])) as image:
        before = image.height, image.width
        if before != (height, width):
            image.draft(None, (2 * width, 2 * height))  # a JPEG is decoded at a fraction of its size
        pixels = image if image.mode == "RGB" else image.convert("RGB")
        if pixels.size != (width, height):
            pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(pixels) * np.uint8(factor), before, label(example[feature])
