"""A model that is loaded once and then classifies images."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from PIL import Image

from vit_jax.checkpoints.download import find
from vit_jax.checkpoints.load import as_checkpoint_error, load, meta_of, model_of_file
from vit_jax.errors import CheckpointError, ImageError, printable
from vit_jax.formats.meta import image_size, statistics
from vit_jax.images import THREADS, Source, read_image
from vit_jax.models.intermediates import attention_maps, attention_rollout
from vit_jax.models.variants import patches
from vit_jax.predict.names import class_names, is_published
from vit_jax.runtime import compiler_options
from vit_jax.transforms.preprocess import scale

_log = logging.getLogger("vit_jax")

Result = list[tuple[str, float]]  # (name, probability) of the most probable classes, best first


class Classifier:
    """Classifies images with a fine-tuned or published model: `classify = Classifier("runs/demo"); classify("lion.jpg")`.

    The probabilities are those of a run's evaluation, up to rounding: images are cropped as the JSON next to the weights says,
    resized to the model's size (without antialiasing if they are not cropped), and scaled as it says. Without such a JSON,
    images are not cropped and Google's scaling is assumed; a warning is logged unless the weights are published ones.
    `vit_jax.images` describes colours, orientation and very large images.

    An image is a path, an http(s) address, the bytes of a file, a PIL image, or a uint8 array [H, W, 3], [H, W] (grey) or
    [H, W, 4] (with transparency). The methods take one image, a batch [B, H, W, 3], or a list of these, of any sizes.

    Args:
      source: a run's folder, a file (npz, safetensors), an exported folder or a published name.
      batch_size: the largest number of images that are computed at once.

    Attributes:
      model, params: as `load` returns them.
      image_size: (height, width) in pixels that the model sees.
      class_names: a name for each class; see `predict.names.class_names`.
      batch_size: as given.

    Raises:
      CheckpointError: if the weights cannot be read or have no head.
      ValueError: if `batch_size` is not a whole number of at least 1.
    """

    def __init__(self, source: str | os.PathLike, batch_size: int = 32):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if not isinstance(source, str | os.PathLike):
            raise CheckpointError(f"weights must be a path or a published name, got {source!r}")
        with as_checkpoint_error(source):
            path = find(source, complete=True)
        model, tree = model_of_file(path)
        if not model.num_classes:
            raise CheckpointError(f"{path} has no head, so it cannot classify; use vit_jax.features to get its features")
        meta = meta_of(path)
        self.image_size = image_size(meta, model.stride, patches(model, tree))
        self.class_names = class_names(path, meta, model.num_classes)
        self.batch_size = batch_size
        channels = statistics(meta)
        if not meta.get("normalization") and not is_published(path, meta, model.num_classes):
            _log.warning("no JSON next to %s says how images are scaled: Google's [-1, 1] is assumed", printable(path))
        self.model, self.params = load(path)

        def probabilities(params: Any, images: jax.Array) -> jax.Array:
            logits: Any = self.model.apply({"params": params}, scale(images, channels))
            return jax.nn.softmax(logits)

        def attention(params: Any, images: jax.Array) -> jax.Array:
            def mean_over_heads(image: jax.Array) -> jax.Array:  # one image at a time, because the maps are large
                return attention_maps(self.model, params, image[None])[:, 0].mean(axis=1, keepdims=True)

            return jax.lax.map(mean_over_heads, scale(images, channels))

        options = compiler_options()
        self._probabilities = jax.jit(probabilities, compiler_options=options)
        self._attention = jax.jit(attention, compiler_options=options)

    def __call__(self, images: Any, top: int = 5) -> list[Result]:
        """Classifies images.

        Args:
          images: one or several images; see the class.
          top: number of classes to return for each image.

        Returns:
          A list with one entry for each image, also for a single one: the `top` classes as (name, probability), best first.

        Raises:
          ImageError: if an image cannot be used.
          CheckpointError: if the probabilities are not finite.
        """
        return [_result_or_raise(found) for _, found in self.stream(_with_names(images), top)]

    def probabilities(self, images: Any) -> np.ndarray:
        """Returns the probabilities of all classes, float32 [B, classes], which sum to 1. Raises as `__call__` does."""
        rows = self._compute(_with_names(images), lambda batch: self._probabilities(self.params, batch))
        result = np.array([_result_or_raise(row) for _, row in rows], np.float32).reshape(-1, self.model.num_classes)
        _check_finite(result)
        return result

    def attention(self, images: Any) -> np.ndarray:
        """Returns the attention rollout, float32 [B, rows, columns] in patches, largest value 1; see `attention_rollout`.

        Raises:
          ImageError: if an image cannot be used.
          CheckpointError: if the model has no class token.
        """
        self.check_attention()
        grid = (self.image_size[0] // self.model.stride, self.image_size[1] // self.model.stride)
        maps = self._compute(_with_names(images), lambda batch: self._attention(self.params, batch))
        masks = [attention_rollout(_result_or_raise(layers)[:, None], grid)[0] for _, layers in maps]
        return np.array(masks, np.float32).reshape(-1, *grid)

    def check_attention(self) -> None:
        """Raises CheckpointError if the model has no class token, which `attention` needs."""
        if self.model.classifier != "token":
            raise CheckpointError("the model has no class token, so there is no attention rollout")

    def stream(self, images: Iterable[tuple[str, Source]], top: int = 5) -> Iterator[tuple[str, Result | ImageError]]:
        """Classifies more images than fit in memory; only a few batches are in memory at a time.

        Threads read the next images while the device computes.

        Args:
          images: pairs of a name, which errors use, and an image.
          top: number of classes to return for each image.

        Yields:
          For each image, in order: its name, and the `top` classes as in `__call__` or the ImageError.

        Raises:
          CheckpointError: if the probabilities are not finite.
        """
        if not isinstance(top, int | np.integer) or top < 1:
            raise ValueError(f"top must be a whole number of at least 1, got {top!r}")

        def best(batch: np.ndarray) -> Any:
            return jax.lax.top_k(self._probabilities(self.params, batch), min(top, self.model.num_classes))

        for name, found in self._compute(images, best):
            if not isinstance(found, ImageError):
                _check_finite(found[0])
                found = [(self.class_names[index], float(value)) for value, index in zip(*found, strict=True)]
            yield name, found

    def _compute(self, images: Iterable[tuple[str, Source]], function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
        """Applies `function` to batches float32 [B, height, width, 3]; yields each image's name and result or ImageError."""
        pending: deque[tuple[list[tuple[str, Any]], Any]] = deque()
        batch: list[tuple[str, Any]] = []

        def dispatch() -> None:
            errors = [(name, found if isinstance(found, ImageError) else None) for name, found in batch]
            images = [found for _, found in batch if not isinstance(found, ImageError)]
            # Padded to a power of two, so that programs are compiled for few sizes.
            padding = min(self.batch_size, 1 << (len(images) - 1).bit_length()) - len(images) if images else 0
            pending.append((errors, function(np.stack(images + padding * images[:1])) if images else None))
            batch.clear()

        def finished(keep: int) -> Iterator[tuple[str, Any]]:
            while len(pending) > keep:
                errors, result = pending.popleft()
                result, row = jax.device_get(result), 0
                for name, error in errors:
                    yield name, error or jax.tree.map(lambda leaf, row=row: leaf[row], result)
                    row += error is None

        for item in self._read_ahead(images):
            batch.append(item)
            if len(batch) == self.batch_size:
                dispatch()
                yield from finished(keep=1)  # the device has its next batch before the host waits for this one
        if batch:
            dispatch()
        yield from finished(keep=0)

    def _read_ahead(self, images: Iterable[tuple[str, Source]]) -> Iterator[tuple[str, np.ndarray | ImageError]]:
        """Yields the name and the pixels of each image, in order; threads read the next ones."""

        def read(name: str, source: Source) -> np.ndarray | ImageError:
            try:
                return read_image(source, self.image_size, name, self.model.eval_crop)
            except ImageError as error:
                return error

        wait = True
        pool, ahead = ThreadPoolExecutor(THREADS, "images"), deque[tuple[str, Future]]()
        try:
            for name, source in images:
                ahead.append((name, pool.submit(read, name, source)))
                if len(ahead) == max(2 * self.batch_size, THREADS):
                    name, future = ahead.popleft()
                    yield name, future.result()
            for name, future in ahead:
                yield name, future.result()
        except KeyboardInterrupt:
            wait = False  # a thread may wait for a server that does not answer
            raise
        finally:
            pool.shutdown(wait=wait, cancel_futures=True)


def _with_names(images: Any) -> Iterator[tuple[str, Source]]:
    """Yields each of `images` with the name that errors use."""
    for number, image in enumerate(_flatten(images)):
        yield os.fspath(image) if isinstance(image, str | os.PathLike) else f"images[{number}]", image


def _flatten(images: Any) -> Iterator[Source]:
    """Yields the single images of nested lists and batches."""
    if isinstance(images, list | tuple):
        for item in images:
            yield from _flatten(item)
    elif isinstance(images, str | os.PathLike | bytes | Image.Image) or callable(images):
        yield images
    elif hasattr(images, "__array__"):  # of NumPy, JAX or PyTorch
        array = np.asarray(images)
        yield from array if array.ndim == 4 else [array]
    else:
        raise ImageError(f"an image must be a path, a PIL image or a uint8 array, got {type(images).__name__}")


def _check_finite(probabilities: np.ndarray) -> None:
    if not np.isfinite(probabilities).all():
        raise CheckpointError("the model's probabilities are not finite: its weights or the scaling of images are wrong")


def _result_or_raise(found: Any) -> Any:
    if isinstance(found, ImageError):
        raise found
    return found
