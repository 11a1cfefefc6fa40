"""Whole runs, tiny: what they leave, how they resume, how they end."""

import json
import os
import shutil
import signal
import struct
from urllib.error import URLError

import jax
import numpy as np
import pytest

import vit_jax
from vit_jax.config_files import read
from vit_jax.errors import ConfigError, TrainingError
from vit_jax.formats.google import read_meta
from vit_jax.training import guard, loop, outputs, restore, saving
from vit_jax.training.preview import preview


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def numbers(workdir):
    """A run's lines without what time it took."""
    return [{name: value for name, value in line.items() if "per_second" not in name} for line in lines(workdir)]


def boards(workdir):
    """What TensorBoard would show: (step, tag) → value; a session's start at a step drops what came at it or later."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown = {}
    for file in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack("<Q", content[place : place + 8])
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += 16 + length
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in shown
                shown[event.step, value.tag] = value.simple_value
    return shown


def test_run_leaves_the_documented_files(uninterrupted, config):
    workdir, result = uninterrupted
    assert {path.name for path in workdir.iterdir()} - {".lock"} == {
        *("config.json", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "predictions.npz"),
        *("best.npz", "best.json", "final.npz", "final.json"),
    }
    found = lines(workdir)
    assert [line["step"] for line in found] == list(range(1, 13))
    train = {"step", "train/loss", "train/gradient_norm", "train/learning_rate", "train/images_per_second"}
    test = {"test/loss", "test/accuracy", "test/accuracy_top5"}
    for line in found:
        expected = train | (test if line["step"] in (4, 8, 12) else set())
        assert line.keys() == (expected - {"train/images_per_second"} if line["step"] == 1 else expected)
    assert found[0]["train/learning_rate"] == 0 and found[2]["train/learning_rate"] == pytest.approx(0.03)
    board = boards(workdir)
    for line in found:
        for name in line.keys() - {"step"}:
            assert board[line["step"], name] == pytest.approx(line[name], rel=1e-6)

    assert result.finished and result.metrics["test/accuracy"] == found[-1]["test/accuracy"]
    evaluated = {line["step"]: line["test/accuracy"] for line in found if "test/accuracy" in line}
    best = max(evaluated, key=lambda step: (evaluated[step], -step))
    assert (result.metrics["best/step"], result.metrics["best/accuracy"]) == (best, evaluated[best])
    meta = read_meta(workdir / "final.npz")
    assert meta["class_names"][:2] == ["lion", "sunflower"] and len(meta["class_names"]) == 10
    assert meta["image_size"] == 16 and meta["task"] == "cifar100_excerpt" and meta["source"] == "tiny.npz"
    assert meta["normalization"] == {"mean": [0.5] * 3, "std": [0.5] * 3} and len(meta["source_sha256"]) == 64


def test_finished_run_only_reports_when_started_again(uninterrupted, config, monkeypatch):
    workdir, result = uninterrupted
    before = (workdir / "metrics.jsonl").read_text()
    (workdir / "final.npz").unlink()
    monkeypatch.setattr(outputs, "predictions", None)  # neither trains nor evaluates
    again = loop.train(config, workdir)
    assert again.metrics == result.metrics and same(again.params, result.params)
    assert (workdir / "metrics.jsonl").read_text() == before and (workdir / "final.npz").exists()


def test_weights_are_written_from_the_host(config, tmp_path, monkeypatch):
    """On a GPU the loop's transfer guard refuses an implicit copy, which no guard on the CPU sees."""
    original, seen = saving.save_npz, []

    def watching(path, params, meta):
        seen.append(path.name)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
        original(path, params, meta)

    monkeypatch.setattr(saving, "save_npz", watching)
    config.training.save_every = 4
    loop.train(config, tmp_path)
    assert seen[0] == "best.npz" and seen[-1] == "final.npz"


@pytest.mark.slow
def test_loaded_model_knows_the_scaling_of_its_run(config, tmp_path):
    config.data.normalization, config.training.steps = "dataset", 3
    loop.train(config, tmp_path)
    from vit_jax.data.splits import open_split
    from vit_jax.data.tasks import task

    images, _ = open_split(task("cifar100_excerpt"), "test[:50]").take(np.arange(50))
    model, params = vit_jax.load(tmp_path)
    logits = model.apply({"params": params}, vit_jax.preprocess(images, 16, model))
    with np.load(tmp_path / "predictions.npz") as stored:
        np.testing.assert_allclose(logits, stored["logits"], rtol=1e-4, atol=1e-5)
    unscaled = model.apply({"params": params}, vit_jax.preprocess(images, 16))
    assert not np.allclose(unscaled, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop_after", [3, 4])
def test_signal_saves_and_the_run_goes_on(uninterrupted, config, tmp_path, monkeypatch, stop_after):
    workdir, result = uninterrupted
    original = guard.check

    def interrupt(step, found, *advice):  # called when a step's metrics are read, and after an evaluation
        if step == stop_after and ("test/loss" in found or step % 4):
            os.kill(os.getpid(), signal.SIGTERM)
        original(step, found, *advice)

    monkeypatch.setattr(guard, "check", interrupt)
    stopped = loop.train(config, tmp_path)
    assert not stopped.finished and len(lines(tmp_path)) < 12
    newest = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    # Nothing of what was done is lost; after step 3, the evaluation of step 4 is still to be made.
    assert newest == 4 and lines(tmp_path)[-1]["step"] == stop_after
    monkeypatch.setattr(guard, "check", original)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/loss": 1}\n{"step": 1')  # what a kill leaves
    resumed = loop.train(config, tmp_path)
    assert resumed.finished and same(resumed.params, result.params)
    assert resumed.metrics == result.metrics
    assert numbers(tmp_path) == numbers(workdir)
    shown, expected = ({key for key in boards(run) if "per_second" not in key[1]} for run in (tmp_path, workdir))
    assert shown == expected


@pytest.mark.slow
@pytest.mark.parametrize(("at", "times"), [(4, 1), (4, 2), (12, 1), (12, 2)])
def test_signal_ends_an_evaluation_which_the_next_start_makes(uninterrupted, config, tmp_path, monkeypatch, at, times):
    workdir, result = uninterrupted
    original, left = outputs.evaluate, [signal.SIGTERM, signal.SIGINT][:times]

    def interrupt(parts, params, step, saver):
        if step == at and left:
            os.kill(os.getpid(), left.pop())
        return original(parts, params, step, saver)

    monkeypatch.setattr(outputs, "evaluate", interrupt)
    for _ in range(times):
        stopped = loop.train(config, tmp_path)
        assert not stopped.finished and stopped.signal and not (tmp_path / "final.npz").exists()
        assert max(restore.steps(tmp_path / "checkpoints")) == at and lines(tmp_path)[-1]["step"] == at - 1
    resumed = loop.train(config, tmp_path)
    assert resumed.finished and same(resumed.params, result.params) and resumed.metrics == result.metrics
    assert numbers(tmp_path) == numbers(workdir)
    shown, expected = ({key for key in boards(run) if "per_second" not in key[1]} for run in (tmp_path, workdir))
    assert shown == expected
    monkeypatch.setattr(outputs, "predictions", None)  # a finished run is not evaluated again
    assert loop.train(config, tmp_path).metrics == result.metrics


def test_failed_save_after_the_last_evaluation_ends_the_run(uninterrupted, config, tmp_path, monkeypatch):
    """The state was saved before that evaluation, and stays."""
    _, result = uninterrupted
    original = outputs.evaluate

    def interrupt(parts, state, step, saver):
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(parts, state, step, saver)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "evaluate", interrupt)
        assert not loop.train(config, tmp_path).finished
    with monkeypatch.context() as patch:
        patch.setattr(saving.Saver, "_write_best", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(TrainingError, match="saving step 12 in .* failed .*No space left"):
            loop.train(config, tmp_path)
    assert 12 in restore.steps(tmp_path / "checkpoints") and not (tmp_path / "final.npz").exists()
    assert same(loop.train(config, tmp_path).params, result.params)


def test_eval_only_gives_the_metrics_of_the_run(uninterrupted, config, tmp_path):
    workdir, result = uninterrupted
    found = loop.evaluate(config, workdir)
    assert found["step"] == 12 and found["test/accuracy"] == result.metrics["test/accuracy"]
    assert found["test/loss"] == pytest.approx(result.metrics["test/loss"], rel=1e-6)
    # Without a state, the checkpoint's own head answers.
    config.model.checkpoint = str(workdir / "final.npz")
    from_file = loop.evaluate(config, tmp_path / "nothing")
    assert from_file["step"] == 0 and from_file["test/accuracy"] == found["test/accuracy"]
    assert not (tmp_path / "nothing").exists()


def test_eval_only_without_weights_is_refused(config, tmp_path):
    config.model.checkpoint, config.model.variant = "", "B/16"
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        loop.evaluate(config, tmp_path)


def test_eval_only_refuses_a_head_of_other_classes(config, tmp_path):
    with pytest.raises(ConfigError, match="has a head of 5 classes, cifar100_excerpt has 10"):
        loop.evaluate(config, tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "error", "said"),
    [
        ("model.checkpoint", "nowhere.npz", ValueError, "there is no file nowhere.npz"),
        ("data.image_size", 20, ConfigError, "data.image_size = 20: .*multiples of 8"),
        ("training.batch_size", 12, ConfigError, "training.batch_size = 12 .* does not divide among 8 devices"),
        ("data.task", "cifar1000", ValueError, "no task 'cifar1000'"),
        ("data.train_split", "train[:0]", ValueError, "is empty"),
        ("model.variant", "B/16", ConfigError, "either model.checkpoint .* or model.variant"),
    ],
)
def test_impossible_run_leaves_no_folder(config, tmp_path, field, value, error, said):
    section, name = field.split(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(error, match=said):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unprepared_data_error_names_the_command(config, tmp_path, monkeypatch):
    config.data.task, config.run.data_dir = "cifar100", str(tmp_path / "tfds")

    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(ValueError, match="python -m vit_jax.data prepare cifar100 --archive"):
        loop.train(config, tmp_path / "run")


@pytest.mark.parametrize("name", ["train/loss", "train/gradient_norm", "test/loss"])
def test_diverged_run_stops_with_advice(config, tmp_path, monkeypatch, name):
    original = guard.check

    def spoilt(step, found, *advice):
        original(step, found | {name: float("nan")} if step == 4 and name in found else found, *advice)

    monkeypatch.setattr(guard, "check", spoilt)
    with pytest.raises(TrainingError, match=f"{name} of step 4 is nan.*: training has diverged"):
        loop.train(config, tmp_path)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert f"{name} of step 4 is nan" in found[-1]["diverged"] and all(map(np.isfinite, list(found[-1].values())[:-1]))
    assert name.startswith("test") or "train/learning_rate" in found[-1]
    assert not (tmp_path / "final.npz").exists() and not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.slow
def test_run_from_random_weights_reads_the_remaining_fields(config, tmp_path):
    """The fields that no other run here sets are read, too."""
    config.model.checkpoint, config.model.variant = "", "Nano/8"
    config.model.dropout, config.model.attention_dropout, config.model.dtype = 0.1, 0.1, "bfloat16"
    config.data.normalization, config.run.device_budget_mib = "dataset", 0
    config.augment.crop, config.augment.flip = "tensorflow", False
    config.optimizer.name, config.optimizer.decay, config.optimizer.weight_decay = "adamw", "linear", 0.1
    config.training.steps, config.training.grad_accum_steps, config.run.parallel = 3, 2, "pmap"
    result = loop.train(config, tmp_path)
    assert result.finished and np.isfinite(result.metrics["test/loss"])
    meta = read_meta(tmp_path / "final.npz")
    assert meta["source"] == "random weights, Nano/8" and meta["normalization"]["mean"][0] == pytest.approx(0.5071)


def test_preview_describes_the_run(config):
    text = preview(config)
    assert "1 blocks of 16, 2 heads, 5 tokens" in text and "64 training and 50 test images" in text
    assert "16 images of 16×16×3 in 1 microbatch(es) over 8 CPUs" in text
    assert "MiB a device" in text and "12 steps, about" in text


@pytest.mark.slow
def test_resolved_fields_are_written_and_kept(config, tmp_path, monkeypatch):
    config.training.steps, config.model.dtype = 4, "bfloat16"
    assert config.model.attention == "auto"
    vit_jax.train(config, tmp_path)
    written = read(str(tmp_path / "config.json"))
    assert (written.model.dtype, written.model.attention) == ("bfloat16", "xla")
    assert config.model.attention == "auto"  # the caller's stays as it was
    config.model.dtype = "auto"  # float32 on this machine, but the run is there
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "final.npz").unlink()
    vit_jax.train(config, tmp_path)
    assert read(str(tmp_path / "config.json")) == written
    config.model.dtype = "float32"
    with pytest.raises(ConfigError, match=r"these fields differ: model\.dtype"):
        vit_jax.train(config, tmp_path)


@pytest.mark.slow
def test_remat_and_determinism_change_no_numbers(uninterrupted, config, tmp_path):
    config.run.remat = config.run.deterministic = True
    vit_jax.train(config, tmp_path)
    for ours, theirs in zip(numbers(tmp_path), numbers(uninterrupted[0]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
