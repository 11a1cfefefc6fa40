"""The command line of checkpoints: output, files, and errors of one line with a status."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.checkpoints.__main__ import main
from vit_jax.checkpoints.catalogue import PUBLISHED, resolve
from vit_jax.checkpoints.load import load
from vit_jax.errors import CheckpointError
from vit_jax.formats.google import read_meta, read_npz, save_npz
from vit_jax.models.intermediates import stages


def equal(a: Path, b: Path) -> bool:
    left, right = flatten_dict(load(a)[1], sep="/"), flatten_dict(load(b)[1], sep="/")
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_list_shows_names_and_local_files(capsys):
    assert main(["list"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "model", "pixels", "classes", "size", "ImageNet", "here"]
    assert max(map(len, [head, *lines])) <= 100 and len(lines) == len(PUBLISHED)
    assert [resolve(line.split()[0]).name for line in lines] == list(PUBLISHED)
    assert lines[0].split()[-1] == "yes" and not any(line.endswith(("yes", "copy")) for line in lines[1:])
    (best,) = [line for line in lines if line.startswith("B/16-384 ")]
    assert best.split()[1:] == ["B/16", "384", "1,000", "347", "MB", "85.49", "%"]


@pytest.mark.parametrize(("text", "count"), [("b/16-384", 1), ("GSAM", 4), ("R26+S/32", 6), ("nothing", 0)])
def test_list_filter_matches_names_and_architectures(capsys, text, count):
    assert main(["list", "--filter", text]) == 0
    assert capsys.readouterr().out.count("\n") == 1 + count


def test_get_prints_path_and_hash_to_different_streams(capsys):
    assert main(["get", "mini_8"]) == 0
    captured = capsys.readouterr()
    path = Path(captured.out.strip())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == "mini_8.npz" and captured.err.startswith(f"sha256:{digest} (")
    for arguments in (["mini_8", "--sha256", digest.upper()], [f"mini_8@sha256:{digest}"]):
        assert main(["get", *arguments]) == 0
        assert "(as demanded)" in capsys.readouterr().err


def test_demanded_hash_is_checked_for_names_and_paths(capsys, tiny, tmp_path):
    right = hashlib.sha256((tiny / "final.npz").read_bytes()).hexdigest()
    for name in (tiny, tiny / "final.npz"):
        assert main(["inspect", f"{name}@sha256:{right}"]) == 0
        assert main(["check", f"{name}@sha256:{'0' * 64}"]) == 1
    assert main(["get", "mini_8", "--sha256", "0" * 64]) == 1
    message = capsys.readouterr().err
    assert message.count(f"has the SHA-256 {right}, expected {'0' * 64}") == 2 and "mini_8.npz has the SHA-256" in message
    with pytest.raises(CheckpointError, match="has the SHA-256 .*, expected 000"):
        load(f"mini_8@sha256:{'0' * 64}")


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_round_trip_is_exact(capsys, tiny, description, tmp_path, to):
    assert main(["convert", str(tiny), str(tmp_path / "out"), "--to", to]) == 0
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back.npz")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out"), str(tmp_path / "back.npz")]
    assert equal(tiny / "final.npz", tmp_path / "back.npz")
    back = read_meta(tmp_path / "back.npz")
    assert {name: back[name] for name in ("normalization", "image_size", "class_names")} == {
        name: description[name] for name in ("normalization", "image_size", "class_names")
    }


def test_convert_to_bfloat16_rounds_and_keeps_the_description(capsys, tiny, description, tmp_path):
    assert main(["convert", str(tiny), str(tmp_path / "half.npz"), "--dtype", "bfloat16"]) == 0
    about = read_meta(tmp_path / "half.npz")
    assert about == description | {"source": "final.npz", "source_sha256": about["source_sha256"]}
    found, whole = (flatten_dict(read_npz(path), sep="/") for path in (tmp_path / "half.npz", tiny / "final.npz"))
    assert all(np.allclose(found[name], whole[name], rtol=2**-8, atol=0) for name in whole)


def test_convert_takes_the_format_from_the_suffix(capsys, tiny, tmp_path):
    assert main(["convert", str(tiny), str(tmp_path / "x.stablehlo")]) == 0
    assert (tmp_path / "x.stablehlo").stat().st_size > (tiny / "final.npz").stat().st_size / 2


@pytest.mark.parametrize("suffix", [".npz", ".stablehlo"])
def test_description_survives_conversion(capsys, tiny, description, tmp_path, suffix):
    """A rectangle through another form and then to timm; without the head the class names are left out."""
    model, params = load(tiny, image_size=(16, 32))
    save_npz(tmp_path / "wide.npz", params, description | {"image_size": [16, 32]})
    assert main(["convert", str(tmp_path / "wide.npz"), str(tmp_path / f"x{suffix}")]) == 0
    assert main(["convert", str(tmp_path / f"x{suffix}"), str(tmp_path / "out"), "--to", "timm"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == description["class_names"] and config["pretrained_cfg"]["input_size"] == [3, 16, 32]
    assert config["pretrained_cfg"]["mean"] == description["normalization"]["mean"]
    _, again = load(tmp_path / f"x{suffix}", image_size=(16, 32))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))
    assert main(["convert", str(tmp_path / f"x{suffix}"), str(tmp_path / "f.npz"), "--features"]) == 0
    assert "class_names" not in read_meta(tmp_path / "f.npz") and "head" not in read_npz(tmp_path / "f.npz")


FULL = """
import resource, sys
from vit_jax.checkpoints.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(max(main(["convert", sys.argv[1], *arguments]) != 1 for arguments in (
    ["x.npz"], ["x.stablehlo"], ["out", "--to", "timm"], ["out", "--to", "huggingface"])))
"""


def test_full_disk_is_one_error_line_and_leaves_no_file(tiny, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_COMPILATION_CACHE_DIR": ""}
    command = [sys.executable, "-c", FULL, str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment)
    assert done.returncode == 0, done.stderr
    message = done.stderr.splitlines()
    assert message == [f"error: {name}: File too large" for name in ("x.npz", "x.stablehlo", "out", "out")]
    assert not list(here.iterdir())


def test_check_reads_all_values(capsys, tiny):
    assert main(["check", str(tiny)]) == 0
    assert "is whole: 40 arrays of finite values" in capsys.readouterr().out
    content = (tiny / "final.npz").read_bytes()
    (tiny / "final.npz").write_bytes(content[:3000] + bytes(4) + content[3004:])
    assert main(["check", str(tiny)]) == 1
    assert "CRC" in capsys.readouterr().err


@pytest.mark.slow
def test_check_compares_stages_with_an_io_npz(capsys, tiny, tmp_path):
    model, params = load(tiny)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    theirs = {name: np.asarray(value) for name, value in stages(model, params, images).items()}
    np.savez(tmp_path / "io.npz", images=images, **theirs)
    command = ["check", str(tiny), "--against", str(tmp_path / "io.npz")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:-1]] == ["embedding", "block_0", "block_1", "features", "logits"]
    assert printed.splitlines()[-1].endswith("agrees")
    np.savez(tmp_path / "io.npz", images=images, **theirs | {"block_1": theirs["block_1"] * 1.001})
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "block_1     9.99e-04  above 1e-05" in printed and printed.splitlines()[-1].endswith("differs")
    assert main([*command, "--tolerance", "0.01"]) == 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 24, 24, 3), "has images of 24×24 pixels, the positions in .* are for 4 patches of 8×8"),
        ((2, 17, 15, 3), "has images of 17×15 pixels"),
        ((0, 16, 16, 3), "should hold `images`"),
    ],
)
def test_check_refuses_images_of_another_size(capsys, tiny, tmp_path, shape, message):
    np.savez(tmp_path / "io.npz", images=np.zeros(shape, np.float32), features=np.zeros((2, 32), np.float32))
    assert main(["check", str(tiny), "--against", str(tmp_path / "io.npz")]) == 1
    error = capsys.readouterr().err
    assert re.search(f"io.npz {message}", error) and error.count("\n") == 1


def test_onnx_file_is_refused(capsys, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"x")
    assert main(["inspect", str(tmp_path / "x.onnx")]) == 1
    assert "x.onnx: ONNX files can be exported, not loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["get", "B/61"], "no checkpoint is published as 'B/61'; the nearest names: B/16"),
        (
            ["get", "ViT-B_16"],
            "error: no network: ViT-B_16 could not be downloaded: get the file another way, such as `gcloud ",
        ),
        (["get", "mini_8", "--sha256", "12"], "mini_8: @sha256:'12', expected 64 hexadecimal digits"),
        (["inspect", "~no-such-user/x"], "checkpoint='~no-such-user/x': the user '~no-such-user' does not exist; give an abs"),
        (["inspect", "nowhere.npz"], "there is no file nowhere.npz"),
        (["inspect", "{here}"], "a folder without weights"),
        (["convert", "mini_8", "{here}/out"], "give --to timm or --to huggingface"),
        (["convert", "mini_8", "{here}/full", "--to", "timm"], "it exists already"),
        (["convert", "mini_8", "{here}/x.txt", "--to", "google"], "the suffix of a file for google must be .npz"),
        (["check", "mini_8", "--against", "nowhere.npz"], "nowhere.npz"),
        (["check", "mini_8", "--against", "TIMM"], "no peer of that name; the peers are timm, huggingface, original"),
        (["check", "mini_8", "--against", "original"], "--original"),
        (["check", "mini_8", "--original", "x"], "--against original needs --original DIR"),
        (["check", "mini_8", "--tolerance", "nan"], "--tolerance"),
        (["get", "B/16", "--best", "i21k", "--index", "nowhere.csv"], "nowhere.csv cannot be read"),
        (["convert", "mini_8", "{here}/config.npz"], "config.npz: its description would be config.json"),
        (["inspect", "/nowhere/x.npz"], "there is no file /nowhere/x.npz\n"),
    ],
)
def test_error_is_one_line_and_status_one(capsys, tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert main([argument.format(here=tmp_path) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("variable", ["VIT_JAX_MIRROR", "VIT_JAX_CACHE", "XDG_CACHE_HOME", "HF_HOME"])
def test_home_of_an_unknown_user_is_an_error(capsys, monkeypatch, variable):
    if variable == "XDG_CACHE_HOME":
        monkeypatch.delenv("VIT_JAX_CACHE")
    monkeypatch.setenv(variable, "~no-such-user/x")
    assert main(["get", "ViT-B_16"]) == 1
    message = capsys.readouterr().err
    assert re.match(f"error: .*{variable}='~no-such-user/x.*': the user '~no-such-user' does not exist", message)
    assert message.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_standard_output_is_an_error(capsys):
    command = f"{sys.executable} -m vit_jax.checkpoints list > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 1 and done.stderr == "error: standard output: No space left on device\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("package", ["checkpoints", "data"])
def test_signal_during_imports_ends_the_process(tmp_path, number, status, package):
    """The import of numpy is replaced by one that never ends."""
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    arguments = ["inspect", "mini_8"] if package == "checkpoints" else ["show", "cifar100_excerpt"]
    command = [sys.executable, "-m", f"vit_jax.{package}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        message = process.communicate(timeout=20)[1]
    assert process.returncode == status and message in ("interrupted\n", "terminated\n")


def test_list_ends_quietly_when_its_pipe_closes(tmp_path):
    command = f"{sys.executable} -m vit_jax.checkpoints list | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr
