"""What a process is set up with before its first computation: its memory, the compiler's options, a cache of programs."""

import atexit
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import AUTO, Model
from vit_jax.errors import ConfigError, reason
from vit_jax.files import cache_root, whole_file
from vit_jax.models.layers import dot_product_attention
from vit_jax.models.vit import VisionTransformer

_log = logging.getLogger("vit_jax")
_ENTRY = "*-cache"  # what JAX calls an entry of its cache
_SHARED = "*-cache.*"  # an entry that is shared between processes; its name ends with the hash of its bytes
_DAYS = 30  # after which an unused program is removed
_NO_CACHE = "programs are compiled at every start because their cache cannot be written (%s)"
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
            _log.warning(_NO_CACHE, reason(error))


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
    """JAX's persistent compilation cache in `shared`, where every entry is whole.

    JAX writes entries in place, and neither checks, replaces nor removes one that a kill or a full disk cut short. So JAX
    is given a folder that only this process uses. It begins with links to the shared entries whose bytes have the hash in
    their name; others are removed, so that they are compiled and shared again. What JAX adds is shared once it is whole. The
    next start removes the folders of killed processes.
    """
    shared.mkdir(parents=True, exist_ok=True)
    _remove_old(shared)
    own = Path(tempfile.mkdtemp(prefix="process-", dir=shared))
    lock = open(own / "lock", "a")  # noqa: SIM115 (a lock lives as long as its file is open)
    fcntl.flock(lock, fcntl.LOCK_EX)
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    atexit.register(lock.close)
    done: dict[str, int] = {}  # the size of each entry in `own` that needs no further look
    cut: dict[str, int] = {}  # the size of each that was not whole when it was looked at
    for entry in shared.glob(_SHARED):
        name, _, expected = entry.name.rpartition(".")
        with contextlib.suppress(OSError):
            if _hash(_read(entry)) != expected:
                entry.unlink(missing_ok=True)
                continue
            _share(entry, own / name)
            done[name] = entry.stat().st_size

    def publish(event: str, *_: Any, **__: Any) -> None:
        if event != "/jax/core/compile/backend_compile_duration":  # ends when the entry is written
            return
        for entry in own.glob(_ENTRY):
            try:
                size = entry.stat().st_size
                if done.get(entry.name) == size:
                    continue
                if _publish(entry, shared):
                    done[entry.name] = size
                elif cut.get(entry.name) != size:
                    cut[entry.name] = size  # another thread may still be writing it: looked at again after the next program
                else:
                    done[entry.name] = size
                    _warn_once("an entry was cut short")
            except OSError as error:  # the cache is a convenience
                _warn_once(reason(error))

    jax.monitoring.register_event_duration_secs_listener(publish)
    # JAX warns of every program that it cannot write; `_warn_once` says it once.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry", UserWarning)
    jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # all of a start's small programs take seconds
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # their folder's name would be part of every key


def _remove_old(shared: Path) -> None:
    """Removes entries that are unused for long or that have no hash, and the folders of killed processes."""
    for entry in [*shared.glob(_ENTRY), *shared.glob(_SHARED)]:
        with contextlib.suppress(OSError):
            used = max(entry.stat().st_atime, entry.stat().st_mtime)
            if entry.match(_ENTRY) or time.time() - used > _DAYS * 24 * 3600:
                entry.unlink()
    for left in shared.glob("process-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < 60:  # its process may be about to lock it
                continue
            with open(left / "lock", "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held as long as its process lives
                shutil.rmtree(left)


def _publish(entry: Path, shared: Path) -> bool:
    """Shares an entry that JAX has written if it is whole; returns whether it is."""
    data = _read(entry)
    try:
        from jax._src.compilation_cache import decompress_executable  # JAX chooses among zlib and two modules for zstd

        decompress_executable(data)
    except Exception:  # each of them has its own
        return False
    with open(entry, "rb") as file:
        os.fsync(file.fileno())
    _share(entry, shared / f"{entry.name}.{_hash(data)}")
    return True


def _read(path: Path) -> bytes:
    """A file's bytes, read without renewing its time of access, by which unused entries are known."""

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | getattr(os, "O_NOATIME", 0))
        except PermissionError:  # it is another user's
            return os.open(name, flags)

    with open(path, "rb", opener=opener) as file:
        return file.read()


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


@functools.cache
def _warn_once(why: str) -> None:
    _log.warning(_NO_CACHE, why)


def _share(entry: Path, place: Path) -> None:
    """Puts a whole entry in a second place, at once."""
    try:
        os.link(entry, place)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        with open(entry, "rb") as source, whole_file(place) as target:  # a file system without links
            shutil.copyfileobj(source, target)


def resolve_auto(settings: Model, model: VisionTransformer, tokens: int) -> Model:
    """The configuration's section with a type and an attention for what is left open, of a model that sees `tokens` tokens.

    A GPU computes in bfloat16, and its attention is cuDNN's where that gives what XLA's gives on a batch of two; where it
    does not, that is said.
    """
    on_gpu = jax.default_backend() == "gpu"
    dtype, attention = settings.dtype, settings.attention
    if dtype == AUTO:
        dtype = "bfloat16" if on_gpu or attention == "cudnn" else "float32"
    if attention == "cudnn" and not on_gpu:
        raise ConfigError(
            f"model.attention = 'cudnn' needs an NVIDIA GPU, and JAX runs on the {jax.default_backend()} here: "
            "set model.attention=auto"
        )
    if attention == AUTO:
        attention = "xla"
        if on_gpu and dtype == "bfloat16" and not settings.attention_dropout:
            try:
                _try_cudnn((2, tokens, model.num_heads, model.hidden_size // model.num_heads))
                attention = "cudnn"
            except Exception as error:  # whatever a missing or broken library makes JAX raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                _log.warning("attention is computed by XLA, for cuDNN's does not work here (%s)", reason)
    return dataclasses.replace(settings, dtype=dtype, attention=attention)


def _try_cudnn(shape: tuple[int, int, int, int]) -> None:
    """Raises where cuDNN's attention or its gradient does not run on [B, T, heads, K], or is not XLA's within bfloat16."""
    draws = jax.random.normal(jax.random.key(0), (4, *shape), jnp.bfloat16)

    def both(implementation: str) -> Any:
        attention = functools.partial(dot_product_attention, implementation=implementation, precision=jax.lax.Precision.DEFAULT)

        @jax.jit
        def run(query, key, value, gradient):
            result, back = jax.vjp(attention, query, key, value)
            return result, *back(gradient)

        return jax.device_get(run(*draws))

    for ours, theirs in zip(both("cudnn"), both("xla"), strict=True):
        if not np.allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=0.05, atol=0.05):
            raise ValueError("its numbers are not those of XLA")
