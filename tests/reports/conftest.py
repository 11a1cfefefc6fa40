"""A small trained run to report on, and a real browser to open pages in."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure
from PIL import Image

from vit_jax import Config
from vit_jax.files import locked
from vit_jax.models.variants import build, shapes


@pytest.fixture(scope="session")
def finished(tmp_path_factory, request):
    """The folder of a finished run: 12 steps of a tiny ViT on a part of the embedded images, evaluated every 4 steps.

    The processes of one test run share it.
    """
    from vit_jax.training.loop import train

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if hasattr(request.config, "workerinput") else folder) / "finished"
    with locked(folder / "lock", "trains the same run"):
        if not (folder / "done").exists():
            train(_make_config(folder), folder / "tiny")
            (folder / "done").touch()
    return folder / "tiny"


def _make_config(folder: Path) -> Config:
    """The configuration of the run; writes the weights that it starts from."""
    model = build("B/8", hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32, num_classes=5)
    draw = np.random.default_rng(0)
    flat = {name: draw.normal(scale=0.2, size=leaf.shape) for name, leaf in flatten_dict(shapes(model, 32), sep="/").items()}
    np.savez(folder / "start.npz", **{name: leaf.astype(np.float32) for name, leaf in flat.items()})
    config = Config(seed=3)
    config.model.checkpoint = str(folder / "start.npz")
    config.data.task, config.data.image_size = "cifar100_excerpt", 32
    config.data.train_split, config.data.test_split = "train[:64]", "test[:100]"
    config.optimizer.warmup_steps = 2
    config.training.steps, config.training.batch_size = 12, 16
    config.training.eval_every, config.run.eval_batch_size, config.training.save_every = 4, 16, 4
    config.run.expected = {"test/accuracy": 0.25, "test/accuracy of another": 0.5}
    return config


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, which a test may change."""
    return shutil.copytree(finished, tmp_path / "tiny", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are made but saved as one white pixel: for tests that do not depend on how figures look."""
    white = Image.new("RGB", (1, 1), "white")
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: white.save(file, "png"))


@pytest.fixture
def predictions():
    """Logits and labels of 4 classes, most of them correct."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 4, 300)
    return (draw.normal(size=(300, 4)) + 1.5 * np.eye(4)[labels]).astype(np.float32), labels.astype(np.int32)


class Browser:
    """Chromium without a window, controlled by chromedriver over the WebDriver protocol (https://www.w3.org/TR/webdriver2/)."""

    _FLAGS = (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "hide-scrollbars"),
    )

    def __init__(self, folder: Path):
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self._driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                break
        self._base = f"http://127.0.0.1:{found[1]}/session"
        options = {"args": [*(f"--{flag}" for flag in self._FLAGS), f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self._base += "/" + self._call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _call(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, page: Path, width: int) -> None:
        """Opens a page in a window of a width in pixels; below 600, as a phone does."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
        self._call("/url", {"url": page.as_uri()})

    def ask(self, script: str):
        """Returns the result of a script in the page."""
        return self._call("/execute/sync", {"script": script, "args": []})

    def console(self) -> list[dict]:
        """Returns the console messages since the last call."""
        return self._call("/se/log", {"type": "browser"})

    def requests(self) -> list[str]:
        """Returns the addresses requested since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self._call("/se/log", {"type": "performance"})]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def close(self) -> None:
        """Ends the browser and its driver."""
        try:
            urllib.request.urlopen(urllib.request.Request(self._base, method="DELETE"), timeout=60).close()
        finally:
            self._driver.terminate()
            self._driver.wait()
            self._driver.stdout.close()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            pytest.skip(f"needs {program}, as in Debian's packages chromium and chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
