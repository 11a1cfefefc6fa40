"""What classes are called: as the JSON beside the weights says, and for Google's published heads as ImageNet does."""

import contextlib
import functools
import logging
import lzma
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.checkpoints.catalogue import PUBLISHED, resolve
from vit_jax.errors import CheckpointError, printable
from vit_jax.formats import meta as beside

_log = logging.getLogger("vit_jax")
_FILE = Path(__file__).parents[1] / "assets" / "imagenet.tsv.xz"


def class_names(path: Path, meta: Mapping[str, Any], num_classes: int) -> list[str]:
    """A name for each class of the weights at `path`, beside which `meta` is said.

    What `meta` names; of 21,843 classes ImageNet-21k's, and of 1,000 ImageNet-1k's where the file is one of Google's by its
    name or a copy of one; else "class 17", and the log says so. CheckpointError as `checkpoints.meta.class_names`.
    """
    if found := beside.class_names(meta, num_classes):
        return found
    if num_classes == 21843:
        return imagenet("21k")
    if num_classes == 1000 and is_googles(path, meta, num_classes):
        return imagenet("1k")
    _log.warning("nothing beside %s names its %d classes: they are called by their numbers", printable(path), num_classes)
    return [f"class {number}" for number in range(num_classes)]


def is_googles(path: Path, meta: Mapping[str, Any], num_classes: int) -> bool:
    """Whether weights are published ones: by what `meta` says, by their classes, or by their file's name and those."""
    rows = [row for row in PUBLISHED.values() if row.name.rpartition("/")[2] == path.stem]
    with contextlib.suppress(CheckpointError):
        rows.append(resolve(path.stem))
    return num_classes == 21843 or "copy_of" in meta or any(row.num_classes == num_classes for row in rows)


@functools.cache
def imagenet(which: str) -> list[str]:
    """The classes of ImageNet "1k" (1,000) or "21k" (Google's 21,843) in the order of the published heads.

    A class is called by all words of its WordNet synset ("lion, king of beasts, Panthera leo"), and where several classes
    are called the same, also by its number there ("crane (n02012849)").
    """
    rows = (line.split("\t") for line in lzma.decompress(_FILE.read_bytes()).decode().splitlines())
    found = [(synset, words) for synset, sets, words in rows if which in sets.split()]
    same = Counter(words for _, words in found)
    return [words if same[words] == 1 else f"{words} ({synset})" for synset, words in found]


def write(source: str | os.PathLike, path: str | os.PathLike) -> None:
    """Makes the file of ImageNet's names from three lists in timm's folder `timm/data/_info`; see assets/README.md.

    A line a class, in the order of their numbers: WordNet's number of the synset, the sets that have it, its words.
    """

    def lines(name: str) -> list[str]:
        return (Path(source) / name).read_text(encoding="utf-8").splitlines()

    sets = {"1k": set(lines("imagenet_synsets.txt")), "21k": set(lines("imagenet21k_goog_synsets.txt"))}
    words = dict(line.split("\t") for line in lines("imagenet_synset_to_lemma.txt"))
    rows = (
        f"{synset}\t{' '.join(name for name in sets if synset in sets[name])}\t{words[synset]}\n"
        for synset in sorted(sets["1k"] | sets["21k"])
    )
    Path(path).write_bytes(lzma.compress("".join(rows).encode(), preset=9 | lzma.PRESET_EXTREME))
