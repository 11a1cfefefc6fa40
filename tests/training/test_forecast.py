"""What `--dry_run --target` says of memory, of a run whose memory is given instead of compiled."""

import copy
from types import SimpleNamespace

import jax
import pytest

from vit_jax import Config
from vit_jax.errors import ConfigError
from vit_jax.training import forecast, hlo, target
from vit_jax.training.cards import CARDS


class Run:
    """In the place of a target.Target: memory as given by a function of the configuration, nothing is compiled."""

    def __init__(self, config, devices=1):
        self.config, self.layout, self.eval_batch_size = config, SimpleNamespace(devices=[0] * devices), 256
        self.data = {"training": None, "test": None}
        self.state = SimpleNamespace(params={})

    def changed(self, **fields):
        config = copy.deepcopy(self.config)
        for name, value in fields.items():
            section, _, field = name.partition("_")
            setattr(getattr(config, section), field, value)
        return Run(config, len(self.layout.devices))

    def train_step(self):
        settings, remat = self.config.training, self.config.run.remat
        images = settings.batch_size / settings.grad_accum_steps / len(self.layout.devices)
        return target.Plan("", 10**9, int(1e9 + images * (20e6 if remat else 90e6) + 3e8 * (settings.grad_accum_steps > 1)))


def described_memory(batch, devices=1, temporary=0):
    config = Config()
    config.training.batch_size = batch
    run = Run(config, devices)
    return forecast._memory_lines(run, CARDS["h100"], run.train_step(), target.Plan("", 0, temporary))


@pytest.fixture
def _memory(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(forecast, "nbytes", lambda tree: 0)


@pytest.mark.usefixtures("_memory")
def test_largest_batch_is_that_of_a_compiled_program():
    assert described_memory(64)[-1] == "largest     a batch of 640 images fits: 59.60 GB by its compiled program"
    assert "a batch of 5,120 images fits" in described_memory(64, devices=8)[-1]


def test_first_guess_of_the_largest_batch_knows_the_type_of_gradients(monkeypatch, capsys):
    """So one program is compiled if memory grows linearly; here with 2 GB of parameters, 1 GB of gradients."""
    monkeypatch.setattr(forecast, "nbytes", lambda tree: 2 * 10**9 if tree == {} else 0)
    monkeypatch.setattr(target, "usable", lambda card: 64e9)
    config = Config()
    config.model.dtype = "bfloat16"
    run = Run(config)
    text = forecast._memory_lines(run, CARDS["h100"], run.train_step(), target.Plan("", 0, 0))
    assert text[-1] == "largest     a batch of 640 images fits: 61.60 GB by its compiled program"
    assert capsys.readouterr().err == "compiling a training step of 640 images\n"


@pytest.mark.usefixtures("_memory")
def test_batch_that_does_not_fit_says_what_does():
    with pytest.raises(ConfigError) as error:
        described_memory(1024)
    assert str(error.value) == (
        "training.batch_size = 1024 needs 94.16 GB on each NVIDIA H100 80GB HBM3, of which 63.70 GB can be used; by compiling: "
        "the largest batch that fits is 640; run.remat=true makes it fit (22.48 GB); "
        "training.grad_accum_steps=2 makes it fit (48.38 GB)"
    )
    with pytest.raises(ConfigError, match=r"672; run.remat=true is not enough \(83.92 GB\); training.grad_accum_steps=8 ma"):
        described_memory(4096)


@pytest.mark.usefixtures("_memory")
def test_model_that_does_not_fit_with_any_batch_is_an_error(monkeypatch):
    monkeypatch.setattr(target, "usable", lambda card: 0.5e9)
    with pytest.raises(
        ConfigError, match=r"batch_size = 64 needs 7.76 GB .* no batch was found that fits; run.remat=true is not"
    ):
        described_memory(64)


@pytest.mark.usefixtures("_memory")
def test_evaluation_that_does_not_fit_is_an_error():
    with pytest.raises(ConfigError, match="run.eval_batch_size = 256 needs 70.00 GB on each card, 63.70 GB of 84.93 GB"):
        described_memory(64, temporary=70 * 10**9)


@pytest.mark.parametrize(
    ("devices", "parts", "nearest"), [(6, 1, 4), (7, 1, 8), (100, 1, 64), (0, 1, 1), (48, 2, 32), (33, 2, 32)]
)
def test_nearest_number_of_devices_is_suggested(devices, parts, nearest):
    config = Config()
    config.training.grad_accum_steps = parts
    with pytest.raises(ConfigError, match=f"the nearest number that works is {nearest}$"):
        forecast.check_options(config, "h100", devices, "")


def test_odd_number_of_mixed_images_on_a_device_is_refused():
    config = Config()
    config.augment.mixup = 0.2
    forecast.check_options(config, "h100", 32, "")
    with pytest.raises(ConfigError, match="in pairs, which augment.mixup = 0.2 mixes; the nearest number that works is 32$"):
        forecast.check_options(config, "h100", 64, "")


def test_exchanges_of_one_kind_are_counted_together():
    scattered = [hlo.Collective("reduce-scatter", 2**20, ("bf16",), True, kernels, "") for kernels in (3, 0)]
    reduced = hlo.Collective("all-reduce", 4, ("f32",), False, 0, "")
    assert forecast._exchange([scattered[0], reduced, scattered[1]]) == [
        "2 reduce-scatter of 2.1 MB in bf16, 1 of them while kernels run",
        "1 all-reduce of 0.0 MB in f32, 0 of them while kernels run",
    ]


def test_validation_images_are_counted_and_named(config, monkeypatch):
    """By the table's sizes, without the data; nothing is compiled."""
    monkeypatch.setattr(target.Target, "train_step", lambda self: target.Plan("", 10**9, 10**9))
    config.model.dtype = "float32"

    def described(split):
        config.data.train_split, config.data.test_split, config.data.validation_split = "train", "test", split
        run = target.Target(config, jax.devices()[:1])
        lines = forecast._memory_lines(run, CARDS["h100"], run.train_step(), target.Plan("", 0, 0))
        needed = forecast._needed(run, run.train_step()), lines[2].split()[0]
        return forecast._shape_lines(run)[1], lines[1], needed

    shapes, memory, before = described("")
    assert shapes == "data        cifar100_excerpt: 1,000 training and 500 test images, on the device"
    assert "with the test images (2 MB) and the best parameters" in memory
    shapes, memory, after = described("train[:90%]")
    assert shapes.endswith(": at most 1,000 training, 1,000 validation and 500 test images, on the device")
    assert "with the validation images (3 MB), the test images (2 MB) and the best parameters" in memory
    added = 1000 * (3072 + 4)
    assert after[0] - before[0] == added and float(after[1]) - float(before[1]) == pytest.approx(added / 1e6, abs=1)
