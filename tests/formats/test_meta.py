"""The JSON next to weights: any content gives a usable value or one error line."""

import json

import numpy as np
import pytest

from vit_jax.checkpoints.inspection import inspect
from vit_jax.errors import CheckpointError
from vit_jax.formats.google import read_meta, save_npz
from vit_jax.formats.meta import class_names, eval_crop, image_size, statistics

GOOD = [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "normalization",
    [
        {"mean": [10**400] * 3, "std": GOOD},
        {"mean": GOOD, "std": [1e-320] * 3},
        {"mean": GOOD, "std": [1e-5, 0.5, 0.5]},
        {"mean": GOOD, "std": [1e5, 0.5, 0.5]},
        {"mean": GOOD, "std": [-0.5] * 3},
        {"mean": GOOD, "std": [float("nan")] * 3},
        {"mean": [float("inf")] * 3, "std": GOOD},
        {"mean": [1e300] * 3, "std": GOOD},
        {"mean": [True] * 3, "std": GOOD},
        {"mean": ["0.5"] * 3, "std": GOOD},
        {"mean": [[0.5]] * 3, "std": GOOD},
        {"mean": GOOD[:2], "std": GOOD[:2]},
        {"mean": GOOD},
        {"mean": 0.5, "std": 0.5},
        [GOOD, GOOD],
        "0.5",
        1,
    ],
)
def test_statistics_out_of_bounds_are_one_error_line(normalization):
    with pytest.raises(CheckpointError, match="normalization .*should hold a mean and a std of three numbers each") as error:
        statistics({"normalization": normalization})
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_statistics_in_use_are_accepted():
    for mean, std in [(GOOD, GOOD), ([0, 0, 0], [1, 1, 1]), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]:
        assert statistics({"normalization": {"mean": mean, "std": std}}) == (mean, std)
    assert statistics({"normalization": {"mean": list(np.float32(GOOD)), "std": tuple(GOOD)}}) == (GOOD, GOOD)
    assert statistics({}) == (GOOD, GOOD)


@pytest.mark.parametrize(
    "size", [-32, [-32, -32], [-32, 32], 0, [], [[32, 32]], [[32], [32, 1]], {"a": 1}, "32", True, [32, 32, 32], 10**400, 64]
)
def test_image_size_that_the_positions_contradict_is_one_error_line(size):
    with pytest.raises(
        CheckpointError, match="image_size is .* in the JSON .*, but their 16 positions are for 32×32 pixels"
    ) as error:
        image_size({"image_size": size}, 8, 16)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_image_size_that_the_positions_have_is_accepted():
    assert image_size({"image_size": 32}, 8, 16) == image_size({"image_size": [32, 32]}, 8, 16) == (32, 32)
    assert image_size({"image_size": (16, 64)}, 8, 16) == (16, 64) and image_size({}, 8, 16) == (32, 32)


def test_eval_crop_is_known_or_missing():
    assert [eval_crop(meta) for meta in ({}, {"eval_crop": "none"}, {"eval_crop": "center"})] == ["none", "none", "center"]


@pytest.mark.parametrize("crop", ["centre", "", 0.875, True, False, ["center"], {"center": 1}, 10**400, "\n" * 500])
def test_unknown_eval_crop_is_one_error_line(crop):
    with pytest.raises(CheckpointError, match="eval_crop in the JSON .* is .*; it should be one of 'none', 'center'") as error:
        eval_crop({"eval_crop": crop})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_class_name_with_half_a_character_can_be_printed_and_written():
    names = class_names(json.loads('{"class_names": ["cat", "\\ud800dog", "كلب"]}'), 3)
    assert names == ["cat", "\\ud800dog", "كلب"]
    assert "\n".join(names).encode()


DAMAGED = {
    "brackets": (100_000 * b"[", "x.json is (not JSON|nested)"),
    "nested too deeply": (b'{"a": ' + 900 * b"[" + 900 * b"]" + b"}", "nested in more than 20 levels"),
    "a number of 5,000 digits": (b'{"image_size": ' + 5000 * b"9" + b"}", "x.json is not JSON"),
    "no text": (b"\xff\xfe\xff", "x.json is not JSON"),
    "lacks as a number": (b'{"lacks": 1}', "x.json: lacks should be a list of names, is 1"),
    "lacks of numbers": (b'{"lacks": [1]}', r"x.json: lacks should be a list of names, is \[1\]"),
    "lacks as a text": (b'{"lacks": "head"}', "x.json: lacks should be a list of names, is head"),
    "too large": (b'"' + 2**24 * b"a" + b'"', "x.json has more than 16777216 bytes"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_json_that_describes_no_weights_is_one_error_line(kind, tmp_path):
    content, expected = DAMAGED[kind]
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as error:
        read_meta(tmp_path / "x.npz")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_inspect_prints_the_json_without_control_characters(tmp_path):
    from vit_jax.checkpoints.load import load

    model, params = load("mini_8")
    meta = {"task\x1b[2J": "\u202eevil\n\ud800", "class_names": ["\x1b"] * model.num_classes, "lacks": ["\x1b]0;title\x07"]}
    save_npz(tmp_path / "x.npz", params, meta)
    text = inspect(tmp_path / "x.npz")
    assert text.encode() and not set(text) & set("\x1b\u202e\x07")
    assert "task\\x1b[2J \\u202eevil\\n\\ud800" in text and "a copy without \\x1b]0;title\\x07" in text


UNRELATED = ['{"name": "app", "version": "1.0.0"}', "[1, 2]", '"text"', "not JSON", 100_000 * "["]


@pytest.mark.parametrize("content", UNRELATED, ids=range(len(UNRELATED)))
@pytest.mark.parametrize("meta", [{"source": "a.npz", "source_sha256": "0"}, None])
def test_json_of_something_else_is_never_replaced(content, meta, tmp_path):
    (tmp_path / "package.json").write_text(content)
    (tmp_path / "package.npz").write_bytes(b"before")
    with pytest.raises(
        CheckpointError, match="package.npz: its description would replace package.json, which does not describe weights"
    ):
        save_npz(tmp_path / "package.npz", {"cls": np.zeros(3)}, meta)
    assert (tmp_path / "package.json").read_text() == content and (tmp_path / "package.npz").read_bytes() == b"before"


@pytest.mark.parametrize("content", ['{"image_size": 32}', '{"image_size": 32, "class_na', "", "\0\0\0", "{}", '{"own": 1}'])
def test_json_of_weights_is_replaced_also_if_damaged(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    save_npz(tmp_path / "x.npz", {"cls": np.zeros(3)}, {"own": 2})
    assert read_meta(tmp_path / "x.npz") == {"own": 2}
