"""From an archive to TFDS data: what is written, and that a part is never taken for the whole."""

import dataclasses
import hashlib
import http.server
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from vit_jax import fetch, transfer
from vit_jax.data import prepare, tasks
from vit_jax.data.places import find_prepared
from vit_jax.data.splits import open_split
from vit_jax.errors import DataError

from .conftest import TEST, TRAIN, files_below

ROOT = pathlib.Path(__file__).parents[2]


def by_digest(images, labels):
    """Digest of an image -> its label: the content of a split in any order."""
    return {hashlib.sha256(image).digest(): int(label) for image, label in zip(images, labels, strict=True)}


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
def test_prepared_data_hold_the_images_and_labels_of_the_archive(tiny, records, pack, tmp_path, compression):
    folder = prepare.prepare(tiny, pack(compression), tmp_path / "data")
    assert folder == tmp_path / "data" / "cifar100" / "3.0.2"
    for split, made in records.items():
        source = open_split(tiny, split, tmp_path / "data")
        images = made[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        assert by_digest(*source.take(np.arange(len(source)))) == by_digest(np.ascontiguousarray(images), made[:, 1])
        assert source.class_names == [f"label_{i}" for i in range(100)]
    assert not any("incomplete" in name for name in files_below(tmp_path / "data"))


def test_prepared_data_are_read_by_tfds(tiny, records, pack, tmp_path):
    import tensorflow_datasets as tfds

    prepare.prepare(tiny, pack(), tmp_path / "data")
    stock = tfds.data_source("cifar100", data_dir=tmp_path / "data")
    assert {split: len(source) for split, source in stock.items()} == {"train": 120, "test": 40}
    for example in stock["test"]:
        record = records["test"][int(example["id"].decode().removeprefix("test_"))]
        assert (example["coarse_label"], example["label"]) == (record[0], record[1])
        np.testing.assert_array_equal(example["image"], record[2:].reshape(3, 32, 32).transpose(1, 2, 0))
    assert "tensorflow" not in sys.modules


def test_cifar10_is_prepared_from_five_files_and_one(tmp_path, pack, files):
    rng = np.random.default_rng(1)
    files.clear()
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        made = rng.integers(0, 256, (10, 3073), np.uint8)
        made[:, 0] = np.arange(10)
        files[f"./cifar-10-batches-bin/{name}"] = made.tobytes()  # as "tar c ./…" packs it
    files["./cifar-10-batches-bin/batches.meta.txt"] = "\n".join([*"abcdefghij", ""]).encode() + b"\n"
    archive = dataclasses.replace(tasks.TASKS["cifar10"].archive, examples={"train": 50, "test": 10})
    task = dataclasses.replace(tasks.TASKS["cifar10"], archive=archive)
    prepare.prepare(task, pack(), tmp_path / "data")
    source = open_split(task, "train+test", tmp_path / "data")
    assert (len(source), source.class_names) == (60, list("abcdefghij"))
    assert np.bincount(source.take(np.arange(60))[1]).tolist() == [6] * 10


def test_prepared_data_are_not_prepared_again(tiny, pack, tmp_path):
    folder = prepare.prepare(tiny, pack(), tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare.prepare(tiny, "no such file", tmp_path / "data") == folder
    assert prepare.prepare(tiny, data_dir=tmp_path / "data") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


# ---- interruptions

KILLED = """
import os, signal, sys
from vit_jax import fetch, transfer
from vit_jax.data import prepare, tasks
import dataclasses
archive = dataclasses.replace(tasks.TASKS["cifar100"].archive, examples={"train": 120, "test": 40})
png, done = prepare._png, []
def fatal(pixels):
    done.append(1)
    if len(done) == 130:
        os.kill(os.getpid(), signal.SIGKILL)
    return png(pixels)
prepare._png = fatal
prepare.prepare(dataclasses.replace(tasks.TASKS["cifar100"], archive=archive), *sys.argv[1:])
"""


def test_killed_preparation_is_not_found_and_its_files_are_removed_by_the_next(tiny, pack, tmp_path):
    data_dir = tmp_path / "data"
    done = subprocess.run([sys.executable, "-c", KILLED, pack(), data_dir], cwd=ROOT, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert files_below(data_dir)  # it had begun to write
    assert find_prepared(tiny, data_dir) is None
    folder = prepare.prepare(tiny, pack(), data_dir)
    assert {data_dir / name for name in files_below(data_dir)} == set(folder.iterdir())


def test_failure_while_writing_leaves_no_file(tiny, pack, tmp_path, monkeypatch):
    def fail(pixels):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_png", fail)
    with pytest.raises(DataError, match="No space left on device.*choose another --data_dir"):
        prepare.prepare(tiny, pack(), tmp_path / "data")
    assert files_below(tmp_path / "data") == []


def test_folder_that_cannot_be_written_is_an_error(tiny, pack, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written into .*file.*choose another --data_dir"):
        prepare.prepare(tiny, pack(), tmp_path / "file" / "data")


def test_prepare_in_several_threads_gives_one_folder(tiny, pack, tmp_path):
    path, found = pack(), []
    threads = [threading.Thread(target=lambda: found.append(prepare.prepare(tiny, path, tmp_path / "d"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "d" / "cifar100" / "3.0.2"] * 3


# ---- downloads


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a web server and returns its address; an answer is (status, content, number of bytes sent)."""
    monkeypatch.setattr(fetch, "_PAUSES", (0.0,))
    monkeypatch.setattr(transfer, "_RATE", 0)
    running = []

    def start(*answers):
        class Handler(http.server.BaseHTTPRequestHandler):
            left = list(answers)

            def do_GET(self):
                status, content, sent = Handler.left.pop(0)
                first = int(self.headers.get("Range", "bytes=0-")[6:-1])
                self.send_response(206 if first else status)
                self.send_header("ETag", '"1"')
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - first))
                self.end_headers()
                self.wfile.write(content[first:sent])

            def log_message(self, *args):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda request, client_address: None  # a client that left
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/cifar-100-binary.tar.gz"

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def at(task, url):
    return dataclasses.replace(task, archive=dataclasses.replace(task.archive, url=url))


def test_download_that_breaks_off_is_resumed(tiny, pack, tmp_path, serve):
    content = pack().read_bytes()
    task = at(tiny, serve((200, content, 1000), (200, content, len(content))))
    prepare.prepare(task, data_dir=tmp_path / "data")
    assert (tmp_path / "data" / "downloads" / "cifar-100-binary.tar.gz").read_bytes() == content
    assert len(open_split(task, "test", tmp_path / "data")) == 40


def test_later_call_resumes_the_download_of_an_earlier_one(tiny, pack, tmp_path, serve, monkeypatch):
    monkeypatch.setattr(fetch, "_PAUSES", ())
    content = pack().read_bytes()
    half = len(content) // 2
    task = at(tiny, serve((200, content, half), (200, bytes(half) + content[half:], len(content))))
    with pytest.raises(DataError, match="cannot be downloaded .*IncompleteRead.*--archive FILE"):
        prepare.prepare(task, data_dir=tmp_path / "data")
    assert files_below(tmp_path / "data") == [f"downloads/.cifar-100-binary.tar.gz.part{end}" for end in ("", ".json")]
    prepare.prepare(task, data_dir=tmp_path / "data")  # the second answer has only its latter half right
    assert (tmp_path / "data" / "downloads" / "cifar-100-binary.tar.gz").read_bytes() == content


def test_download_of_another_file_is_not_kept(tiny, pack, tmp_path, serve):
    page, content = b"<html>Please log in</html>" * 1000, pack().read_bytes()
    task = at(tiny, serve((200, page, len(page)), (200, content, len(content))))
    with pytest.raises(DataError, match="is not a tar archive"):
        prepare.prepare(task, data_dir=tmp_path / "data")
    assert files_below(tmp_path / "data") == []
    prepare.prepare(task, data_dir=tmp_path / "data")


def test_download_larger_than_the_data_is_refused(tiny, tmp_path, serve):
    content = bytes(160 * 3074 + 2**24 + 1)
    with pytest.raises(DataError, match="cannot be downloaded .17,269,057 bytes, expected at most 17,269,056.: .*--archive"):
        prepare.prepare(at(tiny, serve((200, content, len(content)))), data_dir=tmp_path / "data")
    assert files_below(tmp_path / "data") == []


def test_missing_download_is_not_tried_again(tiny, tmp_path, serve):
    task = at(tiny, serve((404, b"", 0)))
    with pytest.raises(DataError, match="cannot be downloaded .404 Not Found.*--archive FILE"):
        prepare.prepare(task, data_dir=tmp_path / "data")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.tar.gz", "http://no-such-host.invalid/a.tar.gz"])
def test_prepare_offline_fails_without_a_retry_and_names_the_command(tiny, tmp_path, monkeypatch, url):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: pytest.fail("a second try"))
    with pytest.raises(DataError, match="^no network: cifar100 is not prepared in .*cannot be downloaded") as caught:
        prepare.prepare(at(tiny, url), data_dir=tmp_path / "my data")
    command = f"`python -m vit_jax.data prepare cifar100 --archive FILE --data_dir '{tmp_path}/my data'`"
    assert command in str(caught.value)
    assert files_below(tmp_path / "my data") == []


# ---- the excerpt


def test_excerpt_does_not_depend_on_packing_or_order(tiny, records, files, pack, tmp_path):
    excerpt = tasks.Excerpt("1.0.0", ("label_7", "label_3"), {"train": 1, "test": 1})
    task = dataclasses.replace(tiny, name="part", builder="part", num_classes=2, excerpt=excerpt)
    one = prepare.prepare(task, pack("gz"), tmp_path / "one")
    for split, name in (("train", TRAIN), ("test", TEST)):
        files[name] = records[split][::-1].tobytes()
    other = prepare.prepare(task, pack("bz2"), tmp_path / "other")
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name

    source = open_split(task, "train", tmp_path / "one")
    assert source.class_names == ["label_7", "label_3"]
    images, labels = source.take(np.arange(2))
    for new, old in enumerate((7, 3)):
        smallest = min(records["train"][records["train"][:, 1] == old], key=lambda record: hashlib.sha256(record).digest())
        np.testing.assert_array_equal(images[labels == new][0], smallest[2:].reshape(3, 32, 32).transpose(1, 2, 0))


def test_excerpt_of_missing_classes_or_records_is_refused(tiny, pack, tmp_path):
    for excerpt, message in (
        (tasks.Excerpt("1.0.0", ("lion",), {"train": 1, "test": 1}), "has no class 'lion'"),
        (
            tasks.Excerpt("1.0.0", ("label_7",), {"train": 1, "test": 9}),
            "has 1 test records of label_7, expected at least 9",
        ),
    ):
        with pytest.raises(DataError, match=message):
            prepare.prepare(dataclasses.replace(tiny, builder="part", excerpt=excerpt), pack(), tmp_path / "data")
        assert files_below(tmp_path / "data") == []


@pytest.mark.slow
def test_embedded_excerpt_is_made_from_the_archive_byte_for_byte(shared, tmp_path):
    task = tasks.task("cifar100_excerpt")
    made = prepare.prepare(task, shared / "data" / "cifar-100-binary.tar.xz", tmp_path)
    shipped = prepare.prepare(task)
    assert shipped == ROOT / "vit_jax" / "assets" / "cifar100_excerpt" / "1.0.0"
    assert {path.name for path in made.iterdir()} == {path.name for path in shipped.iterdir()}
    for path in made.iterdir():
        same = path.read_bytes() == (shipped / path.name).read_bytes()  # pytest would print the whole difference
        assert same, path.name


# ---- official data


@pytest.mark.full
def test_official_cifar100_has_its_known_counts_and_statistics(prepared_cifar100):
    import tensorflow_datasets as tfds

    assert {split: len(source) for split, source in tfds.data_source("cifar100", data_dir=prepared_cifar100).items()} == {
        "train": 50_000,
        "test": 10_000,
    }
    task = tasks.task("cifar100")
    for split, count in (("train", 500), ("test", 100)):
        source = open_split(task, split, prepared_cifar100)
        images, labels = source.take(np.arange(len(source)))
        np.testing.assert_array_equal(np.bincount(labels), [count] * 100)
        if split == "train":
            scaled = images.reshape(-1, 3) / np.float64(255)
            np.testing.assert_allclose(scaled.mean(0), [0.50708, 0.48655, 0.44092], atol=1e-5)
            np.testing.assert_allclose(scaled.std(0), [0.26733, 0.25644, 0.27615], atol=1e-5)
    assert source.class_names[:3] == ["apple", "aquarium_fish", "baby"]
