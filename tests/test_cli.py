"""How a command line ends: exit status and output, in real processes with closed, full and ASCII streams."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vit_jax import cli
from vit_jax.errors import CheckpointError

ROOT = Path(__file__).parents[1]
START = "import sys, time, os, signal\nfrom vit_jax import cli\n"


def start(body: str, *, shell: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Runs `cli.run` of a function with this body in a process, with the redirections of `shell`."""
    code = START + "def main():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "cli.run(lambda: cli.call(main))"
    command = ["sh", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, code]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def ended(done: subprocess.CompletedProcess) -> tuple[int, str, str]:
    return done.returncode, done.stdout, done.stderr


class JaxRuntimeError(Exception):
    """An error with the name of JAX's, which `cli` recognises by name."""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (CheckpointError("x.npz: no head\x1b[2J"), 1, "error: x.npz: no head\\x1b[2J\n"),
        (OSError(28, "No space left on device", "a.npz"), 1, "error: a.npz: No space left on device\n"),
        (OSError("two\nlines"), 1, "error: two lines\n"),
        (MemoryError(), 1, "error: the machine has too little memory: use less\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 0, ""),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB"), 1, "error: the device has too little memory: use less\n"),
    ],
)  # fmt: skip
def test_errors_become_one_line_and_a_status(capsys, error, status, said):
    def fails():
        raise error

    assert cli.call(fails, "use less") == status
    assert capsys.readouterr().err == said


def test_other_errors_are_raised():
    with pytest.raises(ZeroDivisionError):
        cli.call(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("print('answer'); return 0", (0, "answer\n", "")),
        ("return 3", (3, "", "")),
        ("sys.exit(2)", (2, "", "")),
        ("sys.exit()", (0, "", "")),
        ("sys.exit('why')", (1, "", "why\n")),
        ("import atexit; atexit.register(print, 'tidy'); return 0", (0, "tidy\n", "")),
    ],
)
def test_exit_status_of_a_process_is_that_of_main(body, expected):
    assert ended(start(body)) == expected


def test_other_error_prints_a_traceback_and_does_not_wait_for_threads():
    done = start("import threading; threading.Thread(target=time.sleep, args=(50,)).start(); return 1 // 0")
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: integer division or modulo by zero\n")


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("work", ["import slow", "time.sleep(50)", "\ntry: time.sleep(50)\nexcept BaseException: pass"])
def test_signals_end_a_process_at_once_with_their_status(tmp_path, number, status, word, work):
    """In an import that catches KeyboardInterrupt, in the work, and in a block that catches it."""
    (tmp_path / "slow.py").write_text("import time\ntry:\n    time.sleep(50)\nexcept BaseException:\n    pass\n")
    body = f"sys.path.insert(0, {str(tmp_path)!r}); print('ready', flush=True)\n{work.strip()}\nreturn 0"
    code = START + "def main():\n" + "".join(f"    {line}\n" for line in body.splitlines()) + "cli.run(lambda: cli.call(main))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (status, word + "\n")


def test_ignored_signals_stay_ignored():
    done = subprocess.run(
        [
            "sh",
            "-c",
            f"trap '' INT; exec {sys.executable} -c '{START}cli.run(lambda: os.kill(os.getpid(), signal.SIGINT) or 7)'",
        ],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 7


def test_signal_tests_hold_in_background_jobs():
    """The settings of the tests handle Ctrl-C also in a background job, which ignores it by default."""
    code = "import signal, runpy; runpy.run_path('tests/conftest.py'); signal.raise_signal(signal.SIGINT)"
    command = ["sh", "-c", 'trap \'\' INT; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, timeout=60)
    assert b"KeyboardInterrupt" in done.stderr


def test_closed_pipe_is_no_error():
    code = START + "cli.run(lambda: cli.call(lambda: print('a\\n' * 99999) or 0))"
    command = ["sh", "-c", '{ "$0" -c "$1"; echo $? >&2; } | head -n 1', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("a\n", "0\n")


@pytest.mark.parametrize("shell", ["2>/dev/full", "2>&-"])
def test_full_or_closed_stderr_keeps_the_answers(shell):
    body = "import logging; print('progress', file=sys.stderr, flush=True); logging.warning('said'); print('answer'); return 0"
    assert ended(start(body, shell=shell)) == (0, "answer\n", "")


@pytest.mark.parametrize(("shell", "why"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")])
@pytest.mark.parametrize("flush", [True, False])
def test_full_or_closed_stdout_is_one_line_and_status_1(shell, why, flush):
    done = start(f"print('answer', flush={flush}); return 0", shell=shell)
    assert ended(done) == (1, "", f"error: standard output: {why}\n")


def test_closed_streams_are_not_reused_for_opened_files(tmp_path):
    """Text that C code writes to descriptors 1 and 2 would go into such a file."""
    body = f"file = open({str(tmp_path / 'weights')!r}, 'wb'); assert file.fileno() > 2; return 5"
    assert start(body, shell="<&- >&- 2>&-").returncode == 5


def test_ascii_streams_take_any_text():
    done = start("print('caf\\u00e9 \\u2713'); print('\\u2713', file=sys.stderr); return 0", PYTHONIOENCODING="ascii")
    assert ended(done) == (0, "caf\\xe9 \\u2713\n", "\\u2713\n")


def test_main_interrupted_during_its_imports_prints_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "main.py", "--config", "configs/demo.py", "--help"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stderr
        lines = iter(process.stderr)
        next(line for line in lines if line.endswith(" signal\n"))  # the first import of main.py
        next(lines)
        process.send_signal(signal.SIGINT)
        rest = "".join(lines)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in rest


IN_A_LIBRARY = """
import hashlib, os, signal, sys
from vit_jax import cli
def main():
    signal.signal(signal.SIGTERM, lambda *_: None)
    with cli.leaving_at_second_signal():
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000_000)  # for minutes no instruction of Python
    return 0
cli.run(main)
"""


def test_second_signal_ends_a_long_call_of_a_library():
    command = [sys.executable, "-c", IN_A_LIBRARY]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None  # the first one is left to the block
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143 and "terminated" in process.stderr.read()


def test_second_signal_is_left_to_a_block_that_ends():
    with pytest.raises(KeyboardInterrupt), cli.leaving_at_second_signal():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.set_wakeup_fd(-1) == -1
