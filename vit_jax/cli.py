"""What all command lines share: the handling of signals, errors, full disks and closed pipes. It imports nothing slow.

An entry point imports this module first, calls `run`, and imports JAX inside the function that it passes: a signal during the
imports then ends the process at once. Otherwise the code of a library could catch it.
"""

import atexit
import contextlib
import io
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from vit_jax.errors import UserError, printable, reason

# The exit status is 128 + the signal's number, which schedulers expect; the user reads the word.
_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def run(main: Callable[[], int]) -> NoReturn:
    """Runs `main`, which returns the exit status, as the whole process; this function does not return."""
    prepare_streams()
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` and shells ignore signals for background jobs
            signal.signal(number, _exit_on_signal)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        status = main()
    except SystemExit as error:  # from argparse, or from sys.exit with a message
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # a bug; the process still leaves without waiting for threads
        traceback.print_exc()
        status = 1
    leave(call(_flush_stdout) or status)


def call(function: Callable[[], int], advice: str = "") -> int:
    """Calls `function`, which returns an exit status; turns errors that a user can fix into one line and a status.

    Args:
      function: the work of a command line.
      advice: what to do when the device has too little memory.

    Returns:
      The result of `function`; 1 after an error, 130 after Ctrl-C, 0 if the reader of the output closed the pipe.
    """
    try:
        return function()
    except UserError as error:
        return fail(error)
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # such as no permission or a full disk
        return fail(f"{error.filename}: {reason(error)}" if error.filename else reason(error))
    except KeyboardInterrupt:
        print(_SIGNALS[signal.SIGINT], file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if said := too_little_memory(error, advice):
            return fail(said)
        raise


def too_little_memory(error: Exception, advice: str = "") -> str:
    """What to say about an error if it means that memory is short on the machine or the device; else ""."""
    # JAX is not imported here, so its error is recognised by name.
    of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)
    if not of_jax and not isinstance(error, MemoryError):
        return ""
    return f"the {'device' if of_jax else 'machine'} has too little memory{advice and ': '}{advice}"


def fail(message: object) -> int:
    """Prints an error as one line on standard error; returns the exit status 1."""
    print(f"error: {printable(message, 4000)}", file=sys.stderr)
    return 1


def leave(status: int) -> NoReturn:
    """Ends the process without waiting for threads of libraries, which may need minutes for a disk or a server."""
    atexit._run_exitfuncs()  # os._exit does not call them, a normal end does
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def prepare_streams() -> None:
    """Makes standard output and error accept any text; standard error also when it is closed or full."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next opened file would get this descriptor, and the text that libraries write to it
            os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY)
    for name, kind, descriptor in (("stdout", _Output, 1), ("stderr", _Errors, 2)):
        stream = _rewrap(getattr(sys, name), kind, descriptor)
        for place in (name, f"__{name}__"):
            setattr(sys, place, stream)


def _rewrap(stream: Any, kind: type[io.TextIOWrapper], descriptor: int) -> Any:
    if stream is None:
        stream = kind(io.FileIO(descriptor, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
    elif type(stream) is io.TextIOWrapper:  # not the replacement of a test
        encoding, by_line, at_once = stream.encoding, stream.line_buffering or descriptor == 2, stream.write_through
        # A terminal may accept only ASCII.
        stream = kind(stream.detach(), encoding, "backslashreplace", line_buffering=by_line, write_through=at_once)
    return stream


class _Output(io.TextIOWrapper):
    """Standard output whose errors name it."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error


class _Errors(io.TextIOWrapper):
    """Standard error that goes to the null device if it cannot be written: the results matter more than the messages."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def _flush_stdout() -> int:
    sys.stdout.flush()
    return 0


@contextlib.contextmanager
def leaving_at_second_signal() -> Iterator[None]:
    """Lets the second SIGINT or SIGTERM in the block end the process within a second, whatever it does.

    Python calls its own handlers only between two of its instructions, and a compilation of XLA is one.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as set_wakeup_fd wants
    ended = threading.Event()

    def watch() -> None:
        received = 0
        with reader:
            while number := reader.recv(1):  # b"" when the other end is closed
                received += number[0] in _SIGNALS
                if received == 2 and not ended.wait(1):
                    _exit_on_signal(number[0], None)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        writer.close()


def _exit_on_signal(number: int, frame: Any) -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f"{_SIGNALS[signal.Signals(number)]}\n".encode())  # the signal may have interrupted a print
    os._exit(128 + number)
