"""Atomic files and folders, also when processes are killed; locks; hashes; the cache folder."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.errors import UserError
from vit_jax.files import cache_root, expand_user, locked, remove_scratch, sha256, whole_file, whole_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture
def process():
    """A function that starts Python code in a process and returns it after it printed "ready"; the test's end kills it."""
    started = []

    def start(code: str) -> subprocess.Popen:
        code = "import sys, time\nfrom pathlib import Path\nfrom vit_jax.files import *\n" + code
        started.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def test_whole_file_appears_complete(tmp_path):
    path = tmp_path / "folder" / "a"
    with whole_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whole_file_keeps_the_old_file_after_an_error(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(error), whole_file(tmp_path / "a") as file:
        file.write(b"half")
        raise error
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_whole_file_errors_name_the_file_and_not_its_scratch(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as raised, whole_file(tmp_path / "file" / "a"):
        pass
    assert raised.value.filename == str(tmp_path / "file" / "a")
    with pytest.raises(OSError) as raised, whole_file(tmp_path / "b"):
        raise OSError(28, "No space left on device")
    assert (raised.value.errno, raised.value.filename) == (28, str(tmp_path / "b"))


def test_whole_folder_appears_complete_or_not_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with whole_folder(tmp_path / name) as folder:
            (folder / "a").write_text("1")
        assert (tmp_path / name / "a").read_text() == "1"
    with pytest.raises(ValueError), whole_folder(tmp_path / "failed") as folder:
        (folder / "a").write_text("1")
        raise ValueError
    with pytest.raises(FileExistsError, match="give another folder"), whole_folder(tmp_path / "new"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["empty", "new"]


@pytest.mark.parametrize("kind", ["whole_file", "whole_folder"])
def test_scratch_of_a_killed_process_is_removed_by_the_next_writer(tmp_path, process, kind):
    path = tmp_path / "a"
    body = f"with {kind}(Path({str(path)!r})) as scratch:\n    print('ready', flush=True)\n    time.sleep(60)"
    killed = process(body)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".a.") and left.endswith(".tmp")
    with whole_file(path) as file:
        file.write(b"whole")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["whole_file", "whole_folder"])
def test_scratch_of_a_live_process_is_kept(tmp_path, process, kind):
    process(f"with {kind}(Path({str(tmp_path / 'a')!r})) as scratch:\n    print('ready', flush=True)\n    time.sleep(60)")
    (scratch,) = os.listdir(tmp_path)
    remove_scratch(tmp_path)
    assert os.listdir(tmp_path) == [scratch]


def test_remove_scratch_removes_only_scratch_and_of_one_name_if_given(tmp_path):
    others = ["a", ".a.tmp", ".a.12.tmp.txt", "a.12.tmp"]
    for name in [*others, ".a.12.tmp", ".b.12-0123abcd.tmp"]:
        (tmp_path / name).write_text("")
    (tmp_path / ".c.9.tmp").symlink_to(tmp_path / "a")
    remove_scratch(tmp_path, "a")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".b.12-0123abcd.tmp", ".c.9.tmp"])
    remove_scratch(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".c.9.tmp"])
    remove_scratch(tmp_path / "nowhere")


def test_lock_makes_other_processes_wait_and_logs_it(tmp_path, process, caplog):
    path = tmp_path / "folder" / "lock"
    with locked(path, "writes a"):
        pass
    assert caplog.text == ""
    holder = process(
        f"with locked(Path({str(path)!r}), 'writes a'):\n    print('ready', flush=True)\n    time.sleep(0.5)\n"
        f"    Path({str(tmp_path / 'done')!r}).touch()\ntime.sleep(60)"
    )
    with locked(path, "writes a"):
        assert (tmp_path / "done").exists() and holder.poll() is None
    assert f"waiting for another process that writes a (it holds {path})" in caplog.text


def test_lock_of_a_killed_process_is_free(tmp_path, process, caplog):
    holder = process(f"with locked(Path({str(tmp_path / 'lock')!r}), ''):\n    print('ready', flush=True)\n    time.sleep(60)")
    holder.kill()
    holder.wait()
    with locked(tmp_path / "lock", ""):
        assert caplog.text == ""


def test_sha256_equals_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"bytes" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"bytes" * 100_000).hexdigest()


def test_unknown_user_is_an_error_that_names_the_field(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user("~/x", "run.data_dir") == Path("/home/me/x") and expand_user("/a/~", "run.data_dir") == Path("/a/~")
    with pytest.raises(
        UserError, match=r"^run\.data_dir='~no-such-user/x': the user '~no-such-user' does not exist; give an abs"
    ):
        expand_user("~no-such-user/x", "run.data_dir")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"VIT_JAX_CACHE": "/cache", "XDG_CACHE_HOME": "/xdg"}, "/cache"),
        ({"VIT_JAX_CACHE": "~/cache"}, "/home/me/cache"),
        ({"VIT_JAX_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/vit_jax"),
        ({}, "/home/me/.cache/vit_jax"),
    ],
)
def test_cache_root_follows_the_environment(monkeypatch, environment, expected):
    for name in ("VIT_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(expected)


@pytest.mark.parametrize("name", ["VIT_JAX_CACHE", "XDG_CACHE_HOME"])
def test_cache_of_an_unknown_user_is_an_error_that_names_the_variable(monkeypatch, name):
    monkeypatch.delenv("VIT_JAX_CACHE", raising=False)
    monkeypatch.setenv(name, "~no-such-user/x")
    with pytest.raises(UserError, match=f"^{name}='~no-such-user/x': the user '~no-such-user' does not exist"):
        cache_root()


def test_cache_without_a_home_directory_is_an_error_of_the_system(monkeypatch):
    for name in ("VIT_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="the home directory is not known: set HOME or VIT_JAX_CACHE"):
        cache_root()
