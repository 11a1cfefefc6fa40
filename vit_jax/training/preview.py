"""What a run will be, before it is one: shapes, memory by XLA's own analysis, time by two steps."""

import time

import jax

from vit_jax.config import Config, check
from vit_jax.training import devices
from vit_jax.training.assemble import assemble


def preview(config: Config) -> str:
    """A text for people. Loads the model, prepares the data where they are not, computes three steps and an evaluation batch.

    Touches no working directory. The memory is the training step's; the test split and the best parameters come on top.
    """
    check(config)
    layout, settings = devices.start(config.run), config.training
    layout.check(settings.batch_size, settings.accumulation)
    parts = assemble(config, layout)
    model, size = parts.model, config.data.image_size
    state = layout.put(parts.state())
    batches = parts.train_feed.train(settings.batch_size, settings.accumulation, config.seed, 0)
    batch, data = next(batches), parts.train_feed.data
    memory = parts.step.lower(state, batch, data).compile().memory_analysis()

    def seconds(act) -> float:
        began = time.perf_counter()
        jax.block_until_ready(act())
        return time.perf_counter() - began

    state, _ = parts.step(state, batch, data)
    jax.block_until_ready(state)
    times = []
    for _ in range(2):
        batch, began = next(batches), time.perf_counter()
        state, measured = parts.step(state, batch, data)
        jax.block_until_ready(measured)
        times.append(time.perf_counter() - began)
    step = min(times)

    evaluations = -(-settings.steps // settings.eval_every)
    eval_size = layout.round_up(min(config.run.eval_batch_size, len(parts.test_feed)))
    eval_batch, _, _ = next(iter(parts.test_feed.evaluation(eval_size)))
    seconds(lambda: parts.predict(state.params, eval_batch, parts.test_feed.data))
    one = seconds(lambda: parts.predict(state.params, eval_batch, parts.test_feed.data))
    evaluation = one * -(-len(parts.test_feed) // eval_size)
    leaves = jax.tree.leaves(state.params)
    total = settings.steps * step + evaluations * evaluation
    tokens = (size // model.stride) ** 2 + (model.classifier == "token")
    lines = [
        f"model       {model.num_layers} blocks of {model.hidden_size}, {model.num_heads} heads, {tokens} tokens, "
        f"{sum(leaf.size for leaf in leaves):,} parameters, {model.num_classes} classes",
        f"data        {config.data.task}: {len(parts.train_feed):,} training and {len(parts.test_feed):,} test pictures, "
        + ("on the device" if data is not None else "streamed"),
        f"batch       {settings.batch_size} pictures of {size}×{size}×3 in {settings.accumulation} slice(s) over "
        f"{layout.describe()}",
        f"memory      {(memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20:,.0f} MiB a device for a step "
        f"({memory.argument_size_in_bytes / 2**20:,.0f} of state and data, {memory.temp_size_in_bytes / 2**20:,.0f} temporary)",
        f"step        {step:.3f} s, {settings.batch_size / step:,.1f} images/s",
        f"evaluation  {evaluation:.1f} s, {evaluations} of them",
        f"run         {settings.steps} steps, about {total / 60:.1f} minutes",
    ]
    return "\n".join(lines)
