"""The command line of prediction: every image is classified or named in an error."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax import images
from vit_jax.errors import ImageError
from vit_jax.predict.__main__ import _DRAWN_SIZE, main

from .conftest import NAMES, save

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(noise, tmp_path):
    """A folder with three images, one of them in a subfolder, and two bad files."""
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "c.png", "deep/d.png"):
        Image.fromarray(noise(20, 40)).save(tmp_path / name)
    (tmp_path / "b.jpg").write_text("no image")
    (tmp_path / "e.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    return tmp_path


def test_every_image_is_classified_or_named_in_an_error(run, classify, folder, capsys):
    good = [str(folder / name) for name in ("a.png", "c.png", "deep/d.png")]
    assert main(["--checkpoint", str(run), "--json", "--top", "3", str(folder), str(folder / "none.png")]) == 1
    out, error = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == good
    for line, expected in zip(lines, classify(good, top=3), strict=True):
        assert [found["name"] for found in line["predictions"]] == [name for name, _ in expected]
        np.testing.assert_allclose([found["probability"] for found in line["predictions"]], [p for _, p in expected], atol=1e-6)
    said = error.splitlines()
    assert len(said) == 3 and all(line.startswith("error: ") for line in said)
    assert (
        f"{folder}/b.jpg is not an image" in said[0] and f"{folder}/e.png cannot be read" in said[1] and "none.png" in said[2]
    )


def test_text_lists_the_top_classes(run, classify, folder, capsys):
    assert main(["--checkpoint", str(run), str(folder / "a.png"), str(folder / "c.png"), "--top", "2"]) == 0
    out, error = capsys.readouterr()
    ((first, share), _), _ = classify([folder / "a.png", folder / "c.png"], top=2)
    assert out.splitlines()[:2] == [str(folder / "a.png"), f"{share:8.2%}  {first}"]
    assert len(out.splitlines()) == 6 and error == ""


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_small_batches_classify_all_images(run, folder, capsys, batch_size):
    assert main(["--checkpoint", str(run), "--json", "--batch_size", batch_size, str(folder)]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_standard_input_is_an_image(run, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "a.png").read_bytes())))
    assert main(["--checkpoint", str(run), "-", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["image"] == "standard input" and {found["name"] for found in line["predictions"]} < set(NAMES)
    assert main(["--checkpoint", str(run), "-"]) == 1
    assert capsys.readouterr().err == "error: standard input is empty\n"


def test_closed_streams_are_an_error(run, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["--checkpoint", str(run), "-"]) == 1
    assert capsys.readouterr().err == "error: standard input is closed\n"
    with monkeypatch.context() as closed:
        closed.setattr(sys, "stdout", None)
        assert main(["--checkpoint", str(run), str(folder / "a.png")]) == 1
    assert capsys.readouterr().err == "error: standard output is closed\n"


@pytest.mark.parametrize("package", ["jax", "PIL"])
@pytest.mark.parametrize("interrupt", ["raise KeyboardInterrupt", "lost()"])
def test_interruption_during_imports_prints_no_traceback(package, interrupt):
    """Also if a library catches it, as JAX's callback of the garbage collector does."""
    code = f"""
import contextlib, runpy, signal, sys

def lost():
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)

class Interrupts:
    def find_spec(self, name, *rest):
        if name == {package!r}:
            {interrupt}

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupts())
sys.argv = ["predict", "--checkpoint", "none.npz", "none.png"]
runpy.run_module("vit_jax.predict", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_image_removed_before_it_is_drawn_is_an_error(run, folder, capsys, monkeypatch):
    read = images.open_image

    def open_image(source, size, name, **options):
        if size == (_DRAWN_SIZE, _DRAWN_SIZE):
            raise ImageError(f"{name} does not exist")
        return read(source, size, name, **options)

    monkeypatch.setattr(images, "open_image", open_image)
    assert main(["--checkpoint", str(run), str(folder / "a.png"), "--attention", str(folder / "x.png")]) == 1
    assert capsys.readouterr().err == f"error: {folder}/a.png does not exist\n"


def test_attention_is_written_as_png(run, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "a.png").read_bytes())))
    out = folder / "new" / "attention.png"
    assert main(["--checkpoint", str(run), str(folder), "-", "--attention", str(out)]) == 1
    assert len([line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]) == 4
    with Image.open(out) as image:
        assert image.format == "PNG" and min(image.size) > 300
    assert [path.name for path in out.parent.iterdir()] == ["attention.png"]


def test_attention_of_a_model_without_class_token_is_an_error(folder, tmp_path, capsys):
    path = save(tmp_path / "gap.npz", classifier="gap")
    assert main(["--checkpoint", str(path), str(folder), "--attention", str(tmp_path / "x.png")]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and "no class token" in error and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x.png", "--top", "0"], "argument --top: must be a whole number of at least 1, got '0'"),
        (["x.png", "--batch_size", "x"], "argument --batch_size: must be a whole number of at least 1, got 'x'"),
        (["x.png", "--attention", "x.jpg"], "argument --attention: must end in .png, got 'x.jpg'"),
        ([f"{number}.png" for number in range(65)] + ["--attention", "x.png"], "draws at most 64 images, got 65"),
        ([], "the following arguments are required: IMAGE"),
        ([""], "--checkpoint and images must not be empty"),
        (["x.png", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_command_line_is_status_2(run, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", str(run), *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_missing_checkpoint_is_an_error(folder, capsys):
    assert main(["--checkpoint", str(folder / "none.npz"), str(folder)]) == 1
    assert main(["--checkpoint", str(folder), str(folder)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: there is no file ") and "is a folder without weights" in second


def test_full_standard_error_keeps_the_answers(run, folder):
    command = [sys.executable, "-m", "vit_jax.predict", "--checkpoint", str(run), "--json", str(folder)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 3


def test_probabilities_that_are_not_finite_are_an_error(run, folder, tmp_path, capsys):
    flat = {name: leaf * np.float32(1e38) for name, leaf in np.load(run / "final.npz").items()}
    np.savez(tmp_path / "x.npz", **flat)
    shutil.copy(run / "final.json", tmp_path / "x.json")
    assert main(["--checkpoint", str(tmp_path / "x.npz"), "--json", str(folder / "a.png")]) == 1
    out, error = capsys.readouterr()
    assert out == "" and "probabilities are not finite" in error


def test_names_are_printed_without_control_characters(run, folder, capsys):
    name = folder / "a\x1b[31m\u202e.png"
    shutil.copy(folder / "a.png", name)
    assert main(["--checkpoint", str(run), str(name), str(folder / "\x07none.png")]) == 1
    out, error = capsys.readouterr()
    assert "\\x1b[31m\\u202e.png" in out and "\\x07none.png" in error and not {"\x1b", "\u202e", "\x07"} & {*out, *error}


def test_warnings_about_weights_print_names_without_control_characters(folder, capsys, caplog):
    path = save(folder / "bare\x1b[31m\u202e.npz", None)
    out = folder / "x\x1b.png"
    assert main(["--checkpoint", str(path), str(folder / "a.png"), "--attention", str(out)]) == 0
    said = "".join(caplog.messages) + capsys.readouterr().err
    assert said.count("bare\\x1b[31m\\u202e.npz") == 2 and "attention: " in said and not {"\x1b", "\u202e"} & {*said}


def test_folder_without_images_is_an_error(run, tmp_path, capsys):
    assert main(["--checkpoint", str(run), str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} is a folder without images\n"


def test_closed_pipe_is_no_error(run, folder):
    command = [sys.executable, "-m", "vit_jax.predict", "--checkpoint", str(run), "--batch_size", "1", "--json"]
    process = subprocess.Popen(
        [*command, *100 * [str(folder / "a.png")]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert json.loads(process.stdout.readline())["image"] == str(folder / "a.png")
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0 and error == ""
