"""The learning curves of one run or several."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vit_jax.reports.canvas import COLOURS, DASHES, GREY, LINE, WIDTH, with_style

_THIN: Any = {"linewidth": 0.8, "alpha": 0.6}  # training losses of several runs


@with_style
def learning_curves(
    runs: Mapping[str, Sequence[Mapping[str, float]]], accuracy_label: str = "test accuracy", split: str = "test"
) -> Figure:
    """Draws loss, accuracy, learning rate and gradient norm by step, of one run or of several over each other.

    For one run, the training loss of each step is pale, with its running mean over a twentieth of the run. With several
    runs, each has its own colour and, from the eighth on, its own dashes; their training losses are thin.

    Args:
      runs: name → the lines of metrics.jsonl. The gradient norm is left out if no line has it.
      accuracy_label: the name of the accuracy.
      split: whose metrics are drawn: "test" or "validation".
    """
    single = len(runs) == 1
    labels = ["\n".join(textwrap.wrap(name, 58)) for name in runs]
    norms = any("train/gradient_norm" in line for lines in runs.values() for line in lines)
    below = LINE * (not single) * sum(label.count("\n") + 1 for label in labels)
    figure = Figure((WIDTH, 5 + norms + below), layout="constrained")
    loss, accuracy, rate, *norm = figure.subplots(3 + norms, sharex=True, height_ratios=(3, 3, 1.6, 1.6)[: 3 + norms])
    for index, (label, lines) in enumerate(zip(labels, runs.values(), strict=True)):
        colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
        style: Any = {"color": colour, "linestyle": dashes, "linewidth": 1.3}
        test = style | {"color": COLOURS[1]} if single else style | {"linewidth": 1.6}
        mark: Any = {"marker": "o", "markersize": 3} if len(_series(lines, f"{split}/accuracy")[0]) < 60 else {}
        x, y = _series(lines, "train/loss")
        if single:
            loss.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
        loss.plot(*_running_mean(x, y), **(style if single else style | _THIN), label="training, running mean")
        loss.plot(*_series(lines, f"{split}/loss"), **test, **mark, label="evaluation")
        x, y = _series(lines, f"{split}/accuracy")
        accuracy.plot(x, 100 * y, **test, **mark, label="top-1")
        if single:
            x, y = _series(lines, f"{split}/accuracy_top5")
            accuracy.plot(x, 100 * y, **test | {"linestyle": ":"}, **mark, label="top-5")
        rate.plot(*_series(lines, "train/learning_rate"), **style, label=label)
        for axis in norm:
            axis.plot(*_series(lines, "train/gradient_norm"), **style | {"linewidth": 0.9})
    for axis, title in [(loss, "loss"), *((axis, "gradient norm") for axis in norm)]:
        axis.set_title(title + _limit_scale(axis, len(runs)))
    accuracy.set_title(f"{accuracy_label}, %")
    rate.set(title="learning rate", ylim=(0, None))
    figure.axes[-1].set_xlabel("step")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    if single:
        loss.legend(handles=loss.get_lines()[-2:])
        accuracy.legend()
    else:
        kinds: Any = [("training, running mean", _THIN), ("evaluation", {"linewidth": 1.6})]
        loss.legend(handles=[Line2D([], [], color=GREY, label=label, **style) for label, style in kinds])
        figure.legend(handles=rate.get_lines(), loc="outside lower left", handlelength=3)
    return figure


def _series(lines: Iterable[Mapping[str, float]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (steps, values) of a metric."""
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    x, y = np.array(found, np.float64).reshape(-1, 2).T
    return x, y


def _running_mean(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean over a twentieth of the values around each step."""
    if not len(y):
        return x, y
    window = max(1, len(y) // 20)
    y = np.convolve(y, np.ones(window) / window, "valid")
    return x[window // 2 :][: len(y)], y


def _limit_scale(axis: Axes, runs: int) -> str:
    """Prevents a run that diverged from flattening the other lines of an axis.

    A single run gets a logarithmic axis. With several runs, which have equally many lines each, the axis ends above the
    lines of usual height.

    Returns:
      What the axis' title says about it; empty if nothing was changed.
    """
    lines = [np.asarray(line.get_ydata(), np.float64) for line in axis.get_lines()]
    each = len(lines) // max(runs, 1)
    values = [of for run in range(runs) if (of := np.concatenate(lines[run * each : (run + 1) * each])).size]
    if not values:
        return ""
    if runs == 1:
        if values[0].min() <= 0 or values[0].max() <= 20 * np.median(values[0]):
            return ""
        axis.set_yscale("log")
        return ", logarithmic"
    highest = sorted(float(of.max()) for of in values)
    usual = [value for value in highest if value <= 5 * highest[(len(highest) - 1) // 2]]
    if len(usual) in (0, len(highest)) or usual[-1] <= 0:
        return ""
    axis.set_ylim(min(0, *(float(of.min()) for of in values)), 1.1 * usual[-1])
    return f", shown up to {1.1 * usual[-1]:.3g}"
