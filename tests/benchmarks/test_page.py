"""docs/performance.md and the figures that it is made from."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import page

DOCS = Path(__file__).parents[2] / "docs"
FILES = sorted((DOCS / "benchmarks").glob("*.json"))


def test_page_agrees_with_its_figures():
    text = (DOCS / "performance.md").read_text()
    assert page.render(text, DOCS / "benchmarks") == text, "run python -m benchmarks --page"
    assert FILES and all(f"docs/benchmarks/{file.name}" in text for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_figures_name_their_command_and_no_path(file):
    text = file.read_text()
    assert not re.search(r"/(home|tmp|work|root|usr)\b", text)
    for result in json.loads(text)["results"]:
        assert result["command"].startswith("python -m benchmarks ") and re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
        assert result["what"] in page.TABLES


def test_table_shows_figures_with_their_intervals():
    row = dict(model="B/16", size=224, batch=8, name="vit_jax", dtype="float32", images_per_second=2.0, seconds=4.0)
    row |= dict(seconds_low=3.9, seconds_high=4.1, flops_per_second=2e11, memory=2**30, planned=None, ratio=None)
    row |= dict(remat=False, accumulation=1)
    peer = row | dict(name="timm", ratio=dict(median=1.25, low=1.2, high=1.3, coverage=0.96), planned=2**29, remat=True)
    _, _, ours, other = page.table("train", [row, peer]).splitlines()
    assert ours == "| B/16 | 224 | 8 | vit_jax | float32 | 2.0 | 4,000.0 (3,900.0–4,100.0) | 0.2 |  | 1,024 |  |"
    assert other.startswith("| B/16, remat |") and other.endswith("| 1.25 (1.20–1.30) | 1,024 | 512 |")
    assert page.table("loop", []) == ""


def test_page_shows_notes():
    machine = dict(device="a", cores=2, processor="b", versions={"jax": "1"})
    result = dict(what="loop", command="python -m benchmarks loop", rows=[], notes=["main.py is skipped"])
    shown = page._section(dict(machine=machine, results=[result]), "a.json")
    assert shown.endswith("### The training loop around a tiny model\n\n- `python -m benchmarks loop`; main.py is skipped")


def test_results_replace_those_of_the_same_command(tmp_path):
    def result(what, command, value):
        return dict(what=what, command=command, rows=[value], notes=[])

    page.store(
        tmp_path,
        dict(device="NVIDIA H100 (80 GB)", versions=dict(torch="1")),
        [result("train", "t", 1), result("loop", "l", 2)],
    )
    path = tmp_path / "nvidia-h100-80-gb.json"  # a file in a folder is named after the device
    page.store(path, dict(device="b", versions=dict(jax="2")), [result("train", "t", 3), result("train", "u", 4)])
    found = json.loads(path.read_text())
    assert [(one["command"], one["rows"]) for one in found["results"]] == [("t", [3]), ("l", [2]), ("u", [4])]
    assert found["machine"] == dict(device="b", versions=dict(torch="1", jax="2"))
