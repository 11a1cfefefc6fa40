"""The table of published files agrees with its sources, and every name means one file."""

import importlib.util
import re
from pathlib import Path

import pytest

from vit_jax.checkpoints import catalogue
from vit_jax.checkpoints.catalogue import BUCKET, PUBLISHED, best, resolve
from vit_jax.errors import CheckpointError
from vit_jax.models.variants import VARIANTS, build, count

# MiB and GiB as `gsutil ls -lh` gave them (vit_jax.ipynb of the original), and MiB of its README's table.
LISTED = {
    "imagenet21k+imagenet2012/R50+ViT-B_16": 377.57, "imagenet21k+imagenet2012/ViT-B_16-224": 330.29,
    "imagenet21k+imagenet2012/ViT-B_16": 331.4, "imagenet21k+imagenet2012/ViT-B_32": 336.89,
    "imagenet21k+imagenet2012/ViT-B_8": 334.78, "imagenet21k/R26+ViT-B_32": 450.23,
    "imagenet21k/R50+ViT-B_16": 439.85, "imagenet21k/ViT-B_16": 393.69, "imagenet21k/ViT-B_32": 400.01,
    "imagenet21k/ViT-B_8": 393.72, "sam/ViT-B_16": 330.3, "sam/ViT-B_32": 336.61, "sam/ViT-S_16": 252.57,
}  # fmt: skip
LISTED_GIB = {
    "imagenet21k+imagenet2012/ViT-L_16-224": 1.13, "imagenet21k+imagenet2012/ViT-L_16": 1.14,
    "imagenet21k+imagenet2012/ViT-L_32": 1.14, "imagenet21k/R50+ViT-L_32": 1.31, "imagenet21k/ViT-H_14": 2.46,
    "imagenet21k/ViT-L_16": 1.22, "imagenet21k/ViT-L_32": 1.23, "sam/ViT-L_16": 1.13, "sam/ViT-L_32": 1.14,
}  # fmt: skip
RECOMMENDED = {
    "L/16": ("L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0", 1243),
    "B/16": ("B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0", 391),
    "S/16": ("S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0", 115),
    "R50+L/32": ("R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1", 1337),
    "R26+S/32": ("R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", 170),
    "Ti/16": ("Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", 37),
    "B/32": ("B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0", 398),
    "S/32": ("S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0", 118),
    "R+Ti/16": ("R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0", 40),
}


def test_rows_are_consistent():
    assert next(iter(PUBLISHED)) == "mini_8" and len(PUBLISHED) == len(list(catalogue._rows()))
    for name, row in PUBLISHED.items():
        assert name == row.name and row.variant in VARIANTS and row.num_classes in (200, 1000, 21843)
        assert row.image_size % build(row.variant).stride == 0
        assert set(row.headless) <= set(row.addresses)
        if name == "mini_8":
            continue
        assert row.addresses[0] == f"{BUCKET}/{name.replace('+', '%2B')}.npz"
        for address in row.addresses[1:]:
            assert re.fullmatch(r"hf://(google|timm)/[\w.-]+/model\.safetensors", address)
            assert f"{row.image_size}" in address.replace("vit_base_r50_s16", "") and row.num_classes in (1000, 21843)
            assert (row.num_classes == 21843) == (address.split("/")[3].endswith("in21k"))
            # The heads of the original files are zeros, and no copy has them.
            assert (address in row.headless) == name.startswith("imagenet21k/")


def test_published_files_of_every_kind_are_in_the_table():
    for model in ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50+ViT-B_16"):
        assert f"imagenet21k/{model}" in PUBLISHED
    for model in ("ViT-B_16-224", "ViT-B_16", "ViT-B_32", "ViT-L_16-224", "ViT-L_16", "ViT-L_32", "R50+ViT-B_16"):
        assert f"imagenet21k+imagenet2012/{model}" in PUBLISHED
    for file, _ in RECOMMENDED.values():
        assert f"augreg/{file}" in PUBLISHED
        adapted = [name for name in PUBLISHED if name.startswith(f"augreg/{file}--imagenet2012-")]
        assert {PUBLISHED[name].image_size for name in adapted} == {224, 384}
    for folder in ("sam", "gsam"):
        assert {f"{folder}/ViT-S_16", f"{folder}/ViT-B_16", f"{folder}/ViT-B_32"} <= PUBLISHED.keys()


def test_augreg_names_agree_with_their_rows():
    for name, row in PUBLISHED.items():
        if name.startswith("augreg/"):
            file = name.removeprefix("augreg/")
            assert resolve(file) is row and catalogue._augreg(file) == row
            assert build(file.split("-")[0]) == build(row.variant)
            assert row.image_size == (384 if file.endswith("res_384") else 224)
            assert row.num_classes == (21843 if "-i21k-" in file and "--" not in file else 1000)


def parameters(variant, image_size, num_classes, pre_logits):
    model = build(variant, num_classes=num_classes)
    return count(model.clone(representation_size=pre_logits * model.hidden_size), image_size)


def test_sizes_agree_with_the_parameters():
    seen = set()
    for name, row in PUBLISHED.items():
        if name in ("mini_8", "sam/ViT-S_16"):  # the first is in bfloat16, the second has an optimizer's state
            continue
        if row.variant in seen and row.variant not in ("S/16", "R+Ti/16"):  # the small ones at every size, the others once
            continue
        seen.add(row.variant)
        expected = parameters(row.variant, row.image_size, row.num_classes, name.startswith("imagenet21k/"))
        assert row.mib == pytest.approx(4 * expected / 2**20, abs=0.06), name


def test_sizes_agree_with_google_listing():
    for name, mib in LISTED.items():  # names and checksums of the arrays take some bytes
        assert 0 <= mib - PUBLISHED[name].mib + 0.05 < 0.2, name
        if size := PUBLISHED[name].size:
            assert f"{size / 2**20:.2f}" == f"{mib:.2f}", name
    for name, gib in LISTED_GIB.items():
        assert PUBLISHED[name].mib / 1024 == pytest.approx(gib, abs=0.0051), name
    for file, mib in RECOMMENDED.values():
        assert PUBLISHED[f"augreg/{file}"].mib == pytest.approx(mib, abs=0.6), file


def test_copies_agree_with_timm():
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs timm, of which it reads the source")
    folder = Path(spec.submodule_search_locations[0]) / "models"
    text = "".join((folder / file).read_text() for file in ("vision_transformer.py", "vision_transformer_hybrid.py"))
    of = dict(
        re.findall(r"^    '([\w.]+)': _cfg\(\s*url='(https://storage\.googleapis\.com/vit_models/[^']+)'", text, re.MULTILINE)
    )
    copies = {address: row for row in PUBLISHED.values() for address in row.addresses if address.startswith("hf://timm/")}
    for address, row in copies.items():
        name = address.split("/")[3]
        if ".orig_" in name:  # converted in 2020 and 2021 under names that timm no longer gives
            assert f"'{name}': _cfg(" in text
        else:
            assert of.pop(name) == row.addresses[0]
    assert not of  # the table has all of timm's


@pytest.mark.parametrize("variant", RECOMMENDED)
def test_architecture_means_the_recommended_file(variant):
    spellings = {variant, variant.replace("/", "_"), variant.replace("/", "_").replace("+", "_"), variant.lower()}
    for name in spellings | {f"{variant}.npz"}:
        assert resolve(name).name == f"augreg/{RECOMMENDED[variant][0]}"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ViT-B_16", "imagenet21k/ViT-B_16"),
        ("ViT-B_16.npz", "imagenet21k/ViT-B_16"),
        ("R50+ViT-B_16", "imagenet21k/R50+ViT-B_16"),
        ("ViT-L_16-224", "imagenet21k+imagenet2012/ViT-L_16-224"),
        ("imagenet21k+imagenet2012/ViT-B_16.npz", "imagenet21k+imagenet2012/ViT-B_16"),
        ("gs://vit_models/sam/ViT-B_16.npz", "sam/ViT-B_16"),
        (f"{BUCKET}/imagenet21k/R50%2BViT-B_16.npz", "imagenet21k/R50+ViT-B_16"),
        ("mini_8", "mini_8"),
    ],
)
def test_file_name_resolves_to_its_row(name, expected):
    assert resolve(name) is PUBLISHED[expected]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vit-b_16", "imagenet21k/ViT-B_16"),
        ("Mini/8", "mini_8"),
        ("google/vit-base-patch16-224-in21k", "imagenet21k/ViT-B_16"),
        ("hf://timm/vit_tiny_patch16_224.augreg_in21k", "augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"),
    ],
)
def test_alias_resolves_to_its_row(name, expected):
    assert resolve(name) is PUBLISHED[expected]


@pytest.mark.parametrize("name", PUBLISHED)
def test_short_name_resolves_to_its_row(name):
    assert len(short := catalogue.short_name(name)) <= 48 and resolve(short) is PUBLISHED[name]


@pytest.mark.parametrize("name", ["B/16-384", "B_16-384", "b16-384"])
def test_finetuned_file_has_a_short_name_and_an_accuracy(name):
    assert resolve(name).name == f"augreg/{RECOMMENDED['B/16'][0]}--imagenet2012-steps_20k-lr_0.03-res_384"
    assert resolve(name).accuracy == 85.49 and sum(row.accuracy is not None for row in PUBLISHED.values()) == 9


def test_demanded_hash_is_part_of_a_name():
    digits = "0123456789ABCDEF" * 4
    assert resolve(f"ViT-B_16@sha256:{digits}").demanded == digits.lower() and resolve("ViT-B_16").demanded is None
    for wrong in ("", "12", "g" * 64, digits + "0"):
        with pytest.raises(CheckpointError, match="ViT-B_16: @sha256:'.*', expected 64 hexadecimal digits"):
            resolve(f"ViT-B_16@sha256:{wrong}")


@pytest.mark.parametrize(
    "tail, expected",
    [
        ("L_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1-do_0.1-sd_0.1", ("L/16", 224, 1000)),
        ("R26_S_32-i21k-30ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0", ("R26+S/32", 224, 21843)),
        ("B_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0--cifar100-steps_10k-lr_0.003-res_384", ("B/16", 384, 100)),
        ("S_32-i1k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0--oxford_iiit_pet-steps_0k-lr_0.003-res_224", ("S/32", 224, 37)),
        ("R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0--kitti-steps_2k-lr_0.01-res_384", ("R+Ti/16", 384, 4)),
        ("B_8-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0--resisc45-steps_2k-lr_0.01-res_224", ("B/8", 224, 45)),
    ],
)
def test_full_augreg_name_resolves_without_a_row(tail, expected):
    for name in (tail, f"{tail}.npz", f"augreg/{tail}", f"gs://vit_models/augreg/{tail}.npz"):
        row = resolve(name)
        assert (row.variant, row.image_size, row.num_classes) == expected
        assert row.addresses == (f"{BUCKET}/augreg/{tail}.npz",)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ViT-B_61", "no checkpoint is published as 'ViT-B_61'; the nearest names: ViT-B_16, "),
        ("B/61", "the nearest names: B/16"),
        ("zzzzqqq", "`python -m vit_jax.checkpoints list` shows the names"),
        ("Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_x", "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0"),
        ("B_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0--mnist-steps_2k-lr_0.01-res_224", "no checkpoint is publi"),
        ("G_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0", "no checkpoint is published"),
        ("ViT-S_16", "several files are published as 'ViT-S_16': sam/ViT-S_16, gsam/ViT-S_16; give one of these paths"),
        ("", "no checkpoint is published as ''"),
        ("somewhere/ViT-B_16", "no checkpoint is published"),
    ],
)  # fmt: skip
def test_unknown_name_is_one_error_line(name, expected):
    with pytest.raises(CheckpointError, match=re.escape(expected)) as error:
        resolve(name)
    assert "\n" not in str(error.value)


def row_of(name, ds, final_val, aug, adapted="cifar100-steps_10k-lr_0.01-res_224"):
    file = f"{name.replace('/', '_').replace('+', '_')}-{ds.split('_')[0]}-300ep-lr_0.001-aug_{aug}-wd_0.1-do_0.0-sd_0.0"
    return f"{name},{ds},{final_val},{file},{file}--{adapted}"


@pytest.fixture
def index(tmp_path):
    path = tmp_path / "index.csv"
    rows = [
        row_of("B/16", "i21k", 0.45, "none"),
        row_of("B/16", "i21k", 0.47, "strong2"),
        row_of("B/16", "i21k", 0.47, "strong2", "resisc45-steps_2k-lr_0.01-res_224"),
        row_of("B/16", "i21k", 0.47, "medium1"),  # as good: the first by name is taken
        row_of("B/16", "i21k", "", "light0"),
        row_of("B/16", "i21k", "nan", "light1"),
        row_of("B/16", "i1k", 0.79, "medium2"),
        row_of("R+Ti/16", "i21k", 0.39, "none"),
        row_of("S/32", "i21k", "nan", "none"),
    ]
    path.write_text("\n".join(["name,ds,final_val,filename,adapt_filename", *rows]) + "\n")
    return path


def test_best_has_the_highest_final_validation_accuracy(index):
    assert best(index, "b_16").name == "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
    assert best(index, "B/16", ds="i1k").num_classes == 1000
    assert best(index, "R_Ti_16").variant == "R+Ti/16"


@pytest.mark.parametrize(
    "name, ds, expected",
    [
        ("B/61", "i21k", "has no model 'B/61'; it has B/16, R+Ti/16, S/32"),
        ("B/16", "jft", "has no final_val of B/16 pre-trained on 'jft'; it has i21k, i1k"),
        ("S/32", "i21k", "has no final_val of S/32 pre-trained on 'i21k'"),
    ],
)
def test_missing_index_row_is_an_error(index, name, ds, expected):
    with pytest.raises(CheckpointError, match=re.escape(f"{index} {expected}")):
        best(index, name, ds)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"<html>403</html>", "is not AugReg's index.csv: it has no column 'name'"),
        (b"", "it has no column 'name'"),
        (b"name,ds,filename\nB/16,i21k,x\n", "it has no column 'final_val'"),
        (b"name,ds,final_val,filename\nB/16,i21k,high,x\n", "line 2: final_val is 'high', not a number"),
        (b"name,ds,final_val,filename\nB/16,i21k,0.5,x\n", "no checkpoint is published as 'x'"),
        (b"name,ds,final_val,filename\n\xff\n", "is not AugReg's index.csv: 'utf-8'"),
        (None, "cannot be read: No such file"),
    ],
)
def test_file_that_is_not_an_index_is_an_error(tmp_path, content, expected):
    path = tmp_path / "index.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        best(path, "B/16")
