"""From attributes and latent vectors to classes: the three ways of LFGAA (Liu et al., ICCV 2019).

Each gives scores `(images, classes)`, higher for a better fit; a label is the highest.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.linear_model import Ridge

from vggenc.errors import one_of

Array = NDArray[np.floating]
METRICS = ("cosine", "euclidean")
STEPS = 10
"""Of self-adaptation, as published."""


def unit(x: Array) -> Array:
    """Rows at length 1; a row of zeros stays one."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    result: Array = np.divide(x, length, out=np.zeros_like(x), where=length != 0)
    return result


def cosine(x: Array, prototypes: Array) -> Array:
    """Cosine of each row with each prototype, `(images, classes)`; 0 where either is zero."""
    return unit(x) @ unit(prototypes).T


def combined(
    attributes: Array, latent: Array, prototypes: tuple[Array, Array], metric: str = "cosine"
) -> Array:
    """How well both vectors of an image fit both prototypes of a class.

    Args:
        attributes: `(images, k)`.
        latent: `(images, k)`.
        prototypes: of attributes and of latent vectors, each `(classes, k)`.
        metric: `cosine`: the sum of both cosines. `euclidean`: latent vectors by 1 / (1 + squared distance)
            instead, and both parts at length 1 over the classes, as the published code has it.

    Raises:
        UsageError: another metric.
    """
    if metric not in METRICS:
        raise one_of("metric", metric, METRICS)
    by_attributes = cosine(attributes, prototypes[0])
    if metric == "cosine":
        return by_attributes + cosine(latent, prototypes[1])
    squares = cdist(latent, prototypes[1], "sqeuclidean").astype(latent.dtype)
    return unit(by_attributes) + unit(1 / (1 + squares))


def self_adaptation(
    attributes: Array,
    latent: Array,
    prototypes: Array,
    *,
    metric: str = "cosine",
    bias: Array | float = 0.0,
    steps: int = STEPS,
) -> Iterator[Array]:
    """Scores before and after each step of self-adaptation, `steps + 1` times `(images, classes)`.

    The first are the attributes' alone. A step takes the mean of each pseudo-class for its prototypes, of
    attributes at length 1 and of latent vectors (at length 1 for `cosine`); a class without an image takes
    the mean of all. **Transductive**: it learns from the unlabelled test images.

    Args:
        attributes: `(images, k)`, of all test images.
        latent: `(images, k)`.
        prototypes: `(classes, k)`, the classes' own attributes.
        metric: as for `combined`.
        bias: `(classes,)`, added to scores before labels are taken.
        steps: how many.

    Raises:
        UsageError: another metric.
    """
    scores = cosine(attributes, prototypes) + bias
    yield scores
    directions = unit(attributes)
    positions = unit(latent) if metric == "cosine" else latent
    for _ in range(steps):
        member = np.eye(len(prototypes), dtype=attributes.dtype)[scores.argmax(1)]
        counts = member.sum(0)[:, None]
        means = []
        for vectors in (directions, positions):
            own = np.divide(member.T @ vectors, counts, out=np.zeros_like(prototypes), where=counts > 0)
            means.append(np.where(counts > 0, own, vectors.mean(0)))
        scores = combined(attributes, latent, (means[0], means[1]), metric) + bias
        yield scores


def latent_prototypes(
    latent: Array, labels: NDArray[np.int64], attributes: Array, seen: NDArray[np.int64]
) -> Array:
    """The latent prototype of each class, `(classes, k)`, for hybrid inference.

    A seen class has the mean of its training images. Any other one has the same mixture of these as its
    attributes are of theirs, by ridge regression (alpha 1) on attributes at length 1.

    Args:
        latent: `(images, k)`, of training images.
        labels: their classes, as rows of `attributes`.
        attributes: `(classes, k)`.
        seen: rows of the seen classes; each has an image.
    """
    found = np.empty((len(attributes), latent.shape[1]), latent.dtype)
    for row in seen:
        found[row] = latent[labels == row].mean(0)
    others = np.setdiff1d(np.arange(len(attributes)), seen)
    if len(others):
        directions = unit(attributes)
        mixture = Ridge(alpha=1).fit(directions[seen].T, directions[others].T).coef_.reshape(len(others), -1)
        found[others] = mixture @ found[seen]
    return found
