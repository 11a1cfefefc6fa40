"""The table of published checkpoints: names, architectures and addresses.

A row's name is its path in Google's bucket without ".npz". Names and sizes are from the README and the listing in
vit_jax.ipynb of google-research/vision_transformer, GSAM's from its issue 223. The originals of copies on the Hugging Face
hub are from timm's default_cfgs (vision_transformer.py, vision_transformer_hybrid.py) and the model cards of Google's own
repositories, which were converted from timm's `jx_vit_*` weights of 2020, before timm changed to AugReg.
"""

import csv
import dataclasses
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from vit_jax.errors import CheckpointError, printable
from vit_jax.models.variants import VARIANTS, build

BUCKET = "https://storage.googleapis.com/vit_models"
_ASSETS = Path(__file__).parents[1] / "assets"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published file of weights."""

    name: str  # its path in Google's bucket, without ".npz"
    variant: str  # a row of vit_jax.models.variants.VARIANTS
    image_size: int  # pixels it was trained at
    num_classes: int
    addresses: tuple[str, ...]  # in the order to try them; hf://owner/repository/file is a copy as safetensors
    mib: float  # approximate size of the npz in MiB
    headless: tuple[str, ...] = ()  # the addresses whose copy has no head; timm's have no pre_logits either
    size: int | None = None  # of the npz in bytes, if known
    sha256: str | None = None  # of the npz, if known
    demanded: str | None = None  # SHA-256 that the caller demands, whichever address gives the file
    accuracy: float | None = None  # percent on ImageNet's validation set, from the original's README


# Numbers of parameters without head, pre_logits and positions.
_PARAMETERS = {
    "Ti/16": 5_486_592,
    "S/16": 21_590_016,
    "S/32": 22_474_752,
    "B/8": 85_204_992,
    "B/16": 85_647_360,
    "B/32": 87_416_832,
    "L/16": 303_099_904,
    "L/32": 305_459_200,
    "H/14": 630_435_840,
    "R+Ti/16": 6_135_104,
    "R26+S/32": 36_027_712,
    "R26+B/32": 100_576_576,
    "R50+B/16": 97_738_816,
    "R50+L/32": 327_918_656,
}

# AugReg's recommended files (the README's table, by section 4.5 of "How to train your ViT?"), and the table's learning rate
# for fine-tuning on ImageNet at 384 px. B/8 was published later: big_vision's models/vit.py, and the notebook's rate.
_RECOMMENDED = {
    "L/16": ("L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0", "0.01"),
    "B/16": ("B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0", "0.03"),
    "S/16": ("S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03"),
    "R50+L/32": ("R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1", "0.01"),
    "R26+S/32": ("R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", "0.01"),
    "Ti/16": ("Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", "0.03"),
    "B/32": ("B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", "0.01"),
    "S/32": ("S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0", "0.01"),
    "R+Ti/16": ("R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", "0.03"),
    "B/8": ("B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0", "0.03"),
}

# Accuracy in percent on ImageNet's validation set after fine-tuning the recommended files at 384 px: the README's table.
_ACCURACIES = {"L/16": 85.59, "B/16": 85.49, "S/16": 83.73, "R50+L/32": 85.99, "R26+S/32": 83.85, "Ti/16": 78.22,
               "B/32": 83.59, "S/32": 79.58, "R+Ti/16": 75.40}  # fmt: skip


def _i21k(model: str, recipe: str) -> str:
    return f"augreg/{model}-i21k-300ep-lr_0.001-{recipe}"


def _finetuned(variant: str, size: int) -> str:
    """Returns the path of a recommended file after fine-tuning on ImageNet at an image size."""
    name, rate = _RECOMMENDED[variant]
    return f"augreg/{name}--imagenet2012-steps_20k-lr_{rate}-res_{size}"


def _i1k(model: str, recipe: str, size: int) -> str:
    return f"augreg/{model}-i1k-300ep-lr_0.001-{recipe}--imagenet2012-steps_20k-lr_0.01-res_{size}"


def _adapted(model: str, recipe: str, rate: str, size: int) -> str:
    return f"{_i21k(model, recipe)}--imagenet2012-steps_20k-lr_{rate}-res_{size}"


# File → the hub's repositories with a copy of exactly this file. Google's come first, because they keep pre_logits.
_COPIES: dict[str, tuple[str, ...]] = {
    "imagenet21k/ViT-B_16": ("google/vit-base-patch16-224-in21k", "timm/vit_base_patch16_224.orig_in21k"),
    "imagenet21k/ViT-B_32": ("google/vit-base-patch32-224-in21k", "timm/vit_base_patch32_224.orig_in21k"),
    "imagenet21k/ViT-L_16": ("google/vit-large-patch16-224-in21k", "timm/vit_large_patch16_224.orig_in21k"),
    "imagenet21k/ViT-L_32": ("google/vit-large-patch32-224-in21k", "timm/vit_large_patch32_224.orig_in21k"),
    "imagenet21k/ViT-H_14": ("google/vit-huge-patch14-224-in21k", "timm/vit_huge_patch14_224.orig_in21k"),
    "imagenet21k/R50+ViT-B_16": ("timm/vit_base_r50_s16_224.orig_in21k",),
    "imagenet21k+imagenet2012/ViT-B_16-224": ("google/vit-base-patch16-224", "timm/vit_base_patch16_224.orig_in21k_ft_in1k"),
    "imagenet21k+imagenet2012/ViT-B_16": ("google/vit-base-patch16-384", "timm/vit_base_patch16_384.orig_in21k_ft_in1k"),
    "imagenet21k+imagenet2012/ViT-B_32": ("google/vit-base-patch32-384",),
    "imagenet21k+imagenet2012/ViT-L_16-224": ("google/vit-large-patch16-224",),
    "imagenet21k+imagenet2012/ViT-L_16": ("google/vit-large-patch16-384",),
    "imagenet21k+imagenet2012/ViT-L_32": ("google/vit-large-patch32-384", "timm/vit_large_patch32_384.orig_in21k_ft_in1k"),
    "imagenet21k+imagenet2012/R50+ViT-B_16": ("timm/vit_base_r50_s16_384.orig_in21k_ft_in1k",),
    _i21k("Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0"): ("timm/vit_tiny_patch16_224.augreg_in21k",),
    _i21k("S_16", "aug_light1-wd_0.03-do_0.0-sd_0.0"): ("timm/vit_small_patch16_224.augreg_in21k",),
    _i21k("S_32", "aug_light1-wd_0.03-do_0.0-sd_0.0"): ("timm/vit_small_patch32_224.augreg_in21k",),
    _i21k("B_8", "aug_medium1-wd_0.1-do_0.0-sd_0.0"): ("timm/vit_base_patch8_224.augreg_in21k",),
    _i21k("B_16", "aug_medium1-wd_0.1-do_0.0-sd_0.0"): ("timm/vit_base_patch16_224.augreg_in21k",),
    _i21k("B_32", "aug_medium1-wd_0.03-do_0.0-sd_0.0"): ("timm/vit_base_patch32_224.augreg_in21k",),
    _i21k("L_16", "aug_medium1-wd_0.1-do_0.1-sd_0.1"): ("timm/vit_large_patch16_224.augreg_in21k",),
    _i21k("R_Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0"): ("timm/vit_tiny_r_s16_p8_224.augreg_in21k",),
    _i21k("R26_S_32", "aug_medium2-wd_0.03-do_0.0-sd_0.0"): ("timm/vit_small_r26_s32_224.augreg_in21k",),
    _i21k("R50_L_32", "aug_medium2-wd_0.1-do_0.0-sd_0.0"): ("timm/vit_large_r50_s32_224.augreg_in21k",),
    **{
        _adapted(model, recipe, rate, size): (f"timm/{copy}_{size}.augreg_in21k_ft_in1k",)
        for model, recipe, rate, sizes, copy in (
            ("Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", (224, 384), "vit_tiny_patch16"),
            ("S_16", "aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03", (224, 384), "vit_small_patch16"),
            ("S_32", "aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03", (224, 384), "vit_small_patch32"),
            ("B_8", "aug_medium1-wd_0.1-do_0.0-sd_0.0", "0.01", (224,), "vit_base_patch8"),
            ("B_16", "aug_medium1-wd_0.1-do_0.0-sd_0.0", "0.01", (224, 384), "vit_base_patch16"),
            ("B_32", "aug_medium1-wd_0.03-do_0.0-sd_0.0", "0.03", (224,), "vit_base_patch32"),
            ("B_32", "aug_light1-wd_0.1-do_0.0-sd_0.0", "0.03", (384,), "vit_base_patch32"),
            ("L_16", "aug_medium1-wd_0.1-do_0.1-sd_0.1", "0.01", (224, 384), "vit_large_patch16"),
            ("R_Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", (224, 384), "vit_tiny_r_s16_p8"),
            ("R26_S_32", "aug_light0-wd_0.03-do_0.1-sd_0.1", "0.03", (224,), "vit_small_r26_s32"),
            ("R26_S_32", "aug_medium2-wd_0.03-do_0.0-sd_0.0", "0.03", (384,), "vit_small_r26_s32"),
            ("R50_L_32", "aug_medium1-wd_0.1-do_0.1-sd_0.1", "0.01", (224,), "vit_large_r50_s32"),
            ("R50_L_32", "aug_medium2-wd_0.1-do_0.0-sd_0.0", "0.01", (384,), "vit_large_r50_s32"),
        )
        for size in sizes
    },
    **{
        _i1k(model, recipe, size): (f"timm/{copy}_{size}.augreg_in1k",)
        for model, recipe, copy in (
            ("S_16", "aug_medium2-wd_0.1-do_0.0-sd_0.0", "vit_small_patch16"),
            ("B_32", "aug_medium2-wd_0.1-do_0.1-sd_0.1", "vit_base_patch32"),
            ("B_16", "aug_strong2-wd_0.1-do_0.1-sd_0.1", "vit_base_patch16"),
        )
        for size in (224, 384)
    },
    "sam/ViT-B_16": ("timm/vit_base_patch16_224.sam_in1k",),
    "sam/ViT-B_32": ("timm/vit_base_patch32_224.sam_in1k",),
}

_ACCURACY = {_finetuned(variant, 384): accuracy for variant, accuracy in _ACCURACIES.items()}

# Name of a data set in AugReg's file names → number of classes. kitti is VTAB's distance to the closest vehicle.
_CLASSES = {"i21k": 21843, "i1k": 1000, "imagenet2012": 1000, "cifar100": 100, "oxford_iiit_pet": 37, "resisc45": 45}
_CLASSES |= {"kitti": 4}
_AUGREG = re.compile(
    r"(?P<model>\w+)-(?P<data>i21k|i1k)-\d+ep-lr_[\d.]+-aug_\w+-wd_[\d.]+-do_[\d.]+-sd_[\d.]+"
    r"(--(?P<task>\w+)-steps_\d+k-lr_[\d.]+-res_(?P<size>224|384))?"
)


def _plain(name: str) -> str:
    """Returns a name in lower case without punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


_VARIANTS = {_plain(variant): variant for variant in VARIANTS}


def _row(name: str, variant: str, image_size: int, num_classes: int, **known: object) -> Published:
    copies = tuple(f"hf://{repository}/model.safetensors" for repository in _COPIES.get(name, ()))
    original = name.startswith("imagenet21k/")  # with pre_logits, which no other file has
    model = build(variant)
    width, patches = model.hidden_size, (image_size // model.stride) ** 2
    parameters = _PARAMETERS[variant] + (1 + patches) * width + (width + 1) * (num_classes + original * width)
    known = {"accuracy": _ACCURACY.get(name)} | known
    fields = dict(mib=round(4 * parameters / 2**20, 1), headless=copies if original else ()) | known
    return Published(name, variant, image_size, num_classes, (f"{BUCKET}/{quote(name)}.npz", *copies), **fields)  # type: ignore[arg-type]


def _augreg(name: str) -> Published | None:
    """Returns the row of one of AugReg's files from its name; None if the name is not one of theirs."""
    found = _AUGREG.fullmatch(name)
    if not found or not (variant := _VARIANTS.get(_plain(found["model"]))) or variant not in _PARAMETERS:
        return None
    if not (num_classes := _CLASSES.get(found["task"] or found["data"])):
        return None
    return _row(f"augreg/{name}", variant, int(found["size"] or 224), num_classes)


# Every file was fine-tuned with both learning rates at both sizes, B/8 only at 224 px (index.csv).
_FINETUNED = {
    f"{variant}-{size}": _finetuned(variant, size)
    for variant in _RECOMMENDED
    for size in ((224,) if variant == "B/8" else (224, 384))
}


def _rows() -> Iterator[Published]:
    yield Published("mini_8", "Mini/8", 64, 200, ((_ASSETS / "mini_8.npz").as_uri(),), mib=5.3)

    def variant(name: str) -> str:
        return name.removesuffix("-224").replace("ViT-", "").replace("_", "/")

    # Sizes and hashes are from Git LFS pointers to these files in public repositories; the sizes agree with every digit of
    # Google's listing. A hash is given if two independent sources agree.
    known: dict[str, dict[str, object]] = {
        "imagenet21k/ViT-B_16": dict(size=412_815_506),
        "imagenet21k/R50+ViT-B_16": dict(
            size=461_217_452, sha256="ff009bf39bb4f9198b834cfe46aba2bfdaf730e933ab3e3c4b1edf4226eaafbe"
        ),
        "imagenet21k+imagenet2012/ViT-B_16": dict(size=347_502_902),
        # Three times its parameters, probably because it contains an optimizer's state.
        "sam/ViT-S_16": dict(mib=252.6),
    }
    for name in ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50+ViT-B_16", "ViT-B_8", "R26+ViT-B_32",
                 "R50+ViT-L_32"):  # fmt: skip
        path = f"imagenet21k/{name}"
        yield _row(path, variant(name), 224, 21843, **known.get(path, {}))
    for name in ("ViT-B_16-224", "ViT-B_16", "ViT-B_32", "ViT-L_16-224", "ViT-L_16", "ViT-L_32", "R50+ViT-B_16", "ViT-B_8"):
        path = f"imagenet21k+imagenet2012/{name}"
        yield _row(path, variant(name), 224 if name.endswith("-224") else 384, 1000, **known.get(path, {}))
    names = {recommended: None for recommended, _ in _RECOMMENDED.values()}
    names |= {path.removeprefix("augreg/"): None for path in _FINETUNED.values()}
    names |= {path.removeprefix("augreg/"): None for path in _COPIES if path.startswith("augreg/")}
    for name in names:
        row = _augreg(name)
        assert row is not None
        yield row
    for path in ("sam/ViT-S_16", "sam/ViT-B_16", "sam/ViT-B_32", "sam/ViT-L_16", "sam/ViT-L_32"):
        yield _row(path, variant(path.partition("/")[2]), 224, 1000, **known.get(path, {}))
    for name in ("ViT-S_16", "ViT-S_32", "ViT-B_16", "ViT-B_32"):  # without a class token
        yield _row(f"gsam/{name}", variant(name), 224, 1000)


PUBLISHED: dict[str, Published] = {row.name: row for row in _rows()}
# Short name → file: an architecture, or an architecture and the image size of the fine-tuning on ImageNet.
SHORT: dict[str, str] = {"Mini/8": "mini_8"} | {variant: f"augreg/{name}" for variant, (name, _) in _RECOMMENDED.items()}
SHORT |= _FINETUNED
_PLAIN_SHORT = {_plain(short): path for short, path in SHORT.items()}
_SPELLINGS = {known.lower(): known for known in PUBLISHED}
_REPOSITORIES = {repository: known for known, repositories in _COPIES.items() for repository in repositories}


def split_demanded(name: str) -> tuple[str, str | None]:
    """Splits "@sha256:HEX" from the end of a name or path.

    Returns:
      The name and HEX in lower case, None if there is none.

    Raises:
      CheckpointError: if HEX is not 64 hexadecimal digits.
    """
    base, mark, digits = name.rpartition("@sha256:")
    if not mark:
        return name, None
    if not re.fullmatch("[0-9a-fA-F]{64}", digits):
        raise CheckpointError(f"{printable(base, 200)}: @sha256:{digits[:70]!r}, expected 64 hexadecimal digits")
    return base, digits.lower()


def short_name(path: str) -> str:
    """Returns a name of at most 48 characters that `resolve` accepts for a row of PUBLISHED."""
    short = [name for name, file in SHORT.items() if file == path]
    names = [*short, path.rpartition("/")[2], path, *_COPIES.get(path, ())]
    return next(name for name in names if len(name) <= 48 and _resolves_to(name, path))


def _resolves_to(name: str, path: str) -> bool:
    try:
        return resolve(name).name == path
    except CheckpointError:
        return False


def resolve(name: str) -> Published:
    """Returns the row of a published file.

    Args:
      name: one of these, or one with "@sha256:" and 64 hexadecimal digits at the end to demand the file's hash:
        - a path in the bucket, with or without ".npz", "gs://vit_models/" or the bucket's address before it;
        - an architecture ("B/16", "R_Ti_16"): AugReg's recommended file;
        - "B/16-384": that file after fine-tuning on ImageNet;
        - a file name without its folder: the original ImageNet-21k file ("ViT-B_16") if there is one, else the only such file;
        - the name of any of AugReg's files, also of one that is not in the table;
        - a repository of the hub that has a copy ("timm/vit_base_patch16_224.augreg_in21k").

    Raises:
      CheckpointError: if the name is unknown or ambiguous; the message has the nearest names.
    """
    name, demanded = split_demanded(name)
    if demanded:
        return dataclasses.replace(resolve(name), demanded=demanded)
    short = name.removesuffix(".npz").removeprefix("gs://vit_models/").removeprefix(f"{BUCKET}/").replace("%2B", "+")
    recommended, repository = _PLAIN_SHORT.get(_plain(short), ""), _REPOSITORIES.get(short.removeprefix("hf://"), "")
    for known in (short, recommended, repository, f"imagenet21k/{short}", f"augreg/{short}"):
        if known.lower() in _SPELLINGS:
            return PUBLISHED[_SPELLINGS[known.lower()]]
    if row := _augreg(short.removeprefix("augreg/")):
        return row
    same = [known for known in PUBLISHED if known.endswith(f"/{short}")]
    if len(same) == 1:
        return PUBLISHED[same[0]]
    if same:
        raise CheckpointError(f"several files are published as {name!r}: {', '.join(same)}; give one of these paths")
    names = [*PUBLISHED, *(known.rpartition("/")[2] for known in PUBLISHED), *SHORT]
    plain = {_plain(known): known for known in reversed(names)}
    near = [plain[match] for match in difflib.get_close_matches(_plain(short), plain, n=3)]
    hint = f"the nearest names: {', '.join(near)}" if near else "`python -m vit_jax.checkpoints list` shows the names"
    raise CheckpointError(f"no checkpoint is published as {name!r}; {hint}")


def read_index(path: str | os.PathLike) -> Iterator[dict[str, str]]:
    """Yields the rows of AugReg's index.csv; the original's vit_jax/checkpoint.py describes its columns.

    Raises:
      CheckpointError: if the file is not such an index.
    """
    wanted = ("name", "ds", "final_val", "filename")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if missing := [column for column in wanted if column not in (rows.fieldnames or ())]:
                raise CheckpointError(f"{path} is not AugReg's index.csv: it has no column {missing[0]!r}")
            yield from rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"{path} is not AugReg's index.csv: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def best(index: str | os.PathLike, name: str, ds: str = "i21k") -> Published:
    """Returns the file that section 4.5 of "How to train your ViT?" recommends.

    It has the best final validation accuracy in pre-training; of several with the same accuracy, the first by name.

    Args:
      index: AugReg's index.csv, which has one row per fine-tuning.
      name: the architecture, in any spelling ("B/16", "R26_S_32").
      ds: the data set of the pre-training, named as in the index: "i21k", "i21k_30" (30 epochs) or "i1k".

    Raises:
      CheckpointError: if the index has no such row.
    """
    accuracy: dict[str, float] = {}
    models: dict[str, None] = {}
    data: dict[str, None] = {}
    for number, row in enumerate(read_index(index), 2):
        models[row["name"]] = None
        if _plain(row["name"] or "") != _plain(name):
            continue
        data[row["ds"]] = None
        if row["ds"] == ds and row["final_val"]:  # empty if training was interrupted
            try:
                accuracy[row["filename"]] = float(row["final_val"])
            except ValueError:
                raise CheckpointError(f"{index}, line {number}: final_val is {row['final_val']!r}, not a number") from None
    if not data:
        raise CheckpointError(f"{index} has no model {name!r}; it has {', '.join(models)}")
    accuracy = {file: value for file, value in accuracy.items() if value == value}  # without NaN
    if not accuracy:
        raise CheckpointError(f"{index} has no final_val of {name} pre-trained on {ds!r}; it has {', '.join(data)}")
    return resolve(min(accuracy, key=lambda file: (-accuracy[file], file)))
