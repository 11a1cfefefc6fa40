"""The page: what it says is what the files say, and it needs nothing but itself."""

import html.parser
import json
import re
import shutil
import statistics
import tarfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import config as configuration
from vit_jax.checkpoints import download
from vit_jax.checkpoints.google import read_npz, save_npz
from vit_jax.checkpoints.load import load
from vit_jax.config import from_json
from vit_jax.data import batches
from vit_jax.data.sources import open_split
from vit_jax.data.tasks import TASKS
from vit_jax.reports import drawings, figures
from vit_jax.reports.__main__ import main
from vit_jax.reports.page import write
from vit_jax.reports.runs import Missing, ReportError, read, superclasses
from vit_jax.training.loop import train
from vit_jax.training.step import AUGMENT, loss_of, stream
from vit_jax.transforms.preprocess import for_training

FIGURES = {
    *("curves", "training_pictures", "rollout", "attention_distance", "classes", "confusion"),
    *("reliability", "mistakes", "filters", "positions"),
}


class Page(html.parser.HTMLParser):
    """What a page holds: its pictures' attributes, its titles of figures, its text, and every address in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.pictures, self.titles, self.addresses, self.tags, self._text = [], [], [], set(), []
        self.source = path.read_text()
        self.feed(self.source)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.addresses += [values[name] for name in ("src", "href", "srcset", "action", "data") if values.get(name)]
        if tag == "img":
            self.pictures.append(values)

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
    assert drawn(run) == FIGURES and len(page.pictures) == len(FIGURES)
    for picture in page.pictures:
        assert picture["src"].startswith("data:image/png;base64,") and len(picture["alt"]) > 20
        assert int(picture["width"]) == 500 and int(picture["height"]) > 0
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.tags and not re.search(r"url\(|@import", page.source)
    assert {"main", "section", "h1", "h2", "figure", "figcaption", "table", "th"} <= page.tags
    assert 'lang="en"' in page.source and "width=device-width" in page.source


def test_the_numbers_are_those_of_the_files(run, unrendered):
    page = Page(write(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tests = [line for line in lines if "test/accuracy" in line]
    last, best = tests[-1], max(tests, key=lambda line: line["test/accuracy"])
    assert f"{100 * last['test/accuracy']:.2f} % of the test pictures are right after the last step, 12. Best" in page.text
    assert f"evaluation {100 * best['test/accuracy']:.2f} %, step {best['step']}, chosen on the test split" in page.text
    off_by = f"{100 * (last['test/accuracy'] - 0.25):+.2f}"
    row = ["test accuracy", *(f"{100 * x:.2f} %" for x in (last["test/accuracy"], best["test/accuracy"], 0.25)), off_by]
    assert " ".join(row) in page.text
    assert "test accuracy of another – – 50.00 % –" in page.text
    rates = [line["train/images_per_second"] for line in lines if "train/images_per_second" in line]
    shown = statistics.median(rates)
    assert f"pictures/s {shown:,.0f}, the median" in page.text
    for said in ("cifar100_excerpt", "12 steps of 16 pictures", "seed 3", "SHA-256"):
        assert said in page.text
    for name, value in json.loads((run / "environment.json").read_text()).items():
        assert f"{name} {value}" in page.text
    assert all(name in page.text for name in ("optimizer.learning_rate 0.03", "data.train_split train[:64]"))


def test_versions_and_device_are_what_the_run_recorded(run, unrendered):
    (run / "environment.json").write_text(json.dumps({"jax": "0.10.2", "device": "2 × NVIDIA <H100>", "count": 2}))
    text = Page(write(run)).text
    assert "jax 0.10.2 device 2 × NVIDIA <H100> count 2" in text and "not recorded" not in text
    (run / "environment.json").write_text("{")
    assert "not recorded by this run" in Page(write(run)).text


def test_training_pictures_are_exactly_what_the_model_gets(run, monkeypatch):
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
    batch = {"images": jnp.asarray(images), "labels": jnp.asarray(labels), "place": jnp.arange(len(index), dtype=jnp.int32)}
    forward({}, None, batch, 0, stream(0, 0))
    assert drawings._AUGMENT == AUGMENT

    shown = []
    real = figures.training_pictures
    monkeypatch.setattr(figures, "training_pictures", lambda *of: (shown.append(of), real(*of))[1])
    list(drawings.training_pictures(read(run)))
    originals, pictures, names = shown[0]
    assert (originals == images[:12]).all() and names == [source.class_names[label] for label in labels[:12]]
    np.testing.assert_allclose(pictures, (seen[0][:12] + 1) / 2, atol=1e-6)


def test_what_it_started_from_is_beside_it_and_where_it_is_gone_the_page_says_so(run, monkeypatch, unrendered):
    monkeypatch.setattr(download, "fetch", lambda *_, **__: pytest.fail("a report downloads nothing"))
    shown = []
    real = figures.filters
    monkeypatch.setattr(figures, "filters", lambda kernels: (shown.append(list(kernels)), real(kernels))[1])
    write(run)
    edit(run, model__checkpoint="nowhere/start.npz")
    page = Page(write(run))
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
    assert "Not finished : step 9 of 12;" in page.text and "of the test pictures at step 8" in page.text
    assert "There are no predictions yet" in page.text and "The first picture of its class" in page.text
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
    assert drawn(run) == {"training_pictures"}


def test_data_that_are_no_longer_prepared(run, tmp_path, unrendered):
    edit(run, data__task="cifar100", run__data_dir=str(tmp_path / "empty"))
    page = Page(write(run))
    assert "cifar100 is not prepared in" in page.text and "python -m vit_jax.data prepare cifar100" in page.text
    assert drawn(run) == {"curves", "classes", "confusion", "reliability", "filters", "positions"}
    edit(run, data__task="birds")
    assert "There is no task 'birds'" in Page(write(run)).text


def test_another_test_split_under_the_same_name(run, unrendered):
    with np.load(run / "predictions.npz") as file:
        logits, labels = file["logits"], file["labels"]
    np.savez(run / "predictions.npz", logits=logits, labels=np.roll(labels, 1))
    assert "is not the one that the run was tested on" in Page(write(run)).text
    np.savez(run / "predictions.npz", logits=logits[:50], labels=labels[:50])
    assert "predictions.npz holds 50 pictures, the test split on this machine 100" in Page(write(run)).text


@pytest.mark.parametrize("name", ["predictions.npz", "final.npz", "final.json"])
@pytest.mark.parametrize("content", [b"", b"no zip at all", None])
def test_damaged_files_are_named_and_the_rest_is_drawn(run, name, content, unrendered):
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    page = Page(write(run))
    assert str(run / name) in page.text and "Traceback" not in page.text
    assert {"curves", "training_pictures"} <= drawn(run)


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
        ("[]", "the whole should be an object"),
        ('{"sead": 3}', "there is no field sead"),
        ('{"seed": "x"}', "config.json: seed must be of type int"),
    ]:
        (run / "config.json").write_text(content)
        with pytest.raises(ReportError, match=said) as error:
            write(run)
        assert str(run / "config.json") in str(error.value) and "\n" not in str(error.value)


def test_single_layers_and_heads(run, unrendered):
    page = Page(write(run, pictures=2, layers=[1, 2], heads=[2]))
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
    assert len(page.pictures) == 1 and all(address.startswith("data:") for address in page.addresses)
    assert f"{statistics.mean(finals):.2f} ± {statistics.stdev(finals):.2f} %" in page.text
    assert "of 3 runs that differ in the seed alone (tiny, tiny-4, tiny-5)" in page.text
    assert "optimizer.learning_rate 0.03 0.03 0.03 0.5" in page.text and "seed 3 4 5 3" in page.text
    assert "data.task" not in page.text
    assert "tiny-5 70.00 %" in page.text


def test_the_same_run_twice_and_a_run_that_is_not_finished(run, tmp_path, unrendered):
    begun = shutil.copytree(run, tmp_path / "begun")
    edit(begun, seed=9)
    (begun / "metrics.jsonl").unlink()
    page = Page(write(run, run, begun, output=tmp_path / "page.html"))
    assert "±" not in page.text and "begun step 0/12 – 25.00 % –" in page.text
    assert "None that changes the numbers" in Page(write(run, run)).text


def test_the_command_line(run, tmp_path, capsys, unrendered):
    assert main([str(run), "--output", str(tmp_path / "page.html"), "--pictures", "1", "--layers", "1,2", "--heads", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "figures" / "heads_1.png").is_file()
    for arguments, said in [
        ([str(tmp_path / "nowhere")], "there is no folder"),
        ([str(run), "--layers", "9"], "there is no layer 9"),
        ([str(run), "--pictures", "0"], "at least one picture"),
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
    assert "--pictures" in capsys.readouterr().out


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


def made_up(run: Path) -> None:
    """Makes of the run one of the demo's size and length: pictures and labels are real, what it learnt is not."""
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
    write(run, pictures=1)
    for name in ("rollout", "curves"):  # the README shows them
        assert (run / "figures" / f"{name}.png").stat().st_size < 200_000


@pytest.mark.slow
def test_the_page_of_a_run_on_all_of_cifar100_takes_60_seconds_at_most(prepared_cifar100, shared, tmp_path, browser):
    """A real run, if a short one: the embedded model, all 50,000 and 10,000 pictures at 32 pixels."""
    config = configuration.read(str(Path(__file__).parents[2] / "configs" / "demo.py"))
    config.data.task, config.data.image_size, config.run.data_dir = "cifar100", 32, str(prepared_cifar100)
    config.training.steps, config.optimizer.warmup_steps = 6, 2
    config.training.eval_every = config.training.save_every = 6
    train(config, run := tmp_path / "cifar100")
    begun = time.perf_counter()
    page = write(run)
    assert time.perf_counter() - begun < 60
    assert drawn(run) == FIGURES | {"superclasses"} and "20 superclasses" in Page(page).text
    look(browser, page)

    # The archive itself says which class belongs to which superclass.
    with tarfile.open(shared / "data" / "cifar-100-binary.tar.xz") as archive:
        files = {member.name.rpartition("/")[2]: archive.extractfile(member).read() for member in archive if member.isfile()}
    labels = np.frombuffer(files["test.bin"], np.uint8).reshape(-1, 3074)[:, :2]
    names, of = superclasses(read(run))
    assert of == {int(fine): int(coarse) for coarse, fine in labels} and len(of) == 100
    assert names == files["coarse_label_names.txt"].decode().split()


@pytest.mark.parametrize(
    "line", ['{"step": true}', "9" * 5000, "[" * 100_000, '{"step": 12, "test/accuracy": NaN}', "[]", "null"]
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
    assert "expected numbers from 1 on, as in 1,2, got ''" in capsys.readouterr().err


def test_a_page_needs_a_name(run, capsys):
    assert main([str(run), "--output", "/"]) == 1
    assert capsys.readouterr().err == "error: / is no name of a page; give one such as page.html\n"


def test_names_that_are_alike_or_of_another_script(run):
    names = json.loads((run / "final.json").read_text())
    names["class_names"] = ["same", "same", "狮子", "two\nlines", *names["class_names"][4:]]
    (run / "final.json").write_text(json.dumps(names))
    assert list(read(run).class_names[:4]) == ["same (0)", "same (1)", "狮子", "two lines"]
    write(run)  # without a warning
