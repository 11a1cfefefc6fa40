"""Pages in a real browser."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.reports.pages import FIGURES, Page, edit, figure_files, write_lines
from vit_jax.checkpoints.load import load
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import TASKS
from vit_jax.formats.google import save_npz
from vit_jax.reports import sections
from vit_jax.reports.markup import figure_html
from vit_jax.reports.page import write
from vit_jax.reports.runs import read_run


def check_layout(browser, page: Path) -> None:
    """Checks that a page fits its window, as wide as a phone and as a desktop screen, and asks for no other file."""
    for width in (390, 1400):
        browser.console(), browser.requests()
        browser.open(page, width)
        assert browser.ask("return document.documentElement.clientWidth") == width
        count, broken = browser.ask(
            "const all = [...document.images]; return [all.length, all.filter(i => !i.complete || !i.naturalWidth).length]"
        )
        assert count and not broken
        outside = browser.ask(
            "return [...document.querySelectorAll('body *')].filter(e => { const b = e.getBoundingClientRect();"
            " return b.right > innerWidth + 0.5 || b.left < -0.5 }).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"
        )
        assert outside == []
        assert browser.ask("return document.documentElement.scrollWidth") <= width
        # An element that needs scrolling is cut off in print.
        scrolled = browser.ask(
            "return [...document.querySelectorAll('div')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"
        )
        assert scrolled == []
        assert browser.console() == []
        asked = browser.requests()
        assert page.as_uri() in asked
        assert {address.partition(":")[0] for address in asked if address != page.as_uri()} <= {"data"}


@pytest.mark.slow
def test_page_fits_the_window(run, browser):
    check_layout(browser, write(run, layers=[1]))


def test_page_with_long_notices_fits_the_window(run, browser):
    edit(run, model__checkpoint="a/path/that/is/long/" * 8 + "start.npz", data__task="cifar100", run__data_dir="/nowhere/" * 20)
    for name in ("metrics.jsonl", "predictions.npz", "final.npz", "best.npz"):
        (run / name).unlink()
    write_lines(run, [{"step": 1, "train/loss": 2.5}])
    check_layout(browser, write(run))


def test_comparison_of_runs_with_long_names_fits_the_window(run, browser):
    runs = []
    for number in range(10):
        runs.append(shutil.copytree(run, run.with_name(f"a-run-that-has-a-rather-long-name-{'as-sweeps-give-' * 5}{number}")))
        edit(runs[-1], seed=number, optimizer__learning_rate=0.01 * (number % 3 + 1), training__steps=100_000 if number else 12)
    check_layout(browser, page := write(*runs))
    assert all(folder.name in Page(page).text for folder in runs)


def make_long_run(run: Path, task: str, image_size: int, data_dir: str = "") -> None:
    """Turns the run into one of 1,000 steps on a whole task: images and labels are real, metrics and predictions are drawn."""
    edit(run, data__task=task, data__image_size=image_size, data__train_split="", data__test_split="", run__data_dir=data_dir)
    edit(run, model__checkpoint="mini_8", training__steps=1000, training__batch_size=64)
    source = open_split(TASKS[task], "test", data_dir)
    _, params = load("mini_8", num_classes=source.num_classes, image_size=image_size)
    save_npz(run / "final.npz", params, {"class_names": source.class_names})
    _, labels = source.take(np.arange(len(source)))
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(len(source), source.num_classes)).astype(np.float32)
    logits[np.arange(len(source)), labels] += draw.uniform(1, 5, len(source))
    np.savez(run / "predictions.npz", logits=logits, labels=labels)
    losses = [4 / step + draw.normal() / 10 for step in range(1, 1001)]
    lines = [{"step": step, "train/loss": loss, "train/learning_rate": 0.03} for step, loss in enumerate(losses, 1)]
    for line in lines[9::10]:
        line |= {"test/loss": 4 / line["step"], "test/accuracy": line["step"] / 1100, "test/accuracy_top5": 1.0}
    write_lines(run, lines)


@pytest.mark.slow
def test_page_of_the_demo_has_small_figures(run, browser):
    make_long_run(run, "cifar100_excerpt", 64)
    page = write(run)
    assert figure_files(run) == FIGURES
    check_layout(browser, page)
    for captioned in sections.attention_figures(read_run(run), sections.AttentionOptions(num_images=1)):
        figure_html(captioned, run / "figures")
    for name in ("rollout", "curves"):  # the README shows them
        assert (run / "figures" / f"{name}.png").stat().st_size < 200_000


@pytest.mark.full
def test_page_of_all_of_cifar100_is_complete(run, prepared_cifar100, shared, browser):
    make_long_run(run, "cifar100", 32, str(prepared_cifar100))
    page = write(run)
    assert figure_files(run) == FIGURES | {"superclasses", "worst_classes"} and "20 superclasses" in Page(page).text
    check_layout(browser, page)

    # The archive itself gives the superclass of each class.
    with tarfile.open(shared / "data" / "cifar-100-binary.tar.xz") as archive:
        files = {member.name.rpartition("/")[2]: archive.extractfile(member).read() for member in archive if member.isfile()}
    labels = np.frombuffer(files["test.bin"], np.uint8).reshape(-1, 3074)[:, :2]
    names, superclass_of = read_run(run).superclasses()
    assert superclass_of == {int(fine): int(coarse) for coarse, fine in labels} and len(superclass_of) == 100
    assert names == files["coarse_label_names.txt"].decode().split()


@pytest.mark.slow
def test_dark_mode_has_white_figures(run, tmp_path, browser):
    other = shutil.copytree(run, tmp_path / "other")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser._call("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": dark})
    try:
        for page in (write(run), write(run, other, output=tmp_path / "page.html")):
            check_layout(browser, page)
            body, image = browser.ask(
                "return [document.body, document.querySelector('img')].map(e => getComputedStyle(e).backgroundColor)"
            )
            assert body == "rgb(22, 24, 27)" and image == "rgb(255, 255, 255)"
    finally:
        browser._call("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": []}})
