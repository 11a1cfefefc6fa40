"""Labels that a task derives from the features of an example, because its data set has no label or a finer one.

The rules are those of VTAB (Zhai et al. 2019) as google-research/task_adaptation defines them: data/{clevr,kitti,dsprites}.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a label is computed.

    Attributes:
      feature: the feature of the data set that it is computed from.
      label: a function from the value of that feature to the label.
      class_names: a name for each label.
      factor: what the pixels are multiplied by, to be in [0, 255].
    """

    feature: str
    label: Callable[[Any], int]
    class_names: tuple[str, ...]
    factor: int = 1


def _bin(value: float, edges: tuple[float, ...]) -> int:
    """The number of the interval (edge, next edge] that holds a value."""
    return int(np.searchsorted(edges, value, side="left"))


_CLEVR_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)  # in the units of `pixel_coords`; the classes are about equally frequent
_KITTI_EDGES = (8.0, 20.0, 999.0)  # metres; the last class is of images without a vehicle
_KITTI_VEHICLES = 3  # types below this are Car, Van and Truck


def _kitti_distance(objects: Mapping[str, np.ndarray]) -> int:
    distances = np.asarray(objects["location"]).reshape(-1, 3)[np.asarray(objects["type"]) < _KITTI_VEHICLES, 2]
    return _bin(min(distances.tolist(), default=1000.0), _KITTI_EDGES)


def _intervals(edges: tuple[float, ...], unit: str = "") -> tuple[str, ...]:
    inner = [f"{low:g} to {high:g}{unit}" for low, high in zip(edges, edges[1:], strict=False)]
    return f"up to {edges[0]:g}{unit}", *inner, f"over {edges[-1]:g}{unit}"


RULES = {
    "clevr_count": Rule("objects", lambda objects: len(objects["size"]) - 3, tuple(map(str, range(3, 11)))),
    "clevr_distance": Rule(
        "objects",
        lambda objects: _bin(np.asarray(objects["pixel_coords"]).reshape(-1, 3)[:, 2].min(), _CLEVR_EDGES),
        _intervals(_CLEVR_EDGES),
    ),
    "kitti_distance": Rule("objects", _kitti_distance, (*_intervals(_KITTI_EDGES[:2], " m")[:2], "over 20 m", "no vehicle")),
    # Neighbouring values are one class: 32 positions and 40 orientations become 16 classes each. The pixels are 0 and 1.
    "dsprites_location": Rule("label_x_position", lambda value: int(value // (32 / 16)), tuple(map(str, range(16))), 255),
    "dsprites_orientation": Rule("label_orientation", lambda value: int(value // (40 / 16)), tuple(map(str, range(16))), 255),
}
