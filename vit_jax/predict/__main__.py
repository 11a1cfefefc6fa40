"""The command line of prediction: `python -m vit_jax.predict --help`."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import cli
from vit_jax.errors import ImageError, printable

if TYPE_CHECKING:  # what takes its time is imported where Ctrl-C is waited for
    from vit_jax.predict.classifier import Classifier, Result
    from vit_jax.predict.images import Source

_MOST_DRAWN = 64  # images whose attention fits on a page
_DRAWN = 398  # pixels of the longer side of one that is drawn

_MORE = """\
Images are seen as in a run's evaluation: resized straight to the model's size, without antialiasing; of what is four times
as large or more, blocks of pixels are averaged first. EXIF's orientation is followed, what is transparent lies on white.
Images that cannot be used are named on standard error, the others are finished, and the status is then 1."""


def main(argv: list[str] | None = None, program: str = "python -m vit_jax.predict") -> int:
    """Classifies images; returns the exit status: 0, or 1 if something could not be used.

    SystemExit of 2 for a wrong command line.
    """
    return cli.call(lambda: _run(argv, program), advice="lower --batch_size")


def _run(argv: list[str] | None, program: str) -> int:
    parser = argparse.ArgumentParser(
        prog=program,
        description="What a fine-tuned or published model sees in images.",
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="PICTURE",
        help="a file, a folder (all images below it), an http(s) address, or - for an image on standard input",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN|FILE|NAME", help="a run's folder, npz, safetensors, or a published name"
    )
    parser.add_argument("--top", type=_positive, default=5, metavar="N", help="classes that are told of each; default 5")
    parser.add_argument("--json", action="store_true", help="a JSON object a line for each image")
    parser.add_argument(
        "--attention",
        type=_png,
        metavar="OUT.png",
        help=f"draw where the model looks, attention rollout laid over the images; {_MOST_DRAWN} of them at most",
    )
    parser.add_argument(
        "--batch_size", type=_positive, default=32, metavar="N", help="images that are computed at once; default 32"
    )
    args = parser.parse_args(argv)
    if not all([args.checkpoint, *args.images]):
        parser.error("an empty name stands for nothing")
    named = [item for argument in args.images for item in _named(argument)]
    if args.attention and len(named) > _MOST_DRAWN:
        parser.error(f"--attention draws {_MOST_DRAWN} images at most, these are {len(named):,}")
    if sys.stdout is None:
        return cli.fail("standard output is closed, and the answers go there")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of a bad image one line is printed
    return _predict(args, named)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _png(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, got {text!r}")
    return Path(text)


def _named(argument: str) -> list[tuple[str, Source]]:
    """The images that an argument names, each with its name."""
    from vit_jax.predict.images import fetch, is_address, within

    if argument == "-":
        return [("standard input", _standard_input)]
    if is_address(argument):
        return [(argument, functools.partial(fetch, argument))]
    # A folder without images stays, and ends in a sentence.
    return [(str(path), path) for path in within(argument)] or [(argument, argument)]


def _standard_input() -> bytes:
    from vit_jax.predict.images import MOST_BYTES

    if sys.stdin is None:
        raise ImageError("standard input is closed")
    return sys.stdin.buffer.read(MOST_BYTES)


def _predict(args: argparse.Namespace, named: list[tuple[str, Source]]) -> int:
    from tqdm import tqdm

    from vit_jax.predict.classifier import Classifier
    from vit_jax.runtime import prepare

    prepare()
    classify = Classifier(args.checkpoint, args.batch_size)
    if args.attention:
        classify.check_attention()
        # They are read again to be drawn, and what comes from elsewhere comes once.
        named = [(name, functools.cache(source) if callable(source) else source) for name, source in named]
    failed, drawn = 0, []
    # No bar where nobody watches, nor for what is done in a moment.
    with tqdm(total=len(named), unit="image", disable=None if len(named) > args.batch_size else True) as bar:
        for (name, source), (_, found) in zip(named, classify.stream(named, args.top), strict=True):
            if isinstance(found, ImageError):
                failed += 1
                bar.write(f"error: {printable(found, 4000)}", file=sys.stderr)
            else:
                bar.write(_line(name, found) if args.json else _block(name, found), file=sys.stdout)
                sys.stdout.flush()
                if args.attention:
                    drawn.append((name, source, found))
            bar.update()
    if drawn:
        _draw(args.attention, classify, drawn)
    return int(failed > 0)


def _line(name: str, found: Result) -> str:
    predictions = [{"name": label, "probability": probability} for label, probability in found]
    return json.dumps({"image": name, "predictions": predictions}, allow_nan=False)


def _block(name: str, found: Result) -> str:
    return "\n".join([printable(name), *(f"{probability:8.2%}  {printable(label)}" for label, probability in found)])


def _draw(path: Path, classify: Classifier, drawn: list[tuple[str, Source, Result]]) -> None:
    """Writes the images, each beside itself with attention rollout laid over it."""
    import numpy as np

    from vit_jax.files import whole_file
    from vit_jax.predict.images import open_image
    from vit_jax.reports import figures

    views: Any = []
    for name, source, _ in drawn:
        view = open_image(source, (_DRAWN, _DRAWN), name)
        view.thumbnail((_DRAWN, _DRAWN))
        views.append(np.asarray(view, np.float32) / 255)
    labels = [f"{found[0][0]} {found[0][1]:.1%}" for _, _, found in drawn]
    masks = classify.attention([source for _, source, _ in drawn])
    figure = figures.rollout(views, {"attention": masks}, labels)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=figures.DPI)
    print(f"attention: {printable(path)}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
