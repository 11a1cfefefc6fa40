"""What must hold for every compiled training step of a model; each function returns what it found wrong."""

import math

from vit_jax.models.variants import build
from vit_jax.training import hlo
from vit_jax.training.target import Plan


def attention_calls(plan: Plan) -> tuple[int, int]:
    """The calls of cuDNN's attention in a step: forward, backward."""
    targets = [kernel.target for kernel in plan.kernels if kernel.kind == "attention"]
    backward = sum("Backward" in target for target in targets)
    return len(targets) - backward, backward


def float32_products(plan: Plan) -> list[str]:
    """Where products of float32 come from, but for those of the resizing of images (outside the model) and of the head."""
    return [
        kernel.scope
        for kernel in plan.kernels
        if kernel.flops and kernel.type == "f32" and "VisionTransformer" in kernel.scope and "/head/" not in kernel.scope
    ]


def attention_arrays(plan: Plan, model: str, size: int, batch: int) -> set[tuple[int, ...]]:
    """Shapes of float32 arrays that hold attention weights: for every image and head (tokens)² values, padded or not."""
    geometry = build(model)
    tokens = (size // geometry.stride) ** 2 + 1
    padded = range(tokens, tokens + 9)
    return {
        axes
        for kind, axes in hlo.arrays(plan.text)
        if kind == "f32" and {*axes[-2:]} <= {*padded} and math.prod(axes[:-2]) >= batch * geometry.num_heads
    }
