"""Reading a run's files, whole, invalid or absent."""

import json

import numpy as np
import pytest

from tests.reports.pages import edit
from vit_jax.config_files import from_json
from vit_jax.config_rules import check
from vit_jax.errors import ConfigError, DataError, ReportError
from vit_jax.reports.markup import figure_html
from vit_jax.reports.runs import Missing, read_run
from vit_jax.reports.sections import prediction_figures


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
def test_invalid_predictions_are_missing(run, arrays):
    np.savez(run / "predictions.npz", **arrays)
    with pytest.raises(Missing, match="predictions.npz cannot be used"):
        _ = read_run(run).predictions


def test_folder_that_is_not_a_run_is_an_error(tmp_path):
    with pytest.raises(ReportError, match="nowhere: no such folder; give the folder of a run"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="not the folder of a run, because it has no config.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"sead": 3}', '{"seed": "x"}'])
def test_invalid_config_is_a_one_line_error(run, content):
    (run / "config.json").write_text(content)
    with pytest.raises(ConfigError) as expected:
        check(from_json(content, str(run / "config.json")))
    with pytest.raises(ReportError) as error:
        read_run(run)
    message = str(error.value)
    assert str(expected.value) in message and str(run / "config.json") in message and "\n" not in message


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
def test_invalid_lines_of_metrics_are_ignored(run, line):
    before = read_run(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n")
    after = read_run(run)
    assert (after.evaluations, after.best, after.step) == (before.evaluations, before.best, before.step)


def test_class_names_are_distinct_single_lines(run):
    names = json.loads((run / "final.json").read_text())
    names["class_names"] = ["same", "same", "狮子", "two\nlines", *names["class_names"][4:]]
    (run / "final.json").write_text(json.dumps(names))
    assert list(read_run(run).class_names[:4]) == ["same (0)", "same (1)", "狮子", "two lines"]
    for captioned in prediction_figures(read_run(run)):
        figure_html(captioned)  # without a warning


@pytest.mark.parametrize("task", ["cifar100", "cifar100_excerpt"])
def test_superclasses_without_prepared_data_are_an_error(run, tmp_path, task):
    edit(run, data__task=task, run__data_dir=str(tmp_path / "empty"))
    try:
        expected = read_run(run).test
    except DataError as error:
        with pytest.raises(DataError, match="prepared") as found:
            read_run(run).superclasses()
        assert str(found.value) == str(error)
    else:  # the embedded data are there, whatever data_dir is
        assert task == "cifar100_excerpt" and len(expected) == 100 and read_run(run).superclasses() is None


def test_superclasses_of_a_data_set_without_any_are_none(run):
    assert read_run(run).superclasses() is None
