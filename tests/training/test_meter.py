"""The speed of a run, measured with a clock that the tests set."""

import jax.numpy as jnp
import pytest

from vit_jax.training import meter
from vit_jax.training.guard import Diverged


class Metric:
    """A metric of the device that is ready or not when it is dispatched."""

    def __init__(self, value: float, ready: bool):
        self.value, self.ready = jnp.float32(value), ready

    def is_ready(self) -> bool:
        return self.ready


@pytest.fixture
def clock(monkeypatch):
    """A list whose first element is the time."""
    now = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        meter.jax,
        "device_get",
        lambda tree: {name: leaf.value if isinstance(leaf, Metric) else leaf for name, leaf in tree.items()},
    )
    return now


def dispatch(of: meter.Meter, step: int, loss: float = 1.0, ready: bool = False):
    return of.dispatched(step, {"loss": Metric(loss, ready), "gradient_norm": 2.0})


def test_line_has_the_metrics_and_the_rate_of_its_update(clock):
    of = meter.Meter(lambda updates: updates / 10, batch_size=64, start=4)
    assert dispatch(of, 5, loss=3) is None
    step, line = dispatch(of, 6)
    assert step == 5 and line == {"train/loss": 3.0, "train/gradient_norm": 2.0, "train/learning_rate": 0.4}
    clock[0] = 1
    assert of.read()["train/learning_rate"] == 0.5


def test_first_step_has_no_speed_and_later_steps_have(clock):
    of = meter.Meter(float, batch_size=64, start=0)
    dispatch(of, 1)
    clock[0] = 30  # the compiler's
    _, first = dispatch(of, 2)
    clock[0] = 32
    _, second = dispatch(of, 3)
    assert "train/images_per_second" not in first and second["train/images_per_second"] == 64 / 2


def test_step_that_its_dispatch_computed_ends_with_the_dispatch(clock):
    of = meter.Meter(float, batch_size=64, start=0)
    dispatch(of, 1, ready=True)
    clock[0] = 4
    dispatch(of, 2, ready=True)
    clock[0] = 100  # the host did something else
    assert of.read()["train/images_per_second"] == 64 / 4


def test_restart_leaves_out_the_time_of_an_evaluation(clock):
    of = meter.Meter(float, batch_size=64, start=0)
    dispatch(of, 1)
    of.read()
    clock[0] = 500  # an evaluation
    of.restart()
    dispatch(of, 2)
    clock[0] = 504
    assert of.read()["train/images_per_second"] == 64 / 4


def test_metric_that_is_not_finite_is_an_error(clock):
    of = meter.Meter(float, batch_size=64, start=0)
    dispatch(of, 1, loss=float("inf"))
    with pytest.raises(Diverged, match="train/loss of step 1 is inf"):
        of.read()


def test_speed_is_never_negative(clock, monkeypatch):
    """Also if the step before ends only while its metrics are read, and this one is ready by then."""
    of = meter.Meter(float, batch_size=64, start=0)
    dispatch(of, 1)
    dispatch(of, 2)
    read = meter.jax.device_get

    def slowly(tree):
        clock[0] += 1
        return read(tree)

    monkeypatch.setattr(meter.jax, "device_get", slowly)
    speeds = [dispatch(of, step, ready=step == 3)[1].get("train/images_per_second") for step in (3, 4, 5)]
    assert speeds == [64.0, 64.0, 64.0]
