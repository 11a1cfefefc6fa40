"""Helpers of the reports' tests: pages read back, and runs changed."""

import html.parser
import io
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vit_jax.reports import figures

FIGURES = {
    *("curves", "training_images", "rollout", "attention_distance", "classes", "confusion"),
    *("reliability", "mistakes", "filters", "positions"),
}


class Page(html.parser.HTMLParser):
    """What a page contains: the attributes of its images, every address, its tags and its text."""

    def __init__(self, path: Path):
        super().__init__()
        self.images, self.addresses, self.tags, self._text = [], [], set(), []
        self.source = path.read_text()
        self.feed(self.source)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.addresses += [values[name] for name in ("src", "href", "srcset", "action", "data") if values.get(name)]
        if tag == "img":
            self.images.append(values)

    def handle_data(self, data):
        self._text.append(data)


def edit(run: Path, **changes) -> Path:
    """Sets fields of a run's config.json, `section__field=value`; returns the run."""
    config = json.loads((run / "config.json").read_text())
    for name, value in changes.items():
        *sections, field = name.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[field] = value
    (run / "config.json").write_text(json.dumps(config))
    return run


def read_lines(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_lines(run: Path, lines: list[dict]) -> None:
    """Replaces a run's metrics.jsonl."""
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def figure_files(run: Path) -> set[str]:
    """The names of the figures that were written next to a run's page."""
    return {path.stem for path in (run / "figures").glob("*.png")}


def render(figure: Figure) -> np.ndarray:
    """The pixels of the saved figure, float [height, width, 3] in [0, 1]."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figures.DPI)
    return np.asarray(Image.open(file).convert("RGB")) / 255
