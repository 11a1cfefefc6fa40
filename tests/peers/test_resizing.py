"""How the resizing of timm and transformers changes answers: the same weights, each with its own preprocessing.

Run with -rP to see the figures of docs/checkpoints.md.
"""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vit_jax.checkpoints.load import load
from vit_jax.data.splits import open_split
from vit_jax.data.tasks import task
from vit_jax.interop.torch_models import save_huggingface, save_timm
from vit_jax.predict.classifier import Classifier

COUNT = 100


def enlarged(size):
    """CIFAR images enlarged to (width, height), as smooth as blurred photos."""
    images, _ = open_split(task("cifar100_excerpt"), "test").take(np.arange(0, 5 * COUNT, 5))
    return [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in images]


def textured(size):
    """Random images with the amplitude 1/frequency of natural images, with detail up to single pixels."""
    draw = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size[1])[:, None], np.fft.rfftfreq(size[0])[None])
    frequency[0, 0] = np.inf
    for _ in range(COUNT):
        grey, colours = draw.standard_normal((1, *size[::-1])), draw.standard_normal((3, *size[::-1]))
        image = np.fft.irfft2(np.fft.rfft2(grey + colours / 2) / frequency, size[::-1])
        yield Image.fromarray(np.clip(127 + 55 * image / image.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0))


def graphics(size):
    """Thin lines and frames on white."""
    draw = np.random.default_rng(0)
    for _ in range(COUNT):
        image = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(image)
        for x0, y0, x1, y1 in draw.integers(0, [*size, *size], (15, 4)).tolist():
            pen.line([x0, y0, x1, y1], fill=tuple(draw.integers(0, 256, 3).tolist()), width=1)
            box = [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]
            pen.rectangle(box, outline=tuple(draw.integers(0, 256, 3).tolist()))
        yield image


@pytest.fixture(scope="module")
def answers(timm, transformers, torch, tmp_path_factory):
    """A function from images to the probabilities of mini_8 here, in timm and in transformers, with their own preprocessing."""
    folder = tmp_path_factory.mktemp("resizing")
    _, params = load("mini_8")
    save_timm(folder / "timm", params)
    save_huggingface(folder / "huggingface", params)
    ours = Classifier("mini_8")
    one = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(one))
    other = transformers.AutoModelForImageClassification.from_pretrained(folder / "huggingface").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder / "huggingface")

    def ask(images):
        with torch.inference_mode():
            theirs = one(torch.stack([transform(image) for image in images])).softmax(-1)
            others = other(**processor(images, return_tensors="pt")).logits.softmax(-1)
        return ours.probabilities(images), {"timm": theirs.numpy(), "transformers": others.numpy()}

    return ask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size", "least", "most"),
    [
        (enlarged, (64, 64), 0, 1e-5),
        (enlarged, (96, 96), 1e-3, 0.2),
        (enlarged, (500, 375), 1e-3, 0.4),
        (textured, (96, 96), 0.02, 1),
        (textured, (500, 375), 0.1, 1),
        (graphics, (500, 375), 0.1, 1),
    ],
)
def test_resizing_changes_answers_as_documented(kind, size, least, most, answers):
    ours, theirs = answers(list(kind(size)))
    for name, found in theirs.items():
        apart = np.abs(ours - found).max(axis=1)
        other = int((ours.argmax(1) != found.argmax(1)).sum())
        print(f"{kind.__name__} {size}, {name}: largest {apart.max():.4f}, median {np.median(apart):.4f}, other top-1 {other}")
        assert least <= apart.max() <= most
