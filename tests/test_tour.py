"""docs/tour.ipynb: what it says is so, and what is committed is what was written, not what a run left in it.

Its cells are plain Python, so that they run here without a kernel, which would cost 130 MB of packages.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.config_files import read

ROOT = Path(__file__).parents[1]

# Runs cells, name → source, in one namespace as a notebook does, and inside a running event loop, as kernels do: what starts
# one of its own fails there. The last line printed is JSON: what each cell displays, and some of what they found.
RUN = """
import ast, asyncio, json, sys

async def run(cells):
    for cell, source in cells.items():
        body = ast.parse(source).body
        last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else ast.parse("None", mode="eval")
        exec(compile(ast.Module(body, []), cell, "exec"), names)
        yield cell, type(eval(compile(last, cell, "eval"), names)).__name__

async def main(cells):
    return {cell: shown async for cell, shown in run(cells)}

names = {"__name__": "__main__"}
shown = asyncio.run(main(json.load(sys.stdin)))
found = {name: float(names[name]) for name in ("by_features", "by_pixels", "gap")}
found["moved"] = float(abs(names["after"] - names["before"]).mean())
training = names["config"].training
found |= {"accuracy": names["result"].metrics["test/accuracy"], "steps": training.steps, "batch": training.batch_size}
print(json.dumps({"shown": shown, "run": str(names["run"]), **found}))
"""


@pytest.fixture(scope="module")
def tour() -> dict:
    return json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))


def sources(tour: dict, kind: str) -> dict[str, str]:
    """Name → source of the cells of a kind, in order."""
    return {cell["id"]: "".join(cell["source"]) for cell in tour["cells"] if cell["cell_type"] == kind}


def test_nothing_that_a_run_leaves_is_committed(tour):
    assert set(tour) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (tour["nbformat"], tour["nbformat_minor"]) == (4, 5)  # the first whose cells have names
    assert tour["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    names = [cell["id"] for cell in tour["cells"]]
    assert len(set(names)) == len(names)
    for cell in tour["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("folder", [".", "docs"])
def test_it_finds_the_clone_that_it_lies_in(tour, folder, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {}
    exec(sources(tour, "code")["root"], names)
    assert names["root"] == ROOT and sys.path[0] == str(ROOT)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_what_it_says_is_so(tour):
    cells, text = sources(tour, "code"), "\n".join(sources(tour, "markdown").values())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(cells),
        cwd=ROOT / "docs",
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": ""},  # it is to find the package itself
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    assert list(found["shown"]) == list(cells)
    images = [cell for cell, shown in found["shown"].items() if shown == "PngImageFile"]
    assert images == ["load", "images", "attention", "heads", "curves", "tuned", "predictions"]
    assert set(found["shown"].values()) == {"PngImageFile", "NoneType"}

    assert "in about two cases of three" in " ".join(text.split()) and 0.62 < found["by_features"] < 0.72
    assert "it would be four in ten" in text and 0.35 < found["by_pixels"] < 0.45
    demo = read(str(ROOT / "configs" / "demo.py")).training
    assert f"from {demo.steps} steps of {demo.batch_size} images to {found['steps']} of {found['batch']}" in text
    assert found["accuracy"] > 0.6
    assert "hardly change where the model looks" in text and 0 < found["moved"] < 0.1  # of rollouts whose largest value is 1
    assert found["gap"] < 1e-6
    assert "the same weights, read back: True" in done.stdout
    assert not Path(found["run"]).exists()  # gone with the process
    # Of a processor, so that what else this machine does is not counted: 90 s of two cores.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180
