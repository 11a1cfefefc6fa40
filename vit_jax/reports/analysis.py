"""The numbers that figures show: probabilities, principal components, similarities, calibration, intervals. NumPy only."""

import numpy as np
from numpy.typing import ArrayLike


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities float64 [N, classes] of logits [N, classes]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def principal_components(kernel: np.ndarray, count: int, like: np.ndarray | None = None) -> np.ndarray:
    """Computes the first principal components of filters.

    The sign of a component is arbitrary. It is chosen such that the largest entry is positive or, with `like`, such that
    the component correlates with the component of the same number there.

    Args:
      kernel: filters [h, w, C, filters].
      count: number of components; fewer if there are not as many.
      like: components of another kernel, [count, h, w, C].

    Returns:
      float64 [count, h, w, C], each of unit length.
    """
    filters = kernel.reshape(-1, kernel.shape[-1]).T.astype(np.float64)
    count = min(count, *filters.shape)
    found = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)[2][:count]
    towards = (np.abs(found) == np.abs(found).max(axis=1, keepdims=True)).astype(np.float64)
    if like is not None and len(like) == count and like[0].size == found.shape[1]:
        towards = like.reshape(count, -1)
    found = found * np.where((found * towards).sum(axis=1, keepdims=True) < 0, -1, 1)
    return found.reshape(count, *kernel.shape[:3])


def similarity(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Returns the cosine similarity of every patch's position embedding with all others.

    Args:
      positions: embeddings [h · w, D].
      grid: (h, w).

    Returns:
      [h, w, h, w], in [-1, 1].
    """
    unit = positions / np.maximum(np.linalg.norm(positions, axis=1, keepdims=True), 1e-12)
    return (unit @ unit.T).reshape(*grid, *grid)


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Computes accuracy by confidence and the expected calibration error.

    Guo et al., "On Calibration of Modern Neural Networks" (2017), equation 3, with bins of equal width.

    Args:
      logits: [N, classes].
      labels: integers [N].
      bins: number of bins of the confidence.

    Returns:
      (mean confidence [bins], accuracy [bins], number of images [bins], expected calibration error); NaN in empty bins.
    """
    probabilities = softmax(logits)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bin_index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bin_index, confidence, bins) / count
        accuracy = np.bincount(bin_index, correct, bins) / count
    return mean, accuracy, count, float(np.nansum(count * np.abs(mean - accuracy)) / len(labels))


def wilson(accuracy: ArrayLike, count: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends (lower, upper) of Wilson's 95 % interval, in [0, 1].

    Args:
      accuracy: accuracies in [0, 1].
      count: number of images that each was measured on.
    """
    share, count, z = np.asarray(accuracy, np.float64), np.asarray(count, np.float64), 1.959964
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return np.clip(centre - half, 0, share), np.clip(centre + half, share, 1)  # exactly 0 and 1 if those were measured


def confusion_counts(logits: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts how often images of each true class (row) were predicted as each class (column).

    Returns:
      (counts [classes, classes], the same as shares of the row).
    """
    counts = np.bincount(labels * classes + logits.argmax(axis=1), minlength=classes**2).reshape(classes, classes)
    return counts, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
