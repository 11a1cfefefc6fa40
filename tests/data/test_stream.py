"""Batches that worker processes read: the same as those read here, whatever happens to a worker."""

import functools
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import batches, stream
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import task
from vit_jax.errors import DataError, ImageError

ROOT = Path(__file__).parents[2]
EPOCHS = int(os.environ.get("VIT_JAX_EPOCHS", "0"))  # 0: one over a tenth of the images


def take(source, count, first=0, size=16, workers=2, limit=None):
    """`count` of the training batches of a source."""
    indices = functools.partial(batches.train_batch, len(source), size, 0)
    found = stream.read(source, indices, workers, first, limit)
    try:
        return list(itertools.islice(found, count))
    finally:
        found.close()


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x is None and y is None) or (x.dtype == y.dtype and np.array_equal(x, y))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images of two sizes in two classes, as a source."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(24):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 20 + number % 3, 3), np.uint8)).save(file)
    return open_split(task(f"folder:{folder}"), "train", image_size=8)


@pytest.fixture(scope="module")
def excerpt():
    return open_split(task("cifar100_excerpt"), "train[:50]")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["photos", "excerpt"])
def test_workers_read_what_this_process_reads(request, name):
    source = request.getfixturevalue(name)
    whole = take(source, 8, workers=0)
    assert (whole[0].sizes is not None) == (name == "photos")
    for number, found in enumerate(whole):
        index = batches.train_batch(len(source), 16, 0, number)
        assert_same([found], [source.read(index)])
    assert_same(take(source, 8), whole)
    assert_same(take(source, 9, first=5, limit=3), whole[5:])


@pytest.mark.slow
def test_killed_worker_is_replaced_and_no_batch_is_lost(excerpt, caplog):
    indices = functools.partial(batches.train_batch, len(excerpt), 16, 0)
    found = stream.read(excerpt, indices, 2)
    ours = [next(found) for _ in range(3)]
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    ours += [next(found) for _ in range(5)]
    found.close()
    assert_same(ours, take(excerpt, 8, workers=0))
    assert "was killed; others go on at the same batch" in caplog.text and not multiprocessing.active_children()


class Deadly:
    """A source whose reading ends the process."""

    def read(self, index, parallel=True):
        os._exit(3)


@pytest.mark.slow
def test_workers_that_always_die_are_an_error():
    with pytest.raises(DataError, match="end at every attempt .* exit code 3.*lower run.data_workers"):
        next(stream.read(Deadly(), lambda number: number, 1))


def test_program_from_standard_input_reads_the_images_itself(excerpt, monkeypatch, caplog):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "<stdin>", raising=False)
    assert_same(take(excerpt, 3), take(excerpt, 3, workers=0))
    assert "this process reads the images" in caplog.text


def test_error_of_a_worker_is_that_of_the_image(tmp_path):
    for number in range(8):
        file = tmp_path / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9 + number)).save(file)
    source = open_split(task(f"folder:{tmp_path}"), "train", image_size=8)
    for file in tmp_path.glob("*/*.png"):
        file.unlink()
    with pytest.raises(ImageError, match=r"\.png does not exist"):
        next(stream.read(source, functools.partial(batches.train_batch, len(source), 4, 0), 1))


PROGRAM = """
import functools, multiprocessing
from vit_jax.data import batches, stream
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import task

if __name__ == "__main__":
    source = open_split(task("cifar100_excerpt"), "train")
    for _ in stream.read(source, functools.partial(batches.train_batch, len(source), 16, 0), 2):
        print(*[process.pid for process in multiprocessing.active_children()], flush=True)
"""


def exists(pid):
    """Whether a process is there and is not one that has ended and that its parent has not looked at yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes through /proc")
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command, env = [sys.executable, str(tmp_path / "program.py")], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        workers = process.stdout.readline().split()
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in (process.pid, *workers)]
        held = set(re.findall(r"/dev/shm/(psm_\w+)", "".join(maps)))  # not that of other tests, which may hold it for long
        process.kill()
    assert len(workers) == 2 and held
    end = time.monotonic() + 60
    while any(map(exists, workers)) or held.intersection(os.listdir("/dev/shm")):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_number_of_workers_follows_the_cores():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert [stream.number_of_workers(wanted) for wanted in (-1, 0, 3)] == [min(16, cores), 0, 3]


@pytest.mark.slow
def test_streamed_epochs_of_cifar100_are_those_in_memory(prepared_cifar100):
    """As a resident split holds them; then again, from the middle on, as a resumed run reads them."""
    source = open_split(task("cifar100"), "train" if EPOCHS else "train[:10%]", prepared_cifar100)
    images, labels, _ = source.read(np.arange(len(source)))
    size, steps = 64, max(1, EPOCHS) * len(source) // 64
    indices = functools.partial(batches.train_batch, len(source), size, 7)
    for first in (0, steps // 2):
        for step, found in zip(range(first, steps), stream.read(source, indices, 2, first), strict=False):
            index = batches.train_batch(len(source), size, 7, step)
            assert np.array_equal(found.images, images[index]) and np.array_equal(found.labels, labels[index])
