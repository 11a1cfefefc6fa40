"""Interrupted downloads: resumed, started again, or continued by another process."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vit_jax import fetch as fetching
from vit_jax import transfer
from vit_jax.checkpoints.catalogue import Published
from vit_jax.checkpoints.download import fetch, local
from vit_jax.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("isolated")
NAME = "imagenet21k/Nano_8"


def row(*addresses: str, **fields) -> Published:
    return Published(NAME, "Nano/8", 16, 3, addresses, **{"mib": 3.1, **fields})


def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("seed", range(3))
def test_download_cut_ten_times_resumes_each_time(server, content, seed):
    places = sorted(np.random.default_rng(seed).integers(1, len(content), size=10).tolist())
    server.mood = lambda n, asked: {"cut": places[n]} if n < 10 else None
    path = fetch(row(f"{server.url}/{NAME}.npz"))
    assert sha256(path) == hashlib.sha256(content).hexdigest()
    gets = server.gets()
    assert len(gets) == 11 and gets[0].first == 0
    for asked, place in zip(gets[1:], places, strict=True):  # never from the beginning again
        assert place - transfer._CHUNK <= asked.first <= place
        assert asked.first == 0 or asked.condition == '"1"'


def test_second_process_resumes_the_download_of_the_first(server, content, monkeypatch):
    monkeypatch.setattr(fetching, "_PAUSES", ())
    server.mood = lambda n, asked: {"cut": 2_000_000} if n == 0 else None
    wanted = row(f"{server.url}/{NAME}.npz")
    with pytest.raises(CheckpointError, match=r"could not be downloaded: .*tried: http://[^ ]*: .*(2,000,000|IncompleteRead)"):
        fetch(wanted)
    assert local(wanted) is None
    assert fetch(wanted).read_bytes() == content
    again = server.gets()[1]
    assert 2_000_000 - transfer._CHUNK <= again.first <= 2_000_000 and again.sent == len(content) - again.first


def test_file_that_changed_is_downloaded_from_the_beginning(server, content, monkeypatch):
    monkeypatch.setattr(fetching, "_PAUSES", ())
    server.mood = lambda n, asked: {"cut": 2_000_000, "body": bytes(len(content))} if n == 0 else None
    wanted = row(f"{server.url}/{NAME}.npz")
    with pytest.raises(CheckpointError):
        fetch(wanted)
    server.etag = '"2"'
    assert fetch(wanted).read_bytes() == content
    assert server.gets()[1].condition == '"1"' and server.gets()[1].sent == len(content)


@pytest.mark.parametrize("missing", ["ranges", "etag"])
def test_server_without_ranges_or_etag_starts_again(server, content, missing):
    server.mood = lambda n, asked: {missing: False} | ({"cut": 1_000_000 * (n + 1)} if n < 2 else {})
    assert fetch(row(f"{server.url}/{NAME}.npz")).read_bytes() == content
    assert [asked.first > 0 for asked in server.gets()] == [False] + 2 * [missing == "ranges"]


def test_part_from_another_address_is_not_resumed(server, content, monkeypatch):
    monkeypatch.setattr(fetching, "_PAUSES", ())
    server.mood = lambda n, asked: {"cut": 2_000_000, "body": bytes(len(content))} if "bad" in asked.path else None
    assert fetch(row(f"{server.url}/bad.npz", f"{server.url}/{NAME}.npz")).read_bytes() == content
    assert [asked.first for asked in server.gets()] == [0, 0]


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"address": "http://127.0.0.1/another"}', None])
def test_part_of_unknown_origin_is_not_resumed(server, content, tmp_path, state):
    part = tmp_path / "cache" / "imagenet21k" / ".Nano_8.npz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    if state is not None:
        part.with_name(f"{part.name}.json").write_text(state)
    assert fetch(row(f"{server.url}/{NAME}.npz")).read_bytes() == content and server.gets()[0].first == 0


def test_complete_part_is_used_without_a_request(server, content, tmp_path):
    url = f"{server.url}/{NAME}.npz"
    part = tmp_path / "cache" / "imagenet21k" / ".Nano_8.npz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    part.with_name(f"{part.name}.json").write_text(json.dumps({"address": url, "validator": '"1"', "total": len(content)}))
    assert fetch(row(url)).read_bytes() == content and not server.asked


@pytest.mark.parametrize("status", [503, 429])
def test_busy_server_is_asked_again(server, content, status):
    server.mood = lambda n, asked: {"status": status} if n < 2 else None
    assert fetch(row(f"{server.url}/{NAME}.npz")).read_bytes() == content


FETCH = """
import logging, sys
from vit_jax.checkpoints.catalogue import Published
from vit_jax.checkpoints.download import fetch
print("ready", flush=True)
sys.stdin.readline()
print(fetch(Published({name!r}, "Nano/8", 16, 3, ({address!r},), mib=3.1)))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_download_once(server, content, tmp_path, killed):
    """The second waits for the first; if the first is killed, the second resumes its download."""
    server.mood = lambda n, asked: {"pause": 0.02}
    script = FETCH.format(name=NAME, address=f"{server.url}/{NAME}.npz")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, env=environment,
            )  # fmt: skip
            processes.append(stack.enter_context(process))
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        if killed:
            processes[0].stdin.write("go\n")
            processes[0].stdin.flush()
            part = tmp_path / "cache" / "imagenet21k" / ".Nano_8.npz.part"
            while not part.is_file() or part.stat().st_size < 500_000:
                time.sleep(0.005)
            processes[1].stdin.write("go\n")
            processes[1].stdin.flush()
            time.sleep(0.1)
            processes[0].kill()
            results = [processes[1].communicate(timeout=60)]
            processes[0].communicate()
        else:
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            results = [process.communicate(timeout=60) for process in processes]
    for printed, _ in results:
        assert Path(printed.strip()).read_bytes() == content
    assert "waiting for another process that downloads" in "".join(complaint for _, complaint in results)
    assert [asked.first > 0 for asked in server.gets()] == ([False, True] if killed else [False])
