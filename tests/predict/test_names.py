"""Names of classes: ImageNet's in the order of the published heads, and what is used without a JSON."""

import hashlib
import importlib.resources
import lzma
from pathlib import Path

from vit_jax.predict import names


def test_published_heads_have_the_names_of_imagenet(caplog):
    """Google's heads; the order of the 21,843 as in google-research/big_transfer, issue 18."""
    both = names.imagenet("1k"), names.imagenet("21k")
    assert [len(set(found)) for found in both] == [1000, 21843]
    assert (both[0][0], both[0][291], both[0][999]) == (
        "tench, Tinca tinca",
        "lion, king of beasts, Panthera leo",
        "toilet tissue, toilet paper, bathroom tissue",
    )
    assert (both[1][9205], both[1][15027]) == ("picture, image, icon, ikon", "bleacher")
    assert [both[0].index(f"crane ({synset})") for synset in ("n02012849", "n03126707")] == [134, 517]
    for name, classes, expected in (
        ("ViT-B_16.npz", 21843, both[1]),
        ("mine.npz", 21843, both[1]),
        ("ViT-B_16.npz", 1000, both[0]),
        ("B_16-i1k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0.npz", 1000, both[0]),
    ):
        assert names.class_names(Path(name), {}, classes) == expected
    assert names.class_names(Path("model.npz"), {"copy_of": "sam/ViT-B_16"}, 1000) == both[0]
    assert not caplog.messages
    assert names.class_names(Path("mine.npz"), {}, 1000)[17] == "class 17"
    assert caplog.messages == ["no JSON next to mine.npz names its 1000 classes: they are called by their numbers"]


def test_order_of_imagenet_is_that_of_tfds():
    order = importlib.resources.files("tensorflow_datasets") / "datasets" / "imagenet2012" / "labels.txt"
    rows = [line.split("\t") for line in lzma.decompress(names._FILE.read_bytes()).decode().splitlines()]
    assert [synset for synset, sets, _ in rows if "1k" in sets.split()] == order.read_text().split()
    assert [synset for synset, sets, _ in rows if "21k" not in sets.split()] == ["n04399382"]


def test_file_of_names_is_the_documented_one():
    """assets/README.md gives the command that makes it and the hash of its text."""
    text = hashlib.sha256(lzma.decompress(names._FILE.read_bytes())).hexdigest()
    assert text in (names._FILE.parent / "README.md").read_text()
