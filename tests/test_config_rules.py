"""The rules of a configuration."""

from pathlib import Path

import pytest

from vit_jax import config as configuration
from vit_jax.config import Config, Model, difference
from vit_jax.config_files import read
from vit_jax.config_rules import check, mixing_fields, with_steps
from vit_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def valid():
    config = Config()
    config.model.variant = "B/16"
    check(config)
    return config


def put(config, name, value):
    *sections, field = name.split(".")
    for section in sections:
        config = getattr(config, section)
    setattr(config, field, value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("training.steps", "ten", "training.steps must be of type int, got 'ten'"),
        ("training.steps", True, "training.steps must be of type int, got True"),
        ("augment.flip", 1, "augment.flip must be of type bool, got 1"),
        (
            "augment.crop_area",
            (0.1, 0.9, 0.4),
            r"augment.crop_area must be of type tuple\[float, float\], got \(0.1, 0.9, 0.4\)",
        ),
        ("augment.crop_area", (0.1,), "augment.crop_area must be of type tuple"),
        ("augment.crop_area", ("a", "b"), "augment.crop_area must be of type tuple"),
        ("augment.crop_area", 0.3, "augment.crop_area must be of type tuple"),
        ("augment.crop_area", (0.9, 0.1), "0 < least <= largest <= 1"),
        ("augment.crop_area", (0.0, 1.0), "0 < least <= largest <= 1"),
        (
            "augment.eval_crop",
            "centre",
            "augment.eval_crop must be one of 'none', 'center', got 'centre'",
        ),
        (
            "augment.crop",
            "centre",
            "augment.crop must be one of 'torchvision', 'tensorflow', 'resize_crop', 'pad', 'none', got 'centre'",
        ),
        (
            "run.mesh",
            "data:4,model:2",
            "run.mesh must be sizes of the axes data and fsdp, as in 'data:4,fsdp:2', got 'data:4,model:2'",
        ),
        ("run.mesh", "fsdp:2,fsdp:4", "run.mesh must be sizes of the axes"),
        ("run.mesh", "fsdp", "run.mesh must be sizes of the axes"),
        ("run.mesh", "fsdp:0", "run.mesh must be sizes of the axes"),
        ("run.mesh", "data:4;fsdp:2", "run.mesh must be sizes of the axes"),
        ("augment.padding", -1, "augment.padding must be from 0 to 128, got -1"),
        ("augment.randaugment_layers", -1, "augment.randaugment_layers must be from 0 to 10, got -1"),
        ("augment.randaugment_magnitude", -1.0, "augment.randaugment_magnitude must be from 0 to 30, got -1.0"),
        ("augment.randaugment_magnitude", 31.0, "augment.randaugment_magnitude must be from 0 to 30, got 31.0"),
        ("augment.erasing", 1.01, "augment.erasing must be from 0 to 1, got 1.01"),
        ("augment.erasing", -0.1, "augment.erasing must be from 0 to 1, got -0.1"),
        ("augment.mixup", -0.2, "augment.mixup must be from 0 to 100, got -0.2"),
        ("augment.cutmix", 1e-5, r"augment.cutmix must be 0 \(off\) or at least 0.001, got 1e-05"),
        ("augment.cutmix", -1.0, "augment.cutmix must be from 0 to 100, got -1.0"),
        ("training.label_smoothing", 1.0, r"training.label_smoothing must be in \[0, 1\), got 1.0"),
        ("optimizer.name", "adam", "optimizer.name must be one of 'sgd', 'adamw'"),
        ("optimizer.warmup_steps", 1000, "optimizer.warmup_steps = 1000 must be shorter than the run, training.steps = 1000"),
        ("optimizer.warmup_steps", -1, "optimizer.warmup_steps must be from 0 to 2,147,483,647, got -1"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate must be from 1e-30 to 1,000,000.0, got 0.0"),
        ("optimizer.learning_rate", 10**400, "optimizer.learning_rate must be of type float, got 1000"),
        ("run.expected", {"test/loss": 10**400}, "run.expected must be of type"),
        ("augment.crop_area", (0.1, 10**400), "augment.crop_area must be of type"),
        ("training.steps", 2**31, "training.steps must be from 1 to 100,000,000, got 2147483648"),
        ("training.steps", 10**20, "training.steps must be from 1 to 100,000,000"),
        ("training.steps", 10**5000, "training.steps must be .* got a number of more than 4,300 digits"),
        ("training.batch_size", 10**9, "training.batch_size must be from 1 to 131,072, got 1000000000"),
        ("run.eval_batch_size", 0, "run.eval_batch_size must be from 1 to 131,072, got 0"),
        ("model.checkpoint", "a\0b", "model.checkpoint must not contain a NUL character"),
        ("run.data_dir", "\0", "run.data_dir must not contain a NUL character"),
        ("training", Model(), r"training must be a vit_jax.config.Training, got Model\("),
        ("training", {"steps": 3}, "training must be a vit_jax.config.Training, got {'steps': 3}"),
        ("optimizer", None, "optimizer must be a vit_jax.config.Optimizer, got None"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate must be of type float, got nan"),
        ("model.dropout", 1.0, r"model.dropout must be in \[0, 1\)"),
        ("training.on_nan", "skip", "training.on_nan must be one of 'raise', 'rollback', got 'skip'"),
        ("run.watchdog_minutes", -1.0, "run.watchdog_minutes must be from 0 to 1,000,000.0, got -1.0"),
        ("run.deterministic", 1, "run.deterministic must be of type bool, got 1"),
        ("training.epochs", -0.5, "training.epochs must be from 0 to 1,000,000.0, got -0.5"),
        ("training.patience", 3, "training.patience = 3 needs data.validation_split"),
        ("training.grad_accum_steps", 3, "training.batch_size = 64 does not divide into training.grad_accum_steps = 3"),
        ("model.checkpoint", "x.npz", "either model.checkpoint .* got 'x.npz' and 'B/16'"),
        ("model.variant", "", "either model.checkpoint .* got '' and ''"),
        ("run.expected", {"a": "b"}, r"run.expected must be of type dict\[str, float\]"),
        ("model.tune", "bias", "model.tune must be one of 'all', 'head', .*'lora', 'ssf', got 'bias'"),
        ("model.lora_rank", 0, "model.lora_rank must be from 1 to 65,536, got 0"),
        ("model.lora_alpha", -1.0, "model.lora_alpha must be from 0 to 1,000,000.0, got -1.0"),
        ("model.lora_alpha", 16.0, "model.lora_alpha = 16 needs model.tune = 'lora', and model.tune is 'all'"),
        ("model.stochastic_depth", 1.0, r"model.stochastic_depth must be in \[0, 1\), got 1.0"),
        ("optimizer.ema", 1.0, r"optimizer.ema must be in \[0, 1\), got 1.0"),
        ("optimizer.layer_decay", 0.0, "optimizer.layer_decay must be from 0.001 to 1, got 0.0"),
        ("optimizer.layer_decay", 1.5, "optimizer.layer_decay must be from 0.001 to 1, got 1.5"),
        ("optimizer.sam_rho", -0.1, "optimizer.sam_rho must be from 0 to 1,000,000.0, got -0.1"),
        ("optimizer.weight_decay", -0.1, "optimizer.weight_decay must be from 0 to 1,000,000.0, got -0.1"),
        ("optimizer.base_batch_size", -1, "optimizer.base_batch_size must be from 0 to 131,072, got -1"),
        ("optimizer.name", "adam", "optimizer.name must be one of 'sgd', 'adamw', 'lamb', 'lars', 'muon', got 'adam'"),
        ("optimizer.rate_scaling", "root", "optimizer.rate_scaling must be one of 'linear', 'sqrt', got 'root'"),
        (
            "optimizer.rate_scaling",
            "sqrt",
            "optimizer.rate_scaling = 'sqrt' needs optimizer.base_batch_size, .*optimizer.learning_rate = 0.03 .* and it is 0",
        ),
        ("seed", 2**32, "seed must be from 0 to 4,294,967,295, got 4294967296"),
    ],
    ids=lambda value: "" if isinstance(value, int) else None,  # pytest cannot print 10**5000
)
def test_check_error_names_the_field_in_one_line(valid, name, value, said):
    put(valid, name, value)
    with pytest.raises(ConfigError, match=said) as raised:
        check(valid)
    assert len(str(raised.value)) < 300 and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [name for name, (_, kind) in configuration.fields(Config()).items() if kind in (int, float)])
@pytest.mark.parametrize(
    "value",
    [10**20, -(10**20), 10**400, 10**5000, float("inf"), float("nan")],
    ids=["1e20", "-1e20", "1e400", "1e5000", "inf", "nan"],
)
def test_check_refuses_huge_numbers_in_every_field(valid, name, value):
    put(valid, name, value)
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        check(valid)


def test_decay_by_depth_needs_blocks_that_are_trained(valid):
    valid.optimizer.layer_decay, valid.model.tune = 0.75, "head"
    message = r"^optimizer.layer_decay = 0.75 needs blocks to train, and model.tune = 'head' trains none$"
    with pytest.raises(ConfigError, match=message):
        check(valid)
    valid.model.tune = "attention"
    check(valid)


def test_deterministic_pmap_is_refused(valid):
    valid.run.deterministic = True
    check(valid)
    valid.run.parallel = "pmap"
    with pytest.raises(ConfigError, match="run.deterministic = true needs run.parallel = 'mesh'"):
        check(valid)


@pytest.mark.parametrize(("epochs", "images", "steps"), [(3, 50_000, 2344), (0.5, 100, 1), (1, 64, 1), (1.1, 640, 11)])
def test_epochs_give_the_number_of_steps(valid, epochs, images, steps):
    valid.training.epochs, valid.optimizer.warmup_steps = epochs, 0
    check(valid)
    found = with_steps(valid, images)
    assert found.training.steps == steps and found.training.epochs == epochs
    # A run that wrote its steps out is resumed by the configuration that does not know them yet, but not by other epochs.
    assert difference(valid, found) == difference(found, valid) == []
    found.training.epochs += 1
    assert difference(valid, found) == ["training.epochs"]
    valid.training.steps, valid.training.epochs = steps, 0
    assert difference(valid, found) == []


@pytest.mark.parametrize(
    ("epochs", "warmup", "said"),
    [
        (1, 4, "optimizer.warmup_steps = 4 must be shorter than the run, training.steps = 4"),
        (1e6, 0, "training.steps must be from 1"),
    ],
)
def test_epochs_of_an_impossible_length_are_refused(valid, epochs, warmup, said):
    valid.training.epochs, valid.optimizer.warmup_steps = epochs, warmup
    images = 250 if epochs == 1 else 10**6
    with pytest.raises(
        ConfigError, match=f"training.epochs = {epochs:g} passes over {images:,} images: {said}".replace("+", r"\+")
    ):
        with_steps(valid, images)


def test_mesh_and_pmap_exclude_each_other(valid):
    valid.run.mesh, valid.run.parallel = "data:4,fsdp:2", "pmap"
    with pytest.raises(
        ConfigError, match=r"^run.mesh = 'data:4,fsdp:2' needs run.parallel = 'mesh', and run.parallel is 'pmap'$"
    ):
        check(valid)
    valid.run.parallel = "mesh"
    check(valid)
    assert configuration.mesh_sizes(" fsdp:2,data:4") == {"fsdp": 2, "data": 4} and configuration.mesh_sizes("") == {}


def test_mixing_needs_an_even_microbatch(valid):
    valid.augment.mixup, valid.training.batch_size = 0.2, 6
    check(valid)
    valid.training.grad_accum_steps = 2
    said = "augment.mixup = 0.2{} mixes pairs of images: training.batch_size = 6 in training.grad_accum_steps = 2 must give an"
    with pytest.raises(ConfigError, match=said.format("")):
        check(valid)
    valid.augment.cutmix = 1.0
    with pytest.raises(ConfigError, match=said.format(" and augment.cutmix = 1")):
        check(valid)
    valid.augment.mixup = valid.augment.cutmix = 0.0
    check(valid)
    assert mixing_fields(valid.augment) == ""


def test_cudnn_needs_bfloat16_and_no_attention_dropout():
    config = read("configs/demo.py")
    config.model.attention = "cudnn"
    check(config)
    config.model.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"'cudnn' drops no weights, and model\.attention_dropout is 0\.1"):
        check(config)
    config.model.dtype = "float32"
    with pytest.raises(ConfigError, match=r"'cudnn' computes in bfloat16, and model\.dtype is 'float32'"):
        check(config)
