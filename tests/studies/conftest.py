"""The small run of the tests of training."""

from tests.training.conftest import config, tiny_checkpoint  # noqa: F401
