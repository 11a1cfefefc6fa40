"""Figures: the numbers they show, held against plain computations, and that they can be read."""

import io

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vit_jax.reports import canvas, figures


def drawn(figure: Figure) -> np.ndarray:
    """The saved figure's pixels, float [height, width, 3] in [0, 1]."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figures.DPI)
    return np.asarray(Image.open(file).convert("RGB")) / 255


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


@pytest.fixture
def predictions():
    """Logits and labels of 4 classes, right more often than not."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 4, 300)
    return (draw.normal(size=(300, 4)) + 1.5 * np.eye(4)[labels]).astype(np.float32), labels.astype(np.int32)


def test_principal_components_are_the_directions_of_largest_variance():
    kernel = np.random.default_rng(0).normal(size=(4, 4, 3, 64)) * np.linspace(1, 3, 48).reshape(4, 4, 3, 1)
    found = figures.principal_components(kernel, 5)
    values, vectors = np.linalg.eigh(np.cov(kernel.reshape(48, 64)))
    for component, expected in zip(found, vectors.T[::-1], strict=False):
        assert abs(abs(component.ravel() @ expected) - 1) < 1e-6
        assert component.ravel()[np.abs(component).argmax()] > 0
    variances = [np.var(component.ravel() @ kernel.reshape(48, 64), ddof=1) for component in found]
    np.testing.assert_allclose(variances, values[::-1][:5], rtol=1e-6)


def test_principal_components_of_two_kernels_look_alike():
    draw = np.random.default_rng(0)
    before = draw.normal(size=(4, 4, 3, 64)) * np.linspace(1, 9, 48).reshape(4, 4, 3, 1)
    after = -before + draw.normal(scale=0.01, size=before.shape)
    first = figures.principal_components(before, 3)
    second = figures.principal_components(after, 3, like=first)
    assert ((first * second).sum(axis=(1, 2, 3)) > 0.99).all()
    assert len(figures.principal_components(draw.normal(size=(2, 2, 3, 5)), 28)) == 5  # as many as there can be


def test_similarity_is_the_cosine():
    positions = np.random.default_rng(0).normal(size=(6, 16))
    found = figures.similarity(positions, (2, 3))
    for a in range(6):
        for b in range(6):
            expected = positions[a] @ positions[b] / np.sqrt((positions[a] ** 2).sum() * (positions[b] ** 2).sum())
            assert abs(found[a // 3, a % 3, b // 3, b % 3] - expected) < 1e-12


def test_calibration_is_the_plain_computation(predictions):
    logits, labels = predictions
    mean, accuracy, count, error = figures.calibration(logits, labels, bins=10)
    expected = 0.0
    for number in range(10):
        inside = []
        for row, label in zip(logits.astype(np.float64), labels, strict=True):
            probabilities = np.exp(row) / np.exp(row).sum()
            if number / 10 < probabilities.max() <= (number + 1) / 10:
                inside.append((probabilities.max(), probabilities.argmax() == label))
        assert count[number] == len(inside)
        if inside:
            sure, right = np.mean(inside, axis=0)
            np.testing.assert_allclose((mean[number], accuracy[number]), (sure, right))
            expected += len(inside) / len(labels) * abs(sure - right)
    assert count.sum() == len(labels) and abs(error - expected) < 1e-12
    figure = figures.reliability(logits, labels, bins=10)
    assert f"expected calibration error {100 * expected:.2f} %" in figure.axes[0].get_title(loc="left")
    bars = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(bars, 100 * accuracy[count > 0])


def test_a_model_that_is_always_sure_and_right_is_calibrated():
    labels = np.arange(5, dtype=np.int32)
    assert figures.calibration(1000 * np.eye(5, dtype=np.float32), labels)[3] == 0
    assert figures.calibration(1000 * np.eye(5, dtype=np.float32), labels[::-1])[3] == pytest.approx(0.8)


LINES = [
    {"step": step, "train/loss": 4.0 / step, "train/learning_rate": 0.1 * step}
    | ({"test/loss": 1.0, "test/accuracy": step / 100, "test/accuracy_top5": 1.0} if step % 10 == 0 else {})
    for step in range(1, 41)
]


def test_curves_show_the_lines_of_the_metrics():
    loss, accuracy, rate = figures.curves({"one": LINES}).axes
    raw, mean, test = loss.get_lines()
    np.testing.assert_allclose(raw.get_ydata(), [line["train/loss"] for line in LINES])
    assert len(mean.get_xdata()) == 39 and mean.get_ydata()[0] == pytest.approx(np.mean([4.0, 2.0]))
    assert list(test.get_xdata()) == [10, 20, 30, 40]
    np.testing.assert_allclose(accuracy.get_lines()[0].get_ydata(), [10, 20, 30, 40])
    np.testing.assert_allclose(accuracy.get_lines()[1].get_ydata(), 100)
    np.testing.assert_allclose(rate.get_lines()[0].get_ydata(), [line["train/learning_rate"] for line in LINES])


def test_curves_of_several_runs_lie_over_each_other_in_a_colour_each():
    figure = figures.curves({"one": LINES, "two": LINES[:20], "three": []})
    loss, accuracy, rate = figure.axes
    assert len(loss.get_lines()) == 6 and len(accuracy.get_lines()) == len(rate.get_lines()) == 3
    assert len({line.get_color() for line in rate.get_lines()}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two", "three"]
    drawn(figure)


def test_curves_of_many_runs_with_long_names_are_told_apart():
    names = [f"a-run-that-has-a-rather-long-name-as-sweeps-give-them-to-{'their-' * 8}runs-{number}" for number in range(10)]
    figure = figures.curves(dict.fromkeys(names, LINES))
    drawn(figure)
    drawn_as = {
        (matplotlib.colors.to_hex(line.get_color()), str(line._unscaled_dash_pattern)) for line in figure.axes[2].get_lines()
    }
    assert len(drawn_as) == 10
    told = figure.legends[0].get_texts()
    assert [text.get_text().replace("\n", "") for text in told] == names
    box, room = figure.legends[0].get_window_extent(), figure.bbox
    assert room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0
    assert figure.axes[0].get_window_extent().width > 0.8 * room.width


@pytest.mark.parametrize("lines", [[], LINES[:1], [{"step": 3, "test/accuracy": 0.5}]])
def test_curves_of_a_run_that_has_just_begun(lines):
    drawn(figures.curves({"one": lines}))


def test_images_are_shown_as_they_are():
    draw = np.random.default_rng(0)
    originals = draw.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    seen = draw.random((5, 16, 16, 3))
    figure = figures.training_images(originals, seen, [f"$name {i}_" for i in range(5)])
    assert texts(figure.axes[0]) == [f"$name {i}_" for i in range(5)]
    canvas = drawn(figure)
    # Every colour of every image is there, and in the place of an image's pixel there is its colour.
    colours = set(map(tuple, np.rint(255 * canvas.reshape(-1, 3)).astype(int)))
    assert set(map(tuple, originals.reshape(-1, 3).astype(int))) <= colours
    assert set(map(tuple, np.rint(255 * seen.reshape(-1, 3)).astype(int))) <= colours
    assert canvas.shape[1] == 800


def test_images_that_are_not_square_keep_their_shape():
    figures_of = [np.zeros((8, 16, 3), np.uint8), np.zeros((16, 8, 3), np.uint8)]
    for image in figures_of:
        canvas = drawn(figures.mistakes(np.stack([image]), ["a\nb"]))
        dark = (canvas.sum(axis=-1) == 0)[50:]
        height, width = (np.flatnonzero(dark.any(axis=axis)).size for axis in (1, 0))
        assert height / width == pytest.approx(image.shape[0] / image.shape[1], rel=0.05)


@pytest.mark.parametrize("colour", [(1, 1, 1), (0, 0, 0), (1, 0, 0)])
def test_rollout_has_its_colours_over_images_of_any(colour):
    mask = np.full((1, 4, 4), 0.5, np.float32)
    mask[0, 3, 0] = 1
    figure = figures.rollout(np.broadcast_to(colour, (1, 32, 32, 3)), {"after": mask}, ["plain"])
    canvas, side, top = drawn(figure), 398, 2 * 27 + 6
    overlaid = canvas[top : top + side, -side:]
    grey = np.dot(colour, (0.299, 0.587, 0.114))
    for at, share in [((-20, 20), 1.0), ((20, -20), 0.0)]:  # the largest value's end of the scale, and the smallest's
        np.testing.assert_allclose(overlaid[at], (grey + np.array(matplotlib.colormaps["viridis"](share))[:3]) / 2, atol=0.01)
    np.testing.assert_allclose(canvas[top + 5, 5], colour, atol=0.01)  # beside it as it is
    assert texts(figure.axes[1]) == ["least", "most"]
    figure = figures.rollout(np.ones((3, 8, 8, 3)), {"before": np.ones((3, 2, 2)), "after": np.ones((3, 2, 2))}, list("abc"))
    assert [text for text in texts(figure.axes[0]) if len(text) > 1] == 2 * ["image", "before", "after"]


def test_heads_are_named():
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
    np.testing.assert_allclose(image[3:, 4:7], figures.similarity(rows, (2, 3))[1, 1])
    assert len(figure.axes) == 3  # with the scale of colours
    drawn(figure)


def test_attention_distances_are_a_dot_a_head():
    found = np.array([[1.0, 2.0, 4.0], [5.0, 6.0, 7.0]])
    figure = figures.attention_distance({"before": found, "after": found + 1})
    offsets = figure.axes[1].collections[0].get_offsets()
    np.testing.assert_allclose(offsets, [(1, 2), (1, 3), (1, 5), (2, 6), (2, 7), (2, 8)])
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim() and figure.axes[0].get_ylim()[1] > 8


def test_confusion_counts_the_worst_classes(predictions):
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
def test_accuracies_of_many_classes_can_be_read(count):
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


def test_the_wider_accuracy_lies_behind():
    figure = figures.per_class({"a": 0.5, "b": 0.25}, {"a": 0.75, "b": 0.5})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [75, 50, 50, 25]


def test_colours_can_be_told_apart():
    def lab(colour):  # https://en.wikipedia.org/wiki/CIELAB_color_space, of sRGB under D65
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
        f = np.cbrt(xyz / (0.9505, 1, 1.089))
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    used = [*canvas.COLOURS, "#ffffff"]
    assert min(np.linalg.norm(lab(a) - lab(b)) for i, a in enumerate(used) for b in used[:i]) > 20


@pytest.mark.parametrize(("share", "count"), [(0.802, 500), (1.0, 50), (0.0, 50), (0.25, 4)])
def test_wilson_interval_ends_where_the_score_test_rejects(share, count):
    low, high = figures.wilson(share, count)
    assert 0 <= low <= share <= high <= 1
    for end in {float(low), float(high)} - {0.0, 1.0}:
        assert abs(share - end) / np.sqrt(end * (1 - end) / count) == pytest.approx(1.959964, rel=1e-4)
    assert high - low == pytest.approx({500: 0.0697, 50: 0.0713, 4: 0.6530}[count], abs=2e-3)


def test_class_accuracies_have_intervals():
    figure = figures.per_class({"a": 0.5, "b": 0.25}, None, {"a": 50, "b": 4})
    [lines] = figure.axes[0].collections
    ends = [(segment[0][0], segment[1][0]) for segment in lines.get_segments()]
    np.testing.assert_allclose(ends, 100 * np.transpose(figures.wilson([0.5, 0.25], [50, 4])))


@pytest.mark.parametrize("count", [10, 40, 100])
def test_class_names_can_be_read_on_a_phone(count):
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
    for true in range(count):
        for predicted in range(count):
            expected = np.mean(logits[labels == true].argmax(axis=1) == predicted)
            assert axis.get_images()[0].get_array()[true, predicted] == pytest.approx(expected)
    if count == 4:
        assert sum(int(text.get_text()) for text in axis.texts) == 500
    drawn(figure)


def with_norms(scale):
    return [line | {"train/gradient_norm": scale, "train/loss": scale * line["train/loss"]} for line in LINES]


def test_gradient_norm_is_drawn_where_it_was_written():
    *_, norm = figures.curves({"one": with_norms(1.5)}).axes
    assert norm.get_title(loc="left") == "gradient norm" and norm.get_xlabel() == "step"
    np.testing.assert_allclose(norm.get_lines()[0].get_ydata(), 1.5)


@pytest.mark.parametrize("others", [1, 2, 9])
def test_a_diverged_run_does_not_flatten_the_others(others):
    runs = {f"run {i}": with_norms(1 + 0.1 * i) for i in range(others)} | {"diverged": with_norms(1e20)}
    loss, *_, norm = figures.curves(runs).axes
    assert 3 < loss.get_ylim()[1] < 8 and 1 < norm.get_ylim()[1] < 3
    assert "shown up to" in loss.get_title(loc="left") and "shown up to" in norm.get_title(loc="left")
    loss, *_, norm = figures.curves({"a": with_norms(1), "b": with_norms(2)}).axes
    assert loss.get_title(loc="left") == "loss" and norm.get_title(loc="left") == "gradient norm"


def test_curves_of_a_single_diverged_run_are_logarithmic():
    lines = [{"step": step, "train/loss": 2.3 if step < 30 else 10.0 ** (step - 28)} for step in range(1, 41)]
    loss, *_ = figures.curves({"one": lines}).axes
    assert loss.get_yscale() == "log" and loss.get_title(loc="left") == "loss, logarithmic"


def test_legend_of_training_and_evaluation_has_no_runs_colour():
    loss, *_ = figures.curves({"one": LINES, "two": LINES}).axes
    handles = loss.get_legend().get_lines()
    assert {line.get_color() for line in handles} == {"#666666"} and not {"#666666"} & set(canvas.COLOURS)


def test_thirty_runs_are_told_apart():
    *_, rate = figures.curves({f"run {i}": LINES for i in range(30)}).axes
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in rate.get_lines()}) == 30
