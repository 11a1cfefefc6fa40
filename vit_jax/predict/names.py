"""Names of classes: from the JSON next to the weights, or ImageNet's for the heads that Google published."""

import contextlib
import functools
import logging
import lzma
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.checkpoints.catalogue import PUBLISHED, resolve
from vit_jax.errors import CheckpointError, printable
from vit_jax.formats import meta as descriptions

_log = logging.getLogger("vit_jax")
_FILE = Path(__file__).parents[1] / "assets" / "imagenet.tsv.xz"


def class_names(path: Path, meta: Mapping[str, Any], num_classes: int) -> list[str]:
    """Returns a name for each class of the weights at `path`.

    The names are those in `meta`; without them, ImageNet-21k's for 21,843 classes, and ImageNet-1k's for 1,000 classes if the
    weights are published ones or a copy. Otherwise the names are "class 0", "class 1" and so on, with a warning.

    Args:
      path: the file of the weights.
      meta: the content of the JSON next to it; {} if there is none.
      num_classes: number of classes of the head.

    Raises:
      CheckpointError: if `meta` names another number of classes; see `formats.meta.class_names`.
    """
    if found := descriptions.class_names(meta, num_classes):
        return found
    if num_classes == 21843:
        return imagenet("21k")
    if num_classes == 1000 and is_published(path, meta, num_classes):
        return imagenet("1k")
    _log.warning("no JSON next to %s names its %d classes: they are called by their numbers", printable(path), num_classes)
    return [f"class {number}" for number in range(num_classes)]


def is_published(path: Path, meta: Mapping[str, Any], num_classes: int) -> bool:
    """Whether weights are Google's or a copy: `meta` says so, or the number of classes and the name of the file do."""
    rows = [row for row in PUBLISHED.values() if row.name.rpartition("/")[2] == path.stem]
    with contextlib.suppress(CheckpointError):
        rows.append(resolve(path.stem))
    return num_classes == 21843 or "copy_of" in meta or any(row.num_classes == num_classes for row in rows)


@functools.cache
def imagenet(which: str) -> list[str]:
    """Returns the classes of ImageNet "1k" (1,000) or "21k" (Google's 21,843) in the order of the published heads.

    A name is all words of the class's WordNet synset ("lion, king of beasts, Panthera leo"). If several classes have the same
    words, the number of the synset follows ("crane (n02012849)").
    """
    rows = (line.split("\t") for line in lzma.decompress(_FILE.read_bytes()).decode().splitlines())
    found = [(synset, words) for synset, sets, words in rows if which in sets.split()]
    count = Counter(words for _, words in found)
    return [words if count[words] == 1 else f"{words} ({synset})" for synset, words in found]
