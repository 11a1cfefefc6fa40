"""The command line of the benchmarks: `python -m benchmarks --help`."""

import argparse
import contextlib
import datetime
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

import benchmarks
from benchmarks import page
from benchmarks.contestants import CONTESTANTS
from benchmarks.measure import ROOT, environment, say
from benchmarks.parts import LIMITS, PARTS, SUITES
from vit_jax import cli, runtime
from vit_jax.errors import UserError, reason

_PATHS = ("output", "peer_python", "original")  # options whose values are paths of this machine
_list = functools.partial(str.split, sep=",")


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of a command line; exits with 2 and an error message if one is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=benchmarks.__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("what", nargs="*", metavar="WHAT", help=f"of {', '.join(PARTS)}; default: train inference")
    add("--model", default="B/16", help="a row of vit_jax.models.variants.VARIANTS (B/16)")
    add("--size", type=_positive, default=224, help="height and width of the images in pixels (224)")
    add("--batch", type=_positive, default=64, help="number of images (64)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="type of the computation (float32)")
    add("--attention", default="auto", type=_list, help="auto, xla or cudnn; several, separated by commas, are compared")
    add("--grad_accum_steps", type=_positive, default=1, help="number of microbatches of our batch (1)")
    add("--remat", action="store_true", help="rematerialise the blocks in the backward pass")
    add("--rounds", type=_positive, default=9, help="number of rounds; the median is given (9)")
    add("--peer", default=[], type=_list, help="timm or original, with options, as in timm+bf16+compile; several by commas")
    add("--peer-python", default="", metavar="PATH", help="the interpreter that has the peers; default: this one")
    add("--original", default="", metavar="CHECKOUT", help="of github.com/google-research/vision_transformer")
    add("--images", type=_positive, default=10_000, help="number of images of an evaluation pass (10,000)")
    add("--steps", type=_positive, default=3000, help="number of steps of the loop (3,000)")
    add("--output", type=Path, metavar="PATH", help="add the results to this JSON file, or to the device's file in this folder")
    add("--suite", choices=SUITES, help="measure the parts of a suite, each in its own process, for docs/benchmarks/")
    add("--only", type=_list, metavar="PART,…", help="; ".join(f"of {name}: {', '.join(SUITES[name])}" for name in SUITES))
    add("--page", action="store_true", help="make the tables of docs/performance.md from docs/benchmarks/")
    options = parser.parse_args(argv)
    options.what, parts = options.what or ["train", "inference"], SUITES.get(options.suite, {})
    checks = [("WHAT", options.what, PARTS), ("--attention", options.attention, ("auto", "xla", "cudnn"))]
    checks += [("--only", options.only or [], parts or ["the parts of a --suite"])]
    for name, *choices in (peer.split("+") for peer in options.peer):
        checks += [("--peer", [name], list(CONTESTANTS)[1:]), (f"--peer {name}", choices, CONTESTANTS.get(name, ([], ()))[1])]
    for option, names, allowed in checks:
        if unknown := [name for name in names if name not in allowed]:
            parser.error(f"{option}: {unknown[0]!r} is not one of: {', '.join(allowed)}")
    if "cudnn" in options.attention and options.dtype == "float32":
        parser.error("--attention cudnn computes in bfloat16: add --dtype bfloat16")
    if "original" in options.peer and not options.original:
        parser.error("--peer original needs --original, a checkout of github.com/google-research/vision_transformer")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def _command(argv: list[str]) -> str:
    """A command line as results name it, without the paths of this machine."""
    names = {f"--{name.replace('_', '-')}" for name in _PATHS}
    pairs = zip(["", *argv], argv, strict=False)
    kept = (word for before, word in pairs if before not in names and word.split("=")[0] not in names)
    return " ".join(["python -m benchmarks", *kept])


def _measure(options: argparse.Namespace, command: str) -> int:
    """Measures the parts of a command, prints them as they come and stores them; returns the exit status."""
    results, versions, status = list[dict[str, Any]](), dict[str, str](), 0
    for what in [name for name in PARTS if name in options.what]:
        rows, notes = list[dict[str, Any]](), list[str]()
        try:
            found = PARTS[what](options)
            rows, notes, versions = found.rows, found.notes, versions | found.versions
        except (UserError, ValueError, jax.errors.JaxRuntimeError) as error:
            notes, status = [f"failed: {reason(error)}"], 1
        results.append(dict(what=what, rows=rows, notes=notes, command=command, date=datetime.date.today().isoformat()))
        print("\n".join(filter(None, [page.TABLES[what][0], page.table(what, rows), *notes])), flush=True)
    if options.output:
        where = page.machine()
        where["versions"] |= versions
        page.store(options.output, where, results)
    return status


def _measure_suite(options: argparse.Namespace) -> int:
    """Measures the parts of a suite, each in its own process and for a limited time; returns the exit status."""
    parts, (limit, total) = SUITES[options.suite], LIMITS[options.suite]
    failed, end = list[str](), time.monotonic() + total
    options.output = options.output or ROOT / "docs" / "benchmarks"
    paths = [f"--{name.replace('_', '-')}={path}" for name in _PATHS if (path := getattr(options, name))]
    for name in options.only or parts:
        arguments = parts[name] if options.original else parts[name].replace(",original", "")
        say(f"--- {name}: python -m benchmarks {arguments}")
        command = [sys.executable, "-m", "benchmarks", *arguments.split(), *paths]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
        timer = threading.Timer(max(0.0, min(limit, end - time.monotonic())), os.killpg, (process.pid, signal.SIGKILL))
        try:
            timer.start()
            failed += [name] if process.wait() else []
        finally:
            timer.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
    say(f"failed: {', '.join(failed)}" if failed else "every part was measured")
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    """Runs a command line; returns the exit status."""
    options = parse(argv)
    if options.page:
        path = ROOT / "docs" / "performance.md"
        path.write_text(page.render(path.read_text(), ROOT / "docs" / "benchmarks"))
        return 0
    if options.suite:
        return _measure_suite(options)
    runtime.prepare()
    return _measure(options, _command(argv))


if __name__ == "__main__":
    sys.exit(cli.call(lambda: main(sys.argv[1:])))
