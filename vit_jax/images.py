"""Images from any source as a model sees them: read, oriented, in RGB, of the model's size. On the host, in threads.

An image is resized to the model's size without antialiasing, or its central part is with antialiasing, as in the evaluation
of the model's run. If a side is four times as long as the model's or more, the first would pick a few of its pixels and show
noise. So blocks of pixels are averaged first, until the side is two to three times as long.
"""

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vit_jax.errors import ImageError, reason, root_cause
from vit_jax.fetch import Refused
from vit_jax.fetch import read as download
from vit_jax.resampling import center_crop, resize

# A path or an http(s) address, the bytes of a file, a function that returns them, an image, or uint8 pixels.
Source = str | os.PathLike | bytes | Callable[[], bytes] | Image.Image | np.ndarray

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # not EPS: Pillow runs a program for it
MAX_BYTES = 100 * 2**20  # that are read from an address or standard input
THREADS = max(2, min(16, os.cpu_count() or 1))  # that decode images; Pillow works outside Python's lock
_DOWNLOAD_SECONDS = 300.0
_LARGE = 2**24  # pixels; a single thread decodes all images with more
# A lock does not suffice: glibc's malloc keeps what a thread freed for that thread, so eight threads that take turns
# still hold eight decoded images.
_large_images = ThreadPoolExecutor(1, thread_name_prefix="large-images")
_pil_lock = threading.Lock()  # the same PIL image may be given twice, and two threads must not load it at once


def is_address(source: Any) -> bool:
    """Whether a source is an http(s) address."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def image_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the files below a folder that have the suffix of an image, in the order of their names, without hidden ones.

    Links to folders are followed, each folder once.
    """
    return (path for path in _files(folder) if path.name.lower().endswith(SUFFIXES))


def other_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the files below a folder that have another suffix than an image's, likewise."""
    return (path for path in _files(folder) if not path.name.lower().endswith(SUFFIXES))


def _files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    seen = set[str]()
    for root, folders, files in os.walk(os.fspath(folder), followlinks=True):
        place = os.path.realpath(root)
        folders[:] = [] if place in seen else sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if not (name.startswith(".") or place in seen))
        seen.add(place)


def read_image(source: Source, size: tuple[int, int], name: str, crop: str = "none") -> np.ndarray:
    """Returns an image as a model of a size sees it.

    Args:
      source: the image.
      size: (height, width) of the model's images.
      name: what errors call the image.
      crop: "none", or "center"; see `config.Augment.eval_crop`.

    Returns:
      float32 [height, width, 3] in [0, 255].

    Raises:
      ImageError: if the image cannot be read.
    """
    if crop == "center":
        return center_crop(open_image(source, size, name, keep_aspect=True), size)
    return resize(np.asarray(open_image(source, size, name)), size)


def open_image(source: Source, size: tuple[int, int], name: str, keep_aspect: bool = False) -> Image.Image:
    """Returns an image in RGB, rotated as its EXIF data say; sides of four times `size` or more are reduced.

    Transparent pixels are laid on white. Grey, palette and CMYK images become RGB; of 16 bits the higher 8 are taken; of an
    animation the first image. Colour profiles are not applied.

    Args:
      source: the image.
      size: (height, width) of the model's images.
      name: what errors call the image.
      keep_aspect: whether both sides are reduced by the factor of the shorter one.

    Raises:
      ImageError: if the image cannot be read or has more than PIL.Image.MAX_IMAGE_PIXELS pixels (89 million by default).
    """
    try:
        if isinstance(source, Image.Image):
            with _pil_lock:
                source.load()
                source = _oriented(source)
            return _to_rgb(source, size, name, keep_aspect)
        if isinstance(source, np.ndarray):
            return _to_rgb(_from_array(source, name), size, name, keep_aspect)
        return _open_file(source, size, name, keep_aspect)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image in a supported format ({', '.join(_FORMATS)})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ImageError(f"{name} cannot be read ({reason(root_cause(error))})") from None


def fitted(source: Source, size: tuple[int, int], name: str) -> np.ndarray:
    """Returns an image as `open_image` does, resized with antialiasing to (height, width): uint8 [height, width, 3]."""
    image = open_image(source, size, name)
    if image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image)


def shown_size(source: str | os.PathLike[str] | bytes) -> tuple[int, int]:
    """Returns (height, width) in pixels of an image file as it is shown, turned as its EXIF data say; reads only its head."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
        width, height = image.size
        turned = False
        with contextlib.suppress(Exception):  # damaged data raise errors of many types
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def checked_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns the size as `shown_size` does, after decoding the file completely, to find damage.

    Raises:
      ImageError: as `open_image`.
    """
    open_image(path, (32, 32), os.fspath(path))  # at a fraction of its size, which needs less memory
    return shown_size(path)


def fetch(address: str) -> bytes:
    """Downloads an image from an http(s) address.

    Raises:
      ImageError: if the download fails, takes too long or is too large, and if the address is that of a page.
    """
    try:
        content, kind = download(address, MAX_BYTES, _DOWNLOAD_SECONDS)
    except Refused as error:
        raise ImageError(f"{address} cannot be downloaded ({error})") from None
    if kind in ("text/html", "application/xhtml+xml"):
        raise ImageError(f"{address} is a page ({kind}), not an image: give the address of the image on it")
    return content


def _open_file(source: Any, size: tuple[int, int], name: str, keep_aspect: bool) -> Image.Image:
    if is_address(source):
        source = fetch(source)
    elif callable(source):
        source = source()
    elif not isinstance(source, bytes) and Path(source).is_dir():
        first = next(image_files(source), None)
        raise ImageError(f"{name} is a folder {f'of images: give its files, such as {first}' if first else 'without images'}")
    elif not isinstance(source, bytes) and Path(source).exists() and not Path(source).is_file():
        raise ImageError(f"{name} is not a regular file")  # reading a pipe could wait for ever
    if source == b"" or (not isinstance(source, bytes) and Path(source).is_file() and not Path(source).stat().st_size):
        raise ImageError(f"{name} is empty")
    formats = _formats()
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    if _is_decoded_when_opened(source):
        return _large_images.submit(_decode, file, formats, size, name, keep_aspect).result()
    return _decode(file, formats, size, name, keep_aspect, move_large=True)


def _formats() -> list[str]:
    """The formats that are read; a Pillow may be built without some of them."""
    Image.init()
    return [kind for kind in _FORMATS if kind in Image.OPEN]


def _decode(file, formats: list[str], size: tuple[int, int], name: str, keep_aspect: bool, move_large=False) -> Image.Image:
    """Reads an image file as RGB; with `move_large`, the thread for large images decodes it if it is large."""
    with Image.open(file, formats=formats) as image:
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise _too_large(name)
        # A JPEG is decoded at a half, a quarter or an eighth, which is faster and needs less memory; never below 2 · size.
        image.draft(None, (2 * max(size), 2 * max(size)))
        if move_large and image.width * image.height > _LARGE:
            return _large_images.submit(_to_rgb, image, size, name, keep_aspect).result()
        return _to_rgb(image, size, name, keep_aspect)


def _is_decoded_when_opened(source: Any) -> bool:
    """Whether Pillow allocates all pixels of a file when it opens it, as it does for WebP and AVIF."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        with open(source, "rb") as file:
            head = file.read(12)
    return head[8:] == b"WEBP" or head[4:8] == b"ftyp"


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"{name} has pixels of type {array.dtype}, expected uint8, from 0 to 255")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ImageError(
            f"{name} has the shape {list(array.shape)}, expected [height, width] or [height, width, channels] with 1, 3 or 4 "
            "channels"
        )
    return Image.fromarray(array)


def _to_rgb(image: Image.Image, size: tuple[int, int], name: str, keep_aspect: bool) -> Image.Image:
    """Decodes an image and returns it oriented, reduced and in RGB."""
    image.load()
    image = _oriented(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image, name)
    transparent = image.has_transparency_data
    if image.mode != (mode := "RGBA" if transparent else "RGB"):
        image = image.convert(mode)
    factors = max(1, image.width // (2 * size[1])), max(1, image.height // (2 * size[0]))
    if keep_aspect:
        factors = (min(factors), min(factors))
    if factors != (1, 1):
        image = image.reduce(factors)
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def _oriented(image: Image.Image) -> Image.Image:
    """The image rotated and flipped as its EXIF data say; unchanged if they are damaged."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    except Exception:  # damaged data raise errors of many types
        pass
    return image


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """The higher bytes of a grey image of 16 bits, which Pillow may hold in 32."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 2**16:
        raise ImageError(f"{name} has 32 bits per pixel, in an unknown range: save it with 8 or 16 bits per channel")
    if 0 < pixels.max() < 2**8:  # an image of 8 bits or a dark one of 16, which would become black
        raise ImageError(
            f"{name} has more than 8 bits per pixel and no value above 255, so its range is unknown: save it with 8 bits"
        )
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _too_large(name: str) -> ImageError:
    limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels (PIL.Image.MAX_IMAGE_PIXELS)"
    return ImageError(f"{name} has more than {limit}: make it smaller, or raise the limit")
