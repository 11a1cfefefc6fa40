"""Derived labels next to those computed by hand from the rules of task_adaptation."""

import numpy as np
import pytest

from vit_jax.data.labels import RULES


def clevr(*distances):
    return {"size": ["large"] * len(distances), "pixel_coords": np.array([[0, 0, x] for x in distances], np.float32)}


def kitti(*vehicles):
    return {"type": np.array([kind for kind, _ in vehicles]), "location": np.array([[9, 9, z] for _, z in vehicles])}


@pytest.mark.parametrize(
    ("rule", "value", "name"),
    [
        ("clevr_count", clevr(9, 9, 9), "3"),
        ("clevr_count", clevr(*[9] * 10), "10"),
        ("clevr_distance", clevr(12, 8.0, 9), "up to 8"),  # an interval holds its upper end
        ("clevr_distance", clevr(12, 8.01), "8 to 8.5"),
        ("clevr_distance", clevr(9.9), "9.5 to 10"),
        ("clevr_distance", clevr(10.5, 11), "over 10"),
        ("kitti_distance", kitti((0, 7.9), (1, 30)), "up to 8 m"),
        ("kitti_distance", kitti((3, 2), (2, 19.0)), "8 to 20 m"),  # type 3 is a pedestrian
        ("kitti_distance", kitti((0, 20.5)), "over 20 m"),
        ("kitti_distance", kitti((3, 2), (7, 3)), "no vehicle"),
        ("kitti_distance", kitti(), "no vehicle"),
        ("dsprites_location", 0, "0"), ("dsprites_location", 3, "1"), ("dsprites_location", 31, "15"),
        ("dsprites_orientation", 2, "0"), ("dsprites_orientation", 3, "1"), ("dsprites_orientation", 5, "2"),
        ("dsprites_orientation", 39, "15"),
    ],
)  # fmt: skip
def test_derived_label_equals_the_one_computed_by_hand(rule, value, name):
    assert RULES[rule].class_names[RULES[rule].label(value)] == name
