"""Reading an archive of records, such as CIFAR's: its arrays and the names of its classes, all of it checked."""

import gzip
import hashlib
import logging
import lzma
import math
import pathlib
import tarfile
import zlib
from collections.abc import Iterator

import numpy as np

from vit_jax.data.tasks import Archive
from vit_jax.errors import DataError, reason
from vit_jax.files import sha256

_log = logging.getLogger("vit_jax")

Splits = dict[str, np.ndarray]  # split -> records uint8 [n, labels + pixels]
Names = dict[str, list[str]]  # label -> names, in the order of the labels' bytes in a record

PLANES = (3, 32, 32)  # of the image in a record: channels, rows, columns
_CHUNK = 1 << 20  # bytes


def read_archive(archive: Archive, path: pathlib.Path) -> tuple[Splits, Names]:
    """Returns the records and the names in the tar file at `path`; warns if they are not known to be the official ones.

    Raises:
      DataError: if the file cannot be read, is damaged or has other contents than `archive` describes.
    """
    members = _read_members(archive, path)
    size = record_bytes(archive)
    splits = {
        split: np.frombuffer(b"".join(members[file] for file in files), np.uint8).reshape(-1, size)
        for split, files in archive.files.items()
    }
    names = {}
    for column, (label, (file, count)) in enumerate(archive.labels.items()):
        lines = members[file].decode("utf-8", "replace").splitlines()
        names[label] = [line.strip() for line in lines if line.strip()]
        if len(names[label]) != count or len(set(names[label])) != count:
            found = len(set(names[label]))
            raise DataError(f"{path}: {file} has {found} different names, expected {count}; {_advice(archive)}")
        for split, records in splits.items():
            if (wrong := records[:, column] >= count).any():
                at = int(wrong.argmax())
                raise DataError(
                    f"{path}: record {at} of {split} has {label} {records[at, column]}, expected at most {count - 1}; "
                    f"{_advice(archive)}"
                )
    if digests(splits) != archive.digests and sha256(path) != archive.sha256:
        _log.warning(
            "%s is not the file at %s and is not known to hold the same images and labels; it is used because its layout and "
            "sizes are right, but results may not be comparable",
            path,
            archive.url,
        )
    return splits, names


def record_bytes(archive: Archive) -> int:
    """The size of a record: a byte for each label, and the pixels."""
    return len(archive.labels) + math.prod(PLANES)


def _read_members(archive: Archive, path: pathlib.Path) -> dict[str, bytes]:
    """Returns the content of every file of the layout by name."""
    from tqdm import tqdm

    members = {}
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            bar = tqdm.wrapattr(file, "read", total=size, desc=f"Reading {path.name}", mininterval=0.5, disable=None)
            with bar as watched:
                try:
                    tar = tarfile.open(fileobj=watched)  # noqa: SIM115 (closed below; an error here means that it is no tar)
                except tarfile.ReadError as error:
                    raise DataError(f"{path} is not a tar archive, or is cut short or damaged; {_advice(archive)}") from error
                with tar:
                    members = dict(_wanted_members(archive, path, tar))
                    while tar.fileobj.read(_CHUNK):
                        pass  # the checksum of the compressed data comes after the end of the tar
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(f"{path} is cut short or damaged ({reason(error)}); {_advice(archive)}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); {_advice(archive)}") from error
    wanted = [name for name, _ in archive.labels.values()] + [name for files in archive.files.values() for name in files]
    if missing := [f"{archive.folder}/{name}" for name in wanted if name not in members]:
        raise DataError(f"{path} is cut short or has another layout: {', '.join(missing)} is missing; {_advice(archive)}")
    return members


def _wanted_members(archive: Archive, path: pathlib.Path, tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of each file of the layout; the size of a file of records is checked before it is read."""
    sizes: dict[str, int | None] = {file: None for file, _ in archive.labels.values()}
    for split, files in archive.files.items():
        sizes |= {file: archive.examples[split] // len(files) * record_bytes(archive) for file in files}
    for member in tar:
        folder, _, name = member.name.removeprefix("./").rpartition("/")
        if folder != archive.folder or name not in sizes or not member.isfile():
            continue
        if sizes[name] not in (None, member.size):
            raise DataError(
                f"{path}: {name} has {member.size:,} bytes, expected {sizes[name]:,} (records of {record_bytes(archive):,}); "
                f"{_advice(archive)}"
            )
        content = tar.extractfile(member)
        assert content is not None  # it is None only for a member that is not a file
        yield name, content.read()


def _advice(archive: Archive) -> str:
    return f"give the content of {archive.url}, in any compression"


def digests(splits: Splits) -> dict[str, str]:
    """Returns the digest of the records of each split, as in `Archive.digests`."""

    def digest(records: np.ndarray) -> str:
        return hashlib.sha256(b"".join(sorted(hashlib.sha256(record).digest() for record in records))).hexdigest()

    return {split: digest(records) for split, records in splits.items()}
