"""What a process is set up with: a cache of programs that no kill can spoil, options that come and go, memory that stays."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from vit_jax import runtime

ROOT = Path(__file__).parents[1]
# Compiles two programs, says what of them was found and what was compiled, and does what is asked for in between.
SCRIPT = """
import collections, json, os, signal, sys
exec(os.environ.get("FIRST", ""))
import jax
from vit_jax import runtime
runtime.prepare()
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
print(jax.jit(lambda x: x * 3 + 1)(1.0), jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3)))[0, 0])
own = jax.config.jax_compilation_cache_dir
print(json.dumps({**events, "own": own}), flush=True)
exec(sys.argv[1])
"""


def start(cache: Path, then: str = "", **environment) -> tuple[dict, subprocess.CompletedProcess]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    command = [sys.executable, "-W", "error", "-c", SCRIPT, then]
    done = subprocess.run(
        command, cwd=ROOT, env={**kept, "VIT_JAX_CACHE": str(cache), **environment}, capture_output=True, text=True
    )
    numbers, told = done.stdout.splitlines()
    assert numbers == "4.0 3.0"
    return json.loads(told), done


def entries(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("programs/*/*-cache.*")}


def test_a_second_start_compiles_nothing(tmp_path):
    first, done = start(tmp_path)
    assert first["cache_misses"] >= 2 and done.returncode == 0 and done.stderr == ""
    assert len(entries(tmp_path)) == first["cache_misses"]
    second, done = start(tmp_path)
    assert "cache_misses" not in second and second["cache_hits"] >= 2 and done.stderr == ""
    assert not list(tmp_path.glob("programs/*/process-*"))  # both have tidied up


def test_what_a_kill_cuts_short_is_never_seen(tmp_path):
    # Killed while JAX writes an entry: its own folder holds a part of one.
    half = "open(own + '/jit_half-0-cache', 'wb').write(b'a part'); os.kill(os.getpid(), signal.SIGKILL)"
    first, done = start(tmp_path, half)
    assert done.returncode == -signal.SIGKILL
    assert len(entries(tmp_path)) == first["cache_misses"] and not any("half" in name for name in entries(tmp_path))
    (left,) = tmp_path.glob("programs/*/process-*")
    second, done = start(tmp_path)
    assert "cache_misses" not in second and done.stderr == ""
    assert left.exists()  # it may be about to lock its folder
    os.utime(left, (time.time() - 100,) * 2)
    start(tmp_path)
    assert not left.exists() and len(entries(tmp_path)) == first["cache_misses"]


def test_damaged_entries_are_replaced(tmp_path):
    """Cut short, flipped, emptied, without a hash as an earlier version left them: the next start is silent and mends them."""
    start(tmp_path)
    paths, whole = sorted(tmp_path.glob("programs/*/*-cache.*")), entries(tmp_path)
    for number, path in enumerate(paths):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1 << number % 8
        path.write_bytes([data, data[: len(data) // 2], b""][number % 3])
    (paths[0].parent / paths[0].name.rpartition(".")[0]).write_bytes(b"a part")
    second, done = start(tmp_path)
    assert done.stderr == "" and second["cache_misses"] == len(paths)
    assert not list(tmp_path.glob("programs/*/*-cache"))
    third, done = start(tmp_path)
    assert done.stderr == "" and "cache_misses" not in third
    found = entries(tmp_path)
    assert {name.rpartition(".")[0] for name in found} == {name.rpartition(".")[0] for name in whole}
    assert all(runtime._hash(data) == name.rpartition(".")[2] for name, data in found.items())


def test_entries_cut_short_by_a_full_disk_are_not_shared(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"  # a write past it is cut, then fails
    first, done = start(tmp_path, FIRST=limit)
    assert first["cache_misses"] >= 2 and entries(tmp_path) == {}
    assert done.stderr.count("\n") == 1 and "programs are compiled at every start because their cache cannot be" in done.stderr
    _, done = start(tmp_path)
    assert done.stderr == "" and len(entries(tmp_path)) == first["cache_misses"]


def test_checking_an_entry_is_no_use_of_it(tmp_path):
    (tmp_path / "entry").write_bytes(b"program")
    os.utime(tmp_path / "entry", (1, 1))
    assert runtime._read(tmp_path / "entry") == b"program" and (tmp_path / "entry").stat().st_atime == 1


def test_a_living_process_keeps_its_folder(tmp_path):
    second = f"subprocess.run([sys.executable, '-c', {SCRIPT!r}, ''], check=True, stdout=subprocess.DEVNULL)"
    then = f"import subprocess; os.utime(own, (0, 0)); {second}; sys.exit(0 if os.path.isdir(own) else 3)"
    assert start(tmp_path, then)[1].returncode == 0


def test_programs_nobody_asks_for_go(tmp_path):
    start(tmp_path)
    old, *others = tmp_path.glob("programs/*/*-cache.*")
    os.utime(old, (time.time() - 40 * 24 * 3600,) * 2)
    again, _ = start(tmp_path)
    assert again["cache_misses"] == 1 and again["cache_hits"] >= len(others) - 1


def test_whoever_chose_a_cache_has_chosen(tmp_path):
    told, _ = start(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert told["own"] == str(tmp_path / "theirs") and not (tmp_path / "ours").exists()
    told, _ = start(tmp_path / "ours", JAX_ENABLE_COMPILATION_CACHE="false")
    assert told["own"] is None and not (tmp_path / "ours").exists()


def test_without_a_place_for_it_there_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    told, done = start(tmp_path / "file")
    assert told["own"] is None and done.returncode == 0
    assert done.stderr.startswith("programs are compiled at every start because their cache cannot be written")


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"program")
    runtime._share(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"program" and len(list(tmp_path.iterdir())) == 2


def test_options_that_a_compiler_does_not_know_are_left_out(monkeypatch):
    runtime.compiler_options.cache_clear()
    assert runtime.compiler_options() == runtime._CPU_OPTIONS
    runtime.compiler_options.cache_clear()
    monkeypatch.setattr(runtime, "_CPU_OPTIONS", {"xla_of_another_day": ""})
    assert runtime.compiler_options() is None
    runtime.compiler_options.cache_clear()


def test_freed_memory_is_kept_where_the_library_can(monkeypatch):
    asked = []
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *option: asked.append(option)))
    runtime._keep_memory()
    assert asked == [(-4, 0), (-1, 2**31 - 1)]  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _: SimpleNamespace())  # another C library
    runtime._keep_memory()
