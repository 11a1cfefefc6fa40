"""Where TFDS keeps the data of a task."""

import pytest

from vit_jax.data.places import data_root, find_prepared, find_version
from vit_jax.data.tasks import TASKS
from vit_jax.errors import DataError

EXCERPT = TASKS["cifar100_excerpt"]


def test_data_root_follows_the_rules_of_tfds(monkeypatch, tmp_path):
    cifar = TASKS["cifar100"]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert data_root(cifar) == tmp_path / "home" / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "variable"))
    assert data_root(cifar) == tmp_path / "variable"
    assert data_root(cifar, "~/mine") == tmp_path / "home" / "mine"
    assert data_root(EXCERPT) != data_root(cifar)
    assert data_root(EXCERPT, tmp_path) == tmp_path


def test_find_prepared_returns_the_newest_complete_version(tmp_path):
    for version in ("3.0.2", "10.0.0", "9.1.0", "incomplete.ABCDEF_11.0.0", "12.0.0"):
        (tmp_path / "cifar100" / version).mkdir(parents=True)
        if version != "12.0.0":
            (tmp_path / "cifar100" / version / "dataset_info.json").touch()
    assert find_prepared(TASKS["cifar100"], tmp_path) == tmp_path / "cifar100" / "10.0.0"
    assert find_prepared(TASKS["cifar10"], tmp_path) is None


@pytest.mark.parametrize("variable", [True, False])
def test_data_root_of_an_unknown_user_is_an_error_that_names_the_setting(monkeypatch, variable):
    monkeypatch.setenv("TFDS_DATA_DIR", "~no-such-user/x")
    name = "TFDS_DATA_DIR" if variable else "data_dir"
    with pytest.raises(DataError, match=f"^{name}='~no-such-user/x': the user '~no-such-user' does not exist; give an abs"):
        data_root(TASKS["cifar100"], "" if variable else "~no-such-user/x")


def test_embedded_data_are_found_with_any_data_dir(tmp_path):
    embedded = find_prepared(EXCERPT)
    assert embedded and find_prepared(EXCERPT, tmp_path) == embedded and find_version(EXCERPT, tmp_path) is None
    (tmp_path / "cifar100_excerpt" / "1.0.0").mkdir(parents=True)
    (tmp_path / "cifar100_excerpt" / "1.0.0" / "dataset_info.json").touch()
    assert find_prepared(EXCERPT, tmp_path) == tmp_path / "cifar100_excerpt" / "1.0.0"
