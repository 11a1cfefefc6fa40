"""The small run of the tests of training."""

from tests.training.conftest import config, source_of, tiny_checkpoint  # noqa: F401
