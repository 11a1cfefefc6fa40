"""A run that is started again, on other data or with a checkpoint of its classes: what it checks, keeps, refuses, reports."""

import json
import shutil

import numpy as np
import pytest

from vit_jax.config_files import to_json
from vit_jax.errors import ConfigError, TrainingError
from vit_jax.training import devices, loop, outputs
from vit_jax.training.assemble import assemble


def test_edited_configuration_is_refused(uninterrupted, config, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "run")
    config.training.steps = 8  # below the saved step
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    with pytest.raises(ConfigError, match="training.steps = 12 when it was saved, 8 now"):
        loop.train(config, tmp_path / "run")


def test_training_on_test_images_gives_a_recorded_warning(config, tmp_path, caplog):
    config.data.train_split, config.training.batch_size, config.training.steps = "train[:8]+test[:20]", 32, 3
    loop.train(config, tmp_path)
    assert "20 of the 50 test images are training images" in caplog.text
    first, second = json.loads((tmp_path / "environment.json").read_text())["warnings"]
    assert "20 of the 50 test images" in first and "batch_size = 32 is larger than the training split of 28" in second


def test_eval_only_of_nan_parameters_is_an_error(uninterrupted, config, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "metrics", lambda logits, labels: {"loss": float("nan"), "accuracy": 0.0})
    with pytest.raises(TrainingError, match="test/loss of step 12 in .* is nan"):
        loop.evaluate(config, uninterrupted[0])


@pytest.mark.parametrize(("keep_head", "kept"), [("auto", True), ("false", False)])
def test_head_of_the_same_classes_is_kept(uninterrupted, config, keep_head, kept):
    config.model.checkpoint, config.model.keep_head = str(uninterrupted[0] / "final.npz"), keep_head
    parts = assemble(config, devices.start(config.run))
    assert np.any(parts.params["head"]["kernel"]) == kept and parts.config.model.keep_head == str(kept).lower()


def test_cudnn_without_a_gpu_is_refused(config, tmp_path):
    config.model.attention, config.model.dtype = "cudnn", "bfloat16"
    with pytest.raises(ConfigError, match="model.attention = 'cudnn' needs an NVIDIA GPU"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_embedded_data_are_found_with_another_data_dir(config, tmp_path):
    config.run.data_dir = str(tmp_path)
    assert len(assemble(config, devices.start(config.run)).sources[0]) == 64 and not list(tmp_path.iterdir())


def test_first_messages_name_model_data_and_devices(config, tmp_path, capsys):
    config.training.steps = 3
    loop.train(config, tmp_path)
    said = capsys.readouterr().err
    order = [said.index(text) for text in ("loading ", "5,610 parameters", "compiling the training step")]
    assert order == sorted(order) and "64 training and 50 test images; 3 steps of 16; 8 CPUs" in said


def test_rate_of_a_run_is_scaled_by_its_batch_size(config):
    config.optimizer.learning_rate, config.optimizer.base_batch_size = 0.1, 64
    parts = assemble(config, devices.start(config.run))
    assert parts.rate(config.optimizer.warmup_steps) == pytest.approx(0.025)  # a batch of 16
