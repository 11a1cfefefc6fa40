"""The table of tasks."""

import pytest

from vit_jax.data.tasks import TASKS, examples, task
from vit_jax.errors import DataError


def test_unknown_task_is_an_error_that_names_the_nearest():
    with pytest.raises(DataError, match="no task 'cifar-100'; did you mean 'cifar100'.: `vit_jax data list` shows all"):
        task("cifar-100")
    with pytest.raises(DataError, match="no task 'x': `vit_jax data list` shows all, and how to name your own images"):
        task("x")


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("cifar100", "train", 50_000),
        ("cifar10", "test[:98%]", 10_000),
        ("cifar100", "train[:90%]+test", 60_000),
        ("cifar100_excerpt", "train", 1000),
        ("cifar100", "validation", 0),
    ],
)
def test_examples_of_a_split_are_known_without_the_data(name, split, expected):
    assert examples(TASKS[name], split) == expected
