"""Text from outside as one printable line, and the errors that a command line prints without a traceback."""

import inspect

import pytest

from vit_jax import errors
from vit_jax.errors import UserError, printable, reason, root_cause


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain — ü ✓ 猫", "plain — ü ✓ 猫"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\nb\r\tc\0", "a\\nb\\r\\tc\\x00"),
        ("\u202eevil\u2066", "\\u202eevil\\u2066"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("lone \ud800 surrogate", "lone \\ud800 surrogate"),
        ("\x85\u2028", "\\x85\\u2028"),
        (ValueError("of an object"), "of an object"),
    ],
)
def test_printable_escapes_control_characters(text, shown):
    assert printable(text) == shown
    shown.encode()


def test_printable_cuts_long_text():
    assert printable("x" * 20, 10) == "x" * 9 + "…" and printable("x" * 10, 10) == "x" * 10


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "file"), "No space left on device"),
        (ValueError("two\n  lines"), "two lines"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "'name'"),
        (ValueError("\x1b[2J"), "\\x1b[2J"),
        (ValueError("x" * 999), "x" * 199 + "…"),
    ],
)
def test_reason_is_one_line(error, words):
    assert reason(error) == words


def test_root_cause_is_the_first_error_and_ends_in_a_cycle():
    first, second, third = ValueError("first"), TypeError("second"), KeyError("third")
    third.__cause__, second.__context__ = second, first
    assert root_cause(third) is first
    first.__cause__ = third
    assert root_cause(third) in (first, second, third)


def test_every_kind_of_user_error_keeps_its_builtin_base():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not UserError]
    assert len(kinds) >= 6
    for kind in kinds:
        assert issubclass(kind, UserError) and issubclass(kind, ValueError | RuntimeError)
