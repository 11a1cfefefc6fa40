"""All tasks of VTAB on small data in the feature structure of their TFDS builders."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from vit_jax.config import Data
from vit_jax.data import prepared
from vit_jax.data.places import NotPrepared
from vit_jax.data.prepare import _same_bytes_everywhere, _tfds_silent
from vit_jax.data.splits import count, open_split
from vit_jax.data.tasks import TASKS, task
from vit_jax.errors import DataError

VTAB = [row for row in TASKS.values() if row.group]
SPLITS = {  # of the builders; the others have train and test
    **dict.fromkeys(
        ("dtd", "oxford_flowers102", "sun397/tfds", "patch_camelyon", "dmlab", "kitti"), ("train", "validation", "test")
    ),
    "diabetic_retinopathy_detection/btgraham-300": ("train", "validation", "test", "sample"),
    "clevr": ("train", "validation", "test"),
    **dict.fromkeys(("eurosat/rgb", "resisc45", "dsprites"), ("train",)),
}
PER_SPLIT = 20


def encoded(shape, draw) -> io.BytesIO:
    height, width = (size or int(draw.integers(20, 60)) for size in shape[:2])
    pixels = draw.integers(0, 256, (height, width, shape[2]), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels).save(file, "PNG")
    file.seek(0)
    return file


def objects(builder, draw):
    number = int(draw.integers(3, 11))
    if builder == "clevr":
        return [
            {
                "color": "red", "material": "metal", "shape": "cube", "size": "large", "rotation": 0.5,
                "3d_coords": draw.normal(size=3).astype(np.float32),
                "pixel_coords": draw.uniform(7.5, 12, 3).astype(np.float32),
            }
            for _ in range(number)
        ]  # fmt: skip
    return [
        {
            "type": int(draw.integers(0, 8)), "truncated": 0.0, "occluded": 0, "alpha": 0.0, "rotation_y": 0.0,
            "bbox": tfds.features.BBox(0.1, 0.1, 0.5, 0.5), "dimensions": np.ones(3, np.float32),
            "location": draw.uniform(1, 40, 3).astype(np.float32),
        }
        for _ in range(number - 3)
    ]  # fmt: skip


def example(builder, features, draw):
    made = {}
    for name, feature in features.items():
        if isinstance(feature, tfds.features.Image):
            made[name] = encoded(feature.shape, draw)
        elif isinstance(feature, tfds.features.ClassLabel):
            made[name] = int(draw.integers(feature.num_classes))
        elif isinstance(feature, tfds.features.Text):
            made[name] = "x"
        elif isinstance(feature, tfds.features.BBoxFeature):
            made[name] = tfds.features.BBox(0.1, 0.1, 0.5, 0.5)
        elif name == "objects":
            made[name] = objects(builder, draw)
        elif name == "question_answer":
            made[name] = [{"question": "x", "answer": "y"}]
        else:
            made[name] = np.float32(0.5)
    return made


def write(builder, folder, file_format="array_record"):
    """Prepares a builder's data with 20 random examples in each split, as TFDS does."""
    name, _, config = builder.partition("/")
    draw = np.random.default_rng(len(builder))
    made = {}

    class Small(tfds.builder_cls(name), skip_registration=True):
        MANUAL_DOWNLOAD_INSTRUCTIONS = None

        def _split_generators(self, dl_manager):
            for split in SPLITS.get(builder, ("train", "test")):
                made[split] = [example(name, self.info.features, draw) for _ in range(PER_SPLIT)]
            return {split: iter(enumerate(examples)) for split, examples in made.items()}

        def _generate_examples(self):
            raise AssertionError

    Small.name = name
    with _tfds_silent(), _same_bytes_everywhere():
        options = {"config": config} if config else {}
        Small(data_dir=folder, **options).download_and_prepare(
            file_format=file_format, download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return made


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in {row.builder: None for row in VTAB}:
        write(builder, folder)
    return folder


def test_vtab_has_19_tasks_in_its_three_groups():
    groups = [row.group for row in VTAB]
    assert {name: groups.count(name) for name in groups} == {"natural": 7, "specialized": 4, "structured": 8}
    assert len({row.builder for row in VTAB}) == 16


@pytest.mark.parametrize("row", VTAB, ids=lambda row: row.name)
def test_task_gives_images_labels_and_splits(data_dir, row):
    sources = {split: open_split(row, split, data_dir, 16) for split in {row.train_split, row.test_split, *row.validation}}
    for source in sources.values():
        images, labels, sizes = source.read(np.arange(len(source)))
        assert images.shape == (len(source), *source.image_shape) and images.dtype == np.uint8
        assert source.image_shape[0] <= 32 or not source.resized
        assert labels.min() >= 0 and labels.max() < row.num_classes == len(source.class_names)
        assert (sizes is None) == (not source.resized)
    trained, validated = (len(sources[split]) for split in row.validation)
    assert trained + validated == len(sources[row.train_split])  # the parts make up the training split


@pytest.mark.parametrize(
    ("name", "fractions"),
    [
        ("caltech101", (0.9, 0.1, 1)), ("pets", (0.8, 0.2, 1)), ("svhn", (0.9, 0.1, 1)), ("dtd", (1, 1, 1)),
        ("eurosat", (0.6, 0.2, 0.2)), ("resisc45", (0.6, 0.2, 0.2)), ("dsprites_location", (0.8, 0.1, 0.1)),
        ("smallnorb_azimuth", (1, 0.5, 0.5)), ("clevr_count", (0.9, 0.1, 1)), ("retinopathy", (1, 1, 1)),
    ],
)  # fmt: skip
def test_splits_are_those_of_task_adaptation(data_dir, name, fractions):
    row = TASKS[name]
    sizes = [len(open_split(row, split, data_dir)) for split in (*row.validation, row.test_split)]
    assert sizes == [round(PER_SPLIT * fraction) for fraction in fractions]


def test_pixels_of_zero_and_one_become_black_and_white(tmp_path):
    write("dsprites", tmp_path)
    source = open_split(TASKS["dsprites_location"], "train", tmp_path)
    with Image.open(io.BytesIO(source._records[0]["image"])) as image:
        stored = np.asarray(image)
    images, _ = source.take(np.array([0]))
    np.testing.assert_array_equal(images[0, ..., 1], stored * np.uint8(255))


def test_any_data_set_with_image_and_label_works_by_its_own_name(tmp_path):
    write("food101", tmp_path)
    row = task("tfds:food101")
    source = open_split(row, "train", tmp_path, 16)
    assert source.num_classes == 101 and len(source) == PER_SPLIT and source.resized
    assert count(row, Data(task=row.name), tmp_path) == PER_SPLIT


def test_data_set_without_a_label_is_refused_with_its_features(tmp_path):
    write("kitti", tmp_path)
    with pytest.raises(DataError, match="has no feature label, only .*objects"):
        open_split(task("tfds:kitti"), "train", tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pets", ["tfds build oxford_iiit_pet --file_format=array_record --data_dir", "requirements-prepare.txt"]),
        ("resisc45", ["first put NWPU-RESISC45.rar into", "downloads/manual"]),
        ("tfds:food101", ["tfds build food101"]),
        ("cifar100", ["python -m vit_jax.data prepare cifar100"]),
    ],
)
def test_data_that_are_not_prepared_give_the_exact_command(tmp_path, name, words):
    with pytest.raises(NotPrepared) as error:
        open_split(task(name), "train", tmp_path)
    assert all(word in str(error.value) for word in words)
    assert prepared.how_to_prepare(task(name), tmp_path) in str(error.value)
