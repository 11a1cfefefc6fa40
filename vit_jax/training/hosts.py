"""Several hosts that train one model together: processes of JAX's distributed runtime, each with its devices.

Every host runs the same program. Only host 0 reads and writes the working directory, so the others need not see it; what
it finds or decides there, the configuration included, the others are told. On one host every function returns at once and
costs nothing.
"""

import contextlib
import itertools
import os
import pickle
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from vit_jax import cli
from vit_jax.errors import ConfigError, TrainingError, UserError, reason
from vit_jax.training.launch import LOST

# Seconds after which a host that does not answer ends the others; JAX's own are 100, and it allows 300 for all to leave.
HEARTBEAT = 20
_PATIENCE = 24 * 3600 * 1000  # milliseconds; a host that dies ends the wait
# What JAX sets up hosts from without being told: the number of processes of a step of Slurm or of Open MPI.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_calls = itertools.count()  # all hosts make the same calls in the same order, so these numbers are the names of answers


def initialize(coordinator: str, number: int, index: int) -> None:
    """Connects this process with the others, before JAX uses a device.

    Args:
      coordinator: HOST:PORT of host 0; "auto": as JAX detects on Slurm, Open MPI and Kubernetes; "": likewise if this is a
        step of Slurm or Open MPI with more than one process, else this is the only host.
      number: of hosts; with "auto" or "", not used.
      index: of this host, likewise.

    Raises:
      ConfigError: if they do not find each other.
    """
    if not coordinator and not any(os.environ.get(name, "1") != "1" for name in _LAUNCHERS):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from this program
    given: dict[str, Any] = (
        {} if coordinator in ("", "auto") else dict(coordinator_address=coordinator, num_processes=number, process_id=index)
    )
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT)
    except Exception as error:  # JAX's are of many kinds
        raise ConfigError(
            f"--coordinator {coordinator or 'auto'}: the hosts did not find each other: {reason(error, 300)}"
        ) from None


def is_first() -> bool:
    """Whether this is host 0, or the only one."""
    return jax.process_index() == 0


def _store() -> Any:
    """The key-value store of the coordinator, to which JAX has no public way."""
    from jax._src import distributed

    return distributed.global_state.client


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns on host 0; no other host calls it. Its error is raised on every host."""
    if jax.process_count() == 1:
        return make()
    key = f"vit_jax/{next(_calls)}"
    if not is_first():
        found, error = pickle.loads(_store().blocking_key_value_get_bytes(key, _PATIENCE))
        if error:
            raise TrainingError(f"host 0: {error}")
        return found
    try:
        found = make()
    except (UserError, OSError) as error:
        _store().key_value_set_bytes(key, pickle.dumps((None, reason(error, 1000))))
        raise
    _store().key_value_set_bytes(key, pickle.dumps((found, "")))
    return found


@contextlib.contextmanager
def on_first(context: AbstractContextManager[Any]) -> Iterator[None]:
    """Enters a context on host 0 only; its errors at entering are raised on every host."""
    with contextlib.ExitStack() as stack:
        from_first(lambda: stack.enter_context(context) and None)
        yield


def arrays_of_first(tree: Any) -> Any:
    """A tree of arrays as host 0 has it, bit for bit; that of the others needs only its shapes and types."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    def as_bytes(leaf: Any) -> np.ndarray:
        whole = np.ascontiguousarray(leaf) if is_first() else np.zeros(leaf.shape, leaf.dtype)
        return whole.reshape(-1).view(np.uint8)

    found = multihost_utils.broadcast_one_to_all(jax.tree.map(as_bytes, tree))
    return jax.tree.map(lambda leaf, like: np.array(leaf).view(like.dtype).reshape(like.shape), found, tree)


@contextlib.contextmanager
def leaving_on_errors(advice: str) -> Iterator[None]:
    """Ends the process at once if the block fails on one of several hosts.

    A usual end of the process would first wait for the other hosts, which wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        os._exit(_report(error, advice))


def _report(error: BaseException, advice: str) -> int:
    """Prints an error of this host; returns the exit status."""

    def fail() -> int:
        raise error

    if not isinstance(error, UserError) and re.search("gloo|nccl|coordination service|distributed service", str(error), re.I):
        cli.fail(f"host {jax.process_index()} of {jax.process_count()} lost another host; start all of them again to continue")
        return LOST
    try:
        return cli.call(fail, advice)
    except BaseException:  # a bug
        traceback.print_exc()
        return 1


class Agreement:
    """One decision of all hosts to stop after the same step, although a signal may reach only one of them."""

    def __init__(self) -> None:
        self._key = f"vit_jax/{next(_calls)}"
        self._found: tuple[int, int] | None = None  # the step to stop after, and the number of the signal

    def signal(self, step: int, received: int) -> int:
        """The number of the signal after which every host stops at this step; 0: none does.

        Every host must call it after it has dispatched a step and read the metrics of the step before.

        Args:
          step: that was dispatched.
          received: the number of the signal that this host has received; 0: none.
        """
        if jax.process_count() == 1:
            return received
        if self._found is None:
            self._found = self._ask(step, received)
        return self._found[1] if self._found and self._found[0] <= step else 0

    def _ask(self, step: int, received: int) -> tuple[int, int] | None:
        if received:
            # A host that dispatches step + 2 has the metrics of step + 1, which this host takes part in after this call. So no
            # host passes step + 2 without seeing this. The first host that asks decides.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _store().key_value_set(f"{self._key}/stop", f"{step + 2} {received}")
        for _, words in _store().key_value_dir_get(f"{self._key}/"):  # at most one
            at, number = map(int, words.split())
            return at, number
        return None
