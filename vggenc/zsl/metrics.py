"""Accuracies of the zero-shot protocol (Xian et al., TPAMI 2019)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.functional.classification import multiclass_accuracy

Labels = NDArray[np.int64]


def class_accuracies(predicted: Labels, labels: Labels, classes: int) -> NDArray[np.float64]:
    """Top-1 accuracy within each class.

    Args:
        predicted: `(images,)`, rows of the class table.
        labels: `(images,)`, the true ones.
        classes: length of the class table.

    Returns:
        `(classes,)`, from 0 to 1; NaN for a class without an image.
    """
    counts = np.bincount(labels, minlength=classes)
    if not len(labels):
        return np.full(classes, np.nan)
    found = multiclass_accuracy(
        torch.from_numpy(predicted), torch.from_numpy(labels), num_classes=max(classes, 2), average=None
    )
    return np.where(counts > 0, found.double().numpy()[:classes], np.nan)


def mean_class_accuracy(predicted: Labels, labels: Labels, classes: int) -> float:
    """MCA: the mean of `class_accuracies` over the classes that have an image; NaN where none has."""
    found = class_accuracies(predicted, labels, classes)
    there = ~np.isnan(found)
    return float(found[there].mean()) if there.any() else float("nan")


def harmonic_mean(seen: float, unseen: float) -> float:
    """H = 2SU / (S + U) of the generalised protocol; 0 where both are 0."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0
