"""The training step and the forward pass, beside the peers': each contestant in a process of its own."""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.measure import Contestant, ContestantError, Result, Timing, interleave, ratio, say
from benchmarks.ours import Work, prepare
from benchmarks.processes import Process, environment, peer


def work_of(options: argparse.Namespace, kind: str, attention: str = "") -> Work:
    """What the options of a command line ask for; `attention` in place of the first that they name."""
    return Work(
        kind=kind,
        model=options.model,
        size=options.size,
        batch=options.batch,
        classes=options.classes,
        dtype=options.dtype,
        attention=attention or options.attention.split(",")[0],
        remat=options.remat,
        accumulation=options.accumulation,
    )


def _least(options: argparse.Namespace) -> float:
    """Seconds that a round lasts at least: where steps take milliseconds, waiting for one would be part of its time."""
    return options.least if options.least is not None else 0.5 if shutil.which("nvidia-smi") else 0.0


def by_turns(contestants: dict[str, Contestant], options: argparse.Namespace, rounds: int = 0, pause: float = 0.0):
    """`interleave` as the options say."""
    rounds = rounds or options.rounds
    return interleave(contestants, rounds, warmup=2, least=_least(options), pause=pause)


def _compare(kind: str, options: argparse.Namespace) -> Result:
    choices = options.attention.split(",")
    works = {"vit_jax" if len(choices) == 1 else f"vit_jax ({choice})": work_of(options, kind, choice) for choice in choices}
    first = next(iter(works.values()))
    timings, abouts = dict[str, Timing](), dict[str, dict[str, Any]]()
    if len(works) == 1 and not options.peer:
        run, describe = prepare(first)
        timings, notes = by_turns({"vit_jax": run}, options)
        abouts["vit_jax"] = describe()
    else:
        first.build()  # what is wrong with the options is said at once
        commands = {
            name: [sys.executable, "-m", "benchmarks.ours", json.dumps(dataclasses.asdict(work))]
            for name, work in works.items()
        }
        for name in options.peer:
            commands[name] = peer(name, first.for_peers(), options.peer_python, options.original)
        timings, abouts, notes = (_apart if options.apart else _together)(commands, options)
    mine, rows = next(iter(works)), []
    rate = abouts[mine]["rate"]
    for name, timing in timings.items():
        work, about = works.get(name, first), abouts[name]
        low, high = timing.quartiles
        performed = work.flops / timing.median
        rows.append(
            {
                "name": name,
                "model": work.model,
                "size": work.size,
                "batch": work.batch,
                "dtype": work.dtype if name in works else "bfloat16" if "bf16" in name else "float32",
                "attention": about.get("attention"),
                "remat": work.remat,
                "accumulation": work.accumulation,
                "rounds": len(timing.seconds),
                "units": timing.units,
                "seconds": timing.median,
                "seconds_low": low,
                "seconds_high": high,
                "images_per_second": work.batch / timing.median,
                "flops": work.flops,
                "xla_flops": about.get("xla_flops"),
                "flops_per_second": performed,
                "rate": rate,
                "share_of_rate": performed / rate,
                "memory": about["memory"],
                "planned": about.get("planned"),
                "ratio": ratio(timings[mine], timing) if name != mine else None,
            }
        )
    versions = {name: version for about in abouts.values() for name, version in about["versions"].items()}
    return Result(kind, rows, [f"{name} is not in it: {why}" for name, why in notes.items()], versions)


@contextlib.contextmanager
def _started(name: str, command: list[str], options: argparse.Namespace) -> Iterator[Process]:
    say(f"starting {name}")
    # Side by side on one GPU, none may take three quarters of its memory at the start.
    more = {} if options.apart else {"XLA_PYTHON_CLIENT_PREALLOCATE": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")}
    process = Process(name, command, options.limit, environment(**more))
    try:
        yield process
    finally:
        process.close()


def _together(commands: dict[str, list[str]], options: argparse.Namespace):
    """All at once, taking turns."""
    running, notes = dict[str, Process](), dict[str, str]()
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            try:
                running[name] = stack.enter_context(_started(name, command, options))
            except ContestantError as error:
                if not running:
                    raise
                notes[name] = str(error)
                say(f"{name} is not in it: {error}")
        timings, failures = by_turns(dict(running), options, pause=0.3)
        abouts = {name: running[name].about() for name in timings}
    return timings, abouts, notes | failures


def _apart(commands: dict[str, list[str]], options: argparse.Namespace):
    """One after the other and then in the opposite order, each having the device to itself: for what does not fit together."""
    seconds, abouts, notes = {name: Timing(()) for name in commands}, dict[str, dict[str, Any]](), dict[str, str]()
    half = -(-options.rounds // 2)
    for names in (list(commands), list(commands)[::-1]):
        for name in names:
            if name in notes:
                continue
            try:
                with _started(name, commands[name], options) as process:
                    timing = by_turns({name: process}, options, half)[0][name]
                    abouts[name] = process.about()
            except ContestantError as error:
                if name == next(iter(commands)):
                    raise
                notes[name] = str(error)
                say(f"{name} is not in it: {error}")
                continue
            seconds[name] = Timing(seconds[name].seconds + timing.seconds, timing.units)
    return {name: timing for name, timing in seconds.items() if name not in notes}, abouts, notes


def train(options: argparse.Namespace) -> Result:
    """The training step: forward, backward, clipping, update, with its input."""
    return _compare("train", options)


def inference(options: argparse.Namespace) -> Result:
    """The forward pass, with its input."""
    return _compare("inference", options)
