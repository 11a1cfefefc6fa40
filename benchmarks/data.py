"""How fast images reach a training step: from a split on the devices, and streamed, next to only decoding them with Pillow."""

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.contestants import SEED, by_turns
from benchmarks.measure import Contestant, Result, ratio, repeated, say
from vit_jax.config import Run
from vit_jax.data import stream
from vit_jax.data.sources import Source
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import task
from vit_jax.training import devices
from vit_jax.training.feed import Feed
from vit_jax.training.step import Batch

_SHAPES = {"JPEG, 500×375": [(500, 375)], "JPEG, several sizes": [(500, 375), (375, 500), (640, 480), (333, 500)]}
_BATCHES = 32  # in a unit of work: as many as a resident split copies to the devices at once


def _photos(folder: Path, shapes: list[tuple[int, int]], number: int) -> list[str]:
    """Writes JPEG files in folders of two classes: colours that change smoothly, with noise, at about 3 bits a pixel."""
    draw = np.random.default_rng(SEED)
    for index, (width, height) in zip(range(number), itertools.cycle(shapes), strict=False):
        smooth = Image.fromarray(draw.integers(0, 256, (24, 32, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth) + draw.normal(0, 12, (height, width, 1))
        (folder / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "ab"[index % 2] / f"{index}.jpg", quality=85)
    return [str(file) for file in sorted(folder.glob("*/*.jpg"))]


def _decode(paths: list[str]) -> None:
    for path in paths:
        with Image.open(path) as image:
            np.asarray(image)


def _bare(pool: Any, workers: int, files: list[str], batch: int) -> Contestant:
    """Decoding as many of the files in as many processes."""

    def run(n: int) -> float:
        chosen = list(itertools.islice(itertools.cycle(files), n * _BATCHES * batch))
        began = time.perf_counter()
        pool.map(_decode, [chosen[worker::workers] for worker in range(workers)], chunksize=1)
        return time.perf_counter() - began

    return run


def _streamed(source: Source, workers: int, batch: int) -> Contestant:
    """Batches that new worker processes read; the time until they have read their first ones is not counted."""

    def run(n: int) -> float:
        with contextlib.closing(stream.read(source, functools.partial(_order, len(source), batch), workers)) as batches:
            for _ in range(2 * workers + 2):
                next(batches)
            return repeated(lambda: [next(batches) for _ in range(_BATCHES)])(n)

    return run


def _take(batches: Iterator[Batch]) -> list[Any]:
    return [next(batches).index for _ in range(_BATCHES)]


def _often(contestant: Contestant, times: int = 20) -> Contestant:
    """A contestant whose units are too short to time one of them."""
    return lambda n: contestant(n * times) / times


def _resident_memory() -> float:
    """Bytes of memory that this process and its children hold; 0 where /proc does not say."""
    pids = ["self", *(child.pid for child in multiprocessing.active_children())]
    try:
        return sum(4096 * int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    except OSError:
        return 0


def _growth(source: Source, workers: int, batch: int) -> float:
    """How much more memory the fifth epoch of a streamed split needs than the first one, in bytes."""
    order = functools.partial(_order, len(source), batch)
    held, epoch = list[float](), max(1, len(source) // batch)
    for number, _ in enumerate(stream.read(source, order, workers, 0, 5 * epoch)):
        held += [_resident_memory()] if number % epoch == epoch - 1 else []
    return held[-1] - held[0]


def _order(count: int, batch: int, number: int) -> np.ndarray:
    return (number * batch + np.arange(batch)) % count


def measure(options: argparse.Namespace) -> Result:
    """Images a second before augmentation; the streamed ones by a process for each core."""
    workers, layout, rows = stream.number_of_workers(-1), devices.start(Run()), list[dict[str, Any]]()
    spawn = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would not copy
    with tempfile.TemporaryDirectory() as name, spawn.Pool(workers) as pool:
        for kind in ("CIFAR", *_SHAPES):
            contestants: dict[str, Contestant] = {}
            if kind == "CIFAR":
                source = open_split(task("cifar100_excerpt"), "train")
                resident = Feed(source, layout, source.nbytes).train(options.batch, 1, SEED, 0)
                contestants["resident"] = _often(repeated(functools.partial(_take, resident)))
            else:
                (folder := Path(name, kind)).mkdir()
                say(f"writing {options.images // 10:,} images: {kind}")
                files = _photos(folder, _SHAPES[kind], options.images // 10)
                source = open_split(task(f"folder:{folder}"), "train[:100%]+test", image_size=options.size)
                contestants["bare Pillow"] = _bare(pool, workers, files, options.batch)
            contestants["streamed"] = _streamed(source, workers, options.batch)
            timings, _ = by_turns(contestants, options)
            for how, seconds in timings.items():
                rate = _BATCHES * options.batch / statistics.median(seconds)
                row = dict(name=f"{kind}, {how}", workers=0 if how == "resident" else workers, images_per_second=rate)
                rows.append(row | dict(ratio=ratio(timings["streamed"], seconds) if how != "streamed" else None))
            rows[-1]["growth"] = _growth(source, workers, options.batch)
    return Result(rows)
