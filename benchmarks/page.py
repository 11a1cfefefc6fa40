"""Results as tables, and docs/performance.md, whose tables are made from docs/benchmarks/*.json."""

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vit_jax.files import whole_file

_SECTIONS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
_COMPARED = (
    "model | px | batch |  | type | images/s | ms (quartiles) | TFLOP/s | our speed ÷ theirs (95 %) | MiB | XLA's plan, MiB",
    "{model} | {size} | {microbatches} | {name} | {dtype} | {images_per_second:,.1f} | {ms:,.1f} | {tflops:.3g} | {ratio:.2f} "
    "| {memory:,.0f} | {planned:,.0f}",
)
# Part → title, headings, a row.
TABLES: dict[str, tuple[str, str, str]] = {
    "train": ("Training step", *_COMPARED),
    "inference": ("Forward pass", *_COMPARED),
    "evaluation": (
        "Evaluation pass",
        "model | px | batch | type | images | s | images/s | its speed ÷ bare forward passes (95 %)",
        "{model} | {size} | {batch} | {dtype} | {images:,} | {seconds:.2f} | {images_per_second:,.1f} | {full:.3f}",
    ),
    "startup": ("Start-up", " | s | ÷ the first row (95 %)", "{name} | {seconds:.2f} | {of_base:.2f}"),
    "data": (
        "Images before augmentation",
        "images | processes | images/s | streamed ÷ these (95 %) | more memory in the 5th epoch than in the 1st, MiB",
        "{name} | {workers} | {images_per_second:,.0f} | {ratio:.3f} | {growth_mib:,.0f}",
    ),
    "loop": (
        "The training loop around a tiny model",
        "steps | steps/s | ms a step | only the step, ms | the rest of the loop, ms",
        "{steps:,} | {steps_per_second:,.0f} | {mean_ms:.3f} (median {ms:.3f}) | {alone_ms:.3f} | {overhead_ms:.3f}",
    ),
}


class _Figure:
    """A value as a format string shows it: an estimate with its interval, nothing for None."""

    def __init__(self, value: Any):
        self.value = value

    def __format__(self, form: str) -> str:
        if isinstance(self.value, dict):
            return "{} ({}–{})".format(*(format(self.value[key], form) for key in ("median", "low", "high")))
        return "" if self.value is None else format(self.value, form)


def _cells(row: Mapping[str, Any], template: str) -> str:
    """A line of a table from a row of a result, whose times are in seconds and whose memory is in bytes."""
    shown: dict[str, Any] = dict.fromkeys(("ratio", "of_base", "growth_mib")) | dict(row)
    shown |= {"growth_mib": row["growth"] / 2**20} if "growth" in row else {}
    shown |= {f"{name}_ms": 1e3 * row[name] for name in ("mean", "alone", "overhead") if name in row}
    shown["ms"] = 1e3 * row.get("seconds", 0)
    if "seconds_low" in row:
        shown["ms"] = dict(median=shown["ms"], low=1e3 * row["seconds_low"], high=1e3 * row["seconds_high"])
        shown |= {name: row[name] and row[name] / 2**20 for name in ("memory", "planned")}
        shown |= dict(tflops=row["flops_per_second"] / 1e12, model=row["model"] + ", remat" * row["remat"])
        shown["microbatches"] = f"{row['batch']:,}" + (f" in {row['accumulation']}" if row["accumulation"] > 1 else "")
    return template.format_map({name: _Figure(value) for name, value in shown.items()})


def table(what: str, rows: list[dict[str, Any]]) -> str:
    """Rows of a part as a table in Markdown; "" without rows."""
    _, headings, template = TABLES[what]
    lines = [headings, " | ".join(["---"] * len(headings.split(" | "))), *(_cells(row, template) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) if rows else ""


def _section(found: Mapping[str, Any], file: str) -> str:
    where, parts = found["machine"], [f"## {found['machine']['device']}"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    parts.append(f"{where['cores']} cores ({where['processor']}), {versions}; `docs/benchmarks/{file}`.")
    for what, (title, *_) in TABLES.items():
        if results := [result for result in found["results"] if result["what"] == what]:
            rows = [row for result in results for row in result["rows"]]
            commands = [f"- `{result['command']}`" + "".join(f"; {note}" for note in result["notes"]) for result in results]
            parts += filter(None, [f"### {title}", table(what, rows), "\n".join(commands)])
    return "\n\n".join(parts)


def render(page: str, folder: Path) -> str:
    """The page with its tables made from the JSON files of a folder."""
    sections = [_section(json.loads(file.read_text()), file.name) for file in sorted(folder.glob("*.json"))]
    return _SECTIONS.sub(lambda found: found[1] + "\n" + "\n\n".join(sections) + "\n\n" + found[2], page)


def machine() -> dict[str, Any]:
    """The device, the processor and the versions of what is measured. JAX then holds the device until this process ends."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"device": jax.local_devices()[0].device_kind, "devices": jax.local_device_count()}
    found |= {"processor": model[1] if model else platform.machine(), "cores": cores}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    return found | {"versions": {"python": platform.python_version(), **versions}}


def store(path: Path, where: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Writes results to a JSON file, or to that of the device in a folder, in place of earlier ones of the same commands."""
    if path.is_dir():
        path = path / f"{re.sub(r'[^a-z0-9]+', '-', where['device'].lower()).strip('-')}.json"
    before: Any = json.loads(path.read_text()) if path.exists() else dict(machine=dict(versions={}), results=[])
    found = {(result["what"], result["command"]): result for result in [*before["results"], *results]}
    where["versions"] = before["machine"]["versions"] | where["versions"]
    with whole_file(path) as file:
        file.write((json.dumps({"machine": where, "results": list(found.values())}, indent=1) + "\n").encode())
