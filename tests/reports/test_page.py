"""The page of a run: its numbers are those of the files, and it needs no other file."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.reports.pages import FIGURES, Page, edit, figure_files, read_lines, write_lines
from vit_jax.checkpoints import download
from vit_jax.checkpoints.load import load
from vit_jax.data.tasks import task
from vit_jax.errors import DataError, ReportError
from vit_jax.formats.google import read_npz, save_npz
from vit_jax.reports import figures
from vit_jax.reports.analysis import wilson
from vit_jax.reports.page import write
from vit_jax.reports.runs import read_run


def test_page_is_complete_and_self_contained(run):
    path = write(run)
    assert path == run / "report.html"
    page = Page(path)
    assert figure_files(run) == FIGURES and len(page.images) == len(FIGURES)
    for image in page.images:
        assert image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 20
        assert int(image["width"]) == 500 and int(image["height"]) > 0
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "script" not in page.tags and not re.search(r"url\(|@import", page.source)
    assert {"main", "section", "h1", "h2", "figure", "figcaption", "table", "th"} <= page.tags
    assert 'lang="en"' in page.source and "width=device-width" in page.source


def test_page_numbers_equal_the_files(run, unrendered):
    page = Page(write(run))
    tests = [line for line in read_lines(run) if "test/accuracy" in line]
    last, best = tests[-1], max(tests, key=lambda line: line["test/accuracy"])
    split = read_run(run).splits[1]
    assert f"Accuracy on {split} {100 * last['test/accuracy']:.2f} % after 12 steps (95 % interval" in page.text
    assert f"Best {100 * best['test/accuracy']:.2f} % after {best['step']} steps, chosen on the split {split}." in page.text
    difference = f"{100 * (last['test/accuracy'] - 0.25):+.2f} points"
    values = (f"{100 * x:.2f} %" for x in (last["test/accuracy"], best["test/accuracy"], 0.25))
    assert " ".join([f"accuracy on {split}", *values, difference]) in page.text
    assert "Also expected: test accuracy of another 50.00 %." in page.text and "another –" not in page.text
    assert all(text in page.text for text in ("cifar100_excerpt", "12 steps of 16 images", "seed 3", "SHA-256"))
    for name, value in json.loads((run / "environment.json").read_text()).items():
        assert f"{name} {value}" in page.text
    assert all(name in page.text for name in ("optimizer.learning_rate 0.03", "data.train_split train[:64]"))


def test_speed_and_time_are_computed_from_the_steps(run, unrendered):
    # 16 images each: 5 steps of 8 s, 7 of 4 s.
    write_lines(run, [line | {"train/images_per_second": 2.0 if line["step"] <= 5 else 4.0} for line in read_lines(run)])
    text = Page(write(run)).text
    assert "time in training steps 1 min 8 s, without compiling" in text and "images/s 4.0, the median of the steps" in text


def test_versions_and_devices_are_those_recorded(run, unrendered):
    (run / "environment.json").write_text(json.dumps({"jax": "0.10.2", "devices": "2 NVIDIA <H100>", "count": 2}))
    text = Page(write(run)).text
    assert "jax 0.10.2 devices 2 NVIDIA <H100> count 2" in text and "not recorded" not in text
    (run / "environment.json").write_text("{")
    assert "not recorded by this run" in Page(write(run)).text


def test_source_weights_are_compared_if_available(run, monkeypatch, unrendered):
    monkeypatch.setattr(download, "fetch", lambda *_, **__: pytest.fail("a report downloads nothing"))
    shown = []
    real = figures.filters
    monkeypatch.setattr(figures, "filters", lambda kernels: (shown.append(list(kernels)), real(kernels))[1])
    resized = "Those from before training are resized to this grid if their file has another grid."
    assert resized in Page(write(run)).text
    edit(run, model__checkpoint="nowhere/start.npz")
    page = Page(write(run))
    assert resized not in page.text
    assert "The checkpoint that the run started from, nowhere/start.npz, is not on this machine" in page.text
    edit(run, model__checkpoint="B/16")
    assert "The checkpoint that the run started from, B/16, is not on this machine" in Page(write(run)).text
    edit(run, model__checkpoint="", model__variant="Nano/8")
    assert "started from random weights, Nano/8" in Page(write(run)).text
    assert shown == [["before", "fine-tuned"], ["fine-tuned"], ["fine-tuned"], ["trained"]]
    assert figure_files(run) == FIGURES


def test_source_weights_of_another_architecture_are_not_compared(run, unrendered):
    edit(run, model__checkpoint="mini_8")
    meta = json.loads((run / "final.json").read_text())
    (run / "final.json").write_text(json.dumps({name: value for name, value in meta.items() if name != "source_sha256"}))
    assert "has another architecture than the run's weights" in Page(write(run)).text
    edit(run, data__image_size=36)
    with pytest.raises(ValueError, match="into patches") as error:
        load(run / "final.npz", num_classes=0, image_size=36)
    assert str(error.value) in Page(write(run)).text


def test_source_weights_that_changed_are_not_compared(run, tmp_path, unrendered):
    save_npz(tmp_path / "start.npz", read_npz(run / "final.npz"))
    edit(run, model__checkpoint=str(tmp_path / "start.npz"))
    assert "start.npz has changed since the run started from it" in Page(write(run)).text


def test_unfinished_run_has_a_page(run, unrendered):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:9]) + lines[9][:25])  # cut in the middle, as a kill leaves it
    for name in ("predictions.npz", "final.npz", "final.json"):
        (run / name).unlink()
    page = Page(write(run))
    assert "Not finished : step 9 of 12;" in page.text and "at step 8" in page.text
    assert "There are no predictions yet" in page.text and "The first image of each class" in page.text
    assert "weights are from the best evaluation so far, step" in page.text
    assert figure_files(run) == FIGURES - {"classes", "confusion", "reliability", "mistakes"}


@pytest.mark.parametrize("journal", [None, "", '{"step": 1, "trai'])
def test_run_without_metrics_has_a_page(run, journal, unrendered):
    for path in run.iterdir():
        if path.name != "config.json":
            path.unlink()
    if journal is not None:
        (run / "metrics.jsonl").write_text(journal)
    page = Page(write(run))
    for text in ("there are no metrics yet", "There are no weights yet", "There are no predictions yet"):
        assert text in page.text
    assert figure_files(run) == {"training_images"}


def test_missing_data_set_is_reported(run, tmp_path, unrendered):
    edit(run, data__task="cifar100", run__data_dir=str(tmp_path / "empty"))
    page = Page(write(run))
    assert "cifar100 is not prepared in" in page.text and "python -m vit_jax.data prepare cifar100" in page.text
    assert figure_files(run) == {"curves", "classes", "confusion", "reliability", "filters", "positions"}
    edit(run, data__task="birds")
    with pytest.raises(DataError) as error:
        task("birds")
    assert str(error.value) in Page(write(run)).text


def test_different_test_images_are_reported(run, unrendered):
    with np.load(run / "predictions.npz") as file:
        logits, labels = file["logits"], file["labels"]
    np.savez(run / "predictions.npz", logits=logits, labels=np.roll(labels, 1))
    assert "is not the one that the run was tested on" in Page(write(run)).text
    np.savez(run / "predictions.npz", logits=logits[:50], labels=labels[:50])
    assert "predictions.npz has 50 images, but the test split on this machine has 100" in Page(write(run)).text


@pytest.mark.parametrize("name", ["predictions.npz", "final.npz", "final.json"])
@pytest.mark.parametrize("content", [b"", b"not a zip file", None])
def test_damaged_file_is_named_and_the_rest_is_drawn(run, name, content, unrendered):
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    page = Page(write(run))
    assert str(run / name) in page.text and "Traceback" not in page.text
    assert {"curves", "training_images"} <= figure_files(run)


def test_single_layers_and_heads_are_drawn(run, unrendered):
    page = Page(write(run, num_images=2, layers=[1, 2], heads=[2]))
    assert figure_files(run) == FIGURES | {"heads_1", "heads_2"}
    assert page.text.count("attention in single layers and heads") == 2
    with pytest.raises(ReportError, match="layers: there is no layer 3; the model has layers 1 to 2"):
        write(run, layers=[3])
    with pytest.raises(ReportError, match="heads: there is no head 0; the model has heads 1 to 2"):
        write(run, heads=[0])


def test_model_without_class_token_has_no_rollout(run, unrendered):
    params = read_npz(run / "final.npz")
    del params["cls"]
    positions = params["Transformer"]["posembed_input"]
    positions["pos_embedding"] = positions["pos_embedding"][:, 1:]
    save_npz(run / "final.npz", params, json.loads((run / "final.json").read_text()))
    edit(run, model__checkpoint="gone.npz")
    page = Page(write(run))
    assert "has no class token, so there is no attention rollout" in page.text
    assert figure_files(run) == FIGURES - {"rollout"}


def test_output_option_leaves_the_run_unchanged(run, tmp_path, unrendered):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    path = write(run, output=tmp_path / "docs" / "page.html")
    assert path == tmp_path / "docs" / "page.html" and (tmp_path / "docs" / "figures" / "rollout.png").is_file()
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_page_names_the_test_split(run, unrendered):
    text = Page(write(edit(run, data__test_split="train[90%:]"))).text
    assert "Accuracy on train[90%:]" in text and "chosen on the split train[90%:]" in text and "the test split" not in text
    assert re.search(r"training split \S+ test split train\[90%:\]", text)


def test_page_of_a_diverged_run_gives_the_reason(run, unrendered):
    why = "train/loss of step 3 is nan (learning rate 0.5, gradient norm 7.25): training has diverged"
    line = {"step": 3, "train/learning_rate": 0.5, "train/gradient_norm": 7.25, "diverged": why}
    write_lines(run, [{"step": 1, "train/loss": 2.0}, line])
    text = Page(write(run)).text
    assert "Diverged : step 3 of 12" in text and why in text
    assert "Not finished" not in text


def test_page_shows_the_warnings_of_its_run(run, unrendered):
    (run / "environment.json").write_text(json.dumps({"jax": "1", "warnings": ["500 of the test images \u202e <b>"]}))
    page = Page(write(run))
    assert "500 of the test images \\u202e <b>" in page.text and "\u202e" not in page.source


def test_page_begins_with_the_result_and_ends_with_the_versions(run, unrendered):
    page = Page(write(run))
    headings = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert headings[0] == "Learning" and headings[-1] == "Versions and devices"
    links = re.findall(r'<a href="#(.*?)">(.*?)</a>', page.source)
    assert [title for _, title in links] == headings
    assert all(f'id="{anchor}"' in page.source for anchor, _ in links)
    assert page.source.index("95\u00a0% interval") < page.source.index("<nav>") < page.source.index("<section")


def test_page_shows_command_start_and_duration(run, finished, unrendered):
    shutil.copytree(finished / "tensorboard", run / "tensorboard")
    text = Page(write(run)).text
    with np.load(run / "final.npz") as file:
        assert f"parameters {sum(file[name].size for name in file.files):,}" in text
    recorded = json.loads((run / "environment.json").read_text())
    assert f"command {recorded['command'][:900]}" in text and f"started {recorded['started']}" in text
    assert re.search(r"wall time (\d+ min )?\d+ s, with compiling", text)
    shutil.rmtree(run / "tensorboard")
    assert "wall time" not in Page(write(run)).text


def test_interval_is_computed_from_the_evaluated_images(run, unrendered):
    last = read_run(run).evaluations[-1]["test/accuracy"]
    low, high = wilson(last, 100)
    assert f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %: 100 images)" in Page(write(run)).text
    (run / "predictions.npz").unlink()
    edit(run, data__task="cifar100", run__data_dir="/nowhere")
    assert "95 % interval 0" not in Page(write(run)).text


def test_page_names_the_steps_before_which_batches_were_skipped(run, unrendered):
    write_lines(run, [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 2.0, "train/skipped_batches": 2}])
    assert "whose loss was not finite were skipped before step 2 (training.on_nan=rollback)" in Page(write(run)).text
