"""docs/performance.md and the figures that it is made from."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import page

DOCS = Path(__file__).parents[2] / "docs"
FILES = sorted((DOCS / "benchmarks").glob("*.json"))


def test_the_page_is_what_its_figures_make():
    text = (DOCS / "performance.md").read_text()
    assert page.render(text, DOCS / "benchmarks") == text, "run python -m benchmarks --page"
    assert FILES and all(f"docs/benchmarks/{file.name}" in text for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_figures_name_their_command_and_no_machine(file):
    text = file.read_text()
    assert not re.search(r"/(home|tmp|work|root|usr)\b", text)
    for result in json.loads(text)["results"]:
        assert result["command"].startswith("python -m benchmarks ") and re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
        assert page.text(result).strip()


def test_columns_in_which_nothing_stands_are_left_out():
    row = dict(model="B/16", size=224, batch=8, name="vit_jax", dtype="float32", images_per_second=2.0, seconds=4.0)
    row |= dict(seconds_low=3.9, seconds_high=4.1, flops_per_second=2e11, share_of_rate=0.5, memory=2**30, ratio=None)
    peer = row | dict(name="timm", ratio=dict(median=1.25, low=1.2, high=1.3, coverage=0.96))
    alone = page.text(dict(what="train", rows=[row], notes=[]))
    assert "times ours" not in alone and "1,024" in alone and "4,000.0 (3,900.0–4,100.0)" in alone
    assert "1.25 (1.20–1.30)" in page.text(dict(what="train", rows=[row, peer], notes=["a note"]))
    assert page.text(dict(what="loop", rows=[], notes=["skipped: it needs"])).splitlines()[-1] == "skipped: it needs"


def test_results_take_the_place_of_those_of_the_same_command(tmp_path):
    def result(what, command, value):
        return dict(what=what, command=command, rows=[value], notes=[])

    path = tmp_path / "x.json"
    page.store(path, dict(device="a", versions=dict(torch="1")), [result("train", "t", 1), result("loop", "l", 2)])
    page.store(path, dict(device="b", versions=dict(jax="2")), [result("train", "t", 3), result("train", "u", 4)])
    found = json.loads(path.read_text())
    assert [(one["command"], one["rows"]) for one in found["results"]] == [("t", [3]), ("l", [2]), ("u", [4])]
    assert found["machine"] == dict(device="b", versions=dict(torch="1", jax="2"))
