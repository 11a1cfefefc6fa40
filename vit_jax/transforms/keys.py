"""Every random key of a run: one for each kind of draw, step and image, so that no draw depends on another.

All are Threefry keys, whose draws are the same under eager evaluation, jit, a mesh and pmap (those of `rbg` are not).
"""

import jax

# Kinds of draws of a run. Numbers are never reused or changed, so that a new kind leaves the draws of the others as they were.
INIT, AUGMENT, DROPOUT = range(3)
LORA = 3
# Kinds of draws of an image, likewise.
CROP, FLIP, RANDAUGMENT, ERASE, MIX = range(5)


def stream(seed: int | jax.Array, kind: int) -> jax.Array:
    """The key of one kind of draw of a run. Called inside the step: a key closed over would be an array to transfer."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), kind)


def example_keys(key: jax.Array, step: int | jax.Array, index: jax.Array) -> jax.Array:
    """A key for every image of a batch, which depends only on the arguments.

    Args:
      key: of the run's augmentation, `stream(seed, AUGMENT)`.
      step: of the training, from 0.
      index: int32 [B], the images' positions in the whole batch, whatever devices and microbatches share it.

    Returns:
      Typed keys [B].
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def fold(keys: jax.Array, kind: int) -> jax.Array:
    """The keys [B] of one kind of draw of each image."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, kind)
