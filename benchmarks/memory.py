"""The memory of a training step, counted from its program, before any compiler or device has seen it.

The step is traced for one and for two blocks and two batch sizes, and what it needs is linear in both. In the straight line
of its operations, some values take memory from where they are made until where they are last used: what matrix products and
convolutions read and write, what reductions and transcendental functions write. All other values are computed where they are
used, as a compiler's fusion does. State and data lie there all the time; what takes the place of a donated argument is free.
"""

import argparse
import dataclasses
import functools
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from benchmarks.compare import work_of
from benchmarks.measure import Result, say
from benchmarks.ours import OPTIMIZER, SEED, Ours, Work
from vit_jax.config import Augment
from vit_jax.models.variants import shapes
from vit_jax.models.vit import VisionTransformer
from vit_jax.training.state import create
from vit_jax.training.step import loss_of, train_step
from vit_jax.transforms.preprocess import for_training

TABLE = (("B/16", 224), ("B/16", 384), ("L/16", 224), ("L/16", 384), ("H/14", 224), ("H/14", 392))
CARDS = (16, 24, 40, 80, 141)  # GB
SHARE = 0.9  # of a card; the rest is CUDA's, and holes between buffers
_INLINED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_KEPT = _PRODUCTS | {"reduce_sum", "reduce_max", "reduce_window_max", "select_and_scatter_add", "select_and_gather_add"}
_KEPT |= {"concatenate", "gather", "scatter-add", "tanh", "exp", "logistic", "erf", "log"}
_VIEWS = {"reshape", "transpose", "squeeze", "copy", "optimization_barrier"}


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes of a training step: `fixed`, and `image` for each image of a batch."""

    fixed: int
    image: int

    def total(self, batch: int) -> int:
        """Bytes for a batch."""
        return self.fixed + batch * self.image

    def largest(self, memory: float) -> int:
        """The largest batch that fits into so many bytes; from 8 on a multiple of 8; 0 where not even one does."""
        batch = max(0, int((memory - self.fixed) // self.image))
        return batch if batch < 8 else batch - batch % 8


class _Line:
    """The operations of a program in a straight line, with what they call written in their place."""

    def __init__(self, program: Any, ignored: tuple[int, int]):
        self.sizes: list[int] = []
        self.operations: list[tuple[str, list[int], list[int]]] = []
        self._ignored = ignored
        environment: dict[Any, int | None] = {}
        environment |= {v: self._value(v.aval) for v in [*program.jaxpr.constvars, *program.jaxpr.invars]}
        self.inputs = list(range(len(self.sizes)))
        self._walk(program.jaxpr, environment)
        made = [environment[v] for v in program.jaxpr.outvars if not isinstance(v, core.Literal)]
        self.outputs = [x for x in made if x is not None]

    def _value(self, aval: Any) -> int:
        skipped = len(aval.shape) == 4 and aval.shape[2:] == self._ignored
        self.sizes.append(0 if skipped else aval.size * getattr(aval.dtype, "itemsize", 8))
        return len(self.sizes) - 1

    def _walk(self, jaxpr: Any, environment: dict[Any, int | None]) -> None:
        def read(v: Any) -> int | None:
            return None if isinstance(v, core.Literal) else environment[v]

        for equation in jaxpr.eqns:
            inner = next((equation.params[name] for name in _INLINED if name in equation.params), None)
            if inner is not None and len(getattr(inner, "jaxpr", inner).invars) == len(equation.invars):
                inner = getattr(inner, "jaxpr", inner)
                scope: dict[Any, int | None] = {v: self._value(v.aval) for v in inner.constvars}
                scope |= {v: read(given) for v, given in zip(inner.invars, equation.invars, strict=True)}
                self._walk(inner, scope)
                for out, v in zip(equation.outvars, inner.outvars, strict=True):
                    environment[out] = None if isinstance(v, core.Literal) else scope[v]
                continue
            made = [self._value(v.aval) for v in equation.outvars]
            environment |= dict(zip(equation.outvars, made, strict=True))
            self.operations.append((equation.primitive.name, [x for v in equation.invars if (x := read(v)) is not None], made))


def _peak(program: Any, ignored: tuple[int, int] = (0, 0)) -> int:
    """The most bytes that a program's values take at once; those of [., ., *ignored] take none."""
    line = _Line(program, ignored)
    same: dict[int, int] = {}  # a view → what it is a view of
    for name, read, made in line.operations:
        if name in _VIEWS:
            same |= {m: same.get(r, r) for m, r in zip(made, read, strict=True)}
    kept = {same.get(x, x) for name, read, made in line.operations if name in _PRODUCTS for x in read}
    kept |= {same.get(x, x) for name, _, made in line.operations if name in _KEPT for x in made}
    kept |= {*line.inputs}
    donated = {same.get(x, x) for x in line.outputs}
    behind: dict[int, frozenset[int]] = {x: frozenset([x]) for x in line.inputs}  # a value → what it is computed from
    born, dies = dict.fromkeys(line.inputs, 0), dict.fromkeys(line.inputs, len(line.operations))
    for time, (name, read, made) in enumerate(line.operations):
        sources = frozenset[int]().union(*(behind[same.get(x, x)] for x in read))
        if name in _VIEWS:
            continue
        for x in made:
            behind[x] = frozenset([x]) if x in kept else sources
            if x in kept or x in donated:
                born[x] = dies[x] = time
                dies |= {source: max(dies[source], time) for source in sources}
    change = [0] * (len(line.operations) + 2)
    for x in born.keys() - (donated - kept):
        change[born[x]] += line.sizes[x]
        change[dies[x] + 1] -= line.sizes[x]
    return max(itertools.accumulate(change))


def step_program(model: VisionTransformer, size: int, batch: int) -> Any:
    """The product's training step as a jaxpr, on 1,000 resident images."""

    def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    forward = loss_of(model, for_training(Augment(), size), SEED)
    state = jax.eval_shape(lambda: create(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes(model, size)), OPTIMIZER))
    data = {"images": abstract((1000, 32, 32, 3), jnp.uint8), "labels": abstract((1000,), jnp.int32)}
    picked = {name: abstract((1, batch), jnp.int32) for name in ("index", "place")}
    step = functools.partial(train_step, forward=forward, optimizer=OPTIMIZER, seed=SEED)
    return jax.make_jaxpr(step)(state, picked, data)


@functools.lru_cache
def need(work: Work, fused: bool = False) -> Need:
    """What a training step of this model, size and dtype needs, whatever its batch.

    `fused`: attention by a kernel that never holds its weights [B, heads, tokens, tokens], as cuDNN's.
    """
    model, batches = work.build(), (64, 128)
    ignored = (work.tokens, work.tokens) if fused else (0, 0)
    found = []
    for layers in (1, 2):
        few, many = (_peak(step_program(model.clone(num_layers=layers), work.size, b), ignored) for b in batches)
        image = (many - few) // (batches[1] - batches[0])
        found.append((few - batches[0] * image, image))
    (fixed, image), (fixed_2, image_2) = found
    more = model.num_layers - 1
    return Need(fixed + more * (fixed_2 - fixed), image + more * (image_2 - image))


def table(options: argparse.Namespace) -> Result:
    """The largest batch on cards of several sizes, counted from the step's program; with --check, tried on this device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(SHARE))  # JAX has not touched a device yet
    rows = []
    for model, size in TABLE if not options.check else ((options.model, options.size),):
        for remat in (False, True):
            say(f"counting {model} at {size} px{', rematerialised' if remat else ''}")
            work = dataclasses.replace(work_of(options, "train"), model=model, size=size, dtype="bfloat16", remat=remat)
            for fused in (False, True):
                found = need(work, fused)
                row: dict[str, Any] = dict(model=model, size=size, remat=remat, fused=fused)
                row |= dict(fixed=found.fixed, image=found.image)
                row["largest"] = {str(card): found.largest(card * 1e9 * SHARE) for card in CARDS}
                rows.append(row)
    if options.check:
        for row in rows:
            work = work_of(options, "train")
            if row["remat"] == work.remat and row["fused"] == (Ours(work, 1).model.attention == "cudnn"):
                row |= _tried(work, need(work, row["fused"]))
    return Result("memory", rows)


def _tried(work: Work, need: Need) -> dict[str, Any]:
    """The largest batch that this device runs, from the one that was counted; on a CPU, XLA's plan for --batch alone."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    batch = need.largest(limit) if limit else work.batch
    found: dict[str, Any] = {"device_memory": limit, "expected": batch}
    for share in (1.1, 1.0, 0.9, 0.8, 0.7) if limit else (1.0,):
        size = max(1, int(batch * share) // 8 * 8 or batch)
        say(f"trying a batch of {size}")
        ours = Ours(dataclasses.replace(work, batch=size), images=1000)
        step, state, batches = ours.step(), ours.state(), ours.batches()
        try:
            plan = step.lower(state, next(batches), ours.feed.data).compile().memory_analysis()
            if limit:
                jax.block_until_ready(step(state, next(batches), ours.feed.data))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        return found | {"ran": size, "planned": planned, "counted": need.total(size)}
    return found | {"ran": 0}
