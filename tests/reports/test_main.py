"""The command line of the reports."""

import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.reports.__main__ import main


def test_same_run_twice_is_an_error(run, tmp_path, capsys):
    other, link = run / ".." / run.name, tmp_path / "link"
    link.symlink_to(run)
    for again in (run, other, link):
        assert main([str(run), str(again)]) == 1
        assert capsys.readouterr().err == f"error: {run} and {again} are the same run; give it once\n"
    assert not (tmp_path / "comparison.html").exists()


def test_options_and_errors(run, tmp_path, capsys, unrendered):
    assert (
        main([str(run), "--output", str(tmp_path / "page.html"), "--num_images", "1", "--layers", "1,2", "--heads", "1"]) == 0
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "figures" / "heads_1.png").is_file()
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "no such folder"),
        ([str(run), "--layers", "9"], "there is no layer 9"),
        ([str(run), "--images", "17,100"], "images: there is no image 100; the split test[:100] has images 0 to 99"),
        ([str(run), "--num_images", "0"], "num_images=0: must be at least 1"),
        ([str(run), "--output", str(run / "config.json" / "page.html")], "config.json"),
    ]:
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    for arguments in ([], [str(run), "--layers", "one"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    assert {"--num_images", "--images"} <= set(capsys.readouterr().out.split())


def test_attention_options_need_a_single_run(run, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(run), str(run), "--layers", "1"])
    assert end.value.code == 2 and "need a single run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(run), "--layers", ""])
    assert "expected numbers such as 1,2, got ''" in capsys.readouterr().err


@pytest.mark.parametrize("interrupt", ["raise KeyboardInterrupt", "suppressed()"])
@pytest.mark.parametrize("package", ["vit_jax.reports.page", "jax", "matplotlib"])
def test_interruption_during_imports_is_one_line(package, interrupt):
    """Also if a library suppresses it, as JAX's callback of the garbage collector does."""
    code = f"""
import contextlib, runpy, signal, sys

def suppressed():
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)

class Interrupts:
    def find_spec(self, name, *rest):
        if name == {package!r}:
            {interrupt}

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupts())
sys.argv = ["reports", "nowhere"]
runpy.run_module("vit_jax.reports", run_name="__main__", alter_sys=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_output_without_a_file_name_is_an_error(run, capsys):
    assert main([str(run), "--output", "/"]) == 1
    assert capsys.readouterr().err == "error: output='/': not a file name; give one such as page.html\n"


@pytest.mark.parametrize("content", ['{"seed": %s}' % ("9" * 5000), '{"seed": %s}' % ("[" * 100_000)])  # noqa: UP031
def test_huge_config_values_are_a_one_line_error(run, content, capsys):
    (run / "config.json").write_text(content)
    assert main([str(run)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "config.json" in error and error.count("\n") == 1 and len(error) < 1000
