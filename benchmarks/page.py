"""Results as tables: aligned for a terminal, and in docs/performance.md, whose tables are made from docs/benchmarks/*.json."""

import functools
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks.memory import CARDS
from vit_jax.files import whole_file

Row = Mapping[str, Any]
_MARKS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)


def _between(estimate: Row | None, form: str, times: float = 1.0) -> str:
    if estimate is None:
        return ""
    middle, low, high = (format(times * estimate[key], form) for key in ("median", "low", "high"))
    return f"{middle} ({low}–{high})"


def _milliseconds(row: Row) -> str:
    low, high = row["seconds_low"], row["seconds_high"]
    return f"{1000 * row['seconds']:,.1f} ({1000 * low:,.1f}–{1000 * high:,.1f})"


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f}"


def _marks(name: str, row: Row) -> str:
    return f"{row['marks'][name]:.2f}" if "marks" in row else ""


def _largest(card: str, row: Row) -> str:
    return f"{row['largest'][card]:,}"


def _tried(row: Row) -> str:
    if "ran" not in row:
        return ""
    if not row["ran"]:
        return f"none ran of what was expected ({row['expected']})"
    return f"{row['ran']} ran: {_mib(row['planned'])} MiB by XLA, {_mib(row['counted'])} counted"


_WHICH: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"] + (", remat" if row.get("remat") else ""),
    "px": lambda row: f"{row['size']}",
    "batch": lambda row: f"{row['batch']:,}" + (f" in {row['accumulation']}" if row.get("accumulation", 1) > 1 else ""),
}
_COMPARED = _WHICH | {
    "": lambda row: row["name"],
    "type": lambda row: row["dtype"],
    "images/s": lambda row: f"{row['images_per_second']:,.1f}",
    "ms (quartiles)": _milliseconds,
    "TFLOP/s": lambda row: f"{row['flops_per_second'] / 1e12:.3g}",
    "of the matrix rate": lambda row: f"{row['share_of_rate']:.0%}",
    "times ours (95 %)": lambda row: _between(row.get("ratio"), ".2f"),
    "memory, MiB": lambda row: _mib(row["memory"]),
}
# What is measured → heading → what stands in a row.
COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "train": _COMPARED,
    "inference": _COMPARED,
    "evaluation": _WHICH
    | {
        "type": lambda row: row["dtype"],
        "images": lambda row: f"{row['images']:,}",
        "s": lambda row: f"{row['seconds']:.2f}",
        "images/s": lambda row: f"{row['images_per_second']:,.1f}",
        "of bare forward passes (95 %)": lambda row: _between(row["full"], ".3f"),
    },
    "input": _WHICH
    | {
        "type": lambda row: row["dtype"],
        "resized by": lambda row: row["way"],
        "ms": lambda row: f"{1000 * row['seconds']:.2f}",
        "images/s": lambda row: f"{row['images_per_second']:,.0f}",
        "of the step, % (95 %)": lambda row: _between(row["share"], ".2f", 100),
    },
    "startup": {
        "": lambda row: row["name"] + (f", {row['model']} at {row['size']} px" if "model" in row else ""),
        "s": lambda row: f"{row['seconds']:.2f}" if "seconds" in row else _marks("total", row),
        "of the first": lambda row: _between(row.get("of_base"), ".2f"),
        **{name: functools.partial(_marks, name) for name in ("import", "data", "load", "state", "dispatch")},
        "of it tracing": functools.partial(_marks, "trace"),
        "of it compiling": functools.partial(_marks, "compile"),
        "first step": functools.partial(_marks, "step"),
    },
    "memory": {
        "model": lambda row: row["model"],
        "px": lambda row: f"{row['size']}",
        "remat": lambda row: "yes" if row["remat"] else "no",
        "attention": lambda row: "cuDNN" if row["fused"] else "XLA",
        "fixed, MiB": lambda row: _mib(row["fixed"]),
        "MiB an image": lambda row: f"{row['image'] / 2**20:.1f}",
        **{f"{card} GB": functools.partial(_largest, str(card)) for card in CARDS},
        "tried": _tried,
    },
    "loop": {
        "steps": lambda row: f"{row['steps']:,}",
        "steps/s": lambda row: f"{row['steps_per_second']:,.0f}",
        "ms a step": lambda row: f"{1000 * row['mean']:.3f} (median {1000 * row['seconds']:.3f})",
        "the step alone, ms": lambda row: f"{1000 * row['alone']:.3f}",
        "the loop, ms": lambda row: f"{1000 * row['overhead']:.3f}",
    },
    "run": {
        "s to final.npz": lambda row: f"{row['seconds']:.1f}",
        "steps": lambda row: f"{row['steps']:,}",
        "evaluations": lambda row: f"{row['evaluations']}",
        "images/s between them": lambda row: f"{row['images_per_second']:,.0f}",
        "images": lambda row: row["data"],
    },
}
_TITLES = {
    "train": "Training step",
    "inference": "Forward pass",
    "evaluation": "Evaluation pass",
    "input": "Input on the device",
    "startup": "Start-up, seconds",
    "memory": "Largest batch",
    "loop": "The loop around a model of almost nothing",
    "run": "All of configs/cifar100_b16.py",
}


def _cells(what: str, rows: Iterable[Row]) -> list[list[str]]:
    """Headings and rows; columns in which nothing stands are left out."""
    columns = COLUMNS[what]
    cells = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    full = [i for i in range(len(columns)) if any(line[i] for line in cells[1:])]
    return [[line[i] for i in full] for line in cells]


def text(result: Mapping[str, Any]) -> str:
    """A result for a terminal."""
    lines = [_TITLES[result["what"]]]
    if result["rows"]:
        cells = _cells(result["what"], result["rows"])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([*lines, *result["notes"]])


def _section(found: Mapping[str, Any], file: str) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"## {machine['device']}",
        f"{machine['cores']} cores ({machine['processor']}), {versions}; `docs/benchmarks/{file}`.",
    ]
    for what, title in _TITLES.items():
        results = [result for result in found["results"] if result["what"] == what]
        if not results:
            continue
        parts.append(f"### {title}")
        if rows := [row for result in results for row in result["rows"]]:
            head, *body = _cells(what, rows)
            lines = [head, ["---"] * len(head), *body]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        notes = [f"- `{result['command']}`" + "".join(f"; {note}" for note in result["notes"]) for result in results]
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def render(page: str, folder: Path) -> str:
    """The page with its tables made from the JSON files of a folder."""
    sections = [_section(json.loads(file.read_text()), file.name) for file in sorted(folder.glob("*.json"))]
    return _MARKS.sub(lambda found: found[1] + "\n" + "\n\n".join(sections) + "\n\n" + found[2], page)


def machine() -> dict[str, Any]:
    """What the figures were measured on. Takes a device: to be asked last."""
    processor = platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        processor = found[1] if found else processor
    versions = {"python": platform.python_version()}
    for name in ("jax", "flax", "optax", "torch", "timm", "transformers", "keras", "keras-hub"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.local_devices()[0].device_kind
    return {"device": device, "devices": jax.local_device_count(), "processor": processor, "cores": cores, "versions": versions}


def store(path: Path, where: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Adds results to a file, each in the place of the one of the same command that it held before."""
    before: Any = json.loads(path.read_text()) if path.exists() else dict(machine=dict(versions={}), results=[])
    found = {(result["what"], result["command"]): result for result in [*before["results"], *results]}
    where["versions"] = before["machine"]["versions"] | where["versions"]
    text = json.dumps({"machine": where, "results": list(found.values())}, indent=1) + "\n"
    with whole_file(path) as file:
        file.write(text.encode())
