"""How a process is set up for JAX: memory, compiler options, a cache of compiled programs; and the fields left on "auto"."""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.config import AUTO, Model
from vit_jax.errors import ConfigError, reason
from vit_jax.files import cache_root, remove_scratch, whole_file
from vit_jax.models.layers import dot_product_attention, pad_tokens
from vit_jax.models.vit import VisionTransformer

_log = logging.getLogger("vit_jax")
_DAYS = 30  # after which an unused program is removed from the cache
_DIGEST = 32  # bytes of the SHA-256 at the beginning of an entry
_OPTIONS: dict[str, dict[str, Any]] = {  # by platform; docs/performance.md has the figures
    # XLA's newer matrix library is slower than its older one at a ViT's sizes.
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""},
    # XLA would compute query, key and value as one product, and then copy it apart and join it again for the gradient.
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 0},
}
_DETERMINISTIC = {"xla_gpu_deterministic_ops": True}  # of a GPU


@functools.cache
def prepare() -> None:
    """Sets up the process for JAX: how freed memory is kept on the CPU, and the cache of compiled programs.

    This changes the state of the process and of JAX, so only entry points call it, before JAX uses a device; a notebook may
    call it too. Later calls do nothing. A cache that the user configured (JAX_COMPILATION_CACHE_DIR), or that the user
    switched off (JAX_ENABLE_COMPILATION_CACHE=false), stays as it is. Without a cache, which is logged, all else works.

    Raises:
      UserError: if VIT_JAX_CACHE or XDG_CACHE_HOME names the home of a user who does not exist.
    """
    if not has_nvidia_driver():
        _keep_freed_memory()
    if jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        try:
            _use_cache(cache_root() / "programs" / _processor())
        except (OSError, ImportError, AttributeError) as error:  # also another version of JAX, whose cache is not public
            _warn_of_cache(reason(error))


def has_nvidia_driver() -> bool:
    """Whether this machine has a driver of NVIDIA's, and so probably a GPU, which JAX may use or not."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


@functools.cache
def compiler_options(platform: str | None = None, deterministic: bool = False) -> dict[str, Any] | None:
    """The `compiler_options` of jax.jit for a platform; None if there are none or the installed jaxlib does not know them.

    Args:
      platform: of the devices that the program is compiled for, as `jax.Device.platform` has it; None: of the default ones.
      deterministic: whether a GPU must give the same bits at every start. Its kernels are then chosen by rule instead of by
        measurement, and none adds in the order in which its threads arrive. Other platforms do so anyway.

    Raises:
      ConfigError: if the installed jaxlib knows no option for `deterministic`.
    """
    options = _OPTIONS.get(platform := platform or jax.default_backend())
    if deterministic and platform == "gpu":
        if not _is_known(_DETERMINISTIC):
            raise ConfigError(f"run.deterministic = true: this version of jaxlib has no {', '.join(_DETERMINISTIC)}")
        options = (options if options and _is_known(options) else {}) | _DETERMINISTIC
    return options if options and _is_known(options) else None


def _is_known(options: dict[str, Any]) -> bool:
    """Whether the installed jaxlib has the options, which are the same on every platform."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # such as an experimental option of another version
        return False
    return True


def _keep_freed_memory() -> None:
    """Lets the C library keep freed memory, and XLA allocate on the calling thread.

    XLA allocates a program's buffers at every call. By glibc's defaults they are mapped and unmapped each time, and the
    kernel clears their pages, which takes a tenth of a small model's training step. Programs run on a thread of XLA's by
    default, and large blocks of that thread are always mapped. So programs run on the calling thread, which costs nothing
    because the host is the device and could do nothing else meanwhile.
    """
    with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
        library = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
            library.mallopt(option, value)
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _processor() -> str:
    """A name shared by processors that can run each other's programs; several machines may share a home directory."""
    flags = ""
    with contextlib.suppress(OSError):
        flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return hashlib.sha256(f"{platform.machine()} {flags or platform.processor()}".encode()).hexdigest()[:12]


class _ProgramCache:
    """A folder of compiled programs for JAX's persistent compilation cache, which every process may use at any time.

    JAX's own class writes entries in place, and a kill or a full disk leaves a part of an entry that JAX neither detects,
    replaces nor removes. Here an entry appears when it is whole. It begins with the SHA-256 of the program; an entry with
    another hash is removed, so that the program is compiled and saved again.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder  # the name under which JAX logs it
        remove_scratch(folder)
        for entry in folder.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _DAYS * 24 * 3600:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()  # earlier versions made folders

    def get(self, key: str) -> bytes | None:
        """The program with this key, or None."""
        entry = self._path / key
        with contextlib.suppress(OSError):  # usually that there is no such entry
            content = entry.read_bytes()
            program = content[_DIGEST:]
            if hashlib.sha256(program).digest() == content[:_DIGEST]:
                with contextlib.suppress(OSError):  # a cache that this process may only read
                    os.utime(entry)
                return program
            entry.unlink()
        return None

    def put(self, key: str, program: bytes) -> None:
        """Saves a program; an error is logged once, because programs work without a cache."""
        try:
            with whole_file(self._path / key) as file:
                file.write(hashlib.sha256(program).digest() + program)
        except OSError as error:
            _warn_of_cache(reason(error))


def _use_cache(folder: Path) -> None:
    """Makes JAX read and write compiled programs in `folder`."""
    from jax._src import compilation_cache  # JAX has no public function that takes a cache

    cache: Any = _ProgramCache(folder)
    if not hasattr(compilation_cache, "_cache"):
        raise AttributeError("this version of JAX keeps its cache elsewhere")
    compilation_cache.reset_cache()
    compilation_cache._cache = cache
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a start's many small programs take seconds
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA would write its own files into the folder


@functools.cache
def _warn_of_cache(why: str) -> None:
    _log.warning("programs are compiled at every start because their cache cannot be written (%s)", why)


def resolve_auto(settings: Model, model: VisionTransformer, tokens: int) -> Model:
    """Replaces "auto" in `dtype` and `attention` by what suits the device.

    A GPU computes in bfloat16. Its attention is cuDNN's if a trial with a batch of two gives what XLA's attention gives; if
    not, the reason is logged. Everything else computes in float32 with XLA's attention.

    Args:
      settings: the section `model` of a configuration.
      model: the model, of which the number and the width of the heads matter.
      tokens: number of tokens that the model sees, the class token included.

    Raises:
      ConfigError: if cuDNN's attention is asked for without a GPU.
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
                _check_cudnn((2, tokens, model.num_heads, model.hidden_size // model.num_heads))
                attention = "cudnn"
            except Exception as error:  # whatever a missing or broken library makes JAX raise
                _log.warning("attention is computed by XLA because cuDNN's does not work here (%s)", reason(error))
    return dataclasses.replace(settings, dtype=dtype, attention=attention)


def _check_cudnn(shape: tuple[int, int, int, int]) -> None:
    """Computes cuDNN's attention and its gradient on [B, T, heads, K]; raises unless they agree with XLA's in bfloat16.

    An odd T is padded as in the model.
    """
    draws = jax.random.normal(jax.random.key(0), (4, *shape), jnp.bfloat16)

    def attention_and_gradient(implementation: str) -> Any:
        def attention(query, key, value):
            query, key, value = (pad_tokens(x, implementation) for x in (query, key, value))
            padded = functools.partial(dot_product_attention, implementation=implementation, tokens=shape[1])
            return padded(query, key, value, precision=jax.lax.Precision.DEFAULT)[:, : shape[1]]

        @jax.jit
        def run(query, key, value, gradient):
            result, back = jax.vjp(attention, query, key, value)
            return result, *back(gradient)

        return jax.device_get(run(*draws))

    for cudnn, xla in zip(attention_and_gradient("cudnn"), attention_and_gradient("xla"), strict=True):
        if not np.allclose(cudnn.astype(np.float32), xla.astype(np.float32), rtol=0.05, atol=0.05):
            raise ValueError("its numbers differ from XLA's")
