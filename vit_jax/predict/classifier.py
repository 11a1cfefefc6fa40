"""A model that is loaded once and then says what is in images."""

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
from vit_jax.models.intermediates import attention_maps, attention_rollout
from vit_jax.models.variants import patches
from vit_jax.predict.images import Source, read
from vit_jax.predict.names import class_names, is_googles
from vit_jax.runtime import compiler_options
from vit_jax.transforms.preprocess import scale

_log = logging.getLogger("vit_jax")
_THREADS = max(2, min(16, os.cpu_count() or 1))  # that decode

Result = list[tuple[str, float]]  # (name, probability) of the most probable classes, best first


class Classifier:
    """Names what a fine-tuned or published model sees: `classify = Classifier("runs/demo"); classify("lion.jpg")`.

    `source` is a run's folder, a file (npz, safetensors), an exported folder or a published name. An image is a path, an
    http(s) address, a file's bytes, a PIL image or a uint8 array [H, W, 3], also grey [H, W] or with transparency [H, W, 4];
    images are one of these, a batch [B, H, W, 3] or a list of all of these, of any sizes. What becomes of colours, turned
    photographs and very large ones: `predict.images`.

    The numbers are those of a run's evaluation, up to rounding: images resized straight to the size that the weights are
    for, scaled as the JSON beside them says, and as Google's where it does not, which the log says of files that may not be.

    Attributes:
      model, params: as `load` gives them.
      image_size: (height, width) of what the model sees, in pixels.
      class_names: a name for each class; see `predict.names.class_names`.
      batch_size: the most images that are computed at once.

    CheckpointError for weights that cannot be read or have no head; ImageError for an image that cannot be used.
    """

    def __init__(self, source: str | os.PathLike, batch_size: int = 32):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number from 1 on, got {batch_size!r}")
        if not isinstance(source, str | os.PathLike):
            raise CheckpointError(f"weights are a path or a published name, got {source!r}")
        with as_checkpoint_error(source):
            path = find(source, complete=True)
        model, tree = model_of_file(path)
        if not model.num_classes:
            raise CheckpointError(f"{path} has no head and so names no classes: vit_jax.features gives what a head would see")
        meta = meta_of(path)
        self.image_size = image_size(meta, model.stride, patches(model, tree))
        self.class_names = class_names(path, meta, model.num_classes)
        self.batch_size = batch_size
        channels = statistics(meta)
        if not meta.get("normalization") and not is_googles(path, meta, model.num_classes):
            _log.warning("nothing beside %s says how images are scaled: Google's [-1, 1] is assumed", printable(path))
        self.model, self.params = load(path)

        def probabilities(params: Any, images: jax.Array) -> jax.Array:
            logits: Any = self.model.apply({"params": params}, scale(images, channels))
            return jax.nn.softmax(logits)

        def attention(params: Any, images: jax.Array) -> jax.Array:
            def mean_over_heads(image: jax.Array) -> jax.Array:  # of one image at a time, for the maps are large
                return attention_maps(self.model, params, image[None])[:, 0].mean(axis=1, keepdims=True)

            return jax.lax.map(mean_over_heads, scale(images, channels))

        options = compiler_options()
        self._probabilities = jax.jit(probabilities, compiler_options=options)
        self._attention = jax.jit(attention, compiler_options=options)

    def __call__(self, images: Any, top: int = 5) -> list[Result]:
        """For each image, in a list also for one, the `top` classes as (name, probability), best first."""
        return [_or_raise(found) for _, found in self.stream(_named(images), top)]

    def probabilities(self, images: Any) -> np.ndarray:
        """The probabilities of all classes, float32 [B, classes], which sum to 1."""
        found = [_or_raise(row) for _, row in self._stream(_named(images), lambda x: self._probabilities(self.params, x))]
        result = np.array(found, np.float32).reshape(-1, self.model.num_classes)
        _check_finite(result)
        return result

    def attention(self, images: Any) -> np.ndarray:
        """How much of each patch reaches the class token, float32 [B, height, width] in patches, largest value 1.

        See `reports.attention.rollout`. CheckpointError for a model without class token.
        """
        self.check_attention()
        grid = (self.image_size[0] // self.model.stride, self.image_size[1] // self.model.stride)
        found = [_or_raise(maps) for _, maps in self._stream(_named(images), lambda x: self._attention(self.params, x))]
        masks = [attention_rollout(maps[:, None], grid)[0] for maps in found]
        return np.array(masks, np.float32).reshape(-1, *grid)

    def check_attention(self) -> None:
        """CheckpointError unless `attention` can be asked for."""
        if self.model.classifier != "token":
            raise CheckpointError("this model has no class token, whose attention is what attention rollout shows")

    def stream(self, images: Iterable[tuple[str, Source]], top: int = 5) -> Iterator[tuple[str, Result | ImageError]]:
        """For images (what errors call it, image), in their order, the name and the `top` classes or what is amiss.

        Meant for more images than fit in memory: a few batches of them are on their way at a time, however many there are.
        Threads read the next ones while the device works.
        """
        if not isinstance(top, int | np.integer) or top < 1:
            raise ValueError(f"top must be a whole number from 1 on, got {top!r}")

        def best(images: np.ndarray) -> Any:
            return jax.lax.top_k(self._probabilities(self.params, images), min(top, self.model.num_classes))

        for name, found in self._stream(images, best):
            if not isinstance(found, ImageError):
                _check_finite(found[0])
                found = [(self.class_names[at], float(value)) for value, at in zip(*found, strict=True)]
            yield name, found

    def _stream(self, images: Iterable[tuple[str, Source]], compute: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
        """(name, its part of what `compute` makes of float32 [B, height, width, 3], or ImageError) for each image."""
        pending: deque[tuple[list[tuple[str, Any]], Any]] = deque()
        batch: list[tuple[str, Any]] = []

        def dispatch() -> None:
            errors = [(name, found if isinstance(found, ImageError) else None) for name, found in batch]
            images = [found for _, found in batch if not isinstance(found, ImageError)]
            # Padded to a power of two, so that a program is compiled for few sizes.
            padding = min(self.batch_size, 1 << (len(images) - 1).bit_length()) - len(images) if images else 0
            pending.append((errors, compute(np.stack(images + padding * images[:1])) if images else None))
            batch.clear()

        def finished(keep: int) -> Iterator[tuple[str, Any]]:
            while len(pending) > keep:
                errors, result = pending.popleft()
                result, row = jax.device_get(result), 0
                for name, error in errors:
                    yield name, error or jax.tree.map(lambda leaf, row=row: leaf[row], result)
                    row += error is None

        for item in self._read(images):
            batch.append(item)
            if len(batch) == self.batch_size:
                dispatch()
                yield from finished(keep=1)  # the device has its next batch before this one is looked at
        if batch:
            dispatch()
        yield from finished(keep=0)

    def _read(self, images: Iterable[tuple[str, Source]]) -> Iterator[tuple[str, np.ndarray | ImageError]]:
        """What the model sees of each image, in order, read ahead by threads."""

        def reading(name: str, source: Source) -> np.ndarray | ImageError:
            try:
                return read(source, self.image_size, name)
            except ImageError as error:
                return error

        patient = True
        pool, ahead = ThreadPoolExecutor(_THREADS, "images"), deque[tuple[str, Future]]()
        try:
            for name, source in images:
                ahead.append((name, pool.submit(reading, name, source)))
                if len(ahead) == max(2 * self.batch_size, _THREADS):
                    name, future = ahead.popleft()
                    yield name, future.result()
            for name, future in ahead:
                yield name, future.result()
        except KeyboardInterrupt:
            patient = False  # one of them may wait for a server that says nothing
            raise
        finally:
            pool.shutdown(wait=patient, cancel_futures=True)


def _named(images: Any) -> Iterator[tuple[str, Source]]:
    """Each of `images` with what errors call it."""
    for number, image in enumerate(_each(images)):
        yield os.fspath(image) if isinstance(image, str | os.PathLike) else f"images[{number}]", image


def _each(images: Any) -> Iterator[Source]:
    if isinstance(images, list | tuple):
        for some in images:
            yield from _each(some)
    elif isinstance(images, str | os.PathLike | bytes | Image.Image) or callable(images):
        yield images
    elif hasattr(images, "__array__"):  # NumPy's, JAX's, PyTorch's
        array = np.asarray(images)
        yield from array if array.ndim == 4 else [array]
    else:
        raise ImageError(f"an image is a path, a PIL image or a uint8 array, got {type(images).__name__}")


def _check_finite(probabilities: np.ndarray) -> None:
    if not np.isfinite(probabilities).all():
        raise CheckpointError("the model gives probabilities that are not finite numbers: its weights or its scaling are wrong")


def _or_raise(found: Any) -> Any:
    if isinstance(found, ImageError):
        raise found
    return found
