"""TFDS data without TensorFlow: an archive becomes the ArrayRecord files that the stock `tfds.data_source` reads.

Stock TFDS needs TensorFlow three times on this way: to unpack the archive, to read the files in it and to encode arrays
as PNG. So the archive is read here, and TFDS's own builder is given PNG bytes; layout and metadata stay TFDS's.
"""

import contextlib
import gzip
import hashlib
import io
import logging
import lzma
import math
import os
import pathlib
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from vit_jax.data.tasks import Archive, Excerpt, Task, data_root, find_prepared, prepare_command
from vit_jax.errors import DataError
from vit_jax.fetch import Refused, Unreachable, download
from vit_jax.files import locked, sha256

_log = logging.getLogger(__name__)

Splits = dict[str, np.ndarray]  # split -> records uint8 [n, labels + pixels]
Names = dict[str, list[str]]  # label -> names, in the order of the labels' bytes in a record

_PLANES = (3, 32, 32)  # of an image in a record: channels, rows, columns
_SLACK = 16 * 2**20  # bytes that an archive may have more than its records
_CHUNK = 1 << 20  # bytes
_BAR_INTERVAL = 0.5  # seconds between two states of a progress bar


def prepare(task: Task, archive: str | os.PathLike | None = None, data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Makes the task's TFDS data; returns at once where it is there already.

    Args:
      task: a row of TASKS.
      archive: its tar file, in any compression that `tarfile` reads; None: downloaded into `<data_root>/downloads`.
      data_dir: as TFDS's; None or "": see `data_root`.

    Returns:
      The folder `<data_root>/<builder>/<version>`. It appears whole or not at all, however this ends.

    Raises:
      DataError: if the archive cannot be had, cannot be read or does not hold what the task says, or if the folder
        cannot be written. A content that is only not known to be the official one is prepared, with a warning.
    """
    data_dir = data_dir or ""
    root = data_root(task, data_dir)
    if folder := find_prepared(task, data_dir):
        return folder
    if task.archive is None:
        raise DataError(f"{task.name} is not in {root}, and this package cannot prepare it: TFDS has to")
    try:
        with locked(root / f".{task.name}.lock", f"prepares {task.name}"):
            # Another process may have done the work while this one waited.
            return find_prepared(task, data_dir) or _prepare(task, archive, data_dir, root)
    except (OSError, RuntimeError) as error:  # the latter is how ArrayRecord's writer reports a full disk
        raise DataError(f"{task.name} cannot be written into {root} ({error}): choose another --data_dir") from error


def _prepare(task: Task, given: str | os.PathLike | None, data_dir: str | os.PathLike, root: pathlib.Path) -> pathlib.Path:
    assert task.archive is not None
    path = pathlib.Path(given or root / "downloads" / task.archive.url.rsplit("/", 1)[-1])
    fetched = not given and not path.exists()
    if fetched:
        _download(task, data_dir, path)
    try:
        splits, names = _read_archive(task.archive, path)
    except DataError:
        if fetched:
            path.unlink()  # the next attempt would find it and fail for ever
        raise
    if task.excerpt:
        splits, names = _select(task.excerpt, splits, names, path)

    # Written apart and renamed when complete: a killed preparation cannot be mistaken for a finished one, and the next
    # one finds its remains here.
    staging = root / f"{task.name}.incomplete"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        written = _write(task, splits, names, staging)
        folder = root / written.relative_to(staging)
        folder.parent.mkdir(parents=True, exist_ok=True)
        written.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _download(task: Task, data_dir: str | os.PathLike, path: pathlib.Path) -> None:
    """Downloads the task's archive to `path`; what arrives before an interruption is kept for the next try."""
    assert task.archive is not None
    records = sum(task.archive.examples.values()) * _record_bytes(task.archive)
    try:
        download(task.archive.url, path, most=records + _SLACK)
    except Refused as error:
        offline = "no network: " if isinstance(error, Unreachable) else ""
        raise DataError(
            f"{offline}{task.name} is not prepared in {data_root(task, data_dir)} and {task.archive.url} cannot be downloaded "
            f"({error}): get the file in another way and run `{prepare_command(task, data_dir, archive='FILE')}`"
        ) from error


def _read_archive(archive: Archive, path: pathlib.Path) -> tuple[Splits, Names]:
    """Returns the archive's records and names, checked; warns where they are not known to be the official ones."""
    members = _read_members(archive, path)
    size = _record_bytes(archive)
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
            raise DataError(f"{path}: {file} has {found} different names, expected {count}; {_wanted(archive)}")
        for split, records in splits.items():
            if (wrong := records[:, column] >= count).any():
                at = int(wrong.argmax())
                raise DataError(
                    f"{path}: record {at} of {split} has {label} {records[at, column]}, expected at most {count - 1}; "
                    f"{_wanted(archive)}"
                )
    digests = {split: _digest(records) for split, records in splits.items()}
    if digests != archive.digests and sha256(path) != archive.sha256:
        _log.warning(
            "%s is not the file at %s, nor known to hold the same images and labels: layout, sizes and numbers are "
            "right, so it is used, but results may not compare with others'",
            path,
            archive.url,
        )
    return splits, names


def _read_members(archive: Archive, path: pathlib.Path) -> dict[str, bytes]:
    """Returns the content of every file of the layout by name, its size checked before it is read."""
    from tqdm import tqdm

    sizes: dict[str, int | None] = {file: None for file, _ in archive.labels.values()}
    for split, files in archive.files.items():
        sizes |= {file: archive.examples[split] // len(files) * _record_bytes(archive) for file in files}
    members = {}
    try:
        with (
            open(path, "rb") as file,
            tqdm.wrapattr(
                file,
                "read",
                total=path.stat().st_size,
                desc=f"Reading {path.name}",
                mininterval=_BAR_INTERVAL,
                disable=None,
            ) as watched,
        ):
            try:
                tar = tarfile.open(fileobj=watched)  # noqa: SIM115 (entered below: only opening means "no tar at all")
            except tarfile.ReadError as error:
                raise DataError(f"{path} is no tar archive, or cut short or damaged; {_wanted(archive)}") from error
            with tar:
                for member in tar:
                    folder, _, name = member.name.removeprefix("./").rpartition("/")
                    if folder != archive.folder or name not in sizes or not member.isfile():
                        continue
                    if sizes[name] not in (None, member.size):
                        raise DataError(
                            f"{path}: {name} has {member.size:,} bytes, expected {sizes[name]:,} (records of "
                            f"{_record_bytes(archive):,}); {_wanted(archive)}"
                        )
                    content = tar.extractfile(member)
                    assert content is not None  # only of what is no file
                    members[name] = content.read()
                while tar.fileobj.read(_CHUNK):
                    pass  # to the end, behind the end of the tar: there stands the checksum of what is compressed
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(f"{path} is cut short or damaged ({error}); {_wanted(archive)}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); {_wanted(archive)}") from error
    if missing := [f"{archive.folder}/{name}" for name in sizes if name not in members]:
        raise DataError(f"{path} is cut short or of another layout: it lacks {', '.join(missing)}; {_wanted(archive)}")
    return members


def _wanted(archive: Archive) -> str:
    return f"give the content of {archive.url}, packed in any way"


def _record_bytes(archive: Archive) -> int:
    return len(archive.labels) + math.prod(_PLANES)


def _digest(records: np.ndarray) -> str:
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(record).digest() for record in records))).hexdigest()


def _select(excerpt: Excerpt, splits: Splits, names: Names, path: pathlib.Path) -> tuple[Splits, Names]:
    """Returns the excerpt's records, whose only label is its own, by class and then by SHA-256."""
    labels = list(names).index("label")
    selected = {}
    for split, records in splits.items():
        rows, wanted = [], excerpt.examples[split]
        for label, name in enumerate(excerpt.classes):
            if name not in names["label"]:
                raise DataError(f"{path} has no class {name!r}, expected all of {', '.join(excerpt.classes)}")
            candidates = records[records[:, labels] == names["label"].index(name)]
            if len(candidates) < wanted:
                raise DataError(f"{path} has {len(candidates)} {split} records of {name}, expected at least {wanted}")
            for record in sorted(candidates, key=lambda record: hashlib.sha256(record).digest())[:wanted]:
                rows.append(np.concatenate([np.array([label], np.uint8), record[len(names) :]]))
        selected[split] = np.stack(rows)
    return selected, {"label": list(excerpt.classes)}


def _write(task: Task, splits: Splits, names: Names, directory: pathlib.Path) -> pathlib.Path:
    """Writes the data as TFDS would with `data_dir=directory`; returns the folder that is the data set."""
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    base: Any = _excerpt_builder(task) if task.excerpt else tfds.builder_cls(task.builder)

    class Builder(base, skip_registration=True):  # type: ignore[call-arg]  # TFDS carries no types
        name = task.builder

        def _split_generators(self, dl_manager):
            for label, values in names.items():
                self.info.features[label].names = values
            with_id = "id" in self.info.features
            return {split: _examples(split, records, list(names), with_id, bar) for split, records in splits.items()}

        def _generate_examples(self):
            raise AssertionError("unused: the split generators are the examples already")

    total = sum(len(records) for records in splits.values())
    with (
        tqdm(total=total, desc=f"Preparing {task.name}", unit=" images", mininterval=_BAR_INTERVAL, disable=None) as bar,
        _tfds_silent(),
        _same_bytes_everywhere(),
    ):
        builder = Builder(data_dir=directory)
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return pathlib.Path(builder.data_dir)


@contextlib.contextmanager
def _tfds_silent() -> Iterator[None]:
    """Keeps TFDS from reporting sizes that it does not know and paths that will not stay, in bars without an end."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


@contextlib.contextmanager
def _same_bytes_everywhere() -> Iterator[None]:
    """Has protobuf write the features of an example in the order of their names, which else differs between processes."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    def serialize(self, example):
        return self.get_tf_example(example).SerializeToString(deterministic=True)

    original = ExampleSerializer.serialize_example
    ExampleSerializer.serialize_example = serialize
    try:
        yield
    finally:
        ExampleSerializer.serialize_example = original


def _excerpt_builder(task: Task) -> type:
    """Returns the abstract TFDS builder of an excerpt, to which only the examples are missing."""
    import tensorflow_datasets as tfds

    assert task.excerpt is not None
    assert task.archive is not None
    excerpt, archive = task.excerpt, task.archive

    class ExcerptBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version(excerpt.version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"Of {archive.url}, of each of these classes in each split, the records of the smallest SHA-256.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=task.image_shape),
                        "label": tfds.features.ClassLabel(num_classes=len(excerpt.classes)),
                    }
                ),
                supervised_keys=("image", "label"),
                homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            )

    return ExcerptBuilder


def _examples(
    split: str, records: np.ndarray, labels: list[str], with_id: bool, bar: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the split as TFDS's builders do: a key, from which TFDS derives the order on disk, and the features."""
    for index, record in enumerate(records):
        example: dict[str, Any] = {label: int(record[column]) for column, label in enumerate(labels)}
        example["image"] = _png(record[len(labels) :].reshape(_PLANES).transpose(1, 2, 0))
        if with_id:
            example["id"] = f"{split}_{index:05d}"
        yield index, example
        bar.update()


def _png(pixels: np.ndarray) -> io.BytesIO:
    """Returns the image, uint8 [height, width, 3], as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    # Looking only for runs, not for repetitions, which photographs hardly have: as small, quicker, and zlib and zlib-ng
    # (Pillow comes with either) write the same bytes, so that the excerpt comes out the same everywhere.
    Image.fromarray(pixels).save(file, "PNG", compress_type=zlib.Z_RLE)
    file.seek(0)
    return file
