"""docs/tour.ipynb: its code runs, its text is true, and its stored outputs are small and free of machine details.

The cells are plain Python, so that they run here without a Jupyter kernel, which would need 130 MB of packages. After a change
of the notebook, `python tests/test_tour.py` runs it and stores its outputs again.
"""

import base64
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
IMAGES = ["load", "images", "attention", "heads", "curves", "tuned", "predictions"]  # cells that display an image
TEXTS = ["load", "features", "train", "classify"]  # cells that print

# Runs cells, id → source, in one namespace, as a notebook does, and inside a running event loop, as kernels do: code that
# starts its own event loop fails there. The last line printed is JSON: the outputs of each cell, and values from the text.
RUN = """
import ast, asyncio, base64, contextlib, io, json, sys

async def run(cells):
    for cell, source in cells.items():
        body = ast.parse(source).body
        last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else ast.parse("None", mode="eval")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(ast.Module(body, []), cell, "exec"), names)
            value = eval(compile(last, cell, "eval"), names)
        file = io.BytesIO()
        if value is not None:
            value.save(file, "png")
        png = base64.b64encode(file.getvalue()).decode()
        yield cell, {"kind": type(value).__name__, "text": printed.getvalue(), "png": png}

async def main(cells):
    return {cell: outputs async for cell, outputs in run(cells)}

names = {"__name__": "__main__"}
cells = asyncio.run(main(json.load(sys.stdin)))
values = {name: float(names[name]) for name in ("by_features", "by_pixels", "gap")}
values["change"] = float(abs(names["after"] - names["before"]).mean())
training = names["config"].training
values |= {"accuracy": names["result"].metrics["test/accuracy"], "steps": training.steps, "batch": training.batch_size}
print(json.dumps({"cells": cells, "run": str(names["run"]), **values}))
"""


def read_notebook() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def sources(notebook: dict, kind: str) -> dict[str, str]:
    """Id → source of the cells of a kind, in order."""
    return {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind}


def run_cells(cells: dict[str, str], **environment: str) -> dict[str, Any]:
    """Runs the cells in a new process, in the notebook's folder; returns the last line of RUN, and "stderr"."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(cells),
        cwd=NOTEBOOK.parent,
        env={**os.environ, **environment, "PYTHONPATH": ""},  # the notebook must find the package itself
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def stored_outputs(text: str, png: str, number: int) -> list[dict[str, Any]]:
    """The outputs of a cell as nbformat 4.5 stores them."""
    outputs: list[dict[str, Any]] = []
    if text:
        outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    if png:
        data = {"image/png": png, "text/plain": ["<PIL.PngImagePlugin.PngImageFile>"]}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


@pytest.fixture(scope="module")
def tour() -> dict:
    return read_notebook()


def test_notebook_has_no_machine_details(tour):
    assert set(tour) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (tour["nbformat"], tour["nbformat_minor"]) == (4, 5)  # the first version with ids of cells
    assert tour["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    ids = [cell["id"] for cell in tour["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(cell["metadata"] == {} for cell in tour["cells"])
    for cell in tour["cells"]:
        text = "".join("".join(output.get("text", ())) for output in cell.get("outputs", ()))
        assert not any(folder in text for folder in ("/home", "/root", "/tmp", "/work", str(ROOT)))


def test_notebook_has_its_outputs(tour):
    assert NOTEBOOK.stat().st_size < 1_500_000
    code = [cell for cell in tour["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {cell["id"]: [output["output_type"] for output in cell["outputs"]] for cell in code}
    assert [cell for cell, found in kinds.items() if "execute_result" in found] == IMAGES
    assert [cell for cell, found in kinds.items() if "stream" in found] == TEXTS
    for cell in code:
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                assert base64.b64decode(output["data"]["image/png"]).startswith(b"\x89PNG")


@pytest.mark.parametrize("folder", [".", "docs"])
def test_notebook_finds_its_clone(tour, folder, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {}
    exec(sources(tour, "code")["root"], names)
    assert names["root"] == ROOT and sys.path[0] == str(ROOT)


@pytest.mark.slow
def test_notebook_runs_and_its_text_is_true(tour):
    from vit_jax.config_files import read

    cells, text = sources(tour, "code"), " ".join("\n".join(sources(tour, "markdown").values()).split())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = run_cells(cells, XLA_FLAGS="")  # optimised, on one device: it trains more than it compiles
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Warning" not in found["stderr"]

    assert list(found["cells"]) == list(cells)
    assert {outputs["kind"] for outputs in found["cells"].values()} == {"PngImageFile", "NoneType"}
    assert [cell for cell, outputs in found["cells"].items() if outputs["kind"] == "PngImageFile"] == IMAGES
    assert [cell for cell, outputs in found["cells"].items() if outputs["text"]] == TEXTS

    assert "in about two cases of three" in text and 0.62 < found["by_features"] < 0.72
    assert "it would be four in ten" in text and 0.35 < found["by_pixels"] < 0.45
    demo = read(str(ROOT / "configs" / "demo.py")).training
    assert f"from {demo.steps} steps of {demo.batch_size} images to {found['steps']} of {found['batch']}" in text
    assert found["accuracy"] > 0.6
    assert "Twenty steps hardly change where the model looks" in text and found["steps"] == 20
    assert 0 < found["change"] < 0.1  # of rollouts whose largest value is 1
    assert found["gap"] < 1e-6
    assert "the same weights, read back: True" in found["cells"]["classify"]["text"]
    assert not Path(found["run"]).exists()  # removed when the process ends
    # Processor time, which does not depend on what else the machine does: 90 s of two cores.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180


def store_outputs() -> None:
    """Runs the notebook and stores its outputs, with compressed images."""
    from PIL import Image

    notebook = read_notebook()
    found = run_cells(sources(notebook, "code"), JAX_PLATFORMS="cpu")["cells"]
    for number, cell in enumerate((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), 1):
        png = found[cell["id"]]["png"]
        if png:
            file = io.BytesIO()
            Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").save(file, "png", optimize=True)
            png = base64.b64encode(file.getvalue()).decode()
        cell["outputs"], cell["execution_count"] = stored_outputs(found[cell["id"]]["text"], png, number), number
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    store_outputs()
