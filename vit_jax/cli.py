"""What all command lines share: how they answer signals, errors, full disks and closed pipes. Imports nothing slow.

An entry point imports this module first, calls `run`, and imports JAX inside the function that it hands over: a signal that
arrives while libraries are imported then ends the process at once, instead of being lost in their code.
"""

import atexit
import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vit_jax.errors import UserError, printable, reason

# What a scheduler expects of a process that a signal ended (128 + its number), and what the user reads.
_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def run(main: Callable[[], int]) -> NoReturn:
    """Runs `main` as a whole process: `main` returns the exit status, and this function does not return."""
    prepare_streams()
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` and shells that start background jobs set it
            signal.signal(number, _exit_on_signal)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        status = main()
    except SystemExit as error:  # of argparse
        status = error.code if isinstance(error.code, int) else 1
    leave(status)


def call(function: Callable[[], int], advice: str = "") -> int:
    """Calls `function`, which returns an exit status; errors that a user can fix become one line and a status.

    Args:
      function: the body of a command line.
      advice: what to do when the device has too little memory.

    Returns:
      What `function` returns; 1 after an error, 130 after Ctrl-C, 0 where the reader of the output closed the pipe.
    """
    try:
        return function()
    except UserError as error:
        return fail(error)
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # the machine's: no permission, a full disk
        return fail(f"{error.filename or 'standard output'}: {reason(error)}")
    except MemoryError:
        return fail(f"the machine has too little memory{advice and ': '}{advice}")
    except KeyboardInterrupt:
        print(_SIGNALS[signal.SIGINT], file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        # JAX is not imported here: its error is known by its name.
        if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error):
            return fail(f"the device has too little memory{advice and ': '}{advice}")
        raise


def fail(message: object) -> int:
    """Prints an error as one line on standard error; returns the exit status 1."""
    print(f"error: {printable(message, 4000)}", file=sys.stderr)
    return 1


def leave(status: int) -> NoReturn:
    """Ends the process without waiting for threads of libraries, which may wait for a disk or a server for minutes."""
    atexit._run_exitfuncs()  # what os._exit leaves out and a normal end would do first
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def prepare_streams() -> None:
    """Makes standard output and error take any text, and standard error take it also when it is closed or full."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know only ASCII
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    elif isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Tolerant(sys.stderr.detach(), errors="backslashreplace", line_buffering=True)


class _Tolerant(io.TextIOWrapper):
    """Standard error that goes to the null device once it cannot be written: answers matter more than what is said of them."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(text)


def _exit_on_signal(number: int, frame: Any) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"{_SIGNALS[signal.Signals(number)]}\n".encode())  # print may be what the signal interrupted
    os._exit(128 + number)
