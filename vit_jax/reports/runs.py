"""Reads what a run has left in its files. It computes nothing again, downloads nothing and changes nothing in the folder.

A run may still be training, it may have been killed at any point, and its checkpoint or its data may have been removed. Each
part that is not there raises Missing.
"""

import contextlib
import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax import metrics
from vit_jax.checkpoints.catalogue import resolve
from vit_jax.checkpoints.download import FOLDER_WEIGHTS, RUN_WEIGHTS, local
from vit_jax.checkpoints.load import load
from vit_jax.config import Config
from vit_jax.config_files import from_json
from vit_jax.config_rules import check
from vit_jax.data.prepared import superclasses
from vit_jax.data.sources import Source
from vit_jax.data.splits import Names, names, open_split
from vit_jax.data.tasks import Task, task
from vit_jax.errors import CheckpointError, ConfigError, DataError, ReportError, printable, reason
from vit_jax.files import FINAL_WEIGHTS, sha256
from vit_jax.formats.google import read_meta, read_shapes
from vit_jax.models.vit import VisionTransformer

BEFORE = "before"  # the name of the weights that a run started from


class Missing(Exception):
    """A part of a report needs something that does not exist. The message is shown on the page."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder and what was read from it.

    Attributes:
      path: the folder.
      config: its configuration.
      metrics: the lines of its metrics.jsonl in order, up to the last step of the configuration; finite numbers only.
      diverged: why the run ended early, if a metric was not finite; else empty.
    """

    path: Path
    config: Config
    metrics: list[dict[str, float]]
    diverged: str = ""

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    @property
    def task(self) -> Task:
        """The row of TASKS; DataError if this version has no task of that name."""
        return task(self.config.data.task)

    @property
    def step(self) -> int:
        """The last step in the metrics; 0 if there is none."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def finished(self) -> bool:
        """Whether the last step has been evaluated, or the one at which `training.patience` ended the run."""
        last, settings = self.evaluations[-1] if self.evaluations else {"step": 0}, self.config.training
        return last["step"] == settings.steps or bool(settings.patience and "test/accuracy" in last)

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The lines with a test accuracy, without a step that diverged."""
        valid = self.metrics[:-1] if self.diverged else self.metrics
        return [line for line in valid if self.chosen_metric in line]

    @property
    def best(self) -> dict[str, float] | None:
        """The first evaluation with the highest accuracy, which the run chooses too; None if there is no evaluation."""
        return max(self.evaluations, key=lambda line: line[self.chosen_metric], default=None)

    @property
    def chosen_metric(self) -> str:
        """The accuracy that chooses the best state: "validation/accuracy" or, without a validation split, "test/accuracy"."""
        return f"{'validation' if self.config.data.validation_split else 'test'}/accuracy"

    @property
    def num_evaluated(self) -> int:
        """Number of images in an evaluation; 0 if it is not known on this machine."""
        if self.splits.validation and not self.finished:
            return 0
        try:
            return len(self.predictions[1]) if self.finished else len(self.test)
        except (Missing, DataError):
            return 0

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the run's weights, including the head; 0 if no weights can be read."""
        try:
            return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(read_shapes(self.weights)))
        except (Missing, CheckpointError, OSError):
            return 0

    def speed(self) -> tuple[float, float] | None:
        """Returns (seconds in training steps, median images per second), without compilation, evaluations and saves."""
        rates = [rate for line in self.metrics if (rate := line.get("train/images_per_second", 0)) > 0]
        return (sum(self.config.training.batch_size / rate for rate in rates), statistics.median(rates)) if rates else None

    @property
    def splits(self) -> Names:
        """The splits of the run; as named in its configuration, else "train" and "test", if this version has no such task."""
        try:
            return names(self.task, self.config.data)
        except DataError:
            return names(Task("", ""), self.config.data)

    @property
    def test_name(self) -> str:
        """The test split as text: "the test split", or "the split train[90%:]"."""
        return "the test split" if self.splits[1] == "test" else f"the split {self.splits[1]}"

    @property
    def test_label(self) -> str:
        """The name of its accuracy on the test split."""
        return "test accuracy" if self.splits.test == "test" else f"accuracy on {self.splits.test}"

    @property
    def chosen_name(self) -> str:
        """The split that chooses the best state as text, and on which every evaluation but the last test is made."""
        return f"the split {self.splits.validation}" if self.splits.validation else self.test_name

    @property
    def accuracy_label(self) -> str:
        """The name of its accuracy: "test accuracy", or "accuracy on train[90%:]" if that is the split it is evaluated on."""
        split = self.splits.validation or self.splits.test
        return "test accuracy" if split == "test" else f"accuracy on {split}"

    @functools.cached_property
    def weights(self) -> Path:
        """The file with the run's weights."""
        for name in RUN_WEIGHTS:
            if (self.path / name).is_file():
                return self.path / name
        raise Missing("There are no weights yet: the run writes them when it saves.")

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """The JSON next to the weights; empty if there is none that can be read."""
        try:
            found = read_meta(self.weights)
        except (Missing, CheckpointError):
            found = None
        return found if isinstance(found, dict) else {}

    @functools.cached_property
    def source_weights(self) -> Path:
        """The file that the run started from, if it is on this machine and unchanged."""
        source = self.config.model.checkpoint
        if not source:
            raise Missing(f"The run started from random weights ({self.config.model.variant}), so there is no comparison.")
        named, path = Path(source).expanduser(), None
        if named.is_dir():
            path = next((named / name for name in FOLDER_WEIGHTS if (named / name).is_file()), None)
        elif named.is_file():
            path = named
        else:
            with contextlib.suppress(CheckpointError):
                path = local(resolve(source))
        if path is None:
            raise Missing(f"The checkpoint that the run started from, {source}, is not on this machine: it is not compared.")
        if (expected := self.meta.get("source_sha256")) and sha256(path) != expected:
            raise Missing(f"{path} has changed since the run started from it: it is not compared.")
        return path

    @functools.cached_property
    def models(self) -> tuple[dict[str, tuple[VisionTransformer, Any]], str]:
        """The models without heads, before (if available) and after training.

        Returns:
          (name → (model, parameters), remarks for the captions, each with a space in front).
        """
        models, remarks = {}, ""
        trained = self._load(self.weights)
        try:
            source = self._load(self.source_weights)
            if source[0] != trained[0]:
                raise Missing(f"{self.source_weights} has another architecture than the run's weights: it is not compared.")
            models[BEFORE] = source
        except Missing as error:
            remarks = f" {error}"
        models["fine-tuned" if self.config.model.checkpoint else "trained"] = trained
        if self.weights.name != FINAL_WEIGHTS:
            remarks += f" The weights are from the best evaluation so far, step {self.meta.get('step', 'unknown')}."
        return models, remarks

    def _load(self, path: Path) -> tuple[VisionTransformer, Any]:
        try:
            return load(path, num_classes=0, image_size=self.config.data.image_size)
        except ValueError as error:  # a CheckpointError, or an image size that the patches do not divide
            raise Missing(str(error)) from None

    @functools.cached_property
    def predictions(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [N, classes] and labels int64 [N] of the last step's evaluation."""
        path = self.path / "predictions.npz"
        if not path.exists():
            raise Missing("There are no predictions yet: the run writes them at its last step.")
        try:
            with open(path, "rb") as file, np.load(file) as arrays:
                logits, labels = arrays["logits"], arrays["labels"]
            if logits.dtype.kind != "f" or logits.ndim != 2 or labels.shape != logits.shape[:1] or not labels.size:
                raise ValueError(f"logits {list(logits.shape)}, labels {list(labels.shape)}")
            if not np.isfinite(logits).all():
                raise ValueError("some logits are not finite")
            if labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < logits.shape[1]:
                raise ValueError(f"labels must be integers from 0 to {logits.shape[1] - 1}")
        except Exception as error:  # the type depends on where a zip file is damaged
            raise Missing(f"{path} cannot be used ({error}): run the command again to write it again.") from None
        return logits, labels.astype(np.int64)

    @functools.cached_property
    def test(self) -> Source:
        """The test split; DataError if it is not prepared on this machine."""
        return self._open(self.splits[1])

    def _open(self, split: str) -> Source:
        data = self.config.data
        return open_split(self.task, split, self.config.run.data_dir, data.image_size, data.on_error)

    @functools.cached_property
    def train(self) -> Source:
        """The training split; DataError if it is not prepared on this machine."""
        return self._open(self.splits[0])

    def superclasses(self) -> tuple[list[str], dict[int, int]] | None:
        """The data set's own coarser classes, see `data.prepared.superclasses`; DataError if it is not prepared here."""
        return superclasses(self.task, self.splits.test, self.config.run.data_dir, self.test.num_classes)

    @functools.cached_property
    def class_names(self) -> Sequence[str]:
        """A name for each class, from the JSON next to the weights, else from the data set. All differ, each is one line."""
        names: Any = self.meta.get("class_names")
        known = isinstance(names, list) and all(isinstance(name, str) for name in names)
        names = [printable(" ".join(name.split()), 200) for name in (names if known else self.test.class_names)]
        return [f"{name} ({label})" if names.count(name) > 1 else name for label, name in enumerate(names)]

    @functools.cached_property
    def _recorded(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / "environment.json").read_text())
        except (OSError, ValueError, RecursionError):
            found = None
        return found if isinstance(found, dict) else {}

    @property
    def environment(self) -> dict[str, str]:
        """Versions, devices, command and time from environment.json; empty if it cannot be read."""
        return {str(key): str(value) for key, value in self._recorded.items() if key != "warnings"}

    @property
    def warnings(self) -> list[str]:
        """The warnings that the run printed when it began, such as training on test images."""
        found = self._recorded.get("warnings")
        return [str(text) for text in found] if isinstance(found, list) else []


def read_run(path: Path) -> Run:
    """Reads the run in a folder.

    Raises:
      ReportError: if there is no run, or its configuration cannot be read.
    """
    file = path / "config.json"
    if not path.is_dir():
        raise ReportError(f"{path}: no such folder; give the folder of a run, such as runs/demo")
    if not file.is_file():
        raise ReportError(
            f"{path}: not the folder of a run, because it has no config.json; give a folder that a run has written"
        )
    try:
        config = from_json(file.read_text(errors="replace"), str(file))
        check(config)
    except (ConfigError, ValueError, RecursionError, OverflowError) as error:  # the last two: endless brackets and digits
        message = str(error) if str(file) in str(error) else f"{file}: {reason(error, 400)}"
        raise ReportError(f"{message}; restore what the run wrote there") from None
    lines = metrics.read(path, until=config.training.steps)
    diverged = lines[-1].get("diverged", "") if lines else ""
    # Numbers that are not finite are not drawn, and are never the best.
    finite = [{name: x for name, x in line.items() if type(x) in (int, float) and abs(x) < 1e30} for line in lines]
    return Run(path, config, finite, diverged if isinstance(diverged, str) else "")
