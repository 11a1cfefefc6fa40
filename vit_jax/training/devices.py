"""The devices of a run, and how its step uses them. No other file decides this.

Outside this file no state and no metric has a device axis, and no program knows how an array is shared:

| array | axis of the mesh |
|---|---|
| a batch | its images over `data` and `fsdp` |
| parameters and the optimizer's state | the largest dimension that `fsdp` divides; arrays without one lie on every device |
| the images and labels of a resident split, metrics | on every device |

A program gathers parameters as it uses them, and their gradients come back shared as the parameters are. The devices may be
those of several hosts (see hosts.py), each of which puts its own rows of a batch on its own devices. Under pmap, whose
devices are all of the axis `data`, states are also arrays of the mesh: pmap takes and gives them back unmapped (in_axes and
out_axes None) without a copy.
"""

import functools
import logging
import math
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_jax.config import DATA, FSDP, Run, mesh_sizes
from vit_jax.errors import ConfigError
from vit_jax.runtime import compiler_options, has_nvidia_driver

# Bytes of gradients that a GPU sums over the axis fsdp at once. XLA would sum all of them in one operation after the backward
# pass; in pieces, those of the last blocks are summed while the pass goes on with the others.
_PIECE = 2**25


class Layout:
    """The devices of a run, on all its hosts, and one of two ways to use them: "mesh" (jit) or "pmap".

    Attributes:
      pmap: whether the way is "pmap".
      devices: all of them, in the order of a batch.
      mesh: the same, with the axes `data` and `fsdp`; under pmap, only `data`.
    """

    def __init__(self, parallel: str, devices: list[jax.Device] | None = None, mesh: str = "", deterministic: bool = False):
        """The layout that these fields of `run` ask for. Raises ConfigError if these devices cannot be used so."""
        self.pmap = parallel == "pmap"
        self.devices = devices or jax.devices()
        self._hosts = len({device.process_index for device in self.devices})
        if self.pmap and self._hosts > 1:
            raise ConfigError(f"run.parallel = 'pmap' is for one host, and there are {self._hosts}: use run.parallel = 'mesh'")
        sizes = mesh_sizes(mesh) or {DATA: len(self.devices)}
        if (product := math.prod(sizes.values())) != len(self.devices):
            raise ConfigError(f"run.mesh = {mesh!r} is of {product} devices, and there are {len(self.devices)}")
        self._shares = sizes.get(FSDP, 1)  # of a parameter
        self._options = self._compiler_options(deterministic)
        self._shardings: dict[tuple[Any, ...], NamedSharding] = {}
        # The axes of a batch. pmap has one mesh of its axis: with another mesh here, it would compile the step twice, for the
        # first state and for those that it gives back.
        self._batch = (DATA,) if self.pmap else (DATA, FSDP)
        shape = tuple(sizes.get(axis, 1) for axis in self._batch)
        self.mesh = jax.make_mesh(shape, self._batch, axis_types=(AxisType.Auto,) * len(shape), devices=self.devices)
        self._replicate = jax.jit(lambda leaf: leaf, out_shardings=self._sharding())
        self._take_apart = jax.jit(_take_apart, out_shardings=self._sharding(None, self._batch))

    def _compiler_options(self, deterministic: bool) -> dict[str, Any] | None:
        platform = self.devices[0].platform
        options = compiler_options(platform, deterministic)
        if platform == "gpu" and self._shares > 1:  # XLA counts the bytes of a device's share
            return {**(options or {}), "xla_gpu_reduce_scatter_combine_threshold_bytes": _PIECE // self._shares}
        return options

    def _sharding(self, *spec: Any) -> NamedSharding:
        if spec not in self._shardings:  # kept, because making one takes as long as copying the indices of a batch
            self._shardings[spec] = NamedSharding(self.mesh, PartitionSpec(*spec))
        return self._shardings[spec]

    def _state_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """How an array of the parameters or the optimizer's state is shared; a parameter and its momentum have one shape."""
        divided = [axis for axis, length in enumerate(shape) if self._shares > 1 and length and length % self._shares == 0]
        if not divided:
            return self._sharding()
        largest = max(divided, key=lambda axis: shape[axis])
        return self._sharding(*[None] * largest, FSDP)

    def describe(self) -> str:
        """The devices and how they are used: "1 CPU", "8 CPUs, pmap", "8 CPUs as data:4,fsdp:2 on 2 hosts"."""
        count, kind = len(self.devices), self.devices[0].device_kind
        name = "CPU" if kind == "cpu" else kind
        mesh = f" as {','.join(f'{axis}:{size}' for axis, size in self.mesh.shape.items())}" * (self._shares > 1)
        hosts = f" on {self._hosts} hosts" * (self._hosts > 1)
        return f"{count} {name}{'s' * (count > 1)}{mesh}{hosts}{', pmap' if self.pmap else ''}"

    def describe_sharding(self, state: Any) -> str:
        """How the arrays of a state and a batch are shared, in one sentence; the leaves of the state need only shapes."""
        if len(self.devices) == 1:
            return "everything on the one device"
        if self._shares == 1:
            return f"batch over {DATA}:{len(self.devices)}; parameters and optimizer state whole on every device"
        leaves = jax.tree.leaves(self.abstract(state))
        whole = sum(leaf.sharding.is_fully_replicated for leaf in leaves)
        share, total = nbytes(leaves) / 2**20, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20
        axes = " and ".join(f"{axis}:{size}" for axis, size in self.mesh.shape.items())
        return (
            f"batch over {axes}; parameters and optimizer state over {FSDP}: {share:,.1f} of {total:,.1f} MiB a device, "
            f"{whole} of {len(leaves)} arrays whole"
        )

    def check(self, batch_size: int, microbatches: int, mixing: str = "") -> None:
        """ConfigError unless every microbatch of a training batch divides among the devices.

        `mixing` names the fields that mix pairs of images, which must be on one device; "" if none does.
        """
        unit = microbatches * len(self.devices)
        if batch_size % unit:
            below = batch_size // unit * unit
            raise ConfigError(
                f"training.batch_size = {batch_size} in training.grad_accum_steps = {microbatches} does not divide among "
                f"{len(self.devices)} devices; the nearest that does is {f'{below} or ' if below else ''}{below + unit}"
            )
        if mixing and (each := batch_size // unit) % 2:
            raise ConfigError(
                f"{mixing} mixes pairs of images, which must be on one device: training.batch_size = {batch_size} in "
                f"training.grad_accum_steps = {microbatches} gives each of {len(self.devices)} devices {each}; "
                f"the next batch size with an even number is {batch_size + unit}"
            )

    def round_up(self, size: int) -> int:
        """The smallest batch size of at least `size` that divides among the devices."""
        return -(-size // len(self.devices)) * len(self.devices)

    def rows(self, size: int) -> np.ndarray:
        """The rows of a batch of `size` that lie on the devices of this host, in their order."""
        if self._hosts == 1:
            return np.arange(size)
        places = self._sharding(self._batch).addressable_devices_indices_map((size,)).values()
        return np.unique(np.concatenate([np.arange(size)[place] for place in places if place]))

    def _place(self, tree: Any, shardings: Any) -> Any:
        """Arrays that this host holds whole, on the devices."""
        if self._hosts == 1:
            return jax.device_put(tree, shardings)

        def place(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
            with jax.transfer_guard("allow"):  # JAX takes it for implicit
                return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(place, tree, shardings)

    def put(self, state: Any) -> Any:
        """A state or parameters on the devices; they share no memory with the argument, so a step may donate them."""
        # A copy on the host first: device_put shares the memory of an array that already lies on one of the devices, and
        # on the CPU that of a NumPy array that happens to be aligned, may_alias=False or not.
        state = self.gather(state)
        return self._place(state, jax.tree.map(lambda leaf: self._state_sharding(leaf.shape), state))

    def put_data(self, tree: Any) -> Any:
        """What a step reads besides its batch, whole on every device."""
        tree = self.gather(tree)
        return self._place(tree, jax.tree.map(lambda _: self._sharding(), tree))

    def put_batch(self, batch: Any, axis: int = 0) -> Any:
        """A batch shared among the devices along `axis` of every leaf, whose length they must divide.

        On several hosts, the argument has this host's `rows` only.
        """

        sharding = self._sharding(*[None] * axis, self._batch)
        if self._hosts > 1:
            with jax.transfer_guard("allow"):  # JAX takes it for implicit
                return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, sharding), batch)
        if self.pmap:
            batch = jax.tree.map(
                lambda leaf: leaf.reshape(*leaf.shape[:axis], len(self.devices), -1, *leaf.shape[axis + 1 :]), batch
            )
        return jax.device_put(batch, sharding)

    def put_batches(self, batches: list[Any]) -> list[Any]:
        """Training batches, leaves [microbatches, B], as `put_batch` shares them along B.

        They go to the devices as one array that is taken apart there: a copy of one small array takes as long as of many.
        """
        if self._hosts > 1 or self.pmap or len(batches) == 1:
            return [self.put_batch(batch, axis=1) for batch in batches]
        return self._take_apart(self.put_batch(jax.tree.map(lambda *leaves: np.stack(leaves), *batches), axis=2))

    def all_rows(self, leaf: np.ndarray) -> np.ndarray:
        """The rows of a batch on all hosts, of which the argument has this host's; on the host."""
        return leaf if self._hosts == 1 else self.gather(self.put_batch(leaf))

    def abstract(self, state: Any) -> Any:
        """Shapes and types of a state or parameters as `put` places them; the leaves of the argument need only these."""
        return jax.tree.map(lambda leaf: _abstract(leaf, self._state_sharding(leaf.shape)), state)

    def abstract_data(self, tree: Any) -> Any:
        """The same of `put_data`."""
        return jax.tree.map(lambda leaf: _abstract(leaf, self._sharding()), tree)

    def abstract_batch(self, batch: Any, axis: int = 0) -> Any:
        """The same of `put_batch`."""
        return jax.tree.map(lambda leaf: _abstract(leaf, self._sharding(*[None] * axis, self._batch)), batch)

    def gathered(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """forward(params, …) of whole parameters as a function of parameters that are shared, as are its gradients."""
        return lambda params, *rest: forward(jax.tree.map(self._whole, params), *rest)

    def _whole(self, leaf: jax.Array) -> jax.Array:
        """A parameter gathered from the devices; its gradient is summed over them into the parameter's sharding."""
        sharding = self._state_sharding(leaf.shape)
        if sharding.is_fully_replicated:
            return leaf

        @jax.custom_vjp
        def whole(leaf: jax.Array) -> jax.Array:
            return with_sharding_constraint(leaf, self._sharding())

        whole.defvjp(lambda leaf: (whole(leaf), None), lambda _, gradient: (with_sharding_constraint(gradient, sharding),))
        return whole(leaf)

    def convert(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A function from parameters to parameters, compiled; both are shared as `put` shares them."""

        def placed(params: Any) -> Any:
            converted = function(params)
            return jax.tree.map(lambda leaf: with_sharding_constraint(leaf, self._state_sharding(leaf.shape)), converted)

        return jax.jit(placed)

    def train(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """step(state, batch, data, axis=…) → (state, metrics), compiled; the state given is used up."""
        if self.pmap:
            mapped = functools.partial(step, axis=DATA)
            return jax.pmap(mapped, DATA, in_axes=(None, 1, None), out_axes=None, devices=self.devices, donate_argnums=0)

        def placed(state: Any, batch: Any, data: Any) -> tuple[Any, Any]:
            state, metrics = step(state, batch, data)
            state = jax.tree.map(lambda leaf: with_sharding_constraint(leaf, self._state_sharding(leaf.shape)), state)
            return state, with_sharding_constraint(metrics, self._sharding())

        return jax.jit(placed, donate_argnums=0, compiler_options=self._options)

    def evaluate(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """forward(params, batch, data) → per-example arrays, compiled; results lie in the order of the batch."""
        if self.pmap:
            mapped = jax.pmap(forward, DATA, in_axes=(None, 0, None), devices=self.devices)
            return lambda *args: jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), mapped(*args))
        out = self._sharding() if self._hosts > 1 else self._sharding(self._batch)  # every host reads all results
        return jax.jit(self.gathered(forward), out_shardings=out, compiler_options=self._options)

    def gather(self, tree: Any) -> Any:
        """A tree on the host, as NumPy arrays that no device will write to. All hosts must call it together."""

        if self._hosts == 1:
            return jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(tree))

        def whole(leaf: Any) -> np.ndarray:
            if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
                leaf = self._replicate(leaf)  # one at a time, so that no device holds more than one whole array
            return np.array(jax.device_get(leaf), copy=True)

        return jax.tree.map(whole, tree)


def _take_apart(tree: Any) -> list[Any]:
    return [jax.tree.map(operator.itemgetter(number), tree) for number in range(jax.tree.leaves(tree)[0].shape[0])]


def _abstract(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def nbytes(tree: Any) -> int:
    """Bytes that a tree of arrays or of `Layout.abstract` takes on each of its devices."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def start(run: Run) -> Layout:
    """The layout that a configuration asks for. Logs a warning if the machine has an NVIDIA GPU and JAX runs on the CPU."""
    if jax.default_backend() == "cpu" and has_nvidia_driver() and os.environ.get("JAX_PLATFORMS") != "cpu":
        logging.getLogger("vit_jax").warning(
            "\n*** This machine has an NVIDIA driver, but JAX runs on the CPU and will be many times slower. ***\n"
            f'*** Install the CUDA build:  {sys.executable} -m pip install "jax[cuda12]=={jax.__version__}"\n'
            "*** (jax[cuda13] if the driver supports CUDA 13) ***\n"
        )
    return Layout(run.parallel, mesh=run.mesh, deterministic=run.deterministic)
