"""What a run has left, read from its files: nothing is computed again, nothing is fetched, nothing in the folder is changed.

A run may still go on, may have been cut off anywhere, and its checkpoint or data may be gone: what is not there is Missing.
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

from vit_jax.checkpoints.catalogue import resolve
from vit_jax.checkpoints.download import FOLDER_WEIGHTS, RUN_WEIGHTS, local
from vit_jax.checkpoints.load import load
from vit_jax.config import Config, check
from vit_jax.config_files import from_json
from vit_jax.data.sources import Source, open_split
from vit_jax.data.tasks import Task, find_prepared, task
from vit_jax.errors import CheckpointError, ConfigError, DataError, ReportError, printable, reason
from vit_jax.files import sha256
from vit_jax.formats.google import read_meta, read_shapes
from vit_jax.models.vit import VisionTransformer

BEFORE = "before"  # what the weights that a run started from are called
_RECORDS = 1000  # read at once


class Missing(Exception):
    """What a part of a report would need and is not there; the message is one sentence for the reader of the page."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder, its configuration, and the lines of its metrics.jsonl in order: those that are whole and of its steps."""

    path: Path
    config: Config
    metrics: list[dict[str, float]]
    diverged: str = ""  # why the run ended early, if a metric was not finite: the console's words

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def task(self) -> Task:
        """The row of TASKS; DataError where this version knows none of that name."""
        return task(self.config.data.task)

    @property
    def step(self) -> int:
        """The last step there is a line of; 0 before there is one."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def finished(self) -> bool:
        """Whether the last step has been evaluated."""
        return bool(self.evaluations) and self.evaluations[-1]["step"] == self.config.training.steps

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The lines with a test accuracy, the one of a step that diverged left out; the last is the headline."""
        whole = self.metrics[:-1] if self.diverged else self.metrics
        return [line for line in whole if "test/accuracy" in line]

    @property
    def evaluated(self) -> int:
        """Number of images of an evaluation; 0 if it is not known here."""
        try:
            return len(self.predictions[1]) if self.finished else len(self.test)
        except (Missing, DataError):
            return 0

    @property
    def parameters(self) -> int:
        """Number of parameters of the run's weights, the head included; 0 if there are none that can be read."""
        try:
            return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(read_shapes(self.weights)))
        except (Missing, CheckpointError, OSError):
            return 0

    @property
    def best(self) -> dict[str, float] | None:
        """The first evaluation of the highest accuracy, as the run itself chooses; None before there is one."""
        return max(self.evaluations, key=lambda line: line["test/accuracy"], default=None)

    def speed(self) -> tuple[float, float] | None:
        """(seconds in training steps, median of images a second); without compilation, evaluations and saves."""
        rates = [rate for line in self.metrics if (rate := line.get("train/images_per_second", 0)) > 0]
        return (sum(self.config.training.batch_size / rate for rate in rates), statistics.median(rates)) if rates else None

    @property
    def splits(self) -> tuple[str, str]:
        """The training and the test split, in TFDS's language; "train" and "test" of a task that this version does not know."""
        data = self.config.data
        try:
            row = self.task
        except DataError:
            return data.train_split or "train", data.test_split or "test"
        return data.train_split or row.train_split, data.test_split or row.test_split

    @property
    def measured(self) -> str:
        """What its accuracy is called: "test accuracy", or "accuracy on train[90%:]" of a run tested on another split."""
        split = self.splits[1]
        return "test accuracy" if split == "test" else f"accuracy on {split}"

    @functools.cached_property
    def weights(self) -> Path:
        """The run's file of weights."""
        for name in RUN_WEIGHTS:
            if (self.path / name).is_file():
                return self.path / name
        raise Missing("There are no weights yet: the run writes them when it saves.")

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """What the JSON beside the weights says; empty where there is none that can be read."""
        try:
            found = read_meta(self.weights)
        except (Missing, CheckpointError):
            found = None
        return found if isinstance(found, dict) else {}

    @functools.cached_property
    def start(self) -> Path:
        """The file the run started from, where it is on this machine and still the same."""
        source = self.config.model.checkpoint
        if not source:
            raise Missing(f"The run started from random weights, {self.config.model.variant}: nothing to compare with.")
        there, path = Path(source).expanduser(), None
        if there.is_dir():
            path = next((there / name for name in FOLDER_WEIGHTS if (there / name).is_file()), None)
        elif there.is_file():
            path = there
        else:
            with contextlib.suppress(CheckpointError):
                path = local(resolve(source))
        if path is None:
            raise Missing(f"What the run started from, {source}, is not on this machine: the comparison with it is left out.")
        if (wanted := self.meta.get("source_sha256")) and sha256(path) != wanted:
            raise Missing(f"{path} is no longer the file that the run started from: the comparison is left out.")
        return path

    @functools.cached_property
    def models(self) -> tuple[dict[str, tuple[VisionTransformer, Any]], str]:
        """Name → (model, parameters), both without heads: what the run started from, where it is here, and what it became.

        With what a caption has to say of them.
        """

        def load_for_run(path: Path) -> tuple[VisionTransformer, Any]:
            try:
                return load(path, num_classes=0, image_size=self.config.data.image_size)
            except ValueError as error:  # a CheckpointError, or a size that its patches do not divide
                raise Missing(str(error)) from None

        found, said = {}, ""
        trained = load_for_run(self.weights)
        try:
            found[BEFORE] = load_for_run(self.start)
            if found[BEFORE][0] != trained[0]:
                del found[BEFORE]
                raise Missing(f"{self.start} holds another architecture than the run's weights: the comparison is left out.")
        except Missing as error:
            said = f" {error}"
        found["fine-tuned" if self.config.model.checkpoint else "trained"] = trained
        if self.weights.name != "final.npz":
            said += f" The weights are those of the best evaluation so far, step {self.meta.get('step', 'unknown')}."
        return found, said

    @functools.cached_property
    def predictions(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits float32 [N, classes] and labels int32 [N] of the last step's evaluation."""
        path = self.path / "predictions.npz"
        if not path.exists():
            raise Missing("There are no predictions yet: the run writes them at its last step.")
        try:
            with open(path, "rb") as file, np.load(file) as arrays:
                logits, labels = arrays["logits"], arrays["labels"]
            if (
                logits.dtype.kind != "f"
                or logits.ndim != 2
                or labels.shape != logits.shape[:1]
                or not labels.size
                or not np.isfinite(logits).all()
            ):
                raise ValueError(f"logits {list(logits.shape)}, labels {list(labels.shape)}")
            if labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < logits.shape[1]:
                raise ValueError("labels that are no classes of its logits")
        except Exception as error:  # what a damaged zip raises depends on where it is damaged
            raise Missing(f"{path} cannot be used ({error}): give the run's command again to have it written anew.") from None
        return logits, labels.astype(np.int64)

    @functools.cached_property
    def test(self) -> Source:
        """The test split; DataError where it is not prepared on this machine."""
        data = self.config.data
        return open_split(self.task, data.test_split or self.task.test_split, self.config.run.data_dir)

    @functools.cached_property
    def train(self) -> Source:
        """The training split; DataError as `test`."""
        data = self.config.data
        return open_split(self.task, data.train_split or self.task.train_split, self.config.run.data_dir)

    @functools.cached_property
    def class_names(self) -> Sequence[str]:
        """A name for each class: what stands beside the weights or else the data set's."""
        names: Any = self.meta.get("class_names")
        known = isinstance(names, list) and all(isinstance(name, str) for name in names)
        # On one line and no two alike, because they are the rows of figures.
        names = [printable(" ".join(name.split()), 200) for name in (names if known else self.test.class_names)]
        return [f"{name} ({at})" if names.count(name) > 1 else name for at, name in enumerate(names)]

    @functools.cached_property
    def _recorded(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / "environment.json").read_text())
        except (OSError, ValueError, RecursionError):
            found = None
        return found if isinstance(found, dict) else {}

    @property
    def environment(self) -> dict[str, str]:
        """Versions, device, command and time, as the run recorded them in environment.json; empty where it did not."""
        return {str(key): str(value) for key, value in self._recorded.items() if key != "warnings"}

    @property
    def warnings(self) -> list[str]:
        """What the run warned about when it began, such as training on test images."""
        found = self._recorded.get("warnings")
        return [str(text) for text in found] if isinstance(found, list) else []


def read(path: Path) -> Run:
    """The run in a folder; ReportError where there is none, or its configuration is damaged."""
    file = path / "config.json"
    if not path.is_dir():
        raise ReportError(f"there is no folder {path}; name a run's, such as runs/demo")
    if not file.is_file():
        raise ReportError(f"{path} is no run's folder: it holds no config.json; name one that main.py has trained in")
    try:
        config = from_json(file.read_text(errors="replace"), str(file))
        check(config)
    except (ConfigError, ValueError, RecursionError, OverflowError) as error:  # the latter of numbers of thousands of digits
        sentence = str(error) if str(file) in str(error) else f"{file}: {reason(error, 400)}"
        raise ReportError(f"{sentence}; put back what the run wrote there") from None
    metrics, diverged, journal = [], "", path / "metrics.jsonl"
    for text in journal.read_text(errors="replace").splitlines() if journal.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # a kill cuts the last line short, and so does reading while it is written
            continue
        # What lies past the last step is another run's.
        if isinstance(line, dict) and type(line.get("step")) is int and line["step"] <= config.training.steps:
            diverged = line["diverged"] if isinstance(line.get("diverged"), str) else ""
            # What is no finite number is not drawn, and is never the best.
            metrics.append({key: value for key, value in line.items() if type(value) in (int, float) and abs(value) < 1e30})
    return Run(path, config, metrics, diverged)


def superclasses(run: Run) -> tuple[list[str], dict[int, int]] | None:
    """The data set's own coarser classes: their names, and class → superclass as the test images have them.

    None where the data set has none. CIFAR-100's are the feature "coarse_label" of TFDS's cifar100.
    """
    import tensorflow_datasets as tfds

    split = run.config.data.test_split or run.task.test_split
    builder = tfds.builder_from_directory(find_prepared(run.task, run.config.run.data_dir))
    if "coarse_label" not in builder.info.features:
        return None
    records: Any = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    found: dict[int, int] = {}
    for first in range(0, len(records), _RECORDS):
        batch = records.__getitems__(range(first, min(first + _RECORDS, len(records))))
        found |= {int(example["label"]): int(example["coarse_label"]) for example in batch}
        if len(found) == run.task.num_classes:
            break
    return list(builder.info.features["coarse_label"].names), found
