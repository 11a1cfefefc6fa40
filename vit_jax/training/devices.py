"""Which devices a run has and how its step is laid over them: decided here and nowhere else.

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
from vit_jax.runtime import compiler_options, has_nvidia_driver, prepare

_AXIS = "batch"


class Layout:
    """The local devices and one of two ways to use them: "mesh" (jit) or "pmap".

    Batches are shared along one axis of every leaf; states, parameters and a run's data lie on every device.
    """

    def __init__(self, parallel: str, devices: list[jax.Device] | None = None):
        self.pmap = parallel == "pmap"
        self.devices = devices or jax.local_devices()
        self.mesh = jax.make_mesh((len(self.devices),), (_AXIS,), axis_types=(AxisType.Auto,), devices=self.devices)

    def _sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def describe(self) -> str:
        """What a run's record says of the devices and of how they are used."""
        return f"{len(self.devices)} × {self.devices[0].device_kind}, {'pmap' if self.pmap else 'jit over a mesh'}"

    def check(self, batch_size: int, slices: int) -> None:
        """ConfigError unless every slice of a training batch divides among the devices."""
        if batch_size % (slices * len(self.devices)):
            raise ConfigError(
                f"training.batch_size = {batch_size} in {slices} slice(s) (training.grad_accum_steps) does not divide among "
                f"{len(self.devices)} devices; take a multiple of {slices * len(self.devices)}"
            )

    def round_up(self, size: int) -> int:
        """The smallest batch size from `size` on that the devices share evenly."""
        return -(-size // len(self.devices)) * len(self.devices)

    def put(self, tree: Any) -> Any:
        """A tree on every device, in memory of its own: a step may use up the result and leave what was given as it is."""
        # A copy on the host first: device_put shares the memory of an array that already lies on one of the devices, and
        # on the CPU that of a NumPy array that happens to be aligned, may_alias=False or not.
        return jax.device_put(self.gather(tree), self._sharding())

    def put_batch(self, batch: Any, axis: int = 0) -> Any:
        """A batch shared among the devices along `axis` of every leaf, whose length they must divide."""

        def place(leaf):
            spec = [None] * axis + [_AXIS]
            if self.pmap:
                leaf = leaf.reshape(*leaf.shape[:axis], len(self.devices), -1, *leaf.shape[axis + 1 :])
            return jax.device_put(leaf, self._sharding(*spec))

        return jax.tree.map(place, batch)

    def train(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """step(state, batch, data, axis=…) → (state, metrics), compiled; the state given is used up."""
        if self.pmap:
            mapped = functools.partial(step, axis=_AXIS)
            return jax.pmap(mapped, _AXIS, in_axes=(None, 1, None), out_axes=None, devices=self.devices, donate_argnums=0)
        return jax.jit(step, donate_argnums=0, out_shardings=self._sharding(), compiler_options=compiler_options())

    def evaluate(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """forward(params, batch, data) → per-example arrays, compiled; results lie in the order of the batch."""
        if self.pmap:
            mapped = jax.pmap(forward, _AXIS, in_axes=(None, 0, None), devices=self.devices)
            return lambda *args: jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), mapped(*args))
        return jax.jit(forward, out_shardings=self._sharding(_AXIS), compiler_options=compiler_options())

    def gather(self, tree: Any) -> Any:
        """A tree on the host, as NumPy arrays that no device will write to."""
        return jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(tree))


def start(run: Run) -> Layout:
    """The layout that a configuration asks for, in a process made ready for it.

    Warns loudly where an NVIDIA GPU stands by and JAX runs on the CPU.
    """
    prepare()
    if jax.default_backend() == "cpu" and has_nvidia_driver() and os.environ.get("JAX_PLATFORMS") != "cpu":
        logging.getLogger("vit_jax").warning(
            "\n*** This machine has an NVIDIA driver, but JAX runs on the CPU and will be many times slower. ***\n"
            f'*** Mend it with:  {sys.executable} -m pip install "jax[cuda12]=={jax.__version__}"\n'
            "*** (jax[cuda13] where the driver speaks CUDA 13) ***\n"
        )
    return Layout(run.parallel)
