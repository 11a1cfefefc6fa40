"""The training and the test split of a task, opened together, and what must be known about both."""

import os
from collections.abc import Iterator

from vit_jax.data.prepare import prepare
from vit_jax.data.sources import Source, open_split, shared_examples
from vit_jax.data.tasks import Task


def open_splits(task: Task, train: str, test: str, data_dir: str | os.PathLike = "") -> tuple[Source, Source]:
    """Opens two splits of a task and prepares its data first if they are not there. Raises as `prepare` and `open_split`.

    Args:
      task: a row of TASKS.
      train: the training split in TFDS's language; "": the task's own.
      test: the test split, likewise.
      data_dir: as TFDS's.
    """
    prepare(task, data_dir=data_dir)
    return open_split(task, train or task.train_split, data_dir), open_split(task, test or task.test_split, data_dir)


def warnings(task: Task, train: str, test: str, sources: tuple[Source, Source], batch_size: int) -> Iterator[str]:
    """What a reader of a run's figures must know about its data; arguments as of `open_splits`."""
    if shared := shared_examples(*sources):
        yield (
            f"{shared:,} of the {len(sources[1]):,} test images are training images too "
            f"(data.train_split = {train or task.train_split!r}, data.test_split = {test or task.test_split!r}): "
            "the test accuracy does not say how the model does on new images"
        )
    if batch_size > len(sources[0]):
        yield (
            f"training.batch_size = {batch_size} is larger than the training split of {len(sources[0]):,} images: "
            "every batch holds images more than once"
        )
