"""What a run leaves: predictions and last metrics, written again when they are missing or damaged."""

import json
import os
import shutil

import numpy as np
import pytest

import vit_jax
from tests.training.states import same
from vit_jax.config_files import to_json
from vit_jax.formats.google import read_meta
from vit_jax.training import loop, restore
from vit_jax.training.evaluate import metrics
from vit_jax.transforms.preprocess import for_evaluation


def test_predictions_file_is_of_the_final_weights(uninterrupted, config):
    workdir, result = uninterrupted
    model, params = vit_jax.load(str(workdir / "final.npz"))
    assert same(params, result.params)
    from vit_jax.data.splits import open_split
    from vit_jax.data.tasks import task

    images, labels = open_split(task("cifar100_excerpt"), "test[:50]").take(np.arange(50))
    with np.load(workdir / "predictions.npz") as stored:
        logits, stored_labels = stored["logits"], stored["labels"]
    assert np.array_equal(stored_labels, labels)
    expected = model.apply({"params": params}, for_evaluation(16)(images))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert metrics(logits, labels)["accuracy"] == result.metrics["test/accuracy"]


def test_finished_run_without_its_files_is_evaluated_again(uninterrupted, config, tmp_path):
    workdir, result = uninterrupted
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "predictions.npz").unlink()
    again = loop.train(config, tmp_path / "run")
    assert again.metrics == result.metrics
    assert (tmp_path / "run" / "predictions.npz").exists()


def logits(path):
    with np.load(path) as file:
        return file["logits"].tobytes()


@pytest.mark.parametrize("damage", ["nothing", "truncated", "of another split"])
def test_finished_run_renews_damaged_predictions_without_its_checkpoint(uninterrupted, config, tmp_path, damage):
    workdir, result = uninterrupted
    shutil.copytree(workdir, tmp_path / "run")
    path = tmp_path / "run" / "predictions.npz"
    expected = logits(path)
    if damage == "nothing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        np.savez(path, logits=np.zeros((3, 10), np.float32), labels=np.zeros(3, np.int32))
    config.model.checkpoint = str(shutil.copy(config.model.checkpoint, tmp_path / "gone.npz"))
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        record = json.loads((step / "record" / "metadata").read_text())
        del record["record_sha256"]
        record["config"]["model"]["checkpoint"] = config.model.checkpoint
        (step / "record" / "metadata").write_text(json.dumps({**record, "record_sha256": restore._digest_of_json(record)}))
    os.remove(config.model.checkpoint)
    again = loop.train(config, tmp_path / "run")
    assert again.metrics == result.metrics and logits(path) == expected
    assert read_meta(tmp_path / "run" / "final.npz") == read_meta(workdir / "final.npz")  # with the hash of what was read
    assert loop.evaluate(config, tmp_path / "run")["test/accuracy"] == result.metrics["test/accuracy"]
