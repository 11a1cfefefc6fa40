"""The splits of a task, wherever its images come from, and what must be known about those of a run."""

import os
from collections.abc import Iterator
from typing import NamedTuple

from vit_jax.config import Data
from vit_jax.data import folders, hub, prepared
from vit_jax.data.prepare import prepare
from vit_jax.data.sources import Source, shared_examples
from vit_jax.data.tasks import Task
from vit_jax.errors import DataError


def open_split(
    task: Task, split: str, data_dir: str | os.PathLike = "", image_size: int = 224, on_error: str = "raise"
) -> Source:
    """Opens a split of a task's prepared data or of the user's own images; never touches the network.

    Args:
      task: as `vit_jax.data.tasks.task` returns it.
      split: in TFDS's language, such as "test", "train[:98%]", "test[:64]" or "train+test".
      data_dir: the directory of TFDS; "" for `vit_jax.data.places.data_root`. Not used for own images.
      image_size: of the model's images in pixels; images of other sizes are held at up to twice this size.
      on_error: what to do with own images that cannot be read: "raise", or "skip" to leave them out.

    Raises:
      NotPrepared: if the data are not there; the message names the command that prepares them.
      DataError: if the split does not exist or is empty, or if the data are damaged or other data than the task says.
    """
    if task.kind == "tfds":
        return prepared.open_split(task, split, data_dir, image_size)
    if task.kind == "hub":
        return hub.open_split(task, split, image_size)
    return folders.open_split(task, split, image_size, on_error)


class Names(NamedTuple):
    """The splits of a run in TFDS's language; `validation` is "" if the best state is chosen on the test split."""

    train: str
    test: str
    validation: str


class Splits(NamedTuple):
    """The splits of a run; `validation` is None if the best state is chosen on the test split."""

    train: Source
    test: Source
    validation: Source | None


def names(task: Task, data: Data) -> Names:
    """The splits that a configuration means; with the task's own validation split, the rest of its images is trained on."""
    trained, validated = task.validation if data.validation_split == "own" else (task.train_split, data.validation_split)
    return Names(data.train_split or trained, data.test_split or task.test_split, validated)


def open_splits(task: Task, data: Data, data_dir: str | os.PathLike = "") -> Splits:
    """Opens the splits of a run and prepares the task's data first if they are not there.

    Args:
      task: as `vit_jax.data.tasks.task` returns it.
      data: the section of the configuration; its splits are "" for the task's own.
      data_dir: as TFDS's.

    Raises:
      DataError: as `prepare` and `open_split`, and if validation images are training or test images.
    """
    chosen = names(task, data)
    try:
        if task.kind == "tfds":
            prepare(task, data_dir=data_dir)
        train, test, validation = (
            open_split(task, split, data_dir, data.image_size, data.on_error) if split else None for split in chosen
        )
    except OSError as error:  # no permission
        place = f"run.data_dir = {os.fspath(data_dir)!r}" if task.kind == "tfds" else f"data.task = {task.name!r}"
        raise DataError(f"{place}: {task.name} cannot be read or prepared there ({error})") from None
    assert train and test
    if validation:
        for other, kind in ((train, "train"), (test, "test")):
            if shared := shared_examples(validation, other):
                raise DataError(
                    f"{shared:,} of the {len(validation):,} images of data.validation_split = {chosen.validation!r} are in "
                    f"data.{kind}_split = {getattr(chosen, kind)!r} too: choose splits without common images, such as "
                    "'train[:90%]' and 'train[90%:]', or data.validation_split=own"
                )
    return Splits(train, test, validation)


def warnings(task: Task, data: Data, sources: Splits, batch_size: int) -> Iterator[str]:
    """What a reader of a run's figures must know about its data; arguments as of `open_splits`."""
    train, test, _ = names(task, data)
    if skipped := sources[0].skipped:
        more = f" and {len(skipped) - 3:,} more" if len(skipped) > 3 else ""
        yield f"{len(skipped):,} images of {task.name} cannot be read and are left out: {'; '.join(skipped[:3])}{more}"
    if sources.train.ignored:
        yield f"{sources.train.ignored} of {task.name} are not used: their suffixes are not those of images that can be read"
    if shared := shared_examples(sources.train, sources.test):
        yield (
            f"{shared:,} of the {len(sources[1]):,} test images are training images too "
            f"(data.train_split = {train!r}, data.test_split = {test!r}): "
            "the test accuracy does not say how the model does on new images"
        )
    if batch_size > len(sources[0]):
        yield (
            f"training.batch_size = {batch_size} is larger than the training split of {len(sources[0]):,} images: "
            "every batch holds images more than once"
        )


def count(task: Task, data: Data, data_dir: str | os.PathLike = "") -> int:
    """The number of training images, known without reading them if the task has an archive; arguments as of `open_splits`."""
    train = names(task, data).train
    if task.archive and train in task.archive.examples and not task.excerpt:
        return task.archive.examples[train]
    return len(open_split(task, train, data_dir, data.image_size, data.on_error))
