"""The page: what it says is what the files say, and it needs nothing but itself."""

import html.parser
import json
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import config_files
from vit_jax.checkpoints import download
from vit_jax.checkpoints.load import load
from vit_jax.config_files import from_json
from vit_jax.data import batches
from vit_jax.data.sources import open_split
from vit_jax.data.tasks import TASKS
from vit_jax.errors import ReportError
from vit_jax.formats.google import read_npz, save_npz
from vit_jax.models.intermediates import attention_maps
from vit_jax.reports import attention, drawings, figures
from vit_jax.reports.__main__ import main
from vit_jax.reports.events import wall_time
from vit_jax.reports.page import write
from vit_jax.reports.runs import Missing, read, superclasses
from vit_jax.training.loop import train
from vit_jax.training.step import Batch, loss_of
from vit_jax.transforms.keys import stream
from vit_jax.transforms.preprocess import for_training

FIGURES = {
    *("curves", "training_images", "rollout", "attention_distance", "classes", "confusion"),
    *("reliability", "mistakes", "filters", "positions"),
}


class Page(html.parser.HTMLParser):
    """What a page holds: its images' attributes, its titles of figures, its text, and every address in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.images, self.titles, self.addresses, self.tags, self._text = [], [], [], set(), []
        self.source = path.read_text()
        self.feed(self.source)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.addresses += [values[name] for name in ("src", "href", "srcset", "action", "data") if values.get(name)]
        if tag == "img":
            self.images.append(values)

    def handle_data(self, data):
        self._text.append(data)


def edit(run: Path, **changes) -> None:
    """Sets fields of a run's config.json, `section__field=value`."""
    config = json.loads((run / "config.json").read_text())
    for name, value in changes.items():
        *sections, field = name.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[field] = value
    (run / "config.json").write_text(json.dumps(config))


def drawn(run: Path) -> set[str]:
    return {path.stem for path in (run / "figures").glob("*.png")}


def test_everything_is_on_the_page_and_the_page_needs_nothing_else(run):
    path = write(run)
    assert path == run / "report.html"
    page = Page(path)
    assert drawn(run) == FIGURES and len(page.images) == len(FIGURES)
    for image in page.images:
        assert image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 20
        assert int(image["width"]) == 500 and int(image["height"]) > 0
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "script" not in page.tags and not re.search(r"url\(|@import", page.source)
    assert {"main", "section", "h1", "h2", "figure", "figcaption", "table", "th"} <= page.tags
    assert 'lang="en"' in page.source and "width=device-width" in page.source


def test_the_numbers_are_those_of_the_files(run, unrendered):
    page = Page(write(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tests = [line for line in lines if "test/accuracy" in line]
    last, best = tests[-1], max(tests, key=lambda line: line["test/accuracy"])
    split = read(run).splits[1]
    assert f"Accuracy on {split} {100 * last['test/accuracy']:.2f} % after 12 steps (95 % interval" in page.text
    assert f"Best {100 * best['test/accuracy']:.2f} % after {best['step']} steps, chosen on {split}" in page.text
    off_by = f"{100 * (last['test/accuracy'] - 0.25):+.2f} points"
    row = [f"accuracy on {split}", *(f"{100 * x:.2f} %" for x in (last["test/accuracy"], best["test/accuracy"], 0.25)), off_by]
    assert " ".join(row) in page.text
    assert "Also expected: test accuracy of another 50.00 %." in page.text and "another –" not in page.text
    for said in ("cifar100_excerpt", "12 steps of 16 images", "seed 3", "SHA-256"):
        assert said in page.text
    for name, value in json.loads((run / "environment.json").read_text()).items():
        assert f"{name} {value}" in page.text
    assert all(name in page.text for name in ("optimizer.learning_rate 0.03", "data.train_split train[:64]"))


def test_speed_and_time_are_those_of_the_steps(run, unrendered):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:  # 16 images each: 5 steps of 8 s, 7 of 4 s
        line["train/images_per_second"] = 2.0 if line["step"] <= 5 else 4.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(write(run)).text
    assert "time in training steps 1 min 8 s, without compiling" in text and "images/s 4.0, the median of the steps" in text


@pytest.fixture
def given(monkeypatch):
    """What each function of `figures` is given, by its name."""
    found = {}

    def spied(name, real):
        return lambda *of: (found.setdefault(name, []).append(of), real(*of))[1]

    for name in ("heads", "rollout", "attention_distance", "per_class", "mistakes", "filters", "positions"):
        monkeypatch.setattr(figures, name, spied(name, getattr(figures, name)))
    return found


def test_figures_of_attention_are_of_the_run_s_own_images_weights_and_scaling(run, given):
    edit(run, data__normalization="dataset")
    source, row = open_split(TASKS["cifar100_excerpt"], "test[:100]"), TASKS["cifar100_excerpt"]
    pixels, labels = source.take(np.arange(100))
    # Of each class, the first image is wrong and the surest of all; the third is right, and surer than what is right else.
    logits = np.zeros((100, 10), np.float32)
    logits[np.arange(100), labels] = 2
    firsts = [np.flatnonzero(labels == number) for number in range(10)]
    for number, places in enumerate(firsts):
        logits[places[0]] = 9 * np.eye(10)[(number + 1) % 10]
        logits[places[2], number] = 4
    np.savez(run / "predictions.npz", logits=logits, labels=labels)
    list(drawings.looks(read(run), drawings.Look(4, layers=(1, 2), heads=(2,))))

    chosen = [firsts[number][2] for number in (0, 3, 6, 9)]
    images = (pixels[chosen] / 255 - np.array(row.mean)) / np.array(row.std)
    start = json.loads((run / "config.json").read_text())["model"]["checkpoint"]
    maps = {
        name: np.asarray(attention_maps(*load(path, num_classes=0, image_size=32), images.astype(np.float32)))
        for name, path in (("before", start), ("fine-tuned", run / "final.npz"))
    }
    [(shown, masks, names)] = given["rollout"]
    np.testing.assert_allclose(shown, pixels[chosen] / 255, atol=1e-6)
    assert names == [f"{source.class_names[number]}, image {at}" for number, at in zip((0, 3, 6, 9), chosen, strict=True)]
    [(far,)] = given["attention_distance"]
    assert list(masks) == list(far) == list(maps)
    for name, those in maps.items():
        np.testing.assert_allclose(masks[name], attention.rollout(those), atol=1e-5)
        np.testing.assert_allclose(far[name], attention.distances(those, 8), rtol=1e-5)
    assert len(given["heads"]) == 4
    for number, (image, apart) in enumerate(given["heads"]):
        np.testing.assert_allclose(image, pixels[chosen[number]] / 255, atol=1e-6)
        assert list(apart) == ["layer 1, head 2", "layer 2, head 2"]
        for layer, found in enumerate(apart.values()):
            expected = maps["fine-tuned"][layer, number, 1, 0, 1:].reshape(4, 4)
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_figures_of_predictions_and_weights_are_those_of_the_files(run, given):
    source = open_split(TASKS["cifar100_excerpt"], "test[:100]")
    pixels, labels = source.take(np.arange(100))
    logits = np.random.default_rng(0).normal(size=(100, 10)).astype(np.float32)
    np.savez(run / "predictions.npz", logits=logits, labels=labels)
    list(drawings.predicted(read(run)))
    list(drawings.weights(read(run)))

    wrong = []
    for at, row in enumerate(logits.astype(np.float64)):
        if row.argmax() != labels[at]:
            wrong.append((np.exp(row).max() / np.exp(row).sum(), at, row.argmax()))
    surest = sorted(wrong, reverse=True)[:12]
    [(shown, texts)] = given["mistakes"]
    np.testing.assert_array_equal(shown, pixels[[at for _, at, _ in surest]])
    name = source.class_names
    assert texts == [f"{name[labels[at]]}\n→ {100 * sure:.0f} % {name[said]}" for sure, at, said in surest]
    [(accuracies, _, counts)] = given["per_class"]
    assert counts == {name[c]: (labels == c).sum() for c in range(10)}
    assert accuracies == {name[c]: np.mean(logits[labels == c].argmax(axis=1) == c) for c in range(10)}

    start = json.loads((run / "config.json").read_text())["model"]["checkpoint"]
    with np.load(start) as before, np.load(run / "final.npz") as after:
        [(embeddings, grid)], [(kernels,)] = given["positions"], given["filters"]
        for found, leaf, places in [
            (embeddings, "Transformer/posembed_input/pos_embedding", np.s_[0, 1:]),
            (kernels, "embedding/kernel", np.s_[:]),
        ]:
            assert list(found) == ["before", "fine-tuned"] and grid == (4, 4)
            np.testing.assert_array_equal(found["before"], before[leaf][places])
            np.testing.assert_array_equal(found["fine-tuned"], after[leaf][places])


def test_versions_and_device_are_what_the_run_recorded(run, unrendered):
    (run / "environment.json").write_text(json.dumps({"jax": "0.10.2", "device": "2 × NVIDIA <H100>", "count": 2}))
    text = Page(write(run)).text
    assert "jax 0.10.2 device 2 × NVIDIA <H100> count 2" in text and "not recorded" not in text
    (run / "environment.json").write_text("{")
    assert "not recorded by this run" in Page(write(run)).text


def test_training_images_are_exactly_what_the_model_gets(run, monkeypatch):
    config = from_json((run / "config.json").read_text(), "")
    source = open_split(TASKS["cifar100_excerpt"], config.data.train_split)
    seen = []

    class Model:
        def apply(self, params, images, **_):
            seen.append(np.asarray(images))
            return jnp.zeros((len(images), 10))

    index = next(batches.train(len(source), config.training.batch_size, config.seed))
    images, labels = source.take(index)
    forward = loss_of(Model(), for_training(config.augment, config.data.image_size), config.seed)
    batch = Batch(jnp.arange(len(index), dtype=jnp.int32), None, jnp.asarray(images), jnp.asarray(labels))
    forward({}, batch, None, 0, stream(0, 0))

    shown = []
    real = figures.training_images
    monkeypatch.setattr(figures, "training_images", lambda *of: (shown.append(of), real(*of))[1])
    list(drawings.training_images(read(run)))
    originals, pixels, names = shown[0]
    assert (originals == images[:12]).all() and names == [source.class_names[label] for label in labels[:12]]
    np.testing.assert_allclose(pixels, (seen[0][:12] + 1) / 2, atol=1e-6)


def test_what_it_started_from_is_beside_it_and_where_it_is_gone_the_page_says_so(run, monkeypatch, unrendered):
    monkeypatch.setattr(download, "fetch", lambda *_, **__: pytest.fail("a report downloads nothing"))
    shown = []
    real = figures.filters
    monkeypatch.setattr(figures, "filters", lambda kernels: (shown.append(list(kernels)), real(kernels))[1])
    resized = "Those from before are resized to this grid, where their file holds another."
    assert resized in Page(write(run)).text
    edit(run, model__checkpoint="nowhere/start.npz")
    page = Page(write(run))
    assert resized not in page.text
    assert "What the run started from, nowhere/start.npz, is not on this machine" in page.text
    edit(run, model__checkpoint="B/16")
    assert "What the run started from, B/16, is not on this machine" in Page(write(run)).text
    edit(run, model__checkpoint="", model__variant="Nano/8")
    assert "started from random weights, Nano/8" in Page(write(run)).text
    assert shown == [["before", "fine-tuned"], ["fine-tuned"], ["fine-tuned"], ["trained"]]
    assert drawn(run) == FIGURES


def test_another_architecture_is_not_compared_with(run, unrendered):
    edit(run, model__checkpoint="mini_8")
    meta = json.loads((run / "final.json").read_text())
    (run / "final.json").write_text(json.dumps({name: value for name, value in meta.items() if name != "source_sha256"}))
    assert "holds another architecture than the run's weights" in Page(write(run)).text
    edit(run, data__image_size=36)
    assert "does not divide into patches" in Page(write(run)).text


def test_another_file_under_the_same_name_is_not_compared_with(run, tmp_path, unrendered):
    start = read_npz(run / "final.npz")
    save_npz(tmp_path / "start.npz", start)
    edit(run, model__checkpoint=str(tmp_path / "start.npz"))
    assert "start.npz is no longer the file that the run started from" in Page(write(run)).text


def test_a_run_that_goes_on(run, unrendered):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:9]) + lines[9][:25])  # cut in the middle, as a kill leaves it
    for name in ("predictions.npz", "final.npz", "final.json"):
        (run / name).unlink()
    page = Page(write(run))
    assert "Not finished : step 9 of 12;" in page.text and "at step 8" in page.text
    assert "There are no predictions yet" in page.text and "The first image of each class" in page.text
    assert "weights are those of the best evaluation so far, step" in page.text
    assert drawn(run) == FIGURES - {"classes", "confusion", "reliability", "mistakes"}


@pytest.mark.parametrize("journal", [None, "", '{"step": 1, "trai'])
def test_a_run_that_has_only_just_begun(run, journal, unrendered):
    for path in run.iterdir():
        if path.name != "config.json":
            path.unlink()
    if journal is not None:
        (run / "metrics.jsonl").write_text(journal)
    page = Page(write(run))
    for said in ("there are no metrics yet", "There are no weights yet", "There are no predictions yet"):
        assert said in page.text
    assert drawn(run) == {"training_images"}


def test_data_that_are_no_longer_prepared(run, tmp_path, unrendered):
    edit(run, data__task="cifar100", run__data_dir=str(tmp_path / "empty"))
    page = Page(write(run))
    assert "cifar100 is not prepared in" in page.text and "python -m vit_jax.data prepare cifar100" in page.text
    assert drawn(run) == {"curves", "classes", "confusion", "reliability", "filters", "positions"}
    edit(run, data__task="birds")
    assert "there is no task 'birds'" in Page(write(run)).text


def test_another_test_split_under_the_same_name(run, unrendered):
    with np.load(run / "predictions.npz") as file:
        logits, labels = file["logits"], file["labels"]
    np.savez(run / "predictions.npz", logits=logits, labels=np.roll(labels, 1))
    assert "is not the one that the run was tested on" in Page(write(run)).text
    np.savez(run / "predictions.npz", logits=logits[:50], labels=labels[:50])
    assert "predictions.npz holds 50 images, the test split on this machine 100" in Page(write(run)).text


@pytest.mark.parametrize("name", ["predictions.npz", "final.npz", "final.json"])
@pytest.mark.parametrize("content", [b"", b"no zip at all", None])
def test_damaged_files_are_named_and_the_rest_is_drawn(run, name, content, unrendered):
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    page = Page(write(run))
    assert str(run / name) in page.text and "Traceback" not in page.text
    assert {"curves", "training_images"} <= drawn(run)


@pytest.mark.parametrize(
    "arrays",
    [
        {"logits": np.zeros((3, 10), np.float32)},
        {"logits": np.zeros((3, 10), np.float32), "labels": np.zeros(4, np.int32)},
        {"logits": np.full((3, 10), np.nan, np.float32), "labels": np.zeros(3, np.int32)},
        {"logits": np.zeros((3, 10), np.float32), "labels": np.full(3, 10, np.int32)},
        {"logits": np.zeros((0, 10), np.float32), "labels": np.zeros(0, np.int32)},
        {"logits": np.array(None), "labels": np.zeros(3, np.int32)},
    ],
)
def test_predictions_that_are_none(run, arrays):
    np.savez(run / "predictions.npz", **arrays)
    with pytest.raises(Missing, match="predictions.npz cannot be used"):
        _ = read(run).predictions


def test_folders_that_are_no_run(tmp_path, run):
    with pytest.raises(ReportError, match="there is no folder .*nowhere; name a run's"):
        write(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="is no run's folder: it holds no config.json"):
        write(tmp_path)
    for content, said in [
        ("{", "config.json is not JSON"),
        ("[]", "the whole file must be an object"),
        ('{"sead": 3}', "there is no field sead"),
        ('{"seed": "x"}', "config.json: seed must be of type int"),
    ]:
        (run / "config.json").write_text(content)
        with pytest.raises(ReportError, match=said) as error:
            write(run)
        assert str(run / "config.json") in str(error.value) and "\n" not in str(error.value)


def test_single_layers_and_heads(run, unrendered):
    page = Page(write(run, num_images=2, layers=[1, 2], heads=[2]))
    assert drawn(run) == FIGURES | {"heads_1", "heads_2"}
    assert page.text.count("attention in single layers and heads") == 2
    for wrong, said in [({"layers": [3]}, "there is no layer 3: the model has 2"), ({"heads": [0]}, "there is no head 0")]:
        with pytest.raises(ReportError, match=said):
            write(run, **wrong)


def test_a_model_without_a_class_token_has_no_rollout(run, unrendered):
    params = read_npz(run / "final.npz")
    del params["cls"]
    positions = params["Transformer"]["posembed_input"]
    positions["pos_embedding"] = positions["pos_embedding"][:, 1:]
    save_npz(run / "final.npz", params, json.loads((run / "final.json").read_text()))
    edit(run, model__checkpoint="gone.npz")
    page = Page(write(run))
    assert "has no class token: there is no attention rollout" in page.text
    assert drawn(run) == FIGURES - {"rollout"}


def test_a_name_is_text_and_not_html(run, unrendered):
    odd = run.rename(run.with_name("<b>&'\"$x_1$"))
    page = Page(write(odd))
    assert "<b>&'\"$x_1$" in page.text and "b" not in page.tags


def test_another_place_for_the_page(run, tmp_path, unrendered):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    path = write(run, output=tmp_path / "docs" / "page.html")
    assert path == tmp_path / "docs" / "page.html" and (tmp_path / "docs" / "figures" / "rollout.png").is_file()
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_runs_compared(run, tmp_path, unrendered):
    runs, finals = [run], []
    for seed in (4, 5):
        runs.append(shutil.copytree(run, tmp_path / f"tiny-{seed}"))
        edit(runs[-1], seed=seed)
    other = shutil.copytree(run, tmp_path / "other")
    edit(other, optimizer__learning_rate=0.5)
    for number, folder in enumerate(runs):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        lines[-1]["test/accuracy"] = 0.5 + 0.1 * number
        finals.append(100 * lines[-1]["test/accuracy"])
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
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


def test_a_copy_of_a_run_and_a_run_that_is_not_finished(run, tmp_path, unrendered):
    copy, begun = (shutil.copytree(run, tmp_path / name) for name in ("copy", "begun"))
    edit(begun, seed=9)
    (begun / "metrics.jsonl").unlink()
    page = Page(write(run, copy, begun, output=tmp_path / "page.html"))
    assert "±" not in page.text and "begun – – – – 0/12 –" in page.text
    assert "None that changes the numbers" in Page(write(run, copy)).text


def test_the_same_run_twice_is_refused(run, tmp_path, capsys):
    other, link = run / ".." / run.name, tmp_path / "link"
    link.symlink_to(run)
    for again in (run, other, link):
        assert main([str(run), str(again)]) == 1
        assert capsys.readouterr().err == f"error: {run} and {again} are the same run; name it once\n"
    assert not (tmp_path / "comparison.html").exists()


def test_the_command_line(run, tmp_path, capsys, unrendered):
    assert main([str(run), "--output", str(tmp_path / "page.html"), "--images", "1", "--layers", "1,2", "--heads", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "figures" / "heads_1.png").is_file()
    for arguments, said in [
        ([str(tmp_path / "nowhere")], "there is no folder"),
        ([str(run), "--layers", "9"], "there is no layer 9"),
        ([str(run), "--images", "0"], "at least one image"),
        ([str(run), "--output", str(run / "config.json" / "page.html")], "config.json"),
    ]:
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
    for arguments in ([], [str(run), "--layers", "one"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--images" in capsys.readouterr().out


def look(browser, page: Path) -> None:
    """What Must show asks of a page, at the width of a phone and of a desk."""
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
        # What has to be scrolled is cut off in print.
        scrolled = browser.ask(
            "return [...document.querySelectorAll('div')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"
        )
        assert scrolled == []
        assert browser.console() == []
        asked = browser.requests()
        assert page.as_uri() in asked
        assert {address.partition(":")[0] for address in asked if address != page.as_uri()} <= {"data"}


def test_the_page_in_a_browser(run, browser):
    look(browser, write(run, layers=[1]))


def test_the_page_of_a_run_that_has_only_begun_in_a_browser(run, browser):
    edit(run, model__checkpoint="a/path/that/is/long/" * 8 + "start.npz", data__task="cifar100", run__data_dir="/nowhere/" * 20)
    for name in ("metrics.jsonl", "predictions.npz", "final.npz", "best.npz"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "train/loss": 2.5}\n')
    look(browser, write(run))


def test_the_page_of_many_runs_with_long_names_in_a_browser(run, browser):
    runs = []
    for number in range(10):
        runs.append(shutil.copytree(run, run.with_name(f"a-run-that-has-a-rather-long-name-{'as-sweeps-give-' * 5}{number}")))
        edit(runs[-1], seed=number, optimizer__learning_rate=0.01 * (number % 3 + 1), training__steps=100_000 if number else 12)
    look(browser, page := write(*runs))
    assert all(folder.name in Page(page).text for folder in runs)


def made_up(run: Path) -> None:
    """Makes of the run one of the demo's size and length: images and labels are real, what it learnt is not."""
    edit(run, data__image_size=64, data__train_split="", data__test_split="", model__checkpoint="mini_8")
    edit(run, training__steps=1000, training__batch_size=64)
    source = open_split(TASKS["cifar100_excerpt"], "test")
    _, params = load("mini_8", num_classes=source.num_classes, image_size=64)
    save_npz(run / "final.npz", params, {"class_names": source.class_names})
    _, labels = source.take(np.arange(len(source)))
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(len(source), source.num_classes)).astype(np.float32)
    logits[np.arange(len(source)), labels] += draw.uniform(1, 5, len(source))
    np.savez(run / "predictions.npz", logits=logits, labels=labels)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 1001):
            line = {"step": step, "train/loss": 4 / step + draw.normal() / 10, "train/learning_rate": 0.03}
            line |= {"test/loss": 4 / step, "test/accuracy": step / 1100, "test/accuracy_top5": 1.0} if step % 10 == 0 else {}
            file.write(json.dumps(line) + "\n")


def test_the_demos_page_takes_20_seconds_at_most(run, browser):
    made_up(run)
    begun = time.perf_counter()
    page = write(run)
    assert time.perf_counter() - begun < 20
    assert drawn(run) == FIGURES
    look(browser, page)
    write(run, num_images=1)
    for name in ("rollout", "curves"):  # the README shows them
        assert (run / "figures" / f"{name}.png").stat().st_size < 200_000


@pytest.mark.slow
def test_the_page_of_a_run_on_all_of_cifar100_takes_60_seconds_at_most(prepared_cifar100, shared, tmp_path, browser):
    """A real run, if a short one: the embedded model, all 50,000 and 10,000 images at 32 pixels."""
    config = config_files.read(str(Path(__file__).parents[2] / "configs" / "demo.py"))
    config.data.task, config.data.image_size, config.run.data_dir = "cifar100", 32, str(prepared_cifar100)
    config.training.steps, config.optimizer.warmup_steps = 6, 2
    config.training.eval_every = config.training.save_every = 6
    train(config, run := tmp_path / "cifar100")
    begun = time.perf_counter()
    page = write(run)
    assert time.perf_counter() - begun < 60
    assert drawn(run) == FIGURES | {"superclasses", "worst_classes"} and "20 superclasses" in Page(page).text
    look(browser, page)

    # The archive itself says which class belongs to which superclass.
    with tarfile.open(shared / "data" / "cifar-100-binary.tar.xz") as archive:
        files = {member.name.rpartition("/")[2]: archive.extractfile(member).read() for member in archive if member.isfile()}
    labels = np.frombuffer(files["test.bin"], np.uint8).reshape(-1, 3074)[:, :2]
    names, of = superclasses(read(run))
    assert of == {int(fine): int(coarse) for coarse, fine in labels} and len(of) == 100
    assert names == files["coarse_label_names.txt"].decode().split()


@pytest.mark.parametrize(
    "line",
    [
        '{"step": true}',
        '{"step": 16, "test/accuracy": 1.0}',
        "9" * 5000,
        "[" * 100_000,
        '{"step": 12, "test/accuracy": NaN}',
        "[]",
        "null",
    ],
)
def test_lines_of_metrics_that_mean_nothing_change_nothing(run, line):
    before = read(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    after = read(run)
    assert (after.evaluations, after.best, after.step) == (before.evaluations, before.best, before.step)


def test_options_of_one_run_are_refused_for_several(run, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(run), str(run), "--layers", "1"])
    assert end.value.code == 2 and "are for the page of a single run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(run), "--layers", ""])
    assert "expected numbers, as in 1,2, got ''" in capsys.readouterr().err


@pytest.mark.parametrize("interrupt", ["raise KeyboardInterrupt", "lost()"])
@pytest.mark.parametrize("package", ["vit_jax.reports.page", "jax", "matplotlib"])
def test_an_interruption_while_it_starts_is_quiet(package, interrupt):
    """Also where a library loses it, as JAX's callback of the garbage collector does."""
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
sys.argv = ["reports", "nowhere"]
runpy.run_module("vit_jax.reports", run_name="__main__", alter_sys=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_a_page_needs_a_name(run, capsys):
    assert main([str(run), "--output", "/"]) == 1
    assert capsys.readouterr().err == "error: / is no name of a page; give one such as page.html\n"


def test_names_that_are_alike_or_of_another_script(run):
    names = json.loads((run / "final.json").read_text())
    names["class_names"] = ["same", "same", "狮子", "two\nlines", *names["class_names"][4:]]
    (run / "final.json").write_text(json.dumps(names))
    assert list(read(run).class_names[:4]) == ["same (0)", "same (1)", "狮子", "two lines"]
    write(run)  # without a warning


def copy_with(run, folder, lines=None, **fields):
    """A copy of a run's folder with other fields of its configuration, dotted names with "__", and other metrics."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    if lines is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def text_of(path):
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", path.read_text())))


def test_page_says_on_which_split_a_run_is_tested(run, tmp_path):
    folder = copy_with(run, tmp_path / "run", data__test_split="train[90%:]")
    text = text_of(write(folder))
    assert "Accuracy on train[90%:]" in text and "chosen on train[90%:]" in text and "the test split" not in text
    assert re.search(r"trained on, tested on \S+, train\[90%:\]", text)


def test_comparison_never_ranks_runs_of_different_splits_in_one_table(run, tmp_path):
    other = copy_with(run, tmp_path / "other", data__test_split="train[90%:]")
    same = shutil.copytree(run, tmp_path / "same")
    apart, together = (tmp_path / f"{name}.html" for name in ("apart", "together"))
    write(run, other, output=apart)
    assert "different tables do not compare" in text_of(apart) and "accuracy on train[90%:]" in text_of(apart)
    write(run, same, output=together)
    assert "do not compare" not in text_of(together) and "top-5" in text_of(together)


def test_comparison_leaves_out_its_own_page(run, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(run, tmp_path / name)
    page = write(tmp_path / "a", tmp_path / "b")
    assert page == tmp_path / "comparison.html"
    assert write(*sorted(tmp_path.iterdir())) == page  # as `reports runs/*` names them
    with pytest.raises(ReportError, match="a page is no run's folder"):
        write(page)


def test_page_of_a_diverged_run_says_so(run, tmp_path):
    said = "train/loss of step 3 is nan: training has diverged. Lower optimizer.learning_rate"
    lines = [
        {"step": 1, "train/loss": 2.0},
        {"step": 3, "train/learning_rate": 0.5, "train/gradient_norm": 7.25, "diverged": said},
    ]
    text = text_of(write(copy_with(run, tmp_path / "run", lines)))
    assert "Diverged : step 3 of 12" in text and said in text and "learning rate 0.5, gradient norm 7.25" in text
    assert "Not finished" not in text


def test_page_shows_the_warnings_of_its_run(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "environment.json").write_text(json.dumps({"jax": "1", "warnings": ["500 of the test images \u202e <b>"]}))
    path = write(folder)
    assert "500 of the test images \\u202e <b>" in text_of(path) and "\u202e" not in path.read_text()


def test_page_begins_with_the_result_and_ends_with_the_versions(run, unrendered):
    page = Page(write(run))
    headings = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert headings[0] == "Learning" and headings[-1] == "Versions and device"
    links = re.findall(r'<a href="#(.*?)">(.*?)</a>', page.source)
    assert [title for _, title in links] == headings
    assert all(f'id="{anchor}"' in page.source for anchor, _ in links)
    assert page.source.index("95\u00a0% interval") < page.source.index("<nav>") < page.source.index("<section")


def test_page_says_what_was_run_when_and_for_how_long(run, finished, unrendered):
    shutil.copytree(finished / "tensorboard", run / "tensorboard")
    text = Page(write(run)).text
    with np.load(run / "final.npz") as file:
        assert f"parameters {sum(file[name].size for name in file.files):,}" in text
    recorded = json.loads((run / "environment.json").read_text())
    assert f"command {recorded['command'][:900]}" in text and f"started {recorded['started']}" in text
    assert re.search(r"wall time (\d+ min )?\d+ s, with compiling", text)
    shutil.rmtree(run / "tensorboard")
    assert "wall time" not in Page(write(run)).text


def test_wall_time_is_that_of_the_events(tmp_path):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    assert wall_time(tmp_path) is None
    for name, times in (("a", (100.0, 103.5, 110.0)), ("b", (1000.0, 1005.0))):
        board = EventsWriter(str(tmp_path / "events"), name)
        for step, at in enumerate(times):
            board.write_event(Event(wall_time=at, step=step, summary=Summary(value=[Summary.Value(tag="x", simple_value=1)])))
        board.close()
    for path in tmp_path.iterdir():  # the writer's own first event has the time of now
        data = path.read_bytes()
        path.write_bytes(data[16 + int.from_bytes(data[:8], "little") :])
    assert wall_time(tmp_path) == 15
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    assert 0 < wall_time(tmp_path) <= 15


def test_interval_is_that_of_the_evaluated_images(run, unrendered):
    last = read(run).evaluations[-1]["test/accuracy"]
    low, high = figures.wilson(last, 100)
    assert f"(95 % interval {100 * low:.1f} to {100 * high:.1f} %: 100 images)" in Page(write(run)).text
    (run / "predictions.npz").unlink()
    edit(run, data__task="cifar100", run__data_dir="/nowhere")
    assert "95 % interval 0" not in Page(write(run)).text


def test_images_can_be_chosen_by_number(run, given, capsys, tmp_path):
    write(run, images=[17, 3])
    [(shown, _, names)] = given["rollout"]
    pixels, labels = read(run).test.take(np.array([17, 3]))
    np.testing.assert_allclose(shown, pixels / 255, atol=1e-6)
    assert names == [f"{read(run).test.class_names[label]}, image {at}" for label, at in zip(labels, (17, 3), strict=True)]
    assert main([str(run), "--images", "100", "--output", str(tmp_path / "page.html")]) == 1
    assert "there is no image 100: test[:100] has 100, counted from 0" in capsys.readouterr().err


def test_text_of_files_changes_nothing_on_the_page(run, unrendered):
    meta = json.loads((run / "final.json").read_text())
    meta["class_names"] = ["a\u202eb", "\x1b[31m", "<i>", *meta["class_names"][3:]]
    meta["source_sha256"] = "\u200f<i>"
    (run / "final.json").write_text(json.dumps(meta))
    (run / "environment.json").write_text(json.dumps({"jax\u202e": "\x9b<i>", "command": "\x00"}))
    path = write(run.rename(run.with_name("tiny\u202e\x1b")))
    page = Page(path)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e]", page.source)
    assert "i" not in page.tags and "tiny\\u202e\\x1b" in page.text
    assert list(read(path.parent).class_names[:3]) == ["a\\u202eb", "\\x1b[31m", "<i>"]


@pytest.mark.parametrize("content", ['{"seed": %s}' % ("9" * 5000), '{"seed": %s}' % ("[" * 100_000)])  # noqa: UP031
def test_numbers_and_brackets_without_end_are_one_line(run, content, capsys):
    (run / "config.json").write_text(content)
    assert main([str(run)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "config.json" in error and error.count("\n") == 1 and len(error) < 1000


def test_comparison_draws_runs_of_different_splits_apart(run, tmp_path, monkeypatch):
    shown = []
    real = figures.curves
    monkeypatch.setattr(
        figures, "curves", lambda runs, measured: (shown.append((list(runs), measured)), real(runs, measured))[1]
    )
    other = copy_with(run, tmp_path / "other", data__test_split="train[90%:]")
    write(run, other, output=tmp_path / "page.html")
    assert shown == [(["tiny"], "accuracy on test[:100]"), (["other"], "accuracy on train[90%:]")]


def test_page_and_comparison_in_the_dark_in_a_browser(run, tmp_path, browser):
    other = shutil.copytree(run, tmp_path / "other")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser._call("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": dark})
    try:
        for page in (write(run), write(run, other, output=tmp_path / "page.html")):
            look(browser, page)
            body, image = browser.ask(
                "return [document.body, document.querySelector('img')].map(e => getComputedStyle(e).backgroundColor)"
            )
            assert body == "rgb(22, 24, 27)" and image == "rgb(255, 255, 255)"
    finally:
        browser._call("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": {"features": []}})
