"""The command line, on a model so small that a process can do it all."""

import json
import sys

import pytest

from benchmarks import suites
from benchmarks.__main__ import main, parse
from benchmarks.measure import ContestantError, interleave
from benchmarks.parts import PARTS
from benchmarks.processes import Process, peer

NANO = ["--model", "Nano/8", "--size", "32", "--batch", "8", "--classes", "5", "--rounds", "3"]


def test_figures_and_a_table(pico, tmp_path, capsys):
    output = tmp_path / "x.json"
    whats = ["inference", "train", "evaluation", "input"]
    assert main([*whats, *pico, "--images", "20", "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert "Training step" in shown.out and "of bare forward passes" in shown.out and "round 3 of 3" in shown.err
    found = json.loads(output.read_text())
    assert found["machine"]["device"] == "cpu" and "jax" in found["machine"]["versions"]
    results = {result["what"]: result for result in found["results"]}
    assert list(results) == ["train", "inference", "evaluation", "input"]
    assert {result["command"] for result in results.values()} == {
        f"python -m benchmarks {' '.join([*whats, *pico])} --images 20"  # which leaves out this machine's paths
    }
    train, inference = results["train"]["rows"][0], results["inference"]["rows"][0]
    assert train["flops"] == 3 * inference["flops"] and train["rounds"] == 3
    assert train["images_per_second"] == pytest.approx(8 / train["seconds"])
    assert train["seconds_low"] <= train["seconds"] <= train["seconds_high"]
    assert train["xla_flops"] == pytest.approx(train["flops"], rel=0.15)
    assert train["share_of_rate"] == pytest.approx(train["flops"] / train["seconds"] / train["rate"])
    assert results["evaluation"]["rows"][0]["images"] == 20 and results["input"]["rows"][0]["share"]["median"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["guess"], "nothing called 'guess' to measure; there are train, inference"),
        (["--peer", "jeonsworld"], "no peer 'jeonsworld' to time; there are timm"),
        (["--peer", "timm+fp8"], "timm has no option 'fp8'; it has autotune, bf16"),
        (["--peer", "original"], "--peer original needs --original"),
        (["--attention", "flash"], "--attention flash: there are auto, xla and cudnn"),
        (["--attention", "cudnn"], "add --dtype bfloat16"),
        (["--bach", "8"], "there is no option --bach"),
        (["--batch", "0"], "must be above 0"),
        (["--config.seed=3"], "is for `run`"),
        (["--suite", "gpu", "--only", "train-1"], "there is no part 'train-1'; the suite gpu has train-256"),
        (["--only", "loop"], "name its suite"),
    ],
)
def test_a_command_line_that_cannot_be(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "B/17"], "there is no variant 'B/17'"),
        (["--model", "Nano/8", "--size", "33"], "--size 33: Nano/8 divides an image into patches of 8 pixels"),
        (["--model", "Nano/8", "--size", "33", "--peer", "timm"], "--size 33"),
        (["--model", "Nano/8", "--size", "32", "--batch", "9"], "does not divide among"),
    ],
)
def test_work_that_cannot_be_done(arguments, message, capsys):
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_left_out(tmp_path, capsys, monkeypatch):
    (tmp_path / "timm.py").write_text("raise ImportError('not here')")
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    command = ["-c", f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = sys.argv[1:]; "
                     "runpy.run_path(sys.argv[0], run_name='__main__')"]  # fmt: skip
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} {command[0]} "{command[1]}" "$@"\n')
    fake.chmod(0o755)
    output = tmp_path / "x.json"
    assert main(["inference", *NANO, "--peer", "timm", "--peer-python", str(fake), "--output", str(output)]) == 0
    found = json.loads(output.read_text())["results"][0]
    assert [row["name"] for row in found["rows"]] == ["vit_jax"]  # in a process of its own
    assert found["notes"] == ["timm is not in it: timm cannot be imported here (not here): pip install torch torchvision timm"]
    assert found["notes"][0] in capsys.readouterr().out


def script(*lines):
    return [sys.executable, "-c", "import json, os, sys, time\n" + "\n".join(lines)]


READY = "print(json.dumps({'ready': True}), flush=True)"
LOOP = "for line in sys.stdin: print(json.dumps({'seconds': 0.5 * int(line)}), flush=True)"


def test_a_process_answers():
    process = Process("it", script(READY, LOOP))
    assert process(3) == 1.5
    process.close()
    with pytest.raises(Exception):  # noqa: B017 (it is closed)
        process(1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["sys.exit('nothing to see')"], "it ended with status 1: nothing to see"),
        (["print('it cannot be imported here: pip install it', file=sys.stderr); sys.exit(2)"], "^it cannot be imported here"),
        (["os.kill(os.getpid(), 9)"], "it was killed by signal 9"),
        (["time.sleep(60)"], "it did not answer within 1 s"),
        ([READY, "input()", "raise RuntimeError('out of memory')"], "it ended with status 1: RuntimeError: out of memory"),
        ([READY, "input()", "print(json.dumps({'seconds': 1.0}), flush=True)", "input(); os._exit(7)"], "ended with status 7"),
    ],
)
def test_a_process_that_ends_says_why(lines, message):
    with pytest.raises(ContestantError, match=message):
        process = Process("it", script(*lines), limit=1.0 if "sleep" in lines[0] else 20)
        try:
            for _ in range(3):
                process(1)
        finally:
            process.close()


def test_a_process_that_dies_among_others():
    dies = Process("dies", script(READY, "input()", "print(json.dumps({'seconds': 1.0}), flush=True)"))
    lives = Process("lives", script(READY, LOOP))
    timings, failures = interleave({"lives": lives, "dies": dies}, 3, say=lambda text: None)
    assert failures == {"dies": "dies ended with status 0"} and timings["lives"].median == 0.5
    lives.close()
    dies.close()


def test_the_peers_command_names_no_package_of_ours():
    command = peer("timm+bf16", {"kind": "train"}, "python3", "there")
    assert command[:2] == ["python3", "-P"] and command[2].endswith("peers.py")
    assert command[3:5] == ["time", "timm+bf16"] and command[-2:] == ["--original", "there"]


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_part_of_a_suite_is_a_command(suite):
    for arguments, limit in suites.SUITES[suite].values():
        options = parse(arguments.replace("{,original}", "").split())
        assert options.what and set(options.what) <= PARTS.keys() and limit <= 3600
    if suite == "gpu":  # none is cut off by a call of ten minutes
        assert max(limit for _, limit in suites.SUITES[suite].values()) < 600


def test_a_suite_goes_on_behind_a_part_that_fails(tmp_path, monkeypatch, capsys):
    parts = {"bad": ("train --model B/17", 60), "slow": ("loop", 0.2), "good": (f"inference {' '.join(NANO)}", 100)}
    monkeypatch.setitem(suites.SUITES, "cpu", parts)
    output = tmp_path / "cpu.json"
    assert main(["--suite", "cpu", "--output", str(output)]) == 1
    results = json.loads(output.read_text())["results"]
    assert [(result["command"].split()[3], bool(result["rows"])) for result in results] == [
        ("train", False), ("loop", False), ("inference", True)
    ]  # fmt: skip
    assert results[0]["notes"] == ["failed: ended with status 2"] and results[1]["notes"] == ["failed: took more than 0.2 s"]
    assert "failed: bad, slow" in capsys.readouterr().err
    assert suites.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
