"""`--dry_run --target` as far as it needs no plug-in: options, versions, and what is planned for which card."""

import importlib.metadata

import jax
import pytest

from vit_jax import __main__ as entry
from vit_jax.config import Model
from vit_jax.errors import ConfigError
from vit_jax.models.variants import build
from vit_jax.training import target
from vit_jax.training.assemble import assemble
from vit_jax.training.cards import CARDS
from vit_jax.training.devices import Layout, nbytes

DEMO = ["train", "--config", "demo"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--dry_run", "--target", "h10"],
            "--target h10: there is no such card; cards are h100, a100, l4, b200, rtx4090",
        ),
        (["--dry_run", "--target="], "--target : there is no such card; cards are h100, a100, l4, b200, rtx4090"),
        (["--target", "h100"], "--target needs --dry_run"),
        (["--target", "h100", "--eval_only"], "--target needs --dry_run"),
        (["--dry_run", "--devices=8"], "--devices needs --target, one of h100, a100, l4, b200, rtx4090"),
        (["--dry_run", "--hlo", "x.hlo"], "--hlo needs --target"),
        (["--dry_run", "--target", "h100", "--devices", "many"], "flag --devices=many"),
        (["--dry_run", "--target", "h100", "--hlo", "a\0b"], "--hlo must not contain a NUL character"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(capsys, arguments, said):
    assert entry.main([*DEMO, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices=6"], "--devices 6: training.batch_size = 64 "),
        (["--devices=100"], "--devices 100: training.batch_size = 64 "),
        (["--devices=0"], "--devices 0: "),
        (["--devices=48", "--config.training.grad_accum_steps=2"], "--devices 48: training.batch_size = 64 in training.grad_"),
        (["--config.run.parallel=pmap"], "--target compiles for run.parallel=mesh, and run.parallel is 'pmap'"),
        (["--config.run.mesh=fsdp:8"], "run.mesh = 'fsdp:8' is of 8 devices, and --devices is 1"),
        (["--hlo", "/no/such/folder/x.hlo"], "--hlo /no/such/folder/x.hlo cannot be written"),
        (["--hlo", "/"], "--hlo / cannot be written"),
        (["--hlo", "~no-such-user/x"], "--hlo"),
    ],
)
def test_options_that_cannot_be_used_are_one_line(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(target, "check_plugin", lambda: pytest.fail("options are checked first"))
    assert entry.main([*DEMO, "--dry_run", "--target", "h100", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


def test_plugin_of_the_same_version_is_needed(monkeypatch):
    versions = {}

    def version(name):
        if name in versions:
            return versions[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r'needs the CUDA plug-in of JAX, but no GPU: pip install "vit_jax\[aot\]"'):
        target.check_plugin()
    versions["jax-cuda13-plugin"] = "0.9.0"
    command = rf'pip install "jax\[cuda13-local\]=={jax.__version__}"'
    with pytest.raises(ConfigError, match=f"jax-cuda13-plugin is 0.9.0, jax is {jax.__version__}; {command}"):
        target.check_plugin()
    versions["jax-cuda13-plugin"] = jax.__version__
    target.check_plugin()
    versions["jax-cuda12-plugin"] = "0.9.0"
    target.check_plugin()


def test_auto_is_what_a_gpu_resolves_it_to():
    model = build("B/16")

    def resolved(model=model, **fields):
        found = target.resolve_auto(Model(**fields), model)
        return found.dtype, found.attention

    assert resolved() == ("bfloat16", "cudnn")
    assert resolved(dtype="float32") == ("float32", "xla")
    assert resolved(attention_dropout=0.1) == ("bfloat16", "xla")
    assert resolved(attention="xla") == ("bfloat16", "xla")
    assert resolved(build("B/16", hidden_size=60, num_heads=10)) == ("bfloat16", "xla")


def test_share_of_the_memory_follows_the_environment(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert target.usable(CARDS["h100"]) == 0.75 * CARDS["h100"].memory
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert target.usable(CARDS["h100"]) == 0.9 * CARDS["h100"].memory
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(ConfigError, match="XLA_PYTHON_CLIENT_MEM_FRACTION = 'most' must be a fraction of a card's memory"):
        target.usable(CARDS["h100"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("microbatches", "budget"),
    [(1, 0), (2, 4096), *(pytest.param(*case, marks=pytest.mark.full) for case in ((1, 4096), (2, 0)))],
)
def test_programs_and_arguments_are_those_of_the_run(config, budget, microbatches):
    """Both of splits that lie on the devices and of streamed ones; here for two devices of this machine."""
    config.data.train_split = config.data.test_split = ""
    config.model.dtype, config.model.attention = "float32", "xla"
    config.run.device_budget_mib, config.training.grad_accum_steps = budget, microbatches
    layout = Layout("mesh", jax.devices()[:2])
    described, parts = target.Target(config, layout.devices), assemble(config, layout)
    settings, test = config.training, parts.test_feed
    batch = next(parts.train_feed.train(settings.batch_size, settings.grad_accum_steps, 0, 0))
    state, examples = layout.put(parts.state()), next(iter(test.evaluation(described.eval_batch_size)))[0]
    train = (state, batch, parts.train_feed.data)
    lowered = [parts.program.train_step.lower(*train), parts.program.predict.lower(state.params, examples, test.data)]
    calls = []
    described._compile = lambda program, *arguments: calls.append(program.lower(*arguments))
    described.train_step()
    described.predict()
    assert [call.as_text() for call in calls] == [program.as_text() for program in lowered]
    assert nbytes(described.state) == nbytes(state)


def test_weights_in_a_file_give_their_shapes(config, tiny_checkpoint):
    devices = jax.devices()[:1]
    found = target.Target(config, devices).model
    assert (found.hidden_size, found.num_layers, found.num_classes) == (16, 1, 10)
    config.model.keep_head = "true"
    with pytest.raises(ConfigError, match="has a head of 5 classes, cifar100_excerpt has 10"):
        target.Target(config, devices)
    config.model.keep_head, config.data.image_size = "auto", 20
    with pytest.raises(ConfigError, match="data.image_size = 20 does not divide into patches: take a multiple of 8"):
        target.Target(config, devices)
    config.model.checkpoint, config.model.variant = "", "B/15"
    with pytest.raises(ConfigError, match="model.variant = 'B/15': there is no variant"):
        target.Target(config, devices)


def test_validation_images_are_described_as_the_run_holds_them(config):
    config.data.train_split, config.data.test_split, config.data.validation_split = "train", "test", ""
    layout = Layout("mesh", jax.devices()[:1])
    found = target.Target(config, layout.devices)
    assert found.images == {"training": 1000, "test": 500} and found.data.keys() == found.images.keys()
    config.data.validation_split = "test"
    found = target.Target(config, layout.devices)
    assert found.images == {"training": 1000, "validation": 500, "test": 500}
    assert jax.tree.map(lambda leaf: leaf.shape, found.data["validation"]) == {"images": (500, 32, 32, 3), "labels": (500,)}
    config.run.device_budget_mib = 2
    found = target.Target(config, layout.devices)
    assert found.data["training"] is None and found.data["validation"] is not None


def test_epochs_become_steps_by_the_table(config):
    config.data.task, config.data.train_split, config.training.epochs = "cifar100", "", 2.0
    run = target.Target(config, jax.devices()[:1])
    assert run.config.training.steps == 2 * 50_000 // 16
    config.optimizer.warmup_steps = 100
    assert run.changed(training_batch_size=1024).config.training.steps == 2 * 50_000 // 16
    config.data.task = "dtd"
    with pytest.raises(ConfigError, match="training.epochs: the number of images of dtd is not known; give training.steps"):
        target.Target(config, jax.devices()[:1])
