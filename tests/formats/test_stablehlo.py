"""The description in a StableHLO file."""

import numpy as np
import pytest

from vit_jax.errors import CheckpointError
from vit_jax.formats.stablehlo import read_about


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        (None, "it has no 'about'"),
        (np.array([{"image_size": 32}], object), "'about' is a pickled object, which is never loaded"),
        (np.frombuffer(100_000 * b"[", np.uint8), "'about' is (not JSON|nested)"),
        (np.frombuffer(b"[1]", np.uint8), "'about' should hold an object"),
        (np.frombuffer(b'{"lacks": 1}', np.uint8), "'about': lacks should be a list of names"),
    ],
)
def test_damaged_description_in_a_stablehlo_file_is_one_error_line(about, expected, tmp_path):
    path = tmp_path / "x.stablehlo"
    with open(path, "wb") as file:
        np.savez(file, module=np.zeros(3, np.uint8), **({} if about is None else {"about": about}))
    with pytest.raises(CheckpointError, match=f"x.stablehlo.*{expected}") as error:
        read_about(path)
    assert "\n" not in str(error.value) and "allow_pickle" not in str(error.value) and len(str(error.value)) < 400
