"""The page that compares several runs."""

import logging
import shutil
import statistics

import pytest

from tests.reports.pages import Page, edit, read_lines, write_lines
from vit_jax.errors import ReportError
from vit_jax.reports import comparison
from vit_jax.reports.page import write


def test_comparison_shows_results_and_settings(run, tmp_path, unrendered):
    runs, finals = [run], []
    for seed in (4, 5):
        runs.append(shutil.copytree(run, tmp_path / f"tiny-{seed}"))
        edit(runs[-1], seed=seed)
    other = shutil.copytree(run, tmp_path / "other")
    edit(other, optimizer__learning_rate=0.5)
    for number, folder in enumerate(runs):
        lines = read_lines(folder)
        lines[-1]["test/accuracy"] = 0.5 + 0.1 * number
        finals.append(100 * lines[-1]["test/accuracy"])
        write_lines(folder, lines)
    path = write(*runs, other)
    assert path == tmp_path / "comparison.html"
    page = Page(path)
    assert len(page.images) == 1 and all(address.startswith("data:") for address in page.addresses)
    assert f"{statistics.mean(finals):.2f} ± {statistics.stdev(finals):.2f} %" in page.text
    assert "of 3 runs that differ only in the seed (tiny, tiny-4, tiny-5)" in page.text
    assert "optimizer.learning_rate 0.03 tiny, tiny-4, tiny-5 0.5 other" in page.text
    assert "seed 3 tiny, other 4 tiny-4 5 tiny-5" in page.text
    assert "data.task" not in page.text
    assert "tiny-5 70.00 %" in page.text


def test_copies_and_unfinished_runs_are_not_averaged(run, tmp_path, unrendered):
    copy, begun = (shutil.copytree(run, tmp_path / name) for name in ("copy", "begun"))
    edit(begun, seed=9)
    (begun / "metrics.jsonl").unlink()
    page = Page(write(run, copy, begun, output=tmp_path / "page.html"))
    assert "±" not in page.text and "begun – – – – 0/12 –" in page.text
    assert "No setting that changes the numbers differs" in Page(write(run, copy)).text


def test_runs_of_different_splits_are_in_different_tables(run, tmp_path, unrendered):
    other = edit(shutil.copytree(run, tmp_path / "other"), data__test_split="train[90%:]")
    same = shutil.copytree(run, tmp_path / "same")
    text = Page(write(run, other, output=tmp_path / "different.html")).text
    assert "do not compare numbers of different tables" in text and "accuracy on train[90%:]" in text
    text = Page(write(run, same, output=tmp_path / "same.html")).text
    assert "do not compare" not in text and "top-5" in text


def test_runs_of_different_splits_are_in_different_figures(run, tmp_path, monkeypatch, unrendered):
    drawn = []
    real = comparison.learning_curves
    monkeypatch.setattr(
        comparison,
        "learning_curves",
        lambda runs, label, *split: (drawn.append((list(runs), label)), real(runs, label, *split))[1],
    )
    other = edit(shutil.copytree(run, tmp_path / "other"), data__test_split="train[90%:]")
    write(run, other, output=tmp_path / "page.html")
    assert drawn == [(["tiny"], "accuracy on test[:100]"), (["other"], "accuracy on train[90%:]")]


def test_pages_among_the_runs_are_left_out_with_a_warning(run, tmp_path, caplog, unrendered):
    shutil.copytree(run, tmp_path / "other")
    page = write(run, tmp_path / "other")
    assert page == tmp_path / "comparison.html" and caplog.messages == []
    with caplog.at_level(logging.WARNING, "vit_jax"):
        assert write(*sorted(tmp_path.iterdir())) == page  # as `python -m vit_jax.reports runs/*` does
    assert caplog.messages == [f"{page} is left out: it is a page and not the folder of a run"]
    with pytest.raises(ReportError, match="runs: no folder of a run is given"):
        write(page)


def test_runs_with_a_validation_split_name_both_splits_in_the_table(run, tmp_path):
    other = edit(shutil.copytree(run, tmp_path / "other"), data__validation_split="train[90%:]")
    page = write(run, other, output=tmp_path / "page.html").read_text()
    assert "<th>final test</th>" in page and "<th>best validation</th>" in page and "<th>final</th>" in page


def test_runs_that_are_tested_on_other_images_are_in_different_tables(run, tmp_path):
    others = [
        edit(shutil.copytree(run, tmp_path / "a"), data__validation_split="train[90%:]"),
        edit(shutil.copytree(run, tmp_path / "b"), data__validation_split="train[90%:]", data__test_split="train[:10%]"),
        edit(shutil.copytree(run, tmp_path / "c"), data__test_split="train[90%:]"),
    ]
    page = write(*others, output=tmp_path / "page.html").read_text()
    assert page.count('class="numbers runs"') == 3 and "tested on different data" in page
