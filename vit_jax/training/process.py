"""What a process is set up with before its first computation: its memory, the compiler's options, a cache of programs."""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from vit_jax.files import cache_root, whole_file

_log = logging.getLogger("vit_jax")
_ENTRY = "*-cache"  # what JAX calls an entry of its cache
_DAYS = 30  # after which a program that nobody has asked for goes
_CPU_OPTIONS: dict[str, Any] = {
    # XLA's newer matrix library is slower than its older one at a ViT's sizes: docs/performance.md has the figures.
    "xla_cpu_experimental_ynn_fusion_type": "",
}


@functools.cache
def prepare() -> None:
    """Sets the process up, once, whoever asks first; to be called before JAX has touched a device."""
    if not has_nvidia_driver():
        _keep_memory()
    # Whoever has chosen a cache, or none, has chosen.
    if jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        try:
            _cache_programs(cache_root() / "programs" / _machine())
        except (OSError, RuntimeError) as error:
            _log.warning("programs are compiled anew at every start, for their cache cannot be written (%s)", error)


def has_nvidia_driver() -> bool:
    """Whether a GPU of NVIDIA's stands by, used or not."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


@functools.cache
def compiler_options() -> dict[str, Any] | None:
    """What jax.jit is to hand to the compiler on this machine; None where this jaxlib knows none of it."""
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:  # experimental options come and go
        return None
    return _CPU_OPTIONS


def _keep_memory() -> None:
    """Has the C library keep what is freed, and XLA ask for it on the thread that calls.

    XLA allocates a program's buffers at every call. By glibc's defaults they are mapped and unmapped each time, and the
    kernel's clearing of their pages takes a tenth of a small model's training step; a thread of XLA's own, where programs
    would run unless told otherwise, has an arena whose large blocks are always mapped. The host is the device here: it could
    do nothing else meanwhile.
    """
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        library = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
            library.mallopt(option, value)
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _machine() -> str:
    """A name for processors that can run each other's programs, for a home may be shared by several."""
    flags = ""
    with contextlib.suppress(OSError):
        flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return hashlib.sha256(f"{platform.machine()} {flags or platform.processor()}".encode()).hexdigest()[:12]


def _cache_programs(shared: Path) -> None:
    """JAX's persistent compilation cache in `shared`, where no entry is ever seen half-written.

    JAX writes entries in place, and neither replaces nor removes one that a kill cut short. So it is given a folder of this
    process's own, of links to the whole entries; what it adds there becomes part of `shared` when it is whole. The folders
    of killed processes are swept away by the next start.
    """
    shared.mkdir(parents=True, exist_ok=True)
    for entry in shared.glob(_ENTRY):
        if time.time() - max(entry.stat().st_atime, entry.stat().st_mtime) > _DAYS * 24 * 3600:
            entry.unlink(missing_ok=True)
    for left in shared.glob("process-*"):
        if time.time() - left.stat().st_mtime < 60:  # its process may be about to lock it
            continue
        with contextlib.suppress(OSError), open(left / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held for as long as its process lives
            shutil.rmtree(left)
    own = Path(tempfile.mkdtemp(prefix="process-", dir=shared))
    lock = open(own / "lock", "a")  # noqa: SIM115 (a lock lives as long as its file is open)
    fcntl.flock(lock, fcntl.LOCK_EX)
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    atexit.register(lock.close)
    known = set()
    for entry in shared.glob(_ENTRY):
        _share(entry, own / entry.name)
        known.add(entry.name)

    def publish(event: str, *_: Any, **__: Any) -> None:
        if event != "/jax/core/compile/backend_compile_duration":  # ends when the entry is written
            return
        with contextlib.suppress(OSError):  # the cache is a convenience
            for entry in own.glob(_ENTRY):
                if entry.name not in known:
                    known.add(entry.name)
                    with open(entry, "rb") as file:
                        os.fsync(file.fileno())
                    _share(entry, shared / entry.name)

    jax.monitoring.register_event_duration_secs_listener(publish)
    jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # all of a start's small programs take seconds
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # their folder's name would be part of every key


def _share(entry: Path, place: Path) -> None:
    """Puts a whole entry in a second place, at once."""
    try:
        os.link(entry, place)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        with open(entry, "rb") as source, whole_file(place) as target:
            shutil.copyfileobj(source, target)
