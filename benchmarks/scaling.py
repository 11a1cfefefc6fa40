"""What a training step on many GPUs exchanges and how long it should take, for docs/scaling.md: `python -m benchmarks.scaling`.

A model, not a measurement; the constants below are its assumptions. With --measure: weak scaling on simulated CPU devices.
"""

import argparse
import functools
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from benchmarks.measure import ROOT, environment
from vit_jax import cli, metrics
from vit_jax.models.variants import build, flops, shapes
from vit_jax.training.cards import CARDS

MODELS = ("B/16", "L/16", "H/14")
GPUS = (8, 16, 64, 256, 1024, 4096)
CLASSES, IMAGES = 100, 64  # of the head; images on each GPU
EFFICIENCY = 0.3  # of the peak, reached by published runs of models of this size (docs/performance.md)
GRADIENT = 2  # bytes: the compiled step sums gradients in bfloat16
FSDP_GATHERED = 3.32  # bytes of a parameter that FSDP gathers in a step compiled for H100: most in bfloat16, twice
NODE = 8  # GPUs that NVLink connects
NVLINK = 0.8 * 450e9  # bytes/s in each direction, of the H100's 450; four fifths are usual
NETWORK = 0.8 * 50e9  # bytes/s of each GPU in each direction: 400 Gbit/s InfiniBand
LATENCY = 20e-6  # seconds of one exchange between two nodes
BACKWARD = 2 / 3  # the part of a step that exchanges of gradients can hide behind


@functools.cache
def parameters(name: str) -> int:
    """Parameters of a model with its head."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(build(name, num_classes=CLASSES), 224)))


def compute_seconds(name: str) -> float:
    """Seconds of a step on one GPU: three times the products of a forward pass."""
    return 3 * IMAGES * flops(build(name, num_classes=CLASSES), 224) / (EFFICIENCY * CARDS["h100"].bfloat16)


def reduced(bytes_: float, gpus: int) -> float:
    """Seconds of a sum over all GPUs whose result each has: first in a node, then between equal GPUs of all nodes, and back."""
    inside = min(gpus, NODE)
    nodes = gpus // inside
    seconds = 2 * bytes_ * (inside - 1) / inside / NVLINK
    if nodes > 1:
        seconds += 2 * bytes_ / inside * (nodes - 1) / nodes / NETWORK + 2 * math.log2(nodes) * LATENCY
    return seconds


def exchanged(name: str, gpus: int, fsdp: int = 1) -> float:
    """Bytes that each GPU sends in a step: gradients, and with FSDP over `fsdp` GPUs also parameters."""
    own = parameters(name) * GRADIENT
    found = parameters(name) * (GRADIENT + FSDP_GATHERED) * (fsdp - 1) / fsdp if fsdp > 1 else 0.0
    groups = gpus // fsdp
    return found + 2 * own / fsdp * (groups - 1) / groups


def step_seconds(name: str, gpus: int, fsdp: int = 1) -> tuple[float, float]:
    """Seconds of a step if no exchange is hidden, and if those of gradients hide behind the backward pass.

    Args:
      name: a row of vit_jax.models.variants.VARIANTS.
      gpus: their number, a power of two.
      fsdp: the GPUs of one node among which the state is shared; 1: every GPU has all of it.
    """
    compute = compute_seconds(name)
    if fsdp > 1:
        gathered = parameters(name) * FSDP_GATHERED * (fsdp - 1) / fsdp / NVLINK
        summed = parameters(name) * GRADIENT * (fsdp - 1) / fsdp / NVLINK
        nodes = gpus // fsdp
        if nodes > 1:  # the shares of gradients are summed between the nodes
            summed += 2 * parameters(name) * GRADIENT / fsdp * (nodes - 1) / nodes / NETWORK + 2 * math.log2(nodes) * LATENCY
    else:
        gathered, summed = 0.0, reduced(parameters(name) * GRADIENT, gpus)
    hidden = max(compute, (1 - BACKWARD) * compute + summed) + max(0.0, gathered - compute)
    return compute + gathered + summed, hidden


def volume_table() -> list[str]:
    """Rows of Markdown: megabytes that each GPU sends in a step."""
    rows = ["| model | parameters | 8 GPUs | 64 GPUs | `fsdp:8` | `data:8,fsdp:8` |", "|---|---|---|---|---|---|"]
    for name in MODELS:
        found = [exchanged(name, 8), exchanged(name, 64), exchanged(name, 8, 8), exchanged(name, 64, 8)]
        rows.append(f"| {name} | {parameters(name):,} | " + " | ".join(f"{bytes_ / 1e6:,.0f} MB" for bytes_ in found) + " |")
    return rows


def time_table(fsdp: int = 1) -> list[str]:
    """Rows of Markdown: milliseconds of a step, hidden exchanges first, and the speed next to one GPU's."""
    rows = ["| model | 1 GPU | " + " | ".join(f"{gpus:,}" for gpus in GPUS) + " |", "|---|---|" + "---|" * len(GPUS)]
    for name in MODELS:
        alone, cells = compute_seconds(name), list[str]()
        for gpus in GPUS:
            worst, best = step_seconds(name, gpus, fsdp)
            cells.append(f"{1e3 * best:.1f}–{1e3 * worst:.1f} ({alone / worst:.0%}–{alone / best:.0%})")
        rows.append(f"| {name} | {1e3 * alone:.1f} | " + " | ".join(cells) + " |")
    return rows


def _throughput(devices: int, hosts: int, *options: str) -> float:
    """Images a second of a run of Nano/8 on the embedded images, 8 on each simulated device: the median of its steps."""
    fields = ["model.checkpoint=", "model.variant=Nano/8", f"training.batch_size={8 * devices * hosts}", "training.steps=40"]
    fields += ["optimizer.warmup_steps=2", "training.eval_every=1000", "training.save_every=1000", "data.test_split=test[:8]"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "main.py", "--config", "configs/demo.py", "--workdir", folder, *options]
        command += [f"--config.{field}" for field in fields] + ([f"--hosts={hosts}"] if hosts > 1 else [])
        flags = f"--xla_force_host_platform_device_count={devices}"
        subprocess.run(
            command, cwd=ROOT, env=environment(JAX_PLATFORMS="cpu", XLA_FLAGS=flags), check=True, capture_output=True
        )
        rates = [line["train/images_per_second"] for line in metrics.read(Path(folder)) if "train/images_per_second" in line]
    return statistics.median(rates[5:])


def measured_table() -> list[str]:
    """Rows of Markdown: images a second on simulated devices, which share the cores of this machine, next to one device."""
    rows = ["| devices | as | images/s | next to 1 device |", "|---|---|---|---|"]
    layouts = {"": [], "pmap": ["--config.run.parallel=pmap"], "fsdp": []}
    alone = 0.0
    for hosts, devices in ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 4), (4, 1)):
        for name, options in layouts.items():
            if name and (hosts > 1 or devices == 1):
                continue
            options = [f"--config.run.mesh=fsdp:{devices}"] if name == "fsdp" else options
            rate = _throughput(devices, hosts, *options)
            alone = alone or rate
            shown = f"{hosts} processes × {devices}" if hosts > 1 else f"{devices}"
            rows.append(f"| {shown} | {name or 'mesh'} | {rate:,.0f} | {rate / alone:.2f} |")
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main(argv: list[str]) -> int:
    """Prints the tables of docs/scaling.md; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__, allow_abbrev=False)
    parser.add_argument("--measure", action="store_true", help="measure weak scaling on this machine's CPU")
    tables = [measured_table()] if parser.parse_args(argv).measure else [volume_table(), time_table(), time_table(NODE)]
    print("\n\n".join("\n".join(rows) for rows in tables))
    return 0


if __name__ == "__main__":
    sys.exit(cli.call(lambda: main(sys.argv[1:])))
