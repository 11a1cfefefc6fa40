"""Figures show the arrays they get, and can be read."""

import matplotlib.colors
import numpy as np
import pytest

from tests.reports.pages import render
from vit_jax.reports import figures
from vit_jax.reports.analysis import similarity, wilson


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_training_images_keep_their_colours():
    draw = np.random.default_rng(0)
    originals = draw.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    seen = draw.random((5, 16, 16, 3))
    figure = figures.training_images(originals, seen, [f"$name {i}_" for i in range(5)])
    assert texts(figure.axes[0]) == [f"$name {i}_" for i in range(5)]
    canvas = render(figure)
    # Every colour of every image is there, and in the place of an image's pixel there is its colour.
    colours = set(map(tuple, np.rint(255 * canvas.reshape(-1, 3)).astype(int)))
    assert set(map(tuple, originals.reshape(-1, 3).astype(int))) <= colours
    assert set(map(tuple, np.rint(255 * seen.reshape(-1, 3)).astype(int))) <= colours
    assert canvas.shape[1] == 800


def test_images_keep_their_aspect_ratio():
    for image in (np.zeros((8, 16, 3), np.uint8), np.zeros((16, 8, 3), np.uint8)):
        canvas = render(figures.mistakes(np.stack([image]), ["a\nb"]))
        dark = (canvas.sum(axis=-1) == 0)[50:]
        height, width = (np.flatnonzero(dark.any(axis=axis)).size for axis in (1, 0))
        assert height / width == pytest.approx(image.shape[0] / image.shape[1], rel=0.05)


@pytest.mark.parametrize("colour", [(1, 1, 1), (0, 0, 0), (1, 0, 0)])
def test_rollout_has_the_same_colours_over_any_image(colour):
    mask = np.full((1, 4, 4), 0.5, np.float32)
    mask[0, 3, 0] = 1
    figure = figures.rollout(np.broadcast_to(colour, (1, 32, 32, 3)), {"after": mask}, ["plain"])
    canvas, side, top = render(figure), 398, 2 * 27 + 6
    overlaid = canvas[top : top + side, -side:]
    grey = np.dot(colour, (0.299, 0.587, 0.114))
    for at, share in [((-20, 20), 1.0), ((20, -20), 0.0)]:  # the largest value's end of the scale, and the smallest's
        np.testing.assert_allclose(overlaid[at], (grey + np.array(matplotlib.colormaps["viridis"](share))[:3]) / 2, atol=0.01)
    np.testing.assert_allclose(canvas[top + 5, 5], colour, atol=0.01)  # the original image is next to it, unchanged
    assert texts(figure.axes[1]) == ["least", "most"]
    figure = figures.rollout(np.ones((3, 8, 8, 3)), {"before": np.ones((3, 2, 2)), "after": np.ones((3, 2, 2))}, list("abc"))
    assert [text for text in texts(figure.axes[0]) if len(text) > 1] == 2 * ["image", "before", "after"]


def test_heads_have_names():
    figure = figures.heads(np.ones((8, 8, 3)), {"layer 1, head 2": np.ones((2, 2)), "layer 3, head 4": np.zeros((2, 2))})
    assert texts(figure.axes[0]) == ["image", "layer 1, head 2", "layer 3, head 4"]


def test_filters_and_positions_are_side_by_side():
    draw = np.random.default_rng(0)
    figure = figures.filters({"before": draw.normal(size=(4, 4, 3, 32)), "after": draw.normal(size=(4, 4, 3, 32))})
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["before", "after"]
    image = figure.axes[0].get_images()[0].get_array()
    assert image.shape == (7 * 5 - 1, 4 * 5 - 1, 3) and image.min() == 0 and image.max() == 1
    rows = draw.normal(size=(6, 8))
    figure = figures.positions({"before": rows, "after": -rows}, (2, 3))
    image = figure.axes[0].get_images()[0].get_array()
    assert image.shape == (2 * 3 - 1, 3 * 4 - 1)
    np.testing.assert_allclose(image[3:, 4:7], similarity(rows, (2, 3))[1, 1])
    assert len(figure.axes) == 3  # with the scale of colours
    render(figure)


def test_attention_distance_has_one_dot_per_head():
    found = np.array([[1.0, 2.0, 4.0], [5.0, 6.0, 7.0]])
    figure = figures.attention_distance({"before": found, "after": found + 1})
    offsets = figure.axes[1].collections[0].get_offsets()
    np.testing.assert_allclose(offsets, [(1, 2), (1, 3), (1, 5), (2, 6), (2, 7), (2, 8)])
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim() and figure.axes[0].get_ylim()[1] > 8


def test_confusion_shows_the_worst_classes(predictions):
    logits, labels = predictions
    figure = figures.confusion(logits, labels, ["a", "b", "c", "d"], worst=2)
    axis = figure.axes[0]
    said = logits.argmax(axis=1)
    accuracy = [(said[labels == c] == c).mean() for c in range(4)]
    worst = list(np.argsort(accuracy)[:2])
    rows = [label.get_text() for label in axis.get_yticklabels()]
    columns = [label.get_text() for label in axis.get_xticklabels()]
    assert rows == ["abcd"[c] for c in worst] and columns[:2] == rows
    counts = {(round(t.get_position()[0]), round(t.get_position()[1])): int(t.get_text()) for t in axis.texts}
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            if column != "all others":
                expected = ((labels == "abcd".index(row)) & (said == "abcd".index(column))).sum()
                assert counts.get((x, y), 0) == expected
        assert sum(count for (_, at), count in counts.items() if at == y) == (labels == "abcd".index(row)).sum()


@pytest.mark.parametrize("count", [2, 10, 100, 1000])
def test_per_class_accuracies_are_readable(count):
    accuracy = {f"class_with_a_name_{i}": i / count for i in range(count)}
    figure = figures.per_class(accuracy)
    figure.draw_without_rendering()
    bars = [bar.get_width() for axis in figure.axes for bar in axis.patches if bar.get_width()]
    np.testing.assert_allclose(bars, sorted((100 * value for value in accuracy.values() if value), reverse=True))
    assert figure.get_figheight() < 14
    for axis in figure.axes:
        labels = [label for label in axis.get_yticklabels() if label.get_text()]
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
        assert all(below.y1 <= above.y0 + 1 for below, above in zip(boxes, boxes[1:], strict=False))
        assert all(label.get_fontsize() >= 7 for label in labels)
        assert all(box.x0 >= 0 for box in boxes)


def test_wider_accuracy_is_drawn_behind():
    figure = figures.per_class({"a": 0.5, "b": 0.25}, {"a": 0.75, "b": 0.5})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [75, 50, 50, 25]


def test_per_class_accuracies_have_intervals():
    figure = figures.per_class({"a": 0.5, "b": 0.25}, None, {"a": 50, "b": 4})
    [lines] = figure.axes[0].collections
    ends = [(segment[0][0], segment[1][0]) for segment in lines.get_segments()]
    np.testing.assert_allclose(ends, 100 * np.transpose(wilson([0.5, 0.25], [50, 4])))


@pytest.mark.parametrize("count", [10, 40, 100])
def test_class_names_are_readable_on_a_phone(count):
    names = [f"class_{i}" for i in range(count)]
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(500, count)), draw.integers(0, count, 500)
    for figure in (figures.per_class(dict.fromkeys(names, 0.5)), figures.confusion(logits, labels, names)):
        for axis in figure.axes:
            sizes = [label.get_fontsize() for label in axis.get_yticklabels() if label.get_text()]
            assert min(sizes) / 72 / figure.get_figwidth() * 358 >= 9.5  # pixels, on a window of 390


@pytest.mark.parametrize("count", [4, 100])
def test_confusion_matrix_has_all_classes(count):
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(500, count)), draw.integers(0, count, 500)
    figure = figures.confusion_matrix(logits, labels, [f"class {i}" for i in range(count)])
    axis = figure.axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted", "true")
    assert len(axis.get_xticklabels()) == len(axis.get_yticklabels()) == count
    predicted = logits.argmax(axis=1)
    for true, shares in enumerate(axis.get_images()[0].get_array()):
        np.testing.assert_allclose(shares, [np.mean(predicted[labels == true] == label) for label in range(count)])
    if count == 4:
        assert sum(int(text.get_text()) for text in axis.texts) == 500
    render(figure)
