"""A split as arrays, addressed by index, wherever its images come from."""

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.tasks import Task
from vit_jax.errors import DataError, UserError, reason

Decoded = tuple[np.ndarray, tuple[int, int], int]  # pixels uint8 [height, width, 3], original (height, width), label
_BATCH = 1024  # records that are read at once; bounds the memory needed besides the result


class Examples(NamedTuple):
    """Images uint8 [n, height, width, 3], labels int32 [n], and the images' sizes; see `Source.read`."""

    images: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray | None


class Source:
    """The images and labels of a split, addressed by index in the order in which they are stored.

    Attributes:
      class_names: a name for each label.
      image_shape: (height, width, 3) of every image that is returned.
      ranges: (file, first record, number of records) of each part of the split.
      resized: whether images are resized to `image_shape`, because they do not all have it.
      skipped: "PATH (why)" of each image that was left out because it cannot be read.
      ignored: which files are no images, such as "3 files (.txt)"; "" if there are none.
      digest: of the user's own images: the SHA-256 of their paths, sizes in bytes and labels; "" of other data.
    """

    def __init__(
        self,
        records: Any,
        where: str,
        class_names: list[str],
        image_shape: tuple[int, int, int],
        ranges: list[tuple[str, int, int]],
        decode: Callable[..., Decoded],
        resized: bool = False,
        skipped: tuple[str, ...] = (),
        ignored: str = "",
        digest: str = "",
        advice: str = "",
    ):
        """Wraps `records`, a `tfds.data_source` or what acts like one; errors call the source `where`.

        `decode(example, shape=image_shape)` returns the pixels, the original (height, width) and the label.
        """
        self.ranges, self.resized, self.skipped = ranges, resized, skipped
        self.ignored, self.digest, self._advice = ignored, digest, advice
        self._records = records
        self._where = where
        self._decode = decode
        self.class_names = class_names
        self.image_shape = image_shape

    def __len__(self) -> int:
        return len(self._records)

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @property
    def nbytes(self) -> int:
        """Size in bytes of all images as uint8."""
        return len(self) * int(np.prod(self.image_shape))

    def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads images and labels; see `read`."""
        images, labels, _ = self.read(index)
        return images, labels

    def read(self, index: np.ndarray, parallel: bool = True) -> Examples:
        """Reads the examples at `index`, integers [n] in [0, len), in that order; an index may occur several times.

        With `parallel`, several threads decode images that are resized.

        Returns:
          New arrays: images uint8 [n, height, width, 3], labels int32 [n] and, if images are resized, their heights and
          widths before that, int32 [n, 2]; else None.

        Raises:
          IndexError: if an index is out of range.
          DataError: if a record cannot be read or its image has another shape.
          ImageError: if the file of an image cannot be read any more.
        """
        index = np.asarray(index)
        if index.ndim != 1 or index.dtype.kind not in "iu":
            raise IndexError(f"indices must be integers [n], got {index.dtype} {list(index.shape)}")
        if index.size and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"index out of range for the {len(self)} examples of {self._where}")
        images = np.empty((len(index), *self.image_shape), np.uint8)
        labels, sizes = np.empty(len(index), np.int32), np.empty((len(index), 2), np.int32)
        # Pillow works outside Python's lock; threads gain nothing for images of a few kilobytes.
        apply = _threads().map if self.resized and parallel else map
        decode = functools.partial(self._decode, shape=self.image_shape)
        for first in range(0, len(index), _BATCH):
            keys = index[first : first + _BATCH].tolist()
            try:
                for row, found in enumerate(apply(decode, self._records.__getitems__(keys)), first):
                    images[row], sizes[row], labels[row] = found
            except (ImportError, UserError):
                raise
            except Exception as error:  # the type depends on the place of the damage
                raise DataError(f"{self._where} cannot be read ({reason(error)}){self._advice}") from error
        if labels.size and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise DataError(
                f"{self._where} has labels from {labels.min()} to {labels.max()}, expected 0 to {self.num_classes - 1}: the "
                "split is not labelled, or damaged"
            )
        return Examples(images, labels, sizes if self.resized else None)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    from vit_jax.images import THREADS

    return ThreadPoolExecutor(THREADS, "decode")


def shared_examples(a: Source, b: Source) -> int:
    """Returns the number of examples that two splits of the same prepared data have in common."""
    return sum(
        max(0, min(start + count, begin + many) - max(start, begin))
        for file, start, count in a.ranges
        for other, begin, many in b.ranges
        if file == other
    )


def stored_shape(sizes: np.ndarray | None, image_size: int) -> tuple[int, int, int]:
    """The shape in which all images of a data set are held, for a model with images of `image_size` pixels.

    Images of one size are held as they are, if they have no more pixels than a square of twice the model's size; others are
    held as such squares, or as squares of the longest side of all images if that is shorter.

    Args:
      sizes: heights and widths of all images, integers [n, 2]; None: not known.
      image_size: of the model.
    """
    side = 2 * image_size
    if sizes is not None:
        height, width = map(int, sizes[0])
        if height * width <= side**2 and (sizes == sizes[0]).all():
            return height, width, 3
        side = min(int(sizes.max()), side)
    return side, side, 3


def no_split(task: Task, split: str, names: Iterable[str]) -> DataError:
    """The error for a split that does not exist."""
    return DataError(
        f"{task.name} has no split {split!r}: expected one of {', '.join(names)}, a slice of one such as 'train[:98%]' within "
        "its bounds, or a sum of slices such as 'train+test'; data.train_split and data.test_split name them"
    )


def empty_split(task: Task, split: str) -> DataError:
    """The error for a split without examples."""
    return DataError(f"split {split!r} of {task.name} is empty: expected a slice with at least one example")


def resolve(task: Task, split: str, counts: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """The parts of a split in TFDS's language, not empty: (name of the split, first example, end).

    Args:
      task: named by errors.
      split: such as "train[:90%]+test".
      counts: examples of each split that there is.

    Raises:
      DataError: if the split does not exist or is empty.
    """
    import tensorflow_datasets as tfds

    known = {name: types.SimpleNamespace(num_examples=count) for name, count in counts.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(known)
    except Exception as error:  # ValueError or AssertionError
        raise no_split(task, split, counts) from error
    chosen = [(part.splitname, *slice(part.from_, part.to).indices(counts[part.splitname])[:2]) for part in parts]
    chosen = [(name, start, stop) for name, start, stop in chosen if start < stop]
    if not chosen:
        raise empty_split(task, split)
    return chosen
