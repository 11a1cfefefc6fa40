"""What a model sees in pictures: `Classifier` in Python, `python -m vit_jax.predict` on a command line."""

from vit_jax.predict.classifier import Classifier
from vit_jax.predict.pictures import PictureError

__all__ = ["Classifier", "PictureError"]
