"""The table of architectures against the trees of the published files."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.models.variants import VARIANTS, build, count, from_tree, shapes

# Parameters of every architecture at 224 px without a head: none may be missing here, none may change.
COUNTS = {
    "Nano/8": 918_656,
    "Mini/4": 3_281_472,
    "Mini/8": 2_857_536,
    "Midi/4": 11_871_360,
    "Ti/16": 5_524_416,
    "S/16": 21_665_664,
    "S/32": 22_493_952,
    "B/8": 85_807_872,
    "B/16": 85_798_656,
    "B/32": 87_455_232,
    "L/16": 303_301_632,
    "L/32": 305_510_400,
    "H/14": 630_764_800,
    "R+Ti/16": 6_144_704,
    "R26+S/32": 36_046_912,
    "R26+B/32": 100_614_976,
    "R50+B/16": 97_890_112,
    "R50+L/32": 327_969_856,
}


def on_disk(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape a file has for a leaf: GroupNorm's are (1, 1, 1, C) there."""
    return (1, 1, 1, *shape) if "/gn" in f"/{path}" else shape


def test_shapes_equal_every_published_tree(shared):
    trees = json.loads((shared / "oracles" / "trees.json").read_text())
    assert len(trees) == 28
    for name, tree in trees.items():
        architecture = name.split(":")[0]
        pre_logits = tree.get("pre_logits/bias", [0])[0]
        model = build(architecture, num_classes=tree["head/bias"][0], representation_size=pre_logits)
        patches = tree["Transformer/posembed_input/pos_embedding"][1] - 1
        params = shapes(model, round(patches**0.5) * model.stride)
        found = {path: list(on_disk(path, leaf.shape)) for path, leaf in flatten_dict(params, sep="/").items()}
        assert found == tree, name
        assert from_tree(params) == model, name


def test_count_equals_published_counts():
    assert {name: count(build(name)) for name in VARIANTS} == COUNTS


@pytest.mark.parametrize("name", ["R26+S/32", "R26_S_32", "r26+s_32", "R26+ViT-S_32"])
def test_build_accepts_all_spellings(name):
    assert build(name) == build("R26+S/32")


def test_build_of_an_unknown_variant_is_an_error():
    with pytest.raises(ValueError, match="no variant 'B/15'; there are Nano/8, .*B/16"):
        build("B/15")


@pytest.mark.parametrize(("classifier", "representation_size"), [("token", 0), ("gap", 24)])
def test_from_tree_reads_the_classifier(classifier, representation_size):
    model = build("Ti/16", num_layers=1, num_classes=3, classifier=classifier, representation_size=representation_size)
    assert from_tree(shapes(model, 32)) == model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("embedding"), "embedding/kernel is missing"),
        (lambda tree: tree.pop("Transformer"), "encoderblock_0 is missing"),
        (lambda tree: tree["Transformer"].pop("encoderblock_1"), "encoderblock_1 is missing while there is .*block_2"),
        (lambda tree: tree.update(embedding={"kernel": jnp.zeros((4, 8, 3, 16))}), "must be square"),
        (lambda tree: tree.update(embedding={"kernel": jnp.zeros((4, 8))}), "should have 4 axes"),
    ],
)
def test_from_tree_error_names_the_path(change, message):
    tree = shapes(build("Ti/16", num_layers=3), 32)
    change(tree)
    with pytest.raises(ValueError, match=message):
        from_tree(tree)


def test_shapes_allocate_nothing():
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes(build("H/14"))))
