"""The set-up of a process: a cache of programs that no kill can damage, compiler options, memory, fields left on "auto"."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from vit_jax import runtime
from vit_jax.config import Model
from vit_jax.errors import ConfigError
from vit_jax.models.variants import build

ROOT = Path(__file__).parents[1]
# Compiles two programs, prints how many were found and how many were compiled, and then executes the given code.
SCRIPT = """
import collections, json, os, signal, sys
exec(os.environ.get("FIRST", ""))
import jax
from vit_jax import runtime
runtime.prepare()
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
print(jax.jit(lambda x: x * 3 + 1)(1.0), jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3)))[0, 0])
folder = jax.config.jax_compilation_cache_dir
print(json.dumps({**events, "folder": folder}), flush=True)
exec(sys.argv[1])
"""


def command(then: str = "") -> list[str]:
    return [sys.executable, "-W", "error", "-c", SCRIPT, then]


def start(cache: Path, then: str = "", **environment) -> tuple[dict, subprocess.CompletedProcess]:
    done = subprocess.run(command(then), cwd=ROOT, env=variables(cache, **environment), capture_output=True, text=True)
    numbers, events = done.stdout.splitlines()
    assert numbers == "4.0 3.0"
    return json.loads(events), done


def variables(cache: Path, **environment) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    return {**kept, "VIT_JAX_CACHE": str(cache), **environment}


def entries(cache: Path) -> dict[str, Path]:
    return {path.name: path for path in cache.glob("programs/*/*")}


def is_whole(entry: Path) -> bool:
    content = entry.read_bytes()
    return hashlib.sha256(content[32:]).digest() == content[:32]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A cache that one start filled; tests change copies of it."""
    cache = tmp_path_factory.mktemp("warm")
    first, done = start(cache)
    assert done.returncode == 0 and done.stderr == "" and first["cache_misses"] == len(entries(cache)) >= 2
    assert all(map(is_whole, entries(cache).values()))
    return cache


@pytest.fixture
def cache(warm, tmp_path):
    return shutil.copytree(warm, tmp_path / "cache")


def test_second_start_compiles_nothing(cache):
    second, done = start(cache)
    assert "cache_misses" not in second and second["cache_hits"] >= 2 and done.stderr == ""


def test_entry_cut_short_by_a_kill_is_never_read(cache):
    """A process is killed while it writes an entry; the next start removes what it left."""
    names = set(entries(cache))
    half = "entry = runtime.whole_file(runtime.Path(folder) / 'jit_half-0'); file = entry.__enter__()"
    _, done = start(cache, f"{half}; file.write(b'a part'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    (left,) = set(entries(cache)) - names
    assert left.startswith(".jit_half-0.") and left.endswith(".tmp")
    second, done = start(cache)
    assert "cache_misses" not in second and done.stderr == "" and set(entries(cache)) == names


def test_damaged_entries_are_replaced(cache):
    """Entries with a flipped bit, cut short and empty: the next start logs nothing and writes them again."""
    found = entries(cache)
    for number, path in enumerate(found.values()):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1 << number % 8
        path.write_bytes([data, data[: len(data) // 2], b""][number % 3])
    second, done = start(cache)
    assert done.stderr == "" and second["cache_misses"] == len(found)
    assert set(entries(cache)) == set(found) and all(map(is_whole, entries(cache).values()))


def test_full_disk_is_one_warning_and_leaves_no_entry(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"  # a write past it is cut, then fails
    first, done = start(tmp_path, FIRST=limit)
    assert first["cache_misses"] >= 2 and entries(tmp_path) == {}
    assert done.stderr.count("\n") == 1 and "programs are compiled at every start because their cache cannot be" in done.stderr
    _, done = start(tmp_path)
    assert done.stderr == "" and len(entries(tmp_path)) == first["cache_misses"]


@pytest.mark.slow
def test_processes_at_once_share_a_cache(tmp_path):
    """Three processes compile the same programs into an empty cache."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command(), cwd=ROOT, env=variables(tmp_path), **pipes) for _ in range(3)]
    for process in processes:
        out, error = process.communicate()
        assert process.returncode == 0 and error == "" and out.startswith("4.0 3.0\n")
    assert len(entries(tmp_path)) >= 2 and all(map(is_whole, entries(tmp_path).values()))
    assert "cache_misses" not in start(tmp_path)[0]


def test_read_only_cache_is_read_and_one_warning(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    cache = runtime._ProgramCache(tmp_path)
    cache.put("a", b"program")
    runtime._warn_of_cache.cache_clear()
    monkeypatch.setattr(runtime, "whole_file", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    for key in "bcd":
        cache.put(key, b"program")
    assert cache.get("a") == b"program" and cache.get("b") is None
    (message,) = caplog.messages
    assert message == "programs are compiled at every start because their cache cannot be written (Permission denied)"


def test_programs_unused_for_30_days_are_removed(tmp_path):
    cache = runtime._ProgramCache(tmp_path)
    for key in ("old", "used", "kept"):
        cache.put(key, b"program")
        days = {"old": 40, "used": 40, "kept": 20}[key]
        os.utime(tmp_path / key, (time.time() - days * 24 * 3600,) * 2)
    assert cache.get("used") == b"program"  # a use counts anew
    runtime._ProgramCache(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["kept", "used"]


def test_folders_of_the_earlier_cache_are_removed_after_30_days(tmp_path):
    old, new = tmp_path / "process-old", tmp_path / "process-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "entry").write_bytes(b"program")
    os.utime(old, (1, 1))
    runtime._ProgramCache(tmp_path)
    assert not old.exists() and new.exists()


def test_another_version_of_jax_without_this_cache_is_an_error(tmp_path, monkeypatch):
    from jax._src import compilation_cache

    monkeypatch.delattr(compilation_cache, "_cache")
    with pytest.raises(AttributeError, match="keeps its cache elsewhere"):  # which `prepare` turns into a warning
        runtime._use_cache(tmp_path)


def test_user_cache_setting_is_respected(tmp_path):
    found, _ = start(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert found["folder"] == str(tmp_path / "theirs") and not (tmp_path / "ours").exists()
    found, _ = start(tmp_path / "ours", JAX_ENABLE_COMPILATION_CACHE="false")
    assert found["folder"] is None and not (tmp_path / "ours").exists()


def test_cache_that_cannot_be_made_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    found, done = start(tmp_path / "file")
    assert found["folder"] is None and done.returncode == 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("programs are compiled at every start because their cache cannot be written")


def test_options_that_the_compiler_does_not_know_are_left_out(monkeypatch):
    runtime.compiler_options.cache_clear()
    assert runtime.compiler_options() == runtime.compiler_options("cpu") == runtime._OPTIONS["cpu"]
    assert runtime.compiler_options("gpu") == runtime._OPTIONS["gpu"]  # for a GPU that is only described
    assert runtime.compiler_options("tpu") is None
    runtime.compiler_options.cache_clear()
    monkeypatch.setitem(runtime._OPTIONS, "cpu", {"xla_unknown_option": ""})
    assert runtime.compiler_options() is None
    runtime.compiler_options.cache_clear()


def test_deterministic_programs_are_for_gpus_and_never_silently_others(monkeypatch):
    runtime.compiler_options.cache_clear()
    assert runtime.compiler_options("cpu", True) == runtime._OPTIONS["cpu"]
    assert runtime.compiler_options("gpu", True) == {**runtime._OPTIONS["gpu"], "xla_gpu_deterministic_ops": True}
    monkeypatch.setattr(runtime, "_DETERMINISTIC", {"xla_unknown_option": True})
    runtime.compiler_options.cache_clear()
    with pytest.raises(ConfigError, match="run.deterministic = true: this version of jaxlib has no xla_unknown_option"):
        runtime.compiler_options("gpu", True)
    runtime.compiler_options.cache_clear()


def test_freed_memory_is_kept_if_the_library_can(monkeypatch):
    calls = []
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *option: calls.append(option)))
    runtime._keep_freed_memory()
    assert calls == [(-4, 0), (-1, 2**31 - 1)]  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _: SimpleNamespace())  # another C library
    runtime._keep_freed_memory()


def resolved(tokens: int = 5, **fields) -> tuple[str, str]:
    found = runtime.resolve_auto(Model(**fields), build("B/8", hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32), tokens)
    return found.dtype, found.attention


def test_auto_is_resolved_by_the_device(monkeypatch, caplog):
    assert resolved() == ("float32", "xla")
    assert resolved(dtype="bfloat16") == ("bfloat16", "xla")
    with pytest.raises(runtime.ConfigError, match=r"model\.attention = 'cudnn' needs an NVIDIA GPU, and JAX runs on the cpu"):
        resolved(attention="cudnn")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    # The tests have no cuDNN, so its trial really fails.
    assert resolved() == ("bfloat16", "xla")
    (message,) = caplog.messages
    assert message.startswith("attention is computed by XLA because cuDNN's does not work here (")
    caplog.clear()
    for fields in (dict(dtype="float32"), dict(attention_dropout=0.1), dict(attention="xla")):
        assert resolved(**fields)[1] == "xla"
    assert resolved(attention="cudnn") == ("bfloat16", "cudnn") and not caplog.messages


def test_auto_takes_cudnn_only_if_its_numbers_agree(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    xla = runtime.dot_product_attention
    monkeypatch.setattr(runtime, "dot_product_attention", lambda *a, implementation, **k: xla(*a, implementation="xla", **k))
    assert resolved() == ("bfloat16", "cudnn")
    wrong = lambda *a, implementation, **k: xla(*a, implementation="xla", **k) * (1 if implementation == "xla" else 1.5)  # noqa: E731
    monkeypatch.setattr(runtime, "dot_product_attention", wrong)
    assert resolved() == ("bfloat16", "xla") and "its numbers differ from XLA's" in caplog.text


@pytest.mark.parametrize("tokens", [145, 197, 196, 257, 577])
def test_trial_of_cudnn_is_padded_as_the_model_is(monkeypatch, tokens):
    """JAX refuses odd numbers of tokens; XLA's attention computes what cuDNN would, called with the same lengths."""
    public, calls = jax.nn.dot_product_attention, []

    def attention(query, key, value, *, key_value_seq_lengths, implementation):
        calls.append((query.shape[1], implementation, key_value_seq_lengths is None))
        return public(query, key, value, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert resolved(tokens) == ("bfloat16", "cudnn")
    assert calls == [(tokens + tokens % 2, "cudnn", tokens % 2 == 0)]
