"""The command line of checkpoints: `python -m vit_jax.checkpoints {list,get,inspect,check,convert} --help`."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from vit_jax import cli
from vit_jax.errors import CheckpointError, printable

_log = logging.getLogger("vit_jax")

_SUFFIXES = {"google": ".npz", "onnx": ".onnx", "stablehlo": ".stablehlo"}


def main(argv: list[str] | None = None, program: str = "python -m vit_jax.checkpoints") -> int:
    """Runs one command.

    Args:
      argv: arguments; None: those of the process.
      program: the name of the command in help and errors.

    Returns:
      The exit status: 0; 1 after an error or if numbers differ; 2 for a wrong command line.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Downloads, describes, checks and converts weights. FILE and SOURCE are a file (npz, safetensors), a run's "
        "folder, an exported folder or a published name.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="list the published files, and which are on this machine")
    listing.add_argument("--filter", metavar="TEXT", default="", help="only files whose names or architecture contain TEXT")
    getting = commands.add_parser(
        "get", help="download a published file if needed; print its path, and on standard error its SHA-256"
    )
    getting.add_argument("name", metavar="NAME", help='such as "B/16", "ViT-B_16" or a full AugReg name')
    getting.add_argument(
        "--best",
        metavar="DS",
        help='the best of AugReg\'s files of the architecture NAME, pre-trained on "i21k", "i21k_30" or "i1k"',
    )
    getting.add_argument("--index", metavar="CSV", help="AugReg's index.csv for --best; default: download it")
    getting.add_argument(
        "--sha256", metavar="HEX", help="refuse a file with another SHA-256, as NAME@sha256:HEX does everywhere"
    )
    inspecting = commands.add_parser("inspect", help="describe a file from its headers")
    checking = commands.add_parser(
        "check", help="check that a file is whole, or compare its outputs with another implementation"
    )
    for command in (inspecting, checking):
        command.add_argument("file", metavar="FILE")
    checking.add_argument(
        "--against",
        metavar="PEER",
        help="compare stages with timm, huggingface, original, or an IO.npz (docs/checkpoints.md)",
    )
    checking.add_argument("--original", metavar="DIR", help="a checkout of google-research/vision_transformer")
    checking.add_argument(
        "--tolerance", type=float, default=1e-5, help="allowed largest difference over largest value; default 1e-5"
    )
    converting = commands.add_parser("convert", help="write weights for another tool")
    converting.add_argument("source", metavar="SOURCE")
    converting.add_argument("destination", metavar="DESTINATION", help="a file; for timm and huggingface a new folder")
    converting.add_argument(
        "--to", choices=("google", "timm", "huggingface", "onnx", "stablehlo"), help="default: from the destination's suffix"
    )
    converting.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the stored weights; default float32"
    )
    converting.add_argument("--features", action="store_true", help="leave out the head and pre_logits")
    args = parser.parse_args(argv)
    return cli.call(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.command == "list":
        _list(args.filter)
    elif args.command == "get":
        _get(args.name, args.best, args.index, args.sha256)
    elif args.command == "inspect":
        from vit_jax.checkpoints.download import find
        from vit_jax.checkpoints.inspection import inspect

        print(inspect(find(args.file)))
    elif args.command == "check":
        return _check(args.file, args.against, args.original, args.tolerance)
    else:
        convert(args.source, Path(args.destination), args.to, args.dtype, args.features)
    return 0


def _list(text: str) -> None:
    """Prints a table with a row for each file whose names or architecture contain a text, in any case.

    "copy" in the last column means that the local file was converted from the hub and may have no head.
    """
    from vit_jax.checkpoints.catalogue import PUBLISHED, short_name
    from vit_jax.checkpoints.download import local

    print(f"{'name':49}{'model':9}{'pixels':>6}{'classes':>8}{'size':>10}{'ImageNet':>10}  here")
    for name, row in PUBLISHED.items():
        short = short_name(name)
        if not any(text.lower() in words.lower() for words in (name, short, row.variant)):
            continue
        path = local(row)
        here = "" if path is None else "copy" if "copies" in path.parts else "yes"
        accuracy = f"{row.accuracy:.2f} %" if row.accuracy else "–"
        size = f"{row.mib * 2**20 / 1e6:,.0f} MB"
        print(f"{short:49}{row.variant:9}{row.image_size:6}{row.num_classes:8,}{size:>10}{accuracy:>10}  {here}".rstrip())


def _get(name: str, ds: str | None, index: str | None, demanded: str | None) -> None:
    """Downloads a published file; prints its path on standard output and its SHA-256 on standard error."""
    from vit_jax.checkpoints.catalogue import resolve
    from vit_jax.checkpoints.download import best, fetch
    from vit_jax.files import sha256

    row = best(name, ds, index) if ds else resolve(name)
    if demanded:
        row = resolve(f"{row.name}@sha256:{demanded}")
    path = fetch(row)
    print(path)
    known = "as in the table" if row.sha256 else "not checked, the table has none"
    known = "as demanded" if row.demanded else "of a converted copy" if "copies" in path.parts else known
    print(f"sha256:{sha256(path)} ({known})", file=sys.stderr)


def _check(source: str, against: str | None, original: str | None, tolerance: float) -> int:
    """Reads a whole file, and compares its stages with `against` if given; returns the exit status."""
    import jax
    import numpy as np

    from vit_jax.checkpoints.download import find
    from vit_jax.checkpoints.load import meta_of, read
    from vit_jax.formats.google import check_sums
    from vit_jax.formats.meta import image_size
    from vit_jax.interop import parity
    from vit_jax.models.intermediates import stages
    from vit_jax.models.variants import patches

    if (against == "original") != (original is not None):
        raise CheckpointError(
            "--against original needs --original DIR, a checkout of google-research/vision_transformer, and the reverse"
        )
    if not 0 < tolerance < 1:
        raise CheckpointError(f"--tolerance must be between 0 and 1, got {tolerance}")
    path = find(source)
    model, params = read(path)
    meta = meta_of(path)
    if path.suffix != ".safetensors":
        check_sums(path)
    if against is None:
        missing = f" (a copy without {' and '.join(meta['lacks'])})" if meta.get("lacks") else ""
        print(printable(f"{path} is whole: {len(jax.tree.leaves(params))} arrays of finite values{missing}"))
        return 0
    reference: Any = against
    if against in parity.PEERS:
        size = image_size(meta, model.stride, patches(model, params))
        images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
        reference = parity.peer_stages(against, model, params, meta, images, original=original, source=path)
    else:
        images = parity.read_io(against)["images"]
        height, width = images.shape[1:3]
        grid = (height // model.stride, width // model.stride)
        if height % model.stride or width % model.stride or grid[0] * grid[1] != patches(model, params):
            raise CheckpointError(
                f"{against} has images of {height}×{width} pixels, the positions in {path} are for {patches(model, params)} "
                f"patches of {model.stride}×{model.stride}"
            )
    with jax.default_matmul_precision("highest"):  # else a GPU rounds products to TF32
        ours = jax.jit(lambda params, images: stages(model, params, images))(params, images)
    differences = parity.compare({name: np.asarray(value) for name, value in ours.items()}, reference)
    for stage, difference in differences:
        print(f"{stage:12}{difference:.2e}{'' if difference <= tolerance else '  above ' + format(tolerance, '.0e')}")
    worst = max(difference for _, difference in differences)
    print(f"largest {worst:.2e}, tolerance {tolerance:.0e}: {'agrees' if worst <= tolerance else 'differs'}")
    return 0 if worst <= tolerance else 1


def convert(source: str, destination: Path, to: str | None = None, dtype: str = "float32", features: bool = False) -> None:
    """Writes weights for another tool, whole or not at all, and prints the destination.

    Args:
      source: a file, a run's or an exported folder, or a published name.
      destination: a file, or a folder for timm and huggingface.
      to: "google", "timm", "huggingface", "onnx" or "stablehlo"; None: from the destination's suffix.
      dtype: "float32" or "bfloat16", of the stored weights.
      features: whether to leave out the head and pre_logits.

    Raises:
      CheckpointError: if the weights cannot be read or the other tool has no such model.
      FileExistsError: if the destination folder holds something already.
    """
    import ml_dtypes
    import numpy as np

    from vit_jax.checkpoints.download import find
    from vit_jax.checkpoints.load import meta_of, read
    from vit_jax.files import sha256
    from vit_jax.formats.google import save_npz
    from vit_jax.interop import onnx, stablehlo, torch_models

    to = to or next((tool for tool, suffix in _SUFFIXES.items() if suffix == destination.suffix), None)
    if to is None:
        raise CheckpointError(
            f"{destination}: unknown suffix; give --to timm or --to huggingface, or one of the suffixes "
            + ", ".join(_SUFFIXES.values())
        )
    if to in _SUFFIXES and destination.suffix != _SUFFIXES[to]:
        raise CheckpointError(f"{destination}: the suffix of a file for {to} must be {_SUFFIXES[to]}")
    path = find(source)
    model, params = read(path, skip=("head", "pre_logits") if features else ())
    meta = meta_of(path)
    if not meta:
        _log.warning("%s has no description next to it: Google's scaling is assumed, class names are left out", path)
    if to in ("onnx", "stablehlo") and not model.num_classes:
        _log.warning("%s has no head, so %s returns features", path, destination)
    meta = {"source": path.name, "source_sha256": sha256(path)} | meta
    if not model.num_classes:
        meta.pop("class_names", None)
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    if to == "google":
        save_npz(destination, params, meta, stored)
    elif to == "timm":
        torch_models.save_timm(destination, params, meta, stored)
    elif to == "huggingface":
        torch_models.save_huggingface(destination, params, meta, stored)
    elif to == "onnx":
        onnx.save_onnx(destination, model, params, meta, stored)
    else:
        stablehlo.save_stablehlo(destination, model, params, meta, stored)
    print(destination)


if __name__ == "__main__":
    cli.run(main)
