"""Features that are kept on disk in parts."""

import numpy as np
import pytest

from vit_jax.config import Run
from vit_jax.errors import CheckpointError
from vit_jax.studies import features
from vit_jax.training import devices
from vit_jax.training.feed import Feed


@pytest.fixture
def feed(source_of):
    return Feed(source_of(150), devices.start(Run()), budget=0)


@pytest.fixture
def apply(feed):
    """Means of the channels as features; it counts its calls."""

    def means(params, batch, data):
        apply.calls += 1
        return np.asarray(batch.images).mean(axis=(1, 2), dtype=np.float32) * params

    apply = means
    apply.calls = 0
    return apply


def compute(apply, feed, folder, told=None):
    return features.compute(apply, np.float32(2), feed, 8, folder, (told if told is not None else []).append)


def test_features_are_of_every_image_in_order(apply, feed, tmp_path):
    told: list[int] = []
    found, labels = compute(apply, feed, tmp_path, told)
    np.testing.assert_allclose(found, 2 * feed.source.images.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(labels, feed.source.labels)
    assert told == [64, 128, 150] and apply.calls == 19 and len(list(tmp_path.iterdir())) == 3


def test_parts_that_are_there_are_not_computed_again(apply, feed, tmp_path):
    whole, _ = compute(apply, feed, tmp_path)
    apply.calls = 0
    np.testing.assert_array_equal(compute(apply, feed, tmp_path)[0], whole)
    assert apply.calls == 0
    (tmp_path / "00002.npz").unlink()  # as if it was interrupted
    np.testing.assert_array_equal(compute(apply, feed, tmp_path)[0], whole)
    assert apply.calls == 3


@pytest.mark.parametrize("damage", [b"", b"not a zip"])
def test_damaged_part_is_computed_again(apply, feed, tmp_path, damage):
    whole, _ = compute(apply, feed, tmp_path)
    (tmp_path / "00001.npz").write_bytes(damage)
    np.testing.assert_array_equal(compute(apply, feed, tmp_path)[0], whole)


def test_features_that_are_not_finite_are_an_error_and_not_kept(feed, tmp_path):
    with pytest.raises(CheckpointError, match="not finite"):
        features.compute(lambda *_: np.full((8, 3), np.nan), 1, feed, 8, tmp_path, lambda done: None)
    assert not list(tmp_path.iterdir())


def test_folder_changes_with_everything_that_the_features_depend_on():
    content = dict(weights="a", image_size=32, parts=[("file", 0, 10)])
    names = {features.folder_name("train", **content)}
    names |= {
        features.folder_name("train", **content | changed) for changed in ({"weights": "b"}, {"image_size": 64}, {"parts": []})
    }
    names.add(features.folder_name("test", **content))
    assert len(names) == 5 and features.folder_name("train", **content) in names
    assert features.folder_name("train[:90%]+test", **content).startswith("train__90___test-")
