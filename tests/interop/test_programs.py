"""The description that an export contains: defaults, and contradictions with the model."""

import pytest

from vit_jax.errors import CheckpointError
from vit_jax.interop.onnx import save_onnx
from vit_jax.interop.programs import describe
from vit_jax.interop.stablehlo import save_stablehlo


@pytest.mark.parametrize("save", [save_stablehlo, save_onnx])
@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"class_names": ["a", "b"]}, "the head has 5 classes, but the JSON next to the weights names 2"),
        ({"image_size": 24}, "image_size is 24 in .*, but their 4 positions are for 16×16 pixels"),
        ({"image_size": [8, 31]}, r"image_size is \[8, 31\] in .*, but their 4 positions are for 16×16 pixels"),
        ({"image_size": "16"}, "image_size is 16 in .*, but their 4 positions"),
        ({"eval_crop": "left"}, "eval_crop in .* is 'left'; it should be one of 'none', 'center'"),
        ({"normalization": {"mean": [0.5] * 3}}, "should hold a mean and a std of three numbers each"),
        ({"normalization": {"mean": 0.5, "std": 0.5}}, "should hold a mean and a std of three numbers each"),
        ({"normalization": {"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}}, "should hold a mean and a std of three numbers"),
    ],
)
def test_description_that_contradicts_the_model_is_refused(save, meta, expected, made, tmp_path):
    model, params, _, _, _ = made("pre_logits")
    path = tmp_path / f"x.{save.__name__.removeprefix('save_')}"
    with pytest.raises(CheckpointError, match=f"{path.name}: .*{expected}") as error:
        save(path, model, params, meta)
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=f"x.npz: the name of .* file must end in {path.suffix}"):
        save(tmp_path / "x.npz", model, params)
    assert not any(tmp_path.iterdir())


def test_description_says_how_images_are_resized(made):
    model, params, meta, _, _ = made("mean of tokens")
    assert "no antialiasing, straight to image_size" in describe(None, model, params, meta)["resize"]
    about = describe(None, model, params, meta | {"eval_crop": "center"})
    assert "antialiasing: the central part" in about["resize"] and about["eval_crop"] == "center"


def test_positions_without_a_square_need_an_image_size(made, tmp_path):
    model, params, meta, _, _ = made("mean of tokens")
    with pytest.raises(CheckpointError, match="6 positions do not form a square"):  # 2×3
        save_stablehlo(tmp_path / "x.stablehlo", model, params)
    save_stablehlo(tmp_path / "x.stablehlo", model, params, meta)
