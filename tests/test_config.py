"""The rules of a configuration, its JSON, and the files in configs/."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from vit_jax import config as configuration
from vit_jax.config import Config, Model, check, difference
from vit_jax.config_files import from_json, read, to_json
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
        ("augment.crop", "centre", "augment.crop must be one of 'torchvision', 'tensorflow', 'none', got 'centre'"),
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
        ("training.grad_accum_steps", 3, "training.batch_size = 64 does not divide into training.grad_accum_steps = 3"),
        ("model.checkpoint", "x.npz", "either model.checkpoint .* got 'x.npz' and 'B/16'"),
        ("model.variant", "", "either model.checkpoint .* got '' and ''"),
        ("run.expected", {"a": "b"}, r"run.expected must be of type dict\[str, float\]"),
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


def test_difference_names_what_changes_the_numbers(valid):
    other = from_json(to_json(valid), "x")
    assert difference(valid, other) == []
    other.seed, other.augment.flip, other.run.parallel = 9, False, "pmap"
    assert difference(valid, other) == ["augment.flip", "seed"]


def test_json_round_trip_changes_nothing(valid):
    valid.run.expected = {"test/accuracy": 0.5}
    valid.augment.crop_area = (0.25, 0.75)
    assert from_json(to_json(valid), "x") == valid


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "x.json is not JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "x.json is not JSON that can be read: Exceeds the limit"),
        ("[" * 100_000, "x.json is not JSON that can be read: "),
        ("[]", "x.json: the whole file must be an object"),
        ('{"sead": 1}', "x.json: there is no field sead; there are model, .*seed"),
        ('{"augment": {"flop": true}}', "x.json: there is no field augment.flop; there are crop"),
        ('{"augment": 3}', "x.json: augment must be an object"),
    ],
)
def test_json_of_other_content_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        from_json(text, "x.json")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def get_config(: pass", "x.py gives no configuration: SyntaxError"),
        ("x = 1", "x.py gives no configuration: KeyError: 'get_config'"),
        ("def get_config(): return 3", "returned a int, not a vit_jax.Config"),
        (
            "from vit_jax import Config\ndef get_config():\n  c = Config(); c.optimizer.rate = 1; return c",
            "x.py gives no configuration: AttributeError: .*rate",
        ),
    ],
)
def test_files_without_a_configuration_are_refused(tmp_path, code, said):
    (tmp_path / "x.py").write_text(code)
    with pytest.raises(ConfigError, match=said):
        check(read(str(tmp_path / "x.py")))


def test_argument_after_a_colon_is_passed_on(tmp_path):
    (tmp_path / "x.py").write_text(
        "from vit_jax import Config\ndef get_config(argument='none'):\n  c = Config(); c.model.variant = argument; return c"
    )
    assert read(f"{tmp_path}/x.py:R+Ti/16,pets").model.variant == "R+Ti/16,pets"
    assert read(f"{tmp_path}/x.py").model.variant == "none"


def test_configuration_name_prefers_a_file_then_the_current_folder_then_the_package(tmp_path, monkeypatch):
    def write(path: Path, seed: int) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"from vit_jax import Config\ndef get_config(argument=''):\n  return Config(seed={seed})")

    monkeypatch.chdir(tmp_path)
    assert read("demo").model.checkpoint == "mini_8"
    write(tmp_path / "configs" / "demo.py", 2)
    assert read("demo").seed == read("demo:argument").seed == 2
    write(tmp_path / "demo", 1)
    assert read("demo").seed == 1


@pytest.mark.parametrize("name", ["dmeo", "dmeo.py", "configs/dmeo", "dmeo:argument"])
def test_unknown_configuration_error_lists_names_and_the_nearest(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").touch()
    words = (
        f"configuration '{name.split(':')[0]}': there is no such file or name; names are augreg, .*, mine; the nearest is demo"
    )
    with pytest.raises(ConfigError, match=words):
        read(name)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_configs_are_valid_and_open_with_their_command(path):
    command = re.search(
        rf"python main.py --config configs/{path.name}(:\S+)?", ast.get_docstring(ast.parse(path.read_text())) or ""
    )
    assert command
    check(read(f"{path}{command[1] or ''}"))


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("", "wants a checkpoint and a task, as in configs/augreg.py:R\\+Ti/16,cifar100"),
        ("B/16", "wants a checkpoint and a task"),
        ("B/61,cifar100", "no checkpoint is published as 'B/61'"),
    ],
)
def test_augreg_config_takes_any_checkpoint_and_task(argument, said):
    config = read(f"{ROOT / 'configs' / 'augreg.py'}:imagenet21k+imagenet2012/ViT-B_16,cifar10")
    assert (config.model.checkpoint, config.data.task) == ("imagenet21k+imagenet2012/ViT-B_16", "cifar10")
    assert config.data.image_size == 384
    with pytest.raises(ConfigError, match=said):
        read(f"{ROOT / 'configs' / 'augreg.py'}:{argument}")


def test_cifar100_b16_has_the_settings_of_the_report():
    config = read(str(ROOT / "configs" / "cifar100_b16.py"))
    assert (config.model.dropout, config.model.attention_dropout) == (0.1, 0.0)
    assert (config.data.task, config.data.image_size, config.data.normalization) == ("cifar100", 224, "dataset")
    assert dataclasses.astuple(config.augment) == ("torchvision", (0.05, 1.0), False)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.warmup_steps, optimizer.decay) == ("sgd", 0.03, 100, "cosine")
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.0, 1.0)
    assert (config.training.steps, config.training.batch_size, config.training.eval_every) == (1000, 64, 10)
    assert config.seed == 42 and config.run.expected["test/accuracy"] == 0.8957


def test_every_field_is_read_somewhere():
    """No dead options: the product names each field outside the file that defines it."""
    product = [*(ROOT / "vit_jax").rglob("*.py"), ROOT / "main.py"]
    read_names = {
        node.attr
        for path in product
        if path.name != "config.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    for name in configuration.fields(Config()):
        assert name.split(".")[-1] in read_names, name


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


def test_unresolved_auto_differs_from_no_value():
    ours, theirs = Config(), Config()
    theirs.model.dtype = "bfloat16"
    assert difference(ours, theirs) == difference(theirs, ours) == []
    ours.model.dtype = "float32"
    assert difference(ours, theirs) == ["model.dtype"]


def test_renamed_field_of_an_earlier_version_is_read():
    text = to_json(Config()).replace("grad_accum_steps", "accumulation")
    assert '"accumulation": 1' in text and from_json(text, "x") == Config()


def test_both_names_of_a_renamed_field_must_agree():
    text = to_json(Config()).replace('"grad_accum_steps": 1', '"grad_accum_steps": 1, "accumulation": 2')
    with pytest.raises(ConfigError, match=r"x: training\.accumulation and training\.grad_accum_steps are the same field"):
        from_json(text, "x")


def test_renamed_field_in_a_python_file_is_named(tmp_path):
    (tmp_path / "a.py").write_text(
        "from vit_jax import Config\n\n\ndef get_config():\n"
        "    config = Config()\n    config.training.accumulation = 2\n    return config\n"
    )
    with pytest.raises(ConfigError, match=r"training\.accumulation is called training\.grad_accum_steps now"):
        read(str(tmp_path / "a.py"))
