"""Peers as contestants: each in a process of its own, driven as the benchmark drives them."""

import dataclasses
import json
import subprocess
import sys

import pytest

from benchmarks.measure import ContestantError
from benchmarks.ours import Work
from benchmarks.processes import Process, environment, peer

WORK = Work("train", "Nano/8", 16, 2, 5)


def started(name, work=WORK, original=""):
    alone = environment(XLA_FLAGS="", JAX_NUMPY_RANK_PROMOTION="allow")
    return Process(name, peer(name, work.for_peers(), original=original), 120, alone)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("timm", "train"), ("timm+bf16+channels_last", "train"), ("timm", "inference"), ("transformers", "train"),
     ("transformers+bf16", "inference"), ("original", "train"), ("original", "inference")],
)  # fmt: skip
def test_a_peer_runs(name, kind, request):
    package = name.split("+")[0]
    checkout = request.getfixturevalue(package)
    work = dataclasses.replace(WORK, kind=kind)
    process = started(name, work, str(checkout) if package == "original" else "")
    try:
        assert process(1) > 0 and process(2) > 0
        about = process.about()
        assert about["memory"] > 2**20 and about["device"] == "cpu"
        assert ("jax" if package == "original" else package) in about["versions"]
    finally:
        process.close()


def test_what_a_peer_does_not_have(timm):
    with pytest.raises(ContestantError, match="timm is timed on Vision Transformers without ResNet"):
        started("timm", Work("train", "R+Ti/16", 32, 2, 5))


def test_side_by_side_from_the_command_line(timm, tmp_path):
    output = tmp_path / "x.json"
    command = [sys.executable, "-m", "benchmarks", "train", "--model", "Nano/8", "--size", "16", "--batch", "2"]
    command += ["--classes", "5", "--rounds", "6", "--peer", "timm,timm+bf16", f"--output={output}"]
    for apart in ([], ["--apart"]):
        done = subprocess.run([*command, *apart], env=environment(XLA_FLAGS=""), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        *_, found = json.loads(output.read_text())["results"]
        assert [row["name"] for row in found["rows"]] == ["vit_jax", "timm", "timm+bf16"] and found["notes"] == []
        ratio = found["rows"][1]["ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert "times ours" in done.stdout and {row["rounds"] for row in found["rows"]} == {6}
