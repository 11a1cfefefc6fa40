"""What each augmentation costs, compiled, on a batch of 64 images, for docs/recipes.md: `python -m benchmarks.augment`."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import cli
from vit_jax.config import Augment
from vit_jax.transforms.keys import AUGMENT, example_keys, stream
from vit_jax.transforms.preprocess import for_training

BATCH, CLASSES = 64, 100
NOTHING: dict[str, Any] = {"crop": "none", "flip": False}
TRANSFORMS: dict[str, dict[str, Any]] = {
    "only scaling": {},
    "flip": {"flip": True},
    "pad and crop": {"crop": "pad"},
    "random resized crop": {"crop": "torchvision"},
    "AugReg transfer crop": {"crop": "resize_crop"},
    "random erasing": {"erasing": 1.0},
    "mixup": {"mixup": 0.2},
    "CutMix": {"cutmix": 1.0},
    "mixup or CutMix": {"mixup": 0.2, "cutmix": 1.0},
    "RandAugment, 1 layer": {"randaugment_layers": 1},
    "RandAugment, 2 layers": {"randaugment_layers": 2},
}


def compiled(fields: dict[str, Any], size: int) -> Callable[[], Any]:
    """A call of the transform with these fields of `augment` on a batch of random images, compiled and called once."""
    transform = jax.jit(for_training(Augment(**NOTHING | fields), size, None, CLASSES))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), np.uint8))
    keys = jax.jit(lambda: example_keys(stream(0, AUGMENT), 0, jnp.arange(BATCH)))()
    labels = jnp.arange(BATCH, dtype=jnp.int32) % CLASSES

    def call() -> Any:
        return jax.block_until_ready(transform(keys, images, labels))

    call()
    return call


def milliseconds(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """The median time of each call; in every round each is made once, so that all see the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            own.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(own) for own in times]


def table(sizes: tuple[int, ...], rounds: int) -> list[str]:
    """The rows of the table: a transform, and its time at each size."""
    rows = [f"| transform | {' | '.join(f'{size} px, ms' for size in sizes)} |", f"|---|{'---|' * len(sizes)}"]
    columns = [milliseconds([compiled(fields, size) for fields in TRANSFORMS.values()], rounds) for size in sizes]
    for name, *found in zip(TRANSFORMS, *columns, strict=True):
        rows.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in found)} |")
    return rows


def main(argv: list[str]) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.augment", description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="calls of each transform; the median is given (15)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 224], help="of the images and the result in pixels (32 224)"
    )
    options = parser.parse_args(argv)
    print("\n".join(table(tuple(options.sizes), options.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.call(lambda: main(sys.argv[1:])))
