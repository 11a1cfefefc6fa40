"""The format of metrics.jsonl: one flat JSON object a line, which always has "step". Standard library only."""

import json
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read(workdir: Path, until: int | None = None) -> list[dict[str, Any]]:
    """Reads the lines of a run's metrics.jsonl in order.

    Lines that are not JSON objects with an integer step are left out: a kill can cut the last line short, and so can
    reading the file while a run writes it.

    Args:
      workdir: the run's folder.
      until: the last step to read; None: all steps.

    Returns:
      The objects as written; empty if there is no file.
    """
    path, lines = workdir / FILE, []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and (until is None or line["step"] <= until):
            lines.append(line)
    return lines
