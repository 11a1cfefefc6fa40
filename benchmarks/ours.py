"""The product's own step and forward pass as contestants, built as a run builds them: `python -m benchmarks.ours JSON`.

RandomImages are random uint8 of 32×32, resident on the device; cropping, flipping, resizing and scaling happen in the step.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Contestant, enough, timed
from vit_jax import runtime
from vit_jax.config import Augment, Model, Optimizer, Run
from vit_jax.interop import peers
from vit_jax.models.variants import build, flops
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import devices, optimizer
from vit_jax.training.feed import Feed
from vit_jax.training.state import TrainState, create
from vit_jax.training.step import INIT, logits_of, loss_of, stream, train_step
from vit_jax.transforms.preprocess import for_evaluation, for_training

SEED = 0
OPTIMIZER = optimizer.build(Optimizer(learning_rate=1e-3), 1_000_000)  # clipping, SGD, momentum in bfloat16


@dataclasses.dataclass(frozen=True)
class Work:
    """What is timed."""

    kind: str  # "train" or "inference"
    model: str = "B/16"
    size: int = 224
    batch: int = 64
    classes: int = 100
    dtype: str = "float32"
    attention: str = "auto"
    remat: bool = False
    accumulation: int = 1  # slices that a batch is computed in

    def build(self) -> VisionTransformer:
        """The model, with XLA's attention; ValueError for one that there is not, or a size that it does not divide."""
        model = build(self.model, num_classes=self.classes, dtype=jnp.dtype(self.dtype), remat=self.remat)
        if self.size % model.stride:
            raise ValueError(f"--size {self.size}: {self.model} divides an image into patches of {model.stride} pixels")
        return model

    @property
    def tokens(self) -> int:
        """That the model's blocks see."""
        model = self.build()
        return (self.size // model.stride) ** 2 + (model.classifier == "token")

    @property
    def flops(self) -> int:
        """Of one unit: a step or a forward pass of the batch."""
        return (3 if self.kind == "train" else 1) * self.batch * flops(self.build(), self.size)

    def for_peers(self) -> dict[str, Any]:
        """What peers.py is told."""
        model = self.build()
        names = ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim", "classifier", "representation_size",
                 "resnet", "resnet_width", "num_classes")  # fmt: skip
        geometry = {name: getattr(model, name) for name in names}
        return {"kind": self.kind, "size": self.size, "batch": self.batch, "geometry": geometry}


class RandomImages:
    """A Source of random images in memory."""

    def __init__(self, number: int, classes: int, size: int = 32):
        draw = np.random.default_rng(SEED)
        self.images = draw.integers(0, 256, (number, size, size, 3), np.uint8)
        self.labels = draw.integers(0, classes, number, np.int32)
        self.nbytes, self.image_shape = self.images.nbytes, self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As Source.take."""
        return self.images[index], self.labels[index]


@dataclasses.dataclass
class Ours:
    """A model on the devices with images beside it."""

    work: Work
    num_images: int = 10_000

    def __post_init__(self):
        self.layout = devices.start(Run())
        self.layout.check(self.work.batch, self.work.accumulation)
        model, work = self.work.build(), self.work
        settled = runtime.resolve_auto(
            Model(variant=work.model, dtype=work.dtype, attention=work.attention), model, work.tokens
        )
        self.model = model.clone(attention=settled.attention)
        images = jnp.zeros((1, self.work.size, self.work.size, 3))
        self.params = jax.jit(lambda key: self.model.init(key, images)["params"])(stream(SEED, INIT))
        self.feed = Feed(RandomImages(self.num_images, self.work.classes), self.layout, sys.maxsize)  # type: ignore[arg-type]

    def step(self) -> Any:
        """The training step, compiled when first called."""
        forward = loss_of(self.model, for_training(Augment(), self.work.size), SEED)
        return self.layout.train(functools.partial(train_step, forward=forward, optimizer=OPTIMIZER, seed=SEED))

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """Training batches on the devices."""
        return self.feed.train(self.work.batch, self.work.accumulation, SEED, 0)

    def state(self) -> TrainState:
        """The first state, on the devices."""
        return self.layout.put(create(self.params, OPTIMIZER))

    def predict(self) -> Any:
        """The forward pass, compiled when first called."""
        return self.layout.evaluate(logits_of(self.model, for_evaluation(self.work.size)))

    def training(self) -> peers.Timed:
        """Steps one after the other; the device is waited for at the end alone, as in a run."""
        step, state, batches, data = self.step(), self.state(), self.batches(), self.feed.data

        def steps(n: int) -> None:
            nonlocal state
            for _ in range(n):
                state, _ = step(state, next(batches), data)
            jax.block_until_ready(state)

        return timed(steps), lambda: self._about(step, state, next(batches), data)

    def inference(self) -> peers.Timed:
        """Forward passes one after the other."""
        predict, params, data = self.predict(), self.layout.put(self.params), self.feed.data
        batch, _, _ = next(self.feed.evaluation(self.work.batch))

        def passes(n: int) -> None:
            for _ in range(n):
                logits = predict(params, batch, data)
            jax.block_until_ready(logits)

        return timed(passes), lambda: self._about(predict, params, batch, data)

    def _about(self, program: Any, *arguments: Any) -> dict[str, Any]:
        device = self.layout.devices[0]
        held = peers.about_jax("jax", "flax", "optax", device=device)
        lowered = program.lower(*arguments)
        memory = lowered.compile().memory_analysis()
        planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        planned += memory.output_size_in_bytes - memory.alias_size_in_bytes
        rate = matrix_rate(self.work.dtype) * len(self.layout.devices)
        cost = lowered.cost_analysis()
        held["attention"] = self.model.attention
        return held | {"planned": planned, "xla_flops": cost.get("flops") if cost else None, "rate": rate}


def matrix_rate(dtype: str) -> float:
    """Floating-point operations a second of one device's fastest large product of square matrices of this type."""
    sizes = (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192, 16384)
    precision = "highest" if dtype == "float32" else "default"  # as the model's
    multiply, best = jax.jit(functools.partial(jnp.matmul, precision=precision)), 0.0
    for size in sizes:
        keys = jax.random.split(jax.random.key(SEED))
        a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)

        def products(n: int, a: jax.Array = a, b: jax.Array = b) -> None:
            for _ in range(n):
                last = multiply(a, b)
            last.block_until_ready()

        run: Contestant = timed(products)
        run(1)
        n = enough(run, 0.1)
        best = max(best, 2 * size**3 / min(run(n) / n for _ in range(5)))
    return best


def prepare(work: Work) -> peers.Timed:
    """The contestant of a piece of work."""
    ours = Ours(work)
    return ours.training() if work.kind == "train" else ours.inference()


if __name__ == "__main__":
    peers.serve(lambda: prepare(Work(**json.loads(sys.argv[1]))))
