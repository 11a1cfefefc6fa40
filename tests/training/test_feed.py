"""Batches on the devices: resident images and streamed ones are the same."""

import itertools

import jax
import numpy as np
import pytest

from vit_jax.training.devices import Layout
from vit_jax.training.feed import Feed


@pytest.fixture(params=[1, 8])
def layout(request):
    return Layout("mesh", jax.devices()[: request.param])


def test_streamed_batches_hold_the_images_of_resident_batches(source_of, layout):
    source = source_of(50)
    resident, streamed = Feed(source, layout, source.nbytes), Feed(source, layout, source.nbytes - 1)
    assert streamed.data is None and np.array_equal(resident.data["images"], source.images)
    both = zip(resident.train(16, 2, seed=3, start=5), streamed.train(16, 2, seed=3, start=5), strict=True)
    for ours, theirs in itertools.islice(both, 4):
        index = np.asarray(ours.index)
        assert index.shape == (2, 8)
        assert np.array_equal(theirs.images, source.images[index]) and np.array_equal(theirs.labels, source.labels[index])
        assert np.array_equal(ours.example_index, np.arange(16).reshape(2, 8))
        assert np.array_equal(ours.example_index, theirs.example_index)


def test_evaluation_yields_every_image_once_in_order(source_of, layout):
    source = source_of(50)
    feed, images, labels = Feed(source, layout, 0), [], []
    for batch, of_batch, mask in feed.evaluation(16):
        images.append(np.asarray(batch.images)[mask])
        labels.append(of_batch[mask])
    assert len(images) == 4
    assert np.array_equal(np.concatenate(images), source.images) and np.array_equal(np.concatenate(labels), source.labels)
    later = [(np.asarray(batch.images)[mask], of_batch[mask]) for batch, of_batch, mask in feed.evaluation(16, start=2)]
    assert len(later) == 2 and all(np.array_equal(a, b) for a, (b, _) in zip(images[2:], later, strict=True))
