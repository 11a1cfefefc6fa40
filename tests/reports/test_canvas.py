"""What the figures share."""

import matplotlib.colors
import numpy as np

from vit_jax.reports import canvas


def test_colours_are_distinguishable():
    def lab(colour):  # https://en.wikipedia.org/wiki/CIELAB_color_space, of sRGB under D65
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
        f = np.cbrt(xyz / (0.9505, 1, 1.089))
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    used = [*canvas.COLOURS, "#ffffff"]
    assert min(np.linalg.norm(lab(a) - lab(b)) for i, a in enumerate(used) for b in used[:i]) > 20
