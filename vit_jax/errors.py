"""Errors that a user can fix, and text from outside as one printable line. It imports only the standard library."""

import re


class UserError(Exception):
    """An error that the user can fix: one line that says what failed, the value found and what to do.

    A command line prints it without a traceback. The subclasses also have the built-in class that fits, such as ValueError.
    """


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used: the field, its value, and what is allowed."""


class CheckpointError(UserError, ValueError):
    """Weights that cannot be used: the file, what was expected, and what was found."""


class DataError(UserError, ValueError):
    """A data set that cannot be used: the file or the task, what was expected, and what was found."""


class ImageError(UserError, ValueError):
    """An image that cannot be used: its name, what was expected, and what was found."""


class ReportError(UserError, ValueError):
    """A report that cannot be made from the given folders or options."""


class TrainingError(UserError, RuntimeError):
    """A run that cannot continue: why, and what to do."""


# C0 and C1 controls, and the marks that reorder or hide text: zero-width characters, bidirectional marks, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def printable(text: object, limit: int = 1000) -> str:
    """Returns text from a file, a server or a user as one line that is safe to print on a terminal or a page.

    Control characters, bidirectional marks and lone surrogates become escapes (`\\x1b`, `\\u202e`). Text of more than `limit`
    characters is cut and ends with "…".
    """
    shown = str(text)
    shown = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), shown)


def reason(error: BaseException, limit: int = 200) -> str:
    """Returns why an operation failed, in one line: the system's message, else the exception's, else the name of its type."""
    words = " ".join(str(getattr(error, "strerror", None) or error).split())
    return printable(words or type(error).__name__, limit)


def root_cause(error: BaseException) -> BaseException:
    """Returns the first exception of a chain of exceptions."""
    for _ in range(20):  # a chain may contain itself
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error
