"""The command line of prediction: `python -m vit_jax.predict --help`."""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import cli
from vit_jax.errors import ImageError, printable

if TYPE_CHECKING:  # slow imports are in functions that `cli.call` calls, because it handles Ctrl-C
    from vit_jax.images import Source
    from vit_jax.predict.classifier import Classifier, Result

_MAX_DRAWN = 64  # images whose attention fits in one figure
_DRAWN_SIZE = 398  # pixels of the longer side of a drawn image

_EPILOG = """\
Images are resized to the model's size without antialiasing, as in a run's evaluation; if they are four times as large or more,
blocks of pixels are averaged first. EXIF orientation is applied, and transparent pixels become white. An image that cannot be
used is an error on standard error; the others are still classified, and the exit status is 1."""


def main(argv: list[str] | None = None, program: str = "python -m vit_jax.predict") -> int:
    """Classifies images; returns the exit status: 0, or 1 if something could not be used.

    Raises:
      SystemExit: with status 2, if the command line is wrong.
    """
    return cli.call(lambda: _run(argv, program), advice="lower --batch_size")


def _run(argv: list[str] | None, program: str) -> int:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Classify images with a fine-tuned or published model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="a file, a folder (all images below it), an http(s) address, or - for standard input",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN|FILE|NAME", help="a run's folder, npz, safetensors, or a published name"
    )
    parser.add_argument("--top", type=_positive, default=5, metavar="N", help="classes to print for each image; default 5")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line for each image")
    parser.add_argument(
        "--attention",
        type=_png,
        metavar="OUT.png",
        help=f"write a figure with the attention rollout laid over the images, at most {_MAX_DRAWN}",
    )
    parser.add_argument(
        "--batch_size", type=_positive, default=32, metavar="N", help="images that are computed at once; default 32"
    )
    args = parser.parse_args(argv)
    if not all([args.checkpoint, *args.images]):
        parser.error("--checkpoint and images must not be empty")
    images = [item for argument in args.images for item in _named_sources(argument)]
    if args.attention and len(images) > _MAX_DRAWN:
        parser.error(f"--attention draws at most {_MAX_DRAWN} images, got {len(images):,}")
    if sys.stdout is None:
        return cli.fail("standard output is closed")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # a bad image is reported in one line
    return _predict(args, images)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _png(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return Path(text)


def _named_sources(argument: str) -> list[tuple[str, Source]]:
    """The name and the source of each image that an argument of the command line means."""
    from vit_jax.images import fetch, image_files, is_address

    if argument == "-":
        return [("standard input", _read_stdin)]
    if is_address(argument):
        return [(argument, functools.partial(fetch, argument))]
    # A folder without images is kept as it is, and reading it is an error.
    return [(str(path), path) for path in image_files(argument)] or [(argument, argument)]


def _read_stdin() -> bytes:
    from vit_jax.images import MAX_BYTES

    if sys.stdin is None:
        raise ImageError("standard input is closed")
    return sys.stdin.buffer.read(MAX_BYTES)


def _predict(args: argparse.Namespace, images: list[tuple[str, Source]]) -> int:
    from tqdm import tqdm

    from vit_jax.predict.classifier import Classifier
    from vit_jax.runtime import prepare

    prepare()
    classify = Classifier(args.checkpoint, args.batch_size)
    if args.attention:
        classify.check_attention()
        # Images are read a second time for the figure; those from an address or standard input are kept.
        images = [(name, functools.cache(source) if callable(source) else source) for name, source in images]
    failed, drawn = 0, []
    # tqdm shows no bar if standard error is not a terminal; for a single batch a bar is not needed.
    with tqdm(total=len(images), unit="image", disable=None if len(images) > args.batch_size else True) as bar:
        for (name, source), (_, found) in zip(images, classify.stream(images, args.top), strict=True):
            if isinstance(found, ImageError):
                failed += 1
                bar.write(f"error: {printable(found, 4000)}", file=sys.stderr)
            else:
                bar.write(_as_json(name, found) if args.json else _as_text(name, found), file=sys.stdout)
                sys.stdout.flush()
                if args.attention:
                    drawn.append((name, source, found))
            bar.update()
    if drawn:
        _draw_attention(args.attention, classify, drawn)
    return int(failed > 0)


def _as_json(name: str, found: Result) -> str:
    predictions = [{"name": label, "probability": probability} for label, probability in found]
    return json.dumps({"image": name, "predictions": predictions}, allow_nan=False)


def _as_text(name: str, found: Result) -> str:
    return "\n".join([printable(name), *(f"{probability:8.2%}  {printable(label)}" for label, probability in found)])


def _draw_attention(path: Path, classify: Classifier, drawn: list[tuple[str, Source, Result]]) -> None:
    """Writes a figure with each image and, next to it, the image with the attention rollout laid over it."""
    import numpy as np

    from vit_jax.files import whole_file
    from vit_jax.images import open_image
    from vit_jax.reports import figures
    from vit_jax.resampling import central_box

    views: Any = []
    for name, source, _ in drawn:
        cropped = classify.model.eval_crop == "center"
        view = open_image(source, (_DRAWN_SIZE, _DRAWN_SIZE), name, keep_aspect=cropped)
        if cropped:  # the attention is that of this part
            left, top, right, bottom = central_box(view, classify.image_size)
            view = view.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
        view.thumbnail((_DRAWN_SIZE, _DRAWN_SIZE))
        views.append(np.asarray(view, np.float32) / 255)
    labels = [f"{found[0][0]} {found[0][1]:.1%}" for _, _, found in drawn]
    masks = classify.attention([source for _, source, _ in drawn])
    figure = figures.rollout(views, {"attention": masks}, labels)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=figures.DPI)
    print(f"attention: {printable(path)}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
