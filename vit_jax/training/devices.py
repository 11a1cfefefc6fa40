"""The devices of a run, and how its step uses them. No other file decides this.

Outside this file no state and no metric has a device axis. Both layouts keep the state as arrays replicated over a mesh
of all local devices: jit takes them as they are, and pmap takes and gives them back unmapped (in_axes and out_axes None)
without a copy.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_jax.config import Run
from vit_jax.errors import ConfigError
from vit_jax.runtime import compiler_options, has_nvidia_driver

_AXIS = "batch"


class Layout:
    """The local devices and one of two ways to use them: "mesh" (jit) or "pmap".

    Batches are shared along one axis of every leaf; states, parameters and a run's data lie on every device.
    """

    def __init__(self, parallel: str, devices: list[jax.Device] | None = None, deterministic: bool = False):
        self.pmap = parallel == "pmap"
        self.devices = devices or jax.local_devices()
        self._options = compiler_options(self.devices[0].platform, deterministic)
        self._shardings: dict[tuple[Any, ...], NamedSharding] = {}
        self.mesh = jax.make_mesh((len(self.devices),), (_AXIS,), axis_types=(AxisType.Auto,), devices=self.devices)

    def _sharding(self, *spec: Any) -> NamedSharding:
        if spec not in self._shardings:  # kept, because making one takes as long as copying the indices of a batch
            self._shardings[spec] = NamedSharding(self.mesh, PartitionSpec(*spec))
        return self._shardings[spec]

    def describe(self) -> str:
        """The devices and how they are used: "1 CPU", "8 CPUs, pmap", "1 NVIDIA H100 80GB HBM3"."""
        count, kind = len(self.devices), self.devices[0].device_kind
        name = "CPU" if kind == "cpu" else kind
        return f"{count} {name}{'s' * (count > 1)}{', pmap' if self.pmap else ''}"

    def check(self, batch_size: int, microbatches: int) -> None:
        """ConfigError unless every microbatch of a training batch divides among the devices."""
        if batch_size % (microbatches * len(self.devices)):
            raise ConfigError(
                f"training.batch_size = {batch_size} in training.grad_accum_steps = {microbatches} does not divide among "
                f"{len(self.devices)} devices; take a multiple of {microbatches * len(self.devices)}"
            )

    def round_up(self, size: int) -> int:
        """The smallest batch size of at least `size` that divides among the devices."""
        return -(-size // len(self.devices)) * len(self.devices)

    def put(self, tree: Any) -> Any:
        """A copy of a tree on every device; it shares no memory with the argument, so a step may donate it."""
        # A copy on the host first: device_put shares the memory of an array that already lies on one of the devices, and
        # on the CPU that of a NumPy array that happens to be aligned, may_alias=False or not.
        return jax.device_put(self.gather(tree), self._sharding())

    def put_batch(self, batch: Any, axis: int = 0) -> Any:
        """A batch shared among the devices along `axis` of every leaf, whose length they must divide."""

        def place(leaf):
            if self.pmap:
                leaf = leaf.reshape(*leaf.shape[:axis], len(self.devices), -1, *leaf.shape[axis + 1 :])
            return jax.device_put(leaf, sharding)

        sharding = self._sharding(*[None] * axis, _AXIS)
        return jax.tree.map(place, batch)

    def abstract(self, tree: Any, axis: int | None = None) -> Any:
        """Shapes and types of a tree as `put` places it or, with an axis, `put_batch`; its leaves need only these."""
        sharding = self._sharding() if axis is None else self._sharding(*[None] * axis, _AXIS)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    def train(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """step(state, batch, data, axis=…) → (state, metrics), compiled; the state given is used up."""
        if self.pmap:
            mapped = functools.partial(step, axis=_AXIS)
            return jax.pmap(mapped, _AXIS, in_axes=(None, 1, None), out_axes=None, devices=self.devices, donate_argnums=0)
        return jax.jit(step, donate_argnums=0, out_shardings=self._sharding(), compiler_options=self._options)

    def evaluate(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """forward(params, batch, data) → per-example arrays, compiled; results lie in the order of the batch."""
        if self.pmap:
            mapped = jax.pmap(forward, _AXIS, in_axes=(None, 0, None), devices=self.devices)
            return lambda *args: jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), mapped(*args))
        return jax.jit(forward, out_shardings=self._sharding(_AXIS), compiler_options=self._options)

    def gather(self, tree: Any) -> Any:
        """A tree on the host, as NumPy arrays that no device will write to."""
        return jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(tree))


def start(run: Run) -> Layout:
    """The layout that a configuration asks for. Logs a warning if the machine has an NVIDIA GPU and JAX runs on the CPU."""
    if jax.default_backend() == "cpu" and has_nvidia_driver() and os.environ.get("JAX_PLATFORMS") != "cpu":
        logging.getLogger("vit_jax").warning(
            "\n*** This machine has an NVIDIA driver, but JAX runs on the CPU and will be many times slower. ***\n"
            f'*** Install the CUDA build:  {sys.executable} -m pip install "jax[cuda12]=={jax.__version__}"\n'
            "*** (jax[cuda13] if the driver supports CUDA 13) ***\n"
        )
    return Layout(run.parallel, deterministic=run.deterministic)
