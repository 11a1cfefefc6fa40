"""TFDS data without TensorFlow: an archive becomes the ArrayRecord files that `tfds.data_source` reads.

TFDS itself needs TensorFlow three times for this: to unpack the archive, to read its files and to encode arrays as PNG. So
`archives` reads the archive, and TFDS's own builder is given PNG bytes; layout and metadata are TFDS's.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from vit_jax.data.archives import PLANES, Names, Splits, read_archive, record_bytes
from vit_jax.data.places import data_root, find_prepared, find_version, prepare_command
from vit_jax.data.prepared import how_to_prepare
from vit_jax.data.tasks import Excerpt, Task
from vit_jax.errors import DataError, reason
from vit_jax.fetch import Refused, Unreachable, download
from vit_jax.files import locked

_SLACK = 16 * 2**20  # bytes that an archive may be larger than its records


def prepare(
    task: Task, archive: str | os.PathLike | None = None, data_dir: str | os.PathLike | None = None, from_hub: bool = False
) -> pathlib.Path:
    """Makes the TFDS data of a task; returns at once if they are there already.

    Args:
      task: a row of TASKS.
      archive: the tar file, in any compression that `tarfile` reads; None to download it into `<data_root>/downloads`, unless
        the data come with the package.
      data_dir: the directory of TFDS; None or "" for `data_root`.
      from_hub: whether to take the images from the copy on the Hugging Face hub, which is checked by its content.

    Returns:
      The folder `<data_root>/<builder>/<version>`. It appears whole or not at all, also if the process is killed.

    Raises:
      DataError: if the archive cannot be downloaded, cannot be read or has other contents than the task says, or if the
        folder cannot be written. Contents that are only not known to be the official ones are prepared, with a warning.
    """
    data_dir = data_dir or ""
    root = data_root(task, data_dir)
    if folder := find_version(task, root) if archive else find_prepared(task, data_dir):
        return folder
    if task.archive is None:
        raise DataError(f"{task.name} is not in {root}, and only TFDS can prepare it: {how_to_prepare(task, data_dir)}")
    try:
        with locked(root / f".{task.name}.lock", f"prepares {task.name}"):
            # Another process may have prepared the data while this one waited.
            return find_version(task, root) or _prepare(task, archive, data_dir, root, from_hub)
    except (OSError, RuntimeError) as error:  # ArrayRecord's writer reports a full disk as a RuntimeError
        raise DataError(f"{task.name} cannot be written into {root} ({reason(error)}): choose another --data_dir") from error


def _prepare(
    task: Task, given: str | os.PathLike | None, data_dir: str | os.PathLike, root: pathlib.Path, from_hub: bool
) -> pathlib.Path:
    assert task.archive is not None
    path = pathlib.Path(given or root / "downloads" / task.archive.url.rsplit("/", 1)[-1])
    downloaded = not (given or from_hub or path.exists())
    if downloaded:
        _download(task, data_dir, path)
    try:
        if from_hub:
            from vit_jax.data.hub import read_records

            splits, names = read_records(task.archive)
        else:
            splits, names = read_archive(task.archive, path)
    except DataError:
        if downloaded:
            path.unlink()  # the next attempt would read it and fail again
        raise
    if task.excerpt:
        splits, names = _select(task.excerpt, splits, names, path)

    # TFDS writes into a folder that is renamed when it is complete: a killed preparation cannot be taken for a finished one.
    # Its name is always the same, so the next preparation removes what a killed one left.
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
    """Downloads the task's archive to `path`; a later call continues an interrupted download."""
    assert task.archive is not None
    records = sum(task.archive.examples.values()) * record_bytes(task.archive)
    try:
        download(task.archive.url, path, most=records + _SLACK)
    except Refused as error:
        offline = "no network: " if isinstance(error, Unreachable) else ""
        raise DataError(
            f"{offline}{task.name} is not prepared in {data_root(task, data_dir)} and {task.archive.url} cannot be downloaded "
            f"({error}): get the file in another way and run `{prepare_command(task, data_dir, archive='FILE')}`"
        ) from error


def _select(excerpt: Excerpt, splits: Splits, names: Names, path: pathlib.Path) -> tuple[Splits, Names]:
    """Returns the records of an excerpt, ordered by class and then by SHA-256; their only label is the excerpt's."""
    labels = list(names).index("label")
    selected = {}
    for split, records in splits.items():
        rows, wanted = [], excerpt.examples[split]
        for label, name in enumerate(excerpt.classes):
            if name not in names["label"]:
                raise DataError(f"{path} has no class {name!r}, expected {', '.join(excerpt.classes)}")
            candidates = records[records[:, labels] == names["label"].index(name)]
            if len(candidates) < wanted:
                raise DataError(f"{path} has {len(candidates)} {split} records of {name}, expected at least {wanted}")
            for record in sorted(candidates, key=lambda record: hashlib.sha256(record).digest())[:wanted]:
                rows.append(np.concatenate([np.array([label], np.uint8), record[len(names) :]]))
        selected[split] = np.stack(rows)
    return selected, {"label": list(excerpt.classes)}


def _write(task: Task, splits: Splits, names: Names, directory: pathlib.Path) -> pathlib.Path:
    """Writes the data as TFDS does with `data_dir=directory`; returns the folder of the data set."""
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
            raise AssertionError("not called: the split generators yield the examples")

    total = sum(len(records) for records in splits.values())
    with (
        tqdm(total=total, desc=f"Preparing {task.name}", unit=" images", mininterval=0.5, disable=None) as bar,
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
    """Switches off TFDS's output: bars of unknown length, and paths in the folder that is renamed later."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


@contextlib.contextmanager
def _same_bytes_everywhere() -> Iterator[None]:
    """Makes protobuf write the features of an example in the order of their names; by default it differs between processes."""
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
    """Returns the abstract TFDS builder of an excerpt; it has metadata but no examples."""
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
    """Yields the examples of a split for TFDS: a key, which decides the order on disk, and the features."""
    for index, record in enumerate(records):
        example: dict[str, Any] = {label: int(record[column]) for column, label in enumerate(labels)}
        example["image"] = _png(record[len(labels) :].reshape(PLANES).transpose(1, 2, 0))
        if with_id:
            example["id"] = f"{split}_{index:05d}"
        yield index, example
        bar.update()


def _png(pixels: np.ndarray) -> io.BytesIO:
    """Returns the image, uint8 [height, width, 3], as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    # Z_RLE searches only for runs and not for repetitions, which photographs hardly have. Files are as small, it is faster,
    # and zlib and zlib-ng (Pillow comes with either) write the same bytes, so the excerpt is the same everywhere.
    Image.fromarray(pixels).save(file, "PNG", compress_type=zlib.Z_RLE)
    file.seek(0)
    return file
