"""Images from anywhere, as a model wants them: read, turned upright, in RGB, of its size. On the host, for threads.

An image is seen as evaluation sees it, resized straight to the model's size without antialiasing, until it is four times as
large or more: then sampling so few of its pixels would show noise and not the image, and whole blocks of pixels are averaged
first, so that two to three times the size are left.
"""

import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vit_jax.errors import ImageError
from vit_jax.fetch import Refused
from vit_jax.fetch import read as download

# A path or an http(s) address; a file's bytes, or what returns them; an image; uint8 pixels.
Source = str | os.PathLike | bytes | Callable[[], bytes] | Image.Image | np.ndarray

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # Pillow has EPS run another program
MOST_BYTES = 100 * 2**20  # that are taken from an address
_PATIENCE = 300.0  # seconds for the whole of an image
_LARGE = 2**24  # pixels from which on one thread decodes all images
# A lock does not suffice: glibc's malloc keeps what a thread freed for that thread, so eight threads that take turns
# still hold eight decoded images.
_large_images = ThreadPoolExecutor(1, thread_name_prefix="large-images")
_one_given = threading.Lock()  # the same image may be given twice, and Pillow's loading is no work for two threads


def is_address(source: Any) -> bool:
    """Whether a source is an http(s) address."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def within(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """The files below a folder whose names end as an image's do, in the order of their names; hidden ones are left out."""
    for root, folders, files in os.walk(os.fspath(folder)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(root, name)


def read(source: Source, size: tuple[int, int], name: str) -> np.ndarray:
    """What a model of a size, (height, width), sees of an image: float32 [height, width, 3] in [0, 255].

    ImageError, which calls it `name`, where it cannot be read.
    """
    return resize(np.asarray(open_image(source, size, name)), size)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`transforms.geometry.resize` of one image, uint8 [H, W, 3] → float32 [height, width, 3], equal to it but for rounding.

    On the host because images come in all sizes, and a device would compile a program for each of them.
    """
    (top, up), (bottom, down) = _taps(pixels.shape[0], size[0])
    rows = pixels[top] * up[:, None, None] + pixels[bottom] * down[:, None, None]
    (left, before), (right, after) = _taps(pixels.shape[1], size[1])
    return rows[:, left] * before[None, :, None] + rows[:, right] * after[None, :, None]


def _taps(length: int, out: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The two pixels, and their float32 weights, that each of `out` pixels is made from: geometry's, operation by operation."""
    # Rounded once, as compiled programs do, which multiply and add in one operation.
    position = ((np.arange(out) + 0.5) * np.float64(np.float32(length / out)) - 0.5).astype(np.float32)
    position = np.clip(position, 0, length - 1)
    first = np.floor(position)
    at = first.astype(np.int64)
    return (at, 1 - (position - first)), (np.minimum(at + 1, length - 1), 1 - (first + 1 - position))


def open_image(source: Source, size: tuple[int, int], name: str) -> Image.Image:
    """An image in RGB, turned as its EXIF says; sides of four times `size`, (height, width), or more come reduced.

    What is transparent lies on white; grey, palettes and CMYK become RGB; of 16 bits the higher 8 are taken; of an animation
    the first image. Colour profiles are not applied. ImageError, which calls it `name`, where it cannot be read, among
    them files of more than PIL.Image.MAX_IMAGE_PIXELS (89 million, unless somebody sets it).
    """
    try:
        if isinstance(source, Image.Image):
            with _one_given:
                source.load()
                source = _turned(source)
            return _upright(source, size, name)
        if isinstance(source, np.ndarray):
            return _upright(_of_array(source, name), size, name)
        return _of_file(source, size, name)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"there is no file {name}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is no image of a kind that is read here: {', '.join(_FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except Exception as error:  # Pillow raises whatever its decoders stumble over
        raise ImageError(f"{name} cannot be read ({_reason(error)})") from None


def fetch(address: str) -> bytes:
    """What an http(s) address answers with; ImageError where it is a page or too large, and where nothing comes."""
    try:
        content, kind = download(address, MOST_BYTES, _PATIENCE)
    except Refused as error:
        raise ImageError(f"{address} cannot be fetched ({error})") from None
    if kind in ("text/html", "application/xhtml+xml"):
        raise ImageError(f"{address} is a page ({kind}), not an image: give the address of the image on it")
    return content


def _of_file(source: Any, size: tuple[int, int], name: str) -> Image.Image:
    if is_address(source):
        source = fetch(source)
    elif callable(source):
        source = source()
    elif not isinstance(source, bytes) and Path(source).is_dir():
        first = next(within(source), None)
        raise ImageError(f"{name} is a folder {f'of images: name them, as {first}' if first else 'without images'}")
    elif not isinstance(source, bytes) and Path(source).exists() and not Path(source).is_file():
        raise ImageError(f"{name} is no regular file")  # a pipe could be waited at for ever
    if source == b"" or (not isinstance(source, bytes) and Path(source).is_file() and not Path(source).stat().st_size):
        raise ImageError(f"{name} is empty")
    Image.init()
    known = [kind for kind in _FORMATS if kind in Image.OPEN]  # AVIF came with Pillow 11.3
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    if _fills_memory_when_opened(source):
        return _large_images.submit(_decode, file, known, size, name).result()
    return _decode(file, known, size, name, share=True)


def _decode(file: Any, formats: list[str], size: tuple[int, int], name: str, share: bool = False) -> Image.Image:
    """An image file as RGB; with `share` the thread for large images decodes it if it is large."""
    with Image.open(file, formats=formats) as image:
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise _too_large(name)
        # A JPEG is decoded at a half, a quarter or an eighth, which is quicker and needs less memory; never below 2 · size.
        image.draft(None, (2 * max(size), 2 * max(size)))
        if share and image.width * image.height > _LARGE:
            return _large_images.submit(_upright, image, size, name).result()
        return _upright(image, size, name)


def _fills_memory_when_opened(source: Any) -> bool:
    """Whether Pillow has memory for all pixels of a file as soon as it opens it, as it does of WebP and AVIF."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        with open(source, "rb") as file:
            head = file.read(12)
    return head[8:] == b"WEBP" or head[4:8] == b"ftyp"


def _of_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageError(f"{name} has pixels of type {array.dtype}, expected uint8, from 0 to 255")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ImageError(
            f"{name} has the shape {list(array.shape)}, expected [height, width], or [height, width, channels] of 1, 3 or 4"
        )
    return Image.fromarray(array)


def _upright(image: Image.Image, size: tuple[int, int], name: str) -> Image.Image:
    image.load()
    image = _turned(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _of_16_bits(image, name)
    transparent = image.has_transparency_data
    if image.mode != (mode := "RGBA" if transparent else "RGB"):
        image = image.convert(mode)
    factors = max(1, image.width // (2 * size[1])), max(1, image.height // (2 * size[0]))
    if factors != (1, 1):
        image = image.reduce(factors)
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def _turned(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF does not say how the image lies
        pass
    return image


def _of_16_bits(image: Image.Image, name: str) -> Image.Image:
    """The higher bytes of a grey image of 16 bits, which Pillow may hold in 32."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 2**16:
        raise ImageError(f"{name} has pixels of 32 bits, whose range nothing says: save it with 8 or 16 bits a channel")
    if 0 < pixels.max() < 2**8:  # an image of 8 bits or a dark one of 16, which would come out black
        raise ImageError(
            f"{name} has more than 8 bits a pixel and no value above 255, so its range is unknown: save it with 8 bits"
        )
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _too_large(name: str) -> ImageError:
    most = f"{Image.MAX_IMAGE_PIXELS:,} pixels that are read (PIL.Image.MAX_IMAGE_PIXELS)"
    return ImageError(f"{name} has more than the {most}: scale it down first")


def _reason(error: BaseException) -> str:
    """The innermost cause of an exception, in one line."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
