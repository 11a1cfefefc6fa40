"""What --dry_run prints, and what it does without."""

import pytest

from vit_jax.config import Config
from vit_jax.models.variants import flops
from vit_jax.training import devices, preview
from vit_jax.training.assemble import assemble
from vit_jax.training.preview import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 s"),
        (42, "42.0 s"),
        (200, "3 min 20 s"),
        (5 * 3600 + 12 * 60, "5 h 12 min"),
        (86_000, "1 day 0 hours"),
        (8697.5 * 60, "6 days 1 hour"),
    ],
)
def test_duration_has_units_people_use(seconds, text):
    assert duration(seconds) == text


@pytest.mark.slow
def test_preview_needs_no_download_of_a_known_architecture(config, monkeypatch, capsys, tmp_path):
    """An offline machine with an empty cache: the table knows the architecture, here a small one in the place of Ti/16's."""
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    config.model.checkpoint = "Ti/16"
    monkeypatch.setattr("vit_jax.training.preview.resolve", lambda name: type("Row", (), {"variant": "Nano/8"}))
    monkeypatch.setattr("vit_jax.training.preview.local", lambda row: None)
    config.training.eval_every = 1
    times = iter([0.5, 60.0])
    monkeypatch.setattr(preview, "_seconds", lambda act: [act(), next(times)][1])
    text = preview.preview(config).splitlines()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Ti/16 is not on this machine: random weights of the same shapes (Nano/8) are used"
    assert said[1] == "compiling a training step of 16 images and measuring it" and len(said) == 3
    assert "4 blocks of 128, 4 heads, 5 tokens" in text[0]
    assert text[3] == "sharding    batch over data:8; parameters and optimizer state whole on every device"
    assert text[6:] == [
        "step        0.50 s, 32.0 images/s",
        "evaluation  4 min 0 s, 12 of them: 48 min 0 s",
        "run         12 steps, about 48 min 6 s",
        "warning: evaluation takes longer than training (48 min 0 s and 6.0 s); training.eval_every = 1 can be raised",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "Ti/61", "~no-such-user/x", "mini_8"])
def test_preview_leaves_other_weights_to_the_loader(config, name):
    config.model.checkpoint = name
    assert preview.without_download(config) is config


@pytest.mark.slow
def test_validation_images_are_named_and_counted(config, monkeypatch):
    config.training.eval_every = 4

    def previewed(budget=4096):
        config.run.device_budget_mib = budget
        monkeypatch.setattr(preview, "_seconds", lambda act: [act(), 1.0][1])
        return preview.preview(config).splitlines()

    text = previewed()
    assert text[1] == "data        cifar100_excerpt: 64 training and 50 test images, on the device"
    assert " with the test images (0) and the best parameters (0)" in text[5]
    assert text[7:] == ["evaluation  4.0 s, 3 of them: 12.0 s", "run         12 steps, about 24.0 s"]
    config.data.validation_split = "train[64:1000]"  # 2.7 MiB
    before, text = float(text[5].split()[0]), previewed()
    assert text[1] == "data        cifar100_excerpt: 64 training, 936 validation and 50 test images, on the device"
    assert " with the validation images (3), the test images (0) and the best parameters (0)" in text[5]
    assert float(text[5].split()[0]) - before == 3
    assert text[7].startswith("evaluation  59.0 s, 3 of them: 3 min 5 s")
    text = previewed(budget=1)
    assert text[1].endswith("936 validation and 50 test images, training and test on the device, the rest streamed")
    assert " with the validation images (0), the test images (0) and" in text[5]


def test_preview_says_what_is_trained_and_that_averages_are_evaluated_too(config):
    config.model.tune, config.optimizer.ema = "head", 0.9
    parts = assemble(config, devices.start(config.run))
    line = preview.describe_shapes(parts.config, parts.model, parts.abstract(), "", parts.layout)[0]
    assert "170 of 5,610 parameters trained, 10 classes" in line and "170 of 5,610 parameters trained" in parts.describe()
    once = flops(parts.model, config.data.image_size)
    assert preview.training_flops(config, parts.model) == once  # no backward pass goes through the blocks
    config.model.tune, config.optimizer.sam_rho = "all", 0.05
    assert preview.training_flops(config, parts.model) == 6 * once
    assert preview.evaluations_of_a_state(config) == 2 and preview.evaluations_of_a_state(Config()) == 1
