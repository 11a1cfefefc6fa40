"""Reading a split as arrays, addressed by index: of prepared TFDS data, or of the user's own images."""

import functools
import io
import os
import types
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.data import folders
from vit_jax.data.tasks import NotPrepared, Task, data_root, find_prepared, prepare_command
from vit_jax.errors import DataError, ImageError, reason

__all__ = ["NotPrepared", "Source", "open_split"]

_BATCH = 1024  # records that are read at once; bounds the memory needed besides the result


class Source:
    """The images and labels of a split, addressed by index in the order in which they are stored.

    Attributes:
      class_names: a name for each label.
      image_shape: (height, width, 3) of every image that `take` returns.
      ranges: (file, first record, number of records) of each part of the split.
      sizes: (height, width) in pixels of each image before it was resized to `image_shape`, int32 [len, 2]; None if no image
        is resized.
      skipped: "PATH (why)" of each image that was left out because it cannot be read.
    """

    def __init__(
        self,
        records: Any,
        where: str,
        class_names: list[str],
        image_shape: tuple[int, int, int],
        ranges: list[tuple[str, int, int]],
        decode: Callable[..., np.ndarray] | None = None,
        sizes: np.ndarray | None = None,
        skipped: tuple[str, ...] = (),
    ):
        """Wraps `records`, whose "image" the function `decode` turns into pixels; errors call the source `where`.

        Without `decode`, `records` is a `tfds.data_source` that leaves "image" encoded.
        """
        self.ranges, self.sizes, self.skipped = ranges, sizes, skipped
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
        """Reads the examples at `index`, integers [n] in [0, len), in that order; an index may occur several times.

          Returns:
            (images uint8 [n, height, width, 3], labels int32 [n]), both new arrays.

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
        labels = np.empty(len(index), np.int32)
        for first in range(0, len(index), _BATCH):
            keys = index[first : first + _BATCH].tolist()
            try:
                examples = self._records.__getitems__(keys)
                labels[first : first + _BATCH] = [example["label"] for example in examples]
                for row, pixels in enumerate(self._pixels([example["image"] for example in examples]), first):
                    images[row] = pixels
            except (ImportError, ImageError):
                raise
            except Exception as error:  # the type depends on the place of the damage
                raise DataError(
                    f"{self._where} cannot be read ({reason(error)}): delete the folder and prepare it again"
                ) from error
        return images, labels

    def _pixels(self, encoded: list[Any]) -> Iterable[np.ndarray]:
        """The decoded images in order; files are decoded by several threads, because Pillow works outside Python's lock."""
        if self._decode is None:
            return map(functools.partial(_decode_png, shape=self.image_shape), encoded)
        return _threads().map(functools.partial(self._decode, shape=self.image_shape), encoded)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 1)), "decode")


def shared_examples(a: Source, b: Source) -> int:
    """Returns the number of examples that two splits of the same prepared data have in common."""
    return sum(
        max(0, min(start + count, begin + many) - max(start, begin))
        for file, start, count in a.ranges
        for other, begin, many in b.ranges
        if file == other
    )


def open_split(
    task: Task, split: str, data_dir: str | os.PathLike = "", image_size: int = 224, on_error: str = "raise"
) -> Source:
    """Opens a split of a task's prepared data or of the user's own images; never touches the network.

    Args:
      task: as `vit_jax.data.tasks.task` returns it.
      split: in TFDS's language, such as "test", "train[:98%]", "test[:64]" or "train+test".
      data_dir: the directory of TFDS; "" for `vit_jax.data.tasks.data_root`. Not used for own images.
      image_size: of the model's images in pixels; own images of other sizes are held at up to twice this size.
      on_error: what to do with own images that cannot be read: "raise", or "skip" to leave them out.

    Raises:
      NotPrepared: if the data are not there; the message names the command that prepares them.
      DataError: if the split does not exist or is empty, or if the data are damaged or other data than the task says.
    """
    if task.kind != "tfds":
        return _open_own(task, split, image_size, on_error)
    folder = find_prepared(task, data_dir)
    if folder is None:
        raise NotPrepared(
            f"{task.name} is not prepared in {data_root(task, data_dir)}: run `{prepare_command(task, data_dir)}` "
            "(offline, give it the downloaded archive with --archive FILE)"
        )
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # the type depends on the damage
        raise DataError(f"{folder} is damaged ({reason(error)}): delete it and prepare it again") from error
    info = builder.info
    if info.file_format.value != "array_record":
        raise DataError(
            f"{folder} holds {info.file_format.value} files, expected array_record, which can be read without TensorFlow: "
            f"run `{prepare_command(task, data_dir='DIRECTORY')}` and set data_dir to that directory"
        )
    try:
        examples = info.splits[split].num_examples
    except Exception as error:  # KeyError, ValueError or AssertionError
        raise _no_split(task, split, info.splits) from error
    if examples <= 0:
        raise DataError(f"split {split!r} of {task.name} is empty: expected a slice with at least one example")
    label = info.features["label"]
    shape = info.features["image"].shape
    if (label.num_classes, shape) != (task.num_classes, task.image_shape):
        raise DataError(
            f"{folder} holds images {shape} of {label.num_classes} classes, expected {task.image_shape} of {task.num_classes}"
        )
    try:
        # `take` decodes: TFDS's decoder logs a warning if OpenCV is not installed, which is not needed.
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:
        raise DataError(f"{folder} cannot be read ({reason(error)}): delete it and prepare it again") from error
    ranges = [
        (part.filename, part.skip, part.take if part.take >= 0 else part.examples_in_shard - part.skip)
        for part in info.splits[split].file_instructions
    ]
    names = list(label.names or map(str, range(label.num_classes)))
    return Source(records, f"{folder} ({split})", names, shape, ranges)


def _no_split(task: Task, split: str, names: Iterable[str]) -> DataError:
    return DataError(
        f"{task.name} has no split {split!r}: expected one of {', '.join(names)}, a slice of one such as 'train[:98%]' within "
        "its bounds, or a sum of slices such as 'train+test'"
    )


def _open_own(task: Task, split: str, image_size: int, on_error: str) -> Source:
    """Opens a split of a folder or a CSV file."""
    import tensorflow_datasets as tfds

    index = folders.index(task, on_error)
    sizes = {name: types.SimpleNamespace(num_examples=len(part.labels)) for name, part in index.splits.items()}
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(sizes)
    except Exception as error:  # ValueError or AssertionError
        raise _no_split(task, split, index.splits) from error
    chosen = [
        (part.splitname, *slice(part.from_, part.to).indices(len(index.splits[part.splitname].labels))[:2]) for part in parts
    ]
    joined = folders.join([index.splits[name].rows(start, stop) for name, start, stop in chosen if start < stop])
    if joined is None:
        raise DataError(f"split {split!r} of {task.name} is empty: expected a slice with at least one example")
    shape = folders.stored_shape(index, image_size)
    resized = None if (joined.sizes == shape[:2]).all() else joined.sizes
    ranges = [(name, start, stop - start) for name, start, stop in chosen]
    return Source(joined, f"{task.name} ({split})", index.class_names, shape, ranges, folders.decode, resized, index.skipped)


def _decode_png(file: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns the image, uint8 [height, width, 3], of a PNG or JPEG file."""
    from PIL import Image

    with Image.open(io.BytesIO(file)) as image:
        pixels = np.asarray(image.convert("RGB") if image.mode != "RGB" else image)
    if pixels.shape != shape:
        raise ValueError(f"an image has the shape {pixels.shape}, expected {shape}")
    return pixels
