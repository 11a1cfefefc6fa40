"""The convolutional root and stages: standardised kernels and the sizes of their outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.resnet import ResNet, StdConv


def test_convolution_ignores_scale_and_offset_of_its_kernel():
    draw = np.random.default_rng(0)
    images = jnp.asarray(draw.normal(size=(2, 7, 7, 4)), jnp.float32)
    kernel = jnp.asarray(draw.normal(size=(3, 3, 4, 5)), jnp.float32)
    conv = StdConv(5, 3, stride=2)
    found, changed = (conv.apply({"params": {"kernel": leaf}}, images) for leaf in (kernel, 3 * kernel + 2))
    assert found.shape == (2, 4, 4, 5)
    np.testing.assert_allclose(changed, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("blocks", "stride"), [((), 4), ((1,), 4), ((1, 2, 1), 16)])
def test_every_stage_but_the_first_halves_the_image(blocks, stride):
    resnet, images = ResNet(blocks, width=32), jax.ShapeDtypeStruct((2, 64, 32, 3), jnp.float32)
    output, _ = jax.eval_shape(resnet.init_with_output, jax.random.key(0), images)
    channels = 32 * 2 ** (len(blocks) - 1) * 4 if blocks else 32
    assert output.shape == (2, 64 // stride, 32 // stride, channels)
