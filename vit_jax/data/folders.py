"""The user's own images as a data set: an index of a folder or a CSV file, and the pixels of its images.

Every image is decoded completely when it is indexed, so that an unreadable one is found before a run begins. The result is
kept in the cache folder with the size and the time of change of each file; later only files that changed are decoded.
"""

import csv
import dataclasses
import hashlib
import json
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import images
from vit_jax.data.sources import Decoded, Source, resolve, stored_shape
from vit_jax.data.tasks import Task, split_folders
from vit_jax.errors import DataError, ImageError, printable, reason
from vit_jax.files import cache_root, whole_file

_log = logging.getLogger("vit_jax")
_TEST_SHARE = 0.2  # of the images of each class, if the user did not split them
_NAMED = 3  # files that an error names

_known: dict[Path, dict[str, Any]] = {}  # what this process knows of the files of each folder
# Of a file when it was decoded: bytes, time of change in ns, height, width, error. Height and width are 0 if it is unreadable.
_Entry = tuple[int, int, int, int, str]


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of a split.

    Attributes:
      paths: of the files, in the order of the SHA-256 of their paths below the folder.
      labels: int32 [n].
      sizes: (height, width) of each image in pixels, oriented as it is shown; int32 [n, 2].
    """

    paths: list[str]
    labels: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        """Examples as those of a `tfds.data_source`; "image" is the path of the file."""
        return [{"image": self.paths[key], "label": self.labels[key], "size": self.sizes[key]} for key in keys]

    def rows(self, start: int, stop: int) -> "Split":
        """The images from `start` to `stop`."""
        return Split(self.paths[start:stop], self.labels[start:stop], self.sizes[start:stop])


@dataclasses.dataclass(frozen=True)
class Index:
    """What a folder or a CSV file holds.

    Attributes:
      class_names: in the order of the labels.
      splits: name → images.
      skipped: "PATH (why)" of each unreadable image that was left out.
      ignored: which files have another suffix than an image's, such as "20 files (.heic, .txt)"; "" if there are none.
    """

    class_names: list[str]
    splits: dict[str, Split]
    skipped: tuple[str, ...] = ()
    ignored: str = ""


def index(task: Task, on_error: str = "raise") -> Index:
    """Indexes the images of a task and decodes those that changed since the last time.

    A folder has `train/<class>/…` and `test/<class>/…` (or val, valid, validation), or only one of `train/<class>/…` and
    `<class>/…`. If nothing divides the images, as in a CSV file without splits, a fifth of the images of each class is the
    split "test": those with the smallest SHA-256 of their paths, so that the choice is the same for every user and hardly
    changes when images are added. Files with another suffix than an image's are ignored.

    Args:
      task: whose kind is "folder" or "csv".
      on_error: what to do with unreadable images: "raise", or "skip" to leave them out.

    Raises:
      DataError: if images cannot be read, if there are none, if a class has no images or no training images, and if the names
        of two classes differ only in case, spaces or Unicode form. Also if a file has two classes or is in two splits.
    """
    root, others = Path(task.builder), Counter[str]()
    rows = list(_rows_of_folder(root, others) if task.kind == "folder" else _rows_of_csv(root))
    _check_files(task, rows)
    if not rows:
        raise DataError(f"{task.name} has no images; files with these suffixes are used: {', '.join(images.SUFFIXES)}")
    entries = _decode_all(root, sorted({path for _, _, path in rows}))
    bad = [f"{printable(path)} ({entry[4]})" for path, entry in entries.items() if entry[4]]
    if bad and on_error != "skip":
        more = f" and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
        raise DataError(
            f"{len(bad):,} of the {len(entries):,} images of {task.name} cannot be read: {'; '.join(bad[:_NAMED])}{more}. "
            "Remove or replace them, or set data.on_error=skip to leave them out"
        )
    names = _class_names(task, rows)
    rows = [row for row in rows if not entries[row[2]][4]]
    base = root.parent if task.kind == "csv" else root
    if not any(split for split, _, _ in rows):
        rows = _divide(rows, base)
    label = {name: number for number, name in enumerate(names)}
    splits = {}
    for split in dict.fromkeys(split for split, _, _ in rows):
        chosen = [(label[name], path) for _, name, path in sorted((row for row in rows if row[0] == split), key=_rank(base))]
        sizes = np.array([entries[path][2:4] for _, path in chosen], np.int32)
        splits[split] = Split([path for _, path in chosen], np.array([number for number, _ in chosen], np.int32), sizes)
    _check_classes(task, names, splits)
    ignored = f"{others.total():,} files ({', '.join(sorted(others))})" if others else ""
    return Index(names, splits, tuple(bad), ignored)


def _check_files(task: Task, rows: Iterable[tuple[str, str, str]]) -> None:
    """Raises DataError if a file is there more than once, with other names or links too."""
    seen: dict[str, tuple[str, str, str]] = {}
    for row in rows:
        other = seen.setdefault(os.path.realpath(row[2]), row)
        if other is not row:
            places = " and ".join(f"{split or 'no split'}, {name}" for split, name, _ in (other, row))
            raise DataError(f"{task.name}: {printable(row[2])} is there twice ({places}); an image has one class and split")


def _rows_of_folder(root: Path, others: Counter[str]) -> Iterator[tuple[str, str, str]]:
    """(split, class, path) of each image below a folder; the split is "" if nothing divides them.

    Counts in `others` the suffixes of files that are no images.
    """
    folders = split_folders(root)
    parts = folders if len(folders) > 1 else {"": folders.get("train", root)}
    for split, part in parts.items():
        for folder in sorted(part.iterdir()):
            if folder.is_dir() and not folder.name.startswith("."):
                others.update(path.suffix or path.name for path in images.other_files(folder))
                found = [(split, folder.name, str(path)) for path in images.image_files(folder)]
                if not found:
                    raise DataError(f"class {printable(folder.name)!r} is empty: there is no image below {folder}")
                yield from found


def _rows_of_csv(file: Path) -> Iterator[tuple[str, str, str]]:
    """(split, class, path) of each line; paths are relative to the file's folder."""
    with open(file, newline="", encoding="utf-8-sig") as opened:
        lines = csv.DictReader(opened, strict=True)
        missing = {"path", "label"} - set(lines.fieldnames or ())
        if missing:
            raise DataError(
                f"{file} has no column {' and '.join(sorted(missing))}: its first line must name the columns path, label and, "
                "optionally, split, with commas between them"
            )
        try:
            for line in lines:
                if None in line:
                    raise DataError(
                        f"{file}, line {lines.line_num}: there are more values than columns; put a value with a comma in "
                        "double quotes"
                    )
                values = [(line[name] or "").strip() for name in ("path", "label")]
                split = (line.get("split") or "").strip()
                if not all(values) or (not split and line.get("split") is not None and "split" in (lines.fieldnames or ())):
                    raise DataError(f"{file}, line {lines.line_num}: path, label and split must not be empty")
                yield split, values[1], str(file.parent / values[0])
        except csv.Error as error:
            raise DataError(f"{file}, line {lines.line_num}: {error}") from None


def _class_names(task: Task, rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """The names of the classes in their order: by number if all are numbers, else by text."""
    names = sorted({name for _, name, _ in rows})
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    seen: dict[str, str] = {}
    for name in names:
        key = " ".join(unicodedata.normalize("NFKC", name).replace("_", " ").casefold().split())
        if key in seen:
            raise DataError(f"{task.name}: {seen[key]!r} and {name!r} are two spellings of one class; rename one of them")
        seen[key] = name
    return names


def _rank(root: Path) -> Callable[[tuple[str, str, str]], bytes]:
    """A sort key of rows: the SHA-256 of their paths below a folder, so that every slice holds images of all classes."""
    return lambda row: hashlib.sha256(os.path.relpath(row[2], root).encode(errors="surrogateescape")).digest()


def _divide(rows: list[tuple[str, str, str]], root: Path) -> list[tuple[str, str, str]]:
    """Puts a fifth of the images of each class, at least one if it has two, into "test" and the others into "train"."""

    divided = []
    for name in sorted({name for _, name, _ in rows}):
        ranked = sorted((row for row in rows if row[1] == name), key=_rank(root))
        held = max(1, round(_TEST_SHARE * len(ranked))) if len(ranked) > 1 else 0
        divided += [("test" if position < held else "train", name, path) for position, (_, _, path) in enumerate(ranked)]
    return divided


def _check_classes(task: Task, names: list[str], splits: dict[str, Split]) -> None:
    if "train" not in splits:
        raise DataError(f"{task.name} has no split 'train', only {', '.join(map(repr, splits))}")
    trained = Counter(splits["train"].labels.tolist())
    missing = [printable(name) for number, name in enumerate(names) if not trained[number]]
    if missing:
        raise DataError(
            f"{task.name}: {', '.join(missing[:_NAMED])} {'has' if len(missing) == 1 else 'have'} no training images that can "
            "be read: a class must have images in train"
        )
    if len(names) < 2:
        raise DataError(f"{task.name} has one class, {printable(names[0])!r}: a classifier needs at least two")


def _decode_all(root: Path, paths: list[str]) -> dict[str, _Entry]:
    """Path → what is known of the file; files that are not in the cache or changed are decoded."""
    from tqdm import tqdm

    place = root.resolve()
    file = cache_root() / "images" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.json"
    try:
        cached = _known.get(place) or {path: tuple(entry) for path, entry in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or damaged
        cached = {}

    def entry(path: str) -> Any:
        try:
            about = os.stat(path)
        except OSError as error:
            return 0, 0, 0, 0, reason(error)
        key = about.st_size, about.st_mtime_ns
        known: Any = cached.get(os.path.relpath(path, root))
        if known and tuple(known[:2]) == key and len(known) == 5 and not known[4]:
            return known
        try:
            return *key, *images.checked_size(path), ""
        except ImageError as error:
            why = str(error).removeprefix(path).strip()
            return *key, 0, 0, why.removeprefix("cannot be read (").removesuffix(")") if "cannot be read (" in why else why

    with ThreadPoolExecutor(images.THREADS, "index") as pool:
        bar = tqdm(pool.map(entry, paths), total=len(paths), desc="Indexing", unit=" images", delay=2, disable=None)
        entries = dict(zip(paths, bar, strict=True))
    found = {os.path.relpath(path, root): about for path, about in entries.items()}
    if found != cached:
        try:
            with whole_file(file) as opened:
                opened.write(json.dumps(found).encode())
        except OSError as error:
            _log.warning("all images are decoded at every start because their index cannot be written (%s)", reason(error))
    _known[place] = found
    return entries


def _join(parts: Sequence[Split]) -> Split:
    """The images of several splits, one after the other."""
    paths = [path for part in parts for path in part.paths]
    return Split(paths, np.concatenate([part.labels for part in parts]), np.concatenate([part.sizes for part in parts]))


def open_split(task: Task, split: str, image_size: int, on_error: str) -> Source:
    """Opens a split of a folder or a CSV file; arguments as of `splits.open_split`."""
    found = index(task, on_error)
    parts = resolve(task, split, {name: len(part) for name, part in found.splits.items()})
    joined = _join([found.splits[name].rows(start, stop) for name, start, stop in parts])
    shape = stored_shape(np.concatenate([part.sizes for part in found.splits.values()]), image_size)
    resized = not (joined.sizes == shape[:2]).all()
    ranges = [(name, start, stop - start) for name, start, stop in parts]
    base = Path(task.builder).parent if task.kind == "csv" else Path(task.builder)
    lines = zip(joined.paths, joined.labels.tolist(), joined.sizes.tolist(), strict=True)
    content = "\n".join(f"{os.path.relpath(path, base)}\t{label}\t{size}" for path, label, size in lines)
    digest = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()
    where, names = f"{task.name} ({split})", found.class_names
    return Source(joined, where, names, shape, ranges, _decode, resized, found.skipped, found.ignored, digest)


def _decode(example: dict[str, Any], shape: tuple[int, int, int]) -> Decoded:
    return images.fitted(example["image"], shape[:2], example["image"]), example["size"], example["label"]
