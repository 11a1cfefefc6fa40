"""The training step of published models, as XLA compiles it for an H100 and an A100."""

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import pytest

from tests.gpu_program.checks import attention_arrays, attention_calls, float32_products
from vit_jax.models import vit
from vit_jax.training import hlo

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
# Fields of a run; the batch and the size are those of a row in the table of docs/performance.md. The slowest come first.
MODELS = {
    "B/16": dict(model="B/16", size=224, batch=64, dropout=0.1, remat=False),
    "L/16, remat": dict(model="L/16", size=384, batch=64, dropout=0.0, remat=True),
    "B/16, 256": dict(model="B/16", size=224, batch=256, dropout=0.0, remat=False),
}
RUNS = {f"{name}, {card}": dict(card=card, **fields) for name, fields in MODELS.items() for card in ("h100", "a100")}
LAYERS = {"B/16": 12, "L/16": 24}


# One model on each card and each model on one are compiled in CI.
FULL = ("L/16, remat, a100", "B/16, 256, a100")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in RUNS])
def run(request, plans):
    return RUNS[request.param], plans[request.param]


@pytest.fixture(scope="module")
def plans(request, train_step):
    """The programs of the selected tests; two are compiled at once, each on little more than one core."""
    chosen = {item.callspec.params["run"] for item in request.session.items if "run" in item.fixturenames}
    names = [name for name in RUNS if name in chosen]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: train_step(**RUNS[name]), names), strict=True))


def documented(card: str, model: str, size: int, batch: int, dropout: float, remat: bool) -> float:
    """The bytes that docs/performance.md gives for a training step."""
    name = f"{model}, remat" if remat else model
    row = rf"^\| {name} \| {size} \| {batch} \| {dropout:g} \| {card} \| ([\d.]+) \|"
    return 1e9 * float(re.search(row, PAGE.read_text(), re.MULTILINE)[1])


def test_cudnn_computes_attention_in_every_block(run):
    fields, plan = run
    blocks = LAYERS[fields["model"]]
    # With remat a block is computed again for the gradient, attention with it.
    assert attention_calls(plan) == ((2 if fields["remat"] else 1) * blocks, blocks)


def test_only_resizing_and_head_multiply_in_float32(run):
    assert float32_products(run[1]) == []


def test_no_attention_weights_are_stored(run):
    fields, plan = run
    assert attention_arrays(plan, fields["model"], fields["size"], fields["batch"]) == set()


def test_memory_is_what_the_page_says(run):
    fields, plan = run
    assert 0.9 * documented(**fields) < plan.arguments + plan.temporary <= 1.03 * documented(**fields)


@pytest.fixture(scope="module")
def on_eight_cards(train_step):
    """The programs of two meshes, compiled at once."""
    runs = [dict(batch=512), dict(model="S/16", batch=64, mesh="fsdp:8")]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda fields: train_step(card="h100", devices=8, dropout=0.0, **fields), runs))


def test_eight_cards_exchange_only_gradients(on_eight_cards):
    """In the types of the products that they come from, while the backward pass goes on; activations stay where they are."""
    found = hlo.collectives(on_eight_cards[0].module)
    assert {collective.opcode for collective in found} == {"all-reduce"}
    assert all(collective.asynchronous for collective in found)
    assert {kind for collective in found for kind in collective.types} == {"bf16", "f32"}
    parameters = 85_875_556
    sizes = {kind: sum(c.bytes for c in found if c.types == (kind,)) for kind in ("bf16", "f32")}
    assert 1.9 * parameters < sizes["bf16"] < 2.1 * parameters and sizes["f32"] < 0.05 * sizes["bf16"]


def test_fsdp_gathers_parameters_and_scatters_gradients_in_pieces(on_eight_cards):
    """Both while kernels run; what is reduced on all cards is small: the arrays that do not divide, and the norm."""
    parameters = 21_704_164
    found = hlo.collectives(on_eight_cards[1].module)
    size = {
        opcode: sum(c.bytes for c in found if c.opcode == opcode) for opcode in ("all-gather", "reduce-scatter", "all-reduce")
    }
    assert {c.opcode for c in found} == size.keys()
    assert 2 * parameters < size["all-gather"] < 4 * parameters  # between bfloat16 and float32
    assert 1.9 * parameters < 8 * size["reduce-scatter"] < 2.1 * parameters and size["all-reduce"] < 0.01 * parameters
    for opcode in ("all-gather", "reduce-scatter"):
        large = [c for c in found if c.opcode == opcode and c.bytes > 0.1 * size[opcode]]
        assert len(large) > 1 and all(c.asynchronous and c.meanwhile for c in large)


SMALL = dict(card="h100", model="Nano/8", size=64, batch=32, dropout=0.0)  # 4 blocks


def test_attention_by_xla_is_found(train_step):
    plan = train_step(**SMALL, attention="xla")
    assert attention_calls(plan) == (0, 0) and attention_arrays(plan, "Nano/8", 64, 32)


def test_float32_in_the_mlp_is_found(train_step, monkeypatch):
    block = vit.MlpBlock
    monkeypatch.setattr(vit, "MlpBlock", lambda fields, name: block(dataclasses.replace(fields, dtype=jnp.float32), name=name))
    plan = train_step(**SMALL)
    found = float32_products(plan)
    assert len(found) >= 3 * 2 * 4 and all("MlpBlock_3" in scope for scope in found)
    assert attention_calls(plan) == (4, 4) and not attention_arrays(plan, "Nano/8", 64, 32)
