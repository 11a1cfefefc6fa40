"""Examples that are read and decoded by Grain in worker processes, in the order of their batches."""

import contextlib
import gc
import itertools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.data.sources import Examples, Source
from vit_jax.errors import DataError

_log = logging.getLogger("vit_jax")
_MOST = 16  # workers that are started if their number is not given
_RESTARTS = 3  # after workers that died before they gave a batch


class _Batches:
    """What Grain reads: element k is batch k, [images, labels] and, if images are resized, their sizes."""

    def __init__(self, source: Source, indices: Callable[[int], np.ndarray], first: int, count: int):
        self._source, self._indices, self._first, self._count = source, indices, first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> list[np.ndarray]:
        found = self._source.read(self._indices(self._first + int(number)), parallel=False)
        return [part for part in found if part is not None]


def _prepare_worker(index: int, count: int) -> None:
    """Leaves signals to the process that has started the worker, and ends the worker if that process is killed."""
    import multiprocessing

    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal and a scheduler send them to all processes of a run
        signal.signal(number, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keeps signals from the processes that are started meanwhile, which inherit this, until they ignore them."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _can_start_workers() -> bool:
    """Whether Python can start processes that import this program, as it does on every system if the program is a file."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is None or os.path.isfile(file)


def _read_here(source: Source, indices: Callable[[int], np.ndarray], numbers: Iterable[int]) -> Iterator[Examples]:
    """Reads batches in this process, one of them ahead."""
    with ThreadPoolExecutor(1, "feed") as pool:
        ahead = None
        for number in numbers:
            ready, ahead = ahead, pool.submit(source.read, indices(number))
            if ready:
                yield ready.result()
        if ahead:
            yield ahead.result()


def _start(batches: _Batches, workers: int) -> Any:
    """Grain's iterator over batches, whose workers start with its first one."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain has flags, which only command lines of absl parse
        flags.FLAGS.mark_as_parsed()
    reading = grain.MapDataset.source(batches).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(num_workers=min(workers, len(batches)), per_worker_buffer_size=1)
    return iter(reading.mp_prefetch(options, _prepare_worker))


def _next(running: Iterator[list[np.ndarray]]) -> Examples:
    """The next batch, in copies, because the shared memory that it arrives in is freed with the last reference to it."""
    images, labels, *sizes = map(np.array, next(running))
    return Examples(images, labels, sizes[0] if sizes else None)


def number_of_workers(wanted: int) -> int:
    """The number of worker processes that `run.data_workers` means: -1 is one for each CPU core, 16 at most."""
    if wanted >= 0:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST)


def read(
    source: Source, indices: Callable[[int], np.ndarray], workers: int, first: int = 0, count: int | None = None
) -> Generator[Examples]:
    """Reads batches ahead of their use, each by one of several worker processes.

    Workers that die, as the system ends them if memory is short, are replaced, and no batch is lost or repeated.

    Args:
      source: of the examples; it is copied to every worker.
      indices: number of a batch → its examples, as `Source.read` takes them; it is copied to every worker, too.
      workers: number of processes; 0: a thread of this process reads.
      first: the number of the first batch.
      count: number of batches; None: without end.

    Yields:
      Each batch as `Source.read` returns it. The workers end with the iterator.

    Raises:
      DataError, ImageError: as `Source.read`; DataError if workers end at every attempt.
    """
    if workers and not _can_start_workers():
        _log.warning("this process reads the images, because a program from standard input cannot start others")
        workers = 0
    if not workers:
        yield from _read_here(source, indices, itertools.count(first) if count is None else range(first, first + count))
        return
    end, deaths = first + count if count is not None else sys.maxsize, 0
    while first < end:
        running = _start(_Batches(source, indices, first, end - first), workers)
        try:
            with _signals_blocked():
                found = _next(running)
            while True:
                yield found
                first, deaths = first + 1, 0
                if first == end:
                    return
                found = _next(running)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            deaths += 1
            if deaths > _RESTARTS:
                raise DataError(
                    f"the processes that read images end at every attempt ({error}): a script must begin its work below "
                    '`if __name__ == "__main__":`; if memory or /dev/shm (docker run --shm-size) is short, lower '
                    "run.data_workers or training.batch_size; with run.data_workers=0 this process reads the images"
                ) from None
            _log.warning("a process that reads images was killed; others go on at the same batch")
        finally:
            running.close()
            del running
            gc.collect()  # what was read ahead lies in shared memory, in reference cycles
