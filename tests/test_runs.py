"""Runs of real size on real images, each in its own process with one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.models.variants import build, shapes

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*arguments: str, workdir: Path) -> dict[str, float]:
    """The last line of metrics.jsonl of a run of main.py."""
    command = [sys.executable, "main.py", *arguments, "--workdir", str(workdir)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.full
def test_demo_gains_from_pre_training(tmp_path):
    """The first steps of configs/demo.py; all its steps reach its `run.expected`."""
    short = ("--config", "configs/demo.py", "--config.training.steps=16", "--config.optimizer.warmup_steps=2")
    pretrained = run(*short, workdir=tmp_path / "pretrained")
    random = run(*short, "--config.model.checkpoint=", "--config.model.variant=Mini/8", workdir=tmp_path / "random")
    assert pretrained["test/accuracy"] > 0.5
    assert pretrained["test/accuracy"] > random["test/accuracy"] + 0.2
    for folder in ("pretrained", "random"):  # a run ends with its page
        assert (tmp_path / folder / "report.html").stat().st_size > 300_000


def test_vit_b16_fine_tunes_on_cifar100_at_224_pixels(prepared_cifar100, tmp_path):
    model = build("B/16", num_classes=21843, representation_size=768)
    draw = np.random.default_rng(0)
    flat = {
        name: draw.normal(scale=0.02, size=leaf.shape).astype(np.float32)
        for name, leaf in flatten_dict(shapes(model), sep="/").items()
        if not name.startswith(("head", "pre_logits"))  # nothing reads them
    }
    np.savez(tmp_path / "ViT-B_16.npz", **flat)
    last = run(
        *("--config", "configs/cifar100_b16.py", f"--config.model.checkpoint={tmp_path / 'ViT-B_16.npz'}"),
        *(f"--config.run.data_dir={prepared_cifar100}", "--config.data.test_split=test[:16]"),
        *("--config.training.steps=3", "--config.training.batch_size=2", "--config.optimizer.warmup_steps=1"),
        workdir=tmp_path / "run",
    )
    assert last["step"] == 3 and np.isfinite(last["train/loss"]) and np.isfinite(last["test/loss"])
    with np.load(tmp_path / "run" / "final.npz") as final:
        assert final["head/kernel"].shape == (768, 100) and final["head/kernel"].any()
        assert set(final.files) == {*flat, "head/kernel", "head/bias"}
        assert not np.array_equal(final["cls"], flat["cls"])
    with np.load(tmp_path / "run" / "predictions.npz") as predictions:
        assert predictions["logits"].shape == (16, 100)
