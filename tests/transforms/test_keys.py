"""Keys of random draws depend on what they are for and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.transforms import keys

data = jax.random.key_data
KINDS = (keys.CROP, keys.FLIP, keys.RANDAUGMENT, keys.ERASE, keys.MIX)


def example_keys(seed=0, step=0, index=(0, 1)) -> np.ndarray:
    return np.asarray(data(keys.example_keys(keys.stream(seed, keys.AUGMENT), step, jnp.asarray(index, jnp.int32))))


def test_example_keys_depend_only_on_seed_step_and_index():
    index = [5, 0, 70000, 5]
    found = example_keys(3, 7, index)
    for i, one in enumerate(index):
        np.testing.assert_array_equal(example_keys(3, 7, [one])[0], found[i])
    np.testing.assert_array_equal(found[0], found[3])
    compiled = jax.jit(keys.example_keys)(keys.stream(3, keys.AUGMENT), 7, jnp.asarray(index, jnp.int32))
    np.testing.assert_array_equal(data(compiled), found)
    for seed, step in ((4, 7), (3, 8), (7, 3)):
        assert (example_keys(seed, step, index) != found).any(axis=1).all()


def test_keys_are_threefry_with_any_default():
    expected = example_keys()
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(example_keys(), expected)


def test_kinds_of_draws_have_different_keys():
    of_run = [tuple(data(keys.stream(0, kind)).tolist()) for kind in (keys.INIT, keys.AUGMENT, keys.DROPOUT)]
    own = keys.example_keys(keys.stream(0, keys.AUGMENT), 0, jnp.arange(1))
    of_image = [tuple(data(keys.fold(own, kind))[0].tolist()) for kind in KINDS]
    assert len({*of_run, *of_image}) == 8


def test_numbers_of_kinds_never_change():
    """Saved runs go on with the draws that they began with."""
    assert (keys.INIT, keys.AUGMENT, keys.DROPOUT, keys.LORA) == (0, 1, 2, 3) and KINDS == (0, 1, 2, 3, 4)
