"""The tree of a configuration."""

import ast
from pathlib import Path

from vit_jax import config as configuration
from vit_jax.config import Config, difference
from vit_jax.config_files import from_json, to_json

ROOT = Path(__file__).parents[1]


def test_difference_names_what_changes_the_numbers():
    ours = Config()
    other = from_json(to_json(ours), "x")
    assert difference(ours, other) == []
    other.seed, other.augment.flip, other.run.parallel = 9, False, "pmap"
    assert difference(ours, other) == ["augment.flip", "seed"]


def test_every_field_is_read_somewhere():
    """No dead options: the product names each field outside the files that define and check it."""
    product = [*(ROOT / "vit_jax").rglob("*.py"), ROOT / "main.py"]
    read_names = {
        node.attr
        for path in product
        if path.name not in ("config.py", "config_rules.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    for name in configuration.fields(Config()):
        assert name.split(".")[-1] in read_names, name


def test_unresolved_auto_differs_from_no_value():
    ours, theirs = Config(), Config()
    theirs.model.dtype = "bfloat16"
    assert difference(ours, theirs) == difference(theirs, ours) == []
    ours.model.dtype = "float32"
    assert difference(ours, theirs) == ["model.dtype"]


def test_value_of_on_nan_may_change_in_a_run():
    ours, theirs = Config(), Config()
    theirs.training.on_nan, theirs.run.mesh = "rollback", "fsdp:2"
    assert not difference(ours, theirs)
