"""Archives: known and unknown contents, and every defect is an error that names the file and leaves nothing behind."""

import dataclasses
import hashlib
import logging
import os

import pytest

from vit_jax.data import prepare
from vit_jax.data.places import find_prepared
from vit_jax.errors import DataError

from .conftest import FINE, TEST, TRAIN, files_below


def test_unknown_content_is_prepared_with_a_warning(tiny, pack, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="vit_jax"):
        prepare.prepare(tiny, pack(), tmp_path / "data")
    assert "not the file at" in caplog.text


@pytest.mark.parametrize("by", ["hash of the file", "digests of the content"])
def test_known_content_needs_no_warning(tiny, records, files, pack, tmp_path, caplog, by):
    digests = {
        split: hashlib.sha256(b"".join(sorted(hashlib.sha256(record).digest() for record in made))).hexdigest()
        for split, made in records.items()
    }
    if by == "digests of the content":
        files["cifar-100-binary/test.bin"] = records["test"][::-1].tobytes()  # another order, the same content
    archive = pack()  # once: gzip writes the time into the file
    known = (
        {"digests": digests} if by == "digests of the content" else {"sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    )
    task = dataclasses.replace(tiny, archive=dataclasses.replace(tiny.archive, **known))
    with caplog.at_level(logging.WARNING, logger="vit_jax"):
        prepare.prepare(task, archive, tmp_path / "data")
    assert not caplog.text


def _label(files, record, column, value):
    content = bytearray(files[TEST])
    content[record * 3074 + column] = value
    files[TEST] = bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda files: files.pop(TRAIN), "another layout: cifar-100-binary/train.bin is missing"),
        (lambda files: files.pop(FINE), "another layout: cifar-100-binary/fine_label_names.txt is missing"),
        (lambda files: files.update({TRAIN: files[TRAIN][:-1]}), "train.bin has 368,879 bytes, expected 368,880"),
        (
            lambda files: files.update({TEST: files[TEST] + files[TEST][:3074]}),
            "test.bin has 126,034 bytes, expected 122,960",
        ),
        (lambda files: files.update({FINE: b"apple\n" * 100}), "fine_label_names.txt has 1 different names, expected 100"),
        (lambda files: files.update({FINE: b"apple\n"}), "fine_label_names.txt has 1 different names, expected 100"),
        (lambda files: _label(files, 7, 1, 100), "record 7 of test has label 100, expected at most 99"),
        (lambda files: _label(files, 3, 0, 20), "record 3 of test has coarse_label 20, expected at most 19"),
        (
            lambda files: [files.update({f"x/{name}": files.pop(name)}) for name in list(files)],
            "another layout: cifar-100-binary/.* is missing",
        ),
        (lambda files: files.clear(), "another layout: cifar-100-binary/.* is missing"),
    ],
)
def test_archive_of_another_layout_is_refused(tiny, files, pack, tmp_path, spoil, message):
    spoil(files)
    refuse(tiny, pack(), tmp_path / "data", message)


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize("keep", [0, 10, 600, 0.3, 0.9])
def test_archive_cut_short_is_refused(tiny, pack, tmp_path, compression, keep):
    path = pack(compression)
    os.truncate(path, keep if isinstance(keep, int) else int(keep * path.stat().st_size))
    refuse(tiny, path, tmp_path / "data", "cut short")


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_archive_with_a_flipped_bit_is_refused(tiny, pack, tmp_path, compression):
    path = pack(compression)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in pixels, which do not compress: only a checksum shows it
    path.write_bytes(content)
    refuse(tiny, path, tmp_path / "data", "cut short or damaged")


def test_file_that_is_not_an_archive_is_refused(tiny, tmp_path):
    (tmp_path / "text").write_text("not a tar\n" * 1000)
    refuse(tiny, tmp_path / "text", tmp_path / "data", "is not a tar archive")
    refuse(tiny, tmp_path / "nothing", tmp_path / "data", "cannot be read .No such file")
    refuse(tiny, tmp_path, tmp_path / "data", "cannot be read .Is a directory")


def refuse(task, archive, data_dir, message):
    """Asserts that the error is one line with the file and the address, and that no file is left."""
    with pytest.raises(DataError, match=message) as caught:
        prepare.prepare(task, archive, data_dir)
    assert str(archive) in str(caught.value)
    assert task.archive.url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_below(data_dir) == []
    assert find_prepared(task, data_dir) is None
