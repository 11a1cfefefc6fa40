"""The command line."""

import json

import pytest

from benchmarks import __main__ as command
from benchmarks.__main__ import main, parse
from benchmarks.measure import Result
from benchmarks.parts import LIMITS, PARTS, SUITES

NANO = ["--model", "Nano/8", "--size", "32", "--batch", "8", "--rounds", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["guess"], "WHAT: 'guess' is not one of: train, inference"),
        (["--peer", "jeonsworld"], "--peer: 'jeonsworld' is not one of: timm, original"),
        (["--peer", "timm+fp8"], "--peer timm: 'fp8' is not one of: bf16, compile"),
        (["--peer", "original"], "--peer original needs --original"),
        (["--attention", "flash"], "--attention: 'flash' is not one of: auto, xla, cudnn"),
        (["--attention", "cudnn"], "add --dtype bfloat16"),
        (["--bach=8"], "unrecognized arguments: --bach=8"),
        (["--batch", "0"], "must be a whole number above 0, got '0'"),
        (["--suite", "gpu", "--only", "train-1"], "--only: 'train-1' is not one of: train-256"),
        (["--only", "loop"], "'loop' is not one of: the parts of a --suite"),
    ],
)
def test_wrong_option_is_an_error(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "B/17"], "failed: there is no variant 'B/17'"),
        (["--model", "Nano/8", "--size", "33"], "failed: --size 33: Nano/8 divides an image into patches of 8 pixels"),
        (["--model", "Nano/8", "--size", "33", "--peer", "timm"], "failed: --size 33"),
    ],
)
def test_impossible_work_is_an_error(arguments, message, capsys):
    assert main(["train", *arguments]) == 1
    assert message in capsys.readouterr().out


def test_results_are_printed_and_stored(tmp_path, monkeypatch, capsys):
    def loop(options):
        row = dict(steps=options.steps, seconds=2.0, mean=2.0, steps_per_second=0.5, alone=1.5, overhead=0.5)
        return Result([row], ["a note"], {"torch": "1.0"})

    monkeypatch.setitem(PARTS, "loop", loop)
    output = tmp_path / "x.json"
    assert main(["loop", "--steps", "7", "--original", "/a/checkout", f"--output={output}", "--peer-python=/a/python"]) == 0
    assert "| 7 | 0 | 2000.000 (median 2000.000) | 1500.000 | 500.000 |\na note\n" in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["machine"]["device"] == "cpu" and found["machine"]["versions"].keys() >= {"jax", "torch"}
    (result,) = found["results"]
    assert result["command"] == "python -m benchmarks loop --steps 7" and result["rows"][0]["steps"] == 7


def test_failed_part_is_stored_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    def fails(options):
        raise ValueError("it does not run")

    monkeypatch.setitem(PARTS, "startup", fails)
    monkeypatch.setitem(PARTS, "loop", lambda options: Result([], ["skipped"]))
    output = tmp_path / "x.json"
    assert main(["loop", "startup", "--output", str(output)]) == 1
    found = json.loads(output.read_text())["results"]
    assert [result["notes"] for result in found] == [["failed: it does not run"], ["skipped"]]


@pytest.mark.parametrize("suite", SUITES)
def test_every_part_of_a_suite_is_a_command(suite):
    for arguments in SUITES[suite].values():
        assert set(parse([*arguments.split(), "--original=checkout"]).what) <= PARTS.keys()
    limit, total = LIMITS[suite]
    assert limit < total
    if suite == "gpu":
        assert limit < 600 and total <= 25 * 60  # a part fits into a call of ten minutes


@pytest.mark.slow
def test_suite_continues_after_a_part_that_fails(tmp_path, monkeypatch, capsys):
    parts = {"bad": "train --model B/17", "slow": "loop --steps 100000000", "good": f"evaluation {' '.join(NANO)} --images 8"}
    monkeypatch.setitem(SUITES, "cpu", parts)
    monkeypatch.setitem(LIMITS, "cpu", (60, 600))
    output = tmp_path / "cpu.json"
    assert main(["--suite", "cpu", "--only", "bad,good", "--output", str(output)]) == 1
    results = json.loads(output.read_text())["results"]
    assert [(result["command"].split()[3], bool(result["rows"])) for result in results] == [
        ("train", False),
        ("evaluation", True),
    ]
    assert results[0]["notes"][0].startswith("failed: there is no variant 'B/17'")
    assert "failed: bad\n" in capsys.readouterr().err
    monkeypatch.setitem(LIMITS, "cpu", (0.2, 600))
    assert main(["--suite", "cpu", "--only", "slow", "--output", str(output)]) == 1
    assert "failed: slow\n" in capsys.readouterr().err


def test_page_option_writes_the_page(tmp_path, monkeypatch):
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    path = tmp_path / "docs" / "performance.md"
    path.write_text("text\n<!-- results -->\nold\n<!-- /results -->\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert main(["--page"]) == 0
    assert "old" not in path.read_text() and path.read_text().startswith("text\n")
