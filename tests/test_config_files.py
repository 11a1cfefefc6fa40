"""Configurations in files: their JSON, their names, and the files in configs/."""

import ast
import re
from pathlib import Path

import pytest
from PIL import Image

from vit_jax.config import Augment, Config
from vit_jax.config_files import from_json, read, to_json
from vit_jax.config_rules import check
from vit_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_json_round_trip_changes_nothing():
    config = Config(seed=7)
    config.run.expected = {"test/accuracy": 0.5}
    config.augment.crop_area = (0.25, 0.75)
    assert from_json(to_json(config), "x") == config


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
def test_configs_are_valid_and_open_with_their_command(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(20):  # the images that the command of finetune.py names
        photo = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(photo)
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


@pytest.mark.parametrize("argument", ["", "mini_8", "short", "mini_8,shorter", ",short"])
def test_best_config_wants_a_checkpoint_and_a_budget(argument):
    with pytest.raises(
        ConfigError, match="wants a checkpoint and one of short, medium, long, as in configs/cifar100_best.py:mini_8,"
    ):
        read(f"{ROOT / 'configs' / 'cifar100_best.py'}:{argument}")


@pytest.mark.parametrize(
    ("argument", "steps", "size", "rate"), [("mini_8,short", 1000, 64, 0.1), ("B/16,long", 20_000, 224, 0.01)]
)
def test_best_config_takes_any_checkpoint_and_budget(argument, steps, size, rate):
    config = read(f"{ROOT / 'configs' / 'cifar100_best.py'}:{argument}")
    assert (config.training.steps, config.data.image_size, config.optimizer.learning_rate) == (steps, size, rate)


def test_cifar100_b16_has_the_settings_of_the_report():
    config = read(str(ROOT / "configs" / "cifar100_b16.py"))
    assert (config.model.dropout, config.model.attention_dropout) == (0.1, 0.0)
    assert (config.data.task, config.data.image_size, config.data.normalization) == ("cifar100", 224, "dataset")
    assert config.augment == Augment(crop="torchvision", crop_area=(0.05, 1.0), flip=False)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.warmup_steps, optimizer.decay) == ("sgd", 0.03, 100, "cosine")
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.0, 1.0)
    assert (config.training.steps, config.training.batch_size, config.training.eval_every) == (1000, 64, 10)
    assert config.seed == 42 and config.run.expected["test/accuracy"] == 0.8957


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
