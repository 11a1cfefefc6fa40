"""The description of a file of weights."""

import json

from vit_jax.checkpoints.__main__ import main
from vit_jax.checkpoints.inspection import inspect


def test_inspect_describes_a_file(capsys, tiny):
    assert main(["inspect", str(tiny)]) == 0
    printed = capsys.readouterr().out
    for part in (
        "published, 40 arrays of float32",
        "2 blocks of 32, 2 heads, MLP 64, patches of 8",
        "16×16 px, 2×2 patches",
        "3 classes",
        "pre_logits  none",
        "class_names ['a', 'b', 'c']",
        "not in the table of variants",
    ):
        assert part in printed
    assert main(["inspect", "mini_8"]) == 0
    printed = capsys.readouterr().out
    for part in ("Mini/8: 6 blocks of 192", "104 arrays of bfloat16", "2,757,896", "64×64 px", "problems    none"):
        assert part in printed


def test_inspect_shows_the_types_of_an_export(capsys, tiny, tmp_path):
    assert main(["convert", str(tiny), str(tmp_path / "out"), "--to", "timm", "--dtype", "bfloat16"]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "safetensors, 40 arrays of bfloat16" in capsys.readouterr().out


def test_inspection_reports_class_names_that_do_not_fit(tiny, description):
    assert "number of class names" not in inspect(tiny / "final.npz")
    (tiny / "final.json").write_text(json.dumps(description | {"class_names": ["a", "b"]}))
    problems = inspect(tiny / "final.npz").splitlines()[-1]
    assert problems.startswith("problems ") and "the number of class names differs from the number of classes" in problems
