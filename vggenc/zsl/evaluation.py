"""The zero-shot protocol: predictions of an encoder, each way of inference, and what it comes to."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from vggenc.encoder import VGG19Encoder
from vggenc.errors import DataError
from vggenc.options import Options
from vggenc.pipeline import iter_features
from vggenc.zsl.batches import Grids
from vggenc.zsl.data import Indices, ZSLData
from vggenc.zsl.inference import STEPS, combined, cosine, latent_prototypes, self_adaptation
from vggenc.zsl.metrics import class_accuracies, harmonic_mean

METHODS: dict[str, dict[str, Any]] = {
    "attributes": {"transductive": False},
    "hybrid": {"transductive": False},
    "self-adaptation": {"transductive": True, "metric": "cosine"},
    "self-adaptation, Euclidean": {"transductive": True, "metric": "euclidean"},
}
"""Ways of inference; a transductive one learns from the unlabelled test images."""
Result = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What an encoder says of the images of a data set.

    Attributes:
        attributes: `(images, k)`, NaN where the image wasn't asked.
        latent: `(images, k)`, likewise.
    """

    attributes: NDArray[np.float32]
    latent: NDArray[np.float32]


def predict(
    encoder: VGG19Encoder,
    data: ZSLData,
    which: Indices,
    *,
    grids: Grids | None = None,
    options: Options | None = None,
    progress: bool = False,
) -> Predictions:
    """Predict attributes and latent vectors, in evaluation mode; the encoder's own mode stays as it is.

    Args:
        encoder: runs where it lies.
        data: whose images.
        which: images, as rows of `data.paths`.
        grids: cached maps of all images of `data`, in order; None: the images are read.
        options: how images are read and computed.
        progress: show a bar on standard error where that is a terminal, while images are read.

    Raises:
        DataError: images that can't be read, or NaN in a prediction; the message names the first.
    """
    found = [np.full((len(data.paths), encoder.k), np.nan, np.float32) for _ in range(2)]
    if grids:
        chunks = _from_grids(encoder, which, grids)
    else:
        chunks = _from_files(encoder, data, which, options, progress=progress)
    done = 0
    for values in chunks:
        rows = which[done : done + len(values[0])]
        if bad := [row for row, *each in zip(rows, *values, strict=True) if not np.isfinite(each).all()]:
            raise DataError(f"{data.root / data.paths[bad[0]]}: NaN or infinity in what the encoder predicts")
        for all_values, part in zip(found, values, strict=True):
            all_values[rows] = part
        done += len(rows)
    return Predictions(*found)


def _from_files(
    encoder: VGG19Encoder, data: ZSLData, which: Indices, options: Options | None, *, progress: bool
) -> Iterator[list[NDArray[np.floating]]]:
    names = ["attributes", "latent"]
    for batch in iter_features(data.images(which), encoder, names, options=options, progress=progress):
        if bad := [row for row in batch.rows if row.status != "ok"]:
            raise DataError(f"{data.root / bad[0].path} can't be used: {bad[0].error}")
        yield list(batch.features.values())


def _from_grids(encoder: VGG19Encoder, which: Indices, grids: Grids) -> Iterator[list[NDArray[np.floating]]]:
    training = encoder.training
    device = next(encoder.parameters()).device
    encoder.eval()
    try:
        for start in range(0, len(which), 64):
            maps = [maps.to(device) for maps in grids[which[start : start + 64].tolist()]]
            with torch.inference_mode():
                values = encoder.heads(maps, {"attributes", "latent"})
            yield [values[name].cpu().numpy() for name in ("attributes", "latent")]
    finally:
        encoder.train(training)


def evaluate(
    data: ZSLData,
    predictions: Predictions,
    *,
    steps: dict[str, dict[str, int]] | None = None,
    calibration: float = 0.0,
) -> dict[str, Result]:
    """Every way of inference, conventional and, where there are seen test images, generalised.

    Args:
        data: a split.
        predictions: of all its images.
        steps: of self-adaptation, by method and setting, chosen beforehand; None: the last one.
        calibration: subtracted from each cosine with a seen class in the generalised setting (calibrated
            stacking, Chao et al., ECCV 2016).

    Returns:
        By method: `transductive`; `czsl` with `mca` (top-1 on images of unseen classes, among these, averaged
        over classes); `gzsl` with `unseen`, `seen` (among all classes) and their harmonic mean `h`. All are
        from 0 to 1. Both also have `by_step` for self-adaptation, and `by_class`, where a class without test
        images is absent.

    Raises:
        DataError: no test image of an unseen class.
    """
    if not len(data.test_unseen):
        raise DataError("there is no test image of an unseen class")
    prototypes = latent_prototypes(
        predictions.latent[data.trainval], data.labels[data.trainval], data.attributes, data.seen
    )
    settings = {"czsl": (data.test_unseen, data.unseen)}
    if len(data.test_seen):
        settings["gzsl"] = _generalised(data)
    found: dict[str, Result] = {}
    for method, facts in METHODS.items():
        found[method] = dict(facts)
        for setting, (images, classes) in settings.items():
            terms = 1 if method == "attributes" else 2  # cosines that a score is the sum of
            bias = np.where(np.isin(classes, data.seen), -terms * calibration, 0.0).astype(np.float32)
            scores = _scores(method, predictions, images, data.attributes[classes], prototypes[classes], bias)
            by_step = [_outcome(data, images, classes[one.argmax(1)], setting) for one in scores]
            step = (steps or {}).get(method, {}).get(setting, len(by_step) - 1)
            found[method][setting] = dict(by_step[step])
            if len(by_step) > 1:
                found[method][setting] |= {"step": step, "by_step": [_headline(one) for one in by_step]}
    return found


def _scores(
    method: str,
    predictions: Predictions,
    images: Indices,
    attributes: NDArray[np.float32],
    prototypes: NDArray[np.floating],
    bias: NDArray[np.float32],
) -> list[NDArray[np.floating]]:
    mine = predictions.attributes[images], predictions.latent[images]
    if method == "attributes":
        return [cosine(mine[0], attributes) + bias]
    if method == "hybrid":
        return [combined(*mine, (attributes, prototypes)) + bias]
    return list(self_adaptation(*mine, attributes, metric=METHODS[method]["metric"], bias=bias, steps=STEPS))


def _outcome(data: ZSLData, images: Indices, predicted: Indices, setting: str) -> Result:
    accuracies = class_accuracies(predicted, data.labels[images], len(data.classes))
    by_class = {data.classes[i]: float(accuracies[i]) for i in np.flatnonzero(~np.isnan(accuracies))}

    def mean(rows: Indices) -> float:
        there = accuracies[rows][~np.isnan(accuracies[rows])]
        return float(there.mean()) if len(there) else float("nan")

    if setting == "czsl":
        return {"mca": mean(data.unseen), "by_class": by_class}
    seen, unseen = mean(data.seen), mean(data.unseen)
    return {"unseen": unseen, "seen": seen, "h": harmonic_mean(seen, unseen), "by_class": by_class}


def _headline(outcome: Result) -> float:
    return float(outcome["mca"] if "mca" in outcome else outcome["h"])


def confusion(data: ZSLData, predictions: Predictions, setting: str) -> tuple[Indices, NDArray[np.int64]]:
    """How often images of each class are taken for each other one, by attributes alone.

    Args:
        data: a split.
        predictions: of its test images.
        setting: `czsl`: images of unseen classes among these; `gzsl`: all test images among all classes.

    Returns:
        Rows of `data.classes`, and counts `(classes, classes)`: a row a true class, a column a predicted one.
    """
    images, classes = _generalised(data) if setting == "gzsl" else (data.test_unseen, data.unseen)
    predicted = classes[cosine(predictions.attributes[images], data.attributes[classes]).argmax(1)]
    return classes, confusion_matrix(data.labels[images], predicted, labels=classes)


def margins(data: ZSLData, predictions: Predictions) -> tuple[Indices, NDArray[np.floating]]:
    """How clearly each image of `data.test_unseen` is told from other unseen classes, by attributes alone.

    Returns:
        The nearest class of each, as a row of `data.classes`, and its margin: the cosine with its own class
        minus the highest one with another; below 0 where it is taken for that. Infinite where there is but
        one unseen class.
    """
    scores = cosine(predictions.attributes[data.test_unseen], data.attributes[data.unseen])
    own = data.labels[data.test_unseen][:, None] == data.unseen
    best_other = np.where(own, -np.inf, scores).max(1)
    return data.unseen[scores.argmax(1)], scores[own] - best_other


def best_calibration(data: ZSLData, predictions: Predictions) -> float:
    """The calibration, from 0 to 0.5, with the best harmonic mean by attributes; 0 without seen images."""
    if not len(data.test_seen):
        return 0.0
    images, classes = _generalised(data)
    scores = cosine(predictions.attributes[images], data.attributes[classes])
    is_seen = np.isin(classes, data.seen)

    def h(value: float) -> float:
        return float(_outcome(data, images, classes[(scores - value * is_seen).argmax(1)], "gzsl")["h"])

    return float(max(np.linspace(0, 0.5, 101), key=h))


def _generalised(data: ZSLData) -> tuple[Indices, Indices]:
    """Images and classes of the generalised setting."""
    images = np.concatenate([data.test_seen, data.test_unseen])
    return images, np.sort(np.concatenate([data.seen, data.unseen]))


def best_steps(results: dict[str, Result]) -> dict[str, dict[str, int]]:
    """The steps of self-adaptation that did best, by method and setting."""
    return {
        method: {
            setting: int(np.argmax(results[method][setting]["by_step"]))
            for setting in ("czsl", "gzsl")
            if setting in results[method]
        }
        for method, facts in METHODS.items()
        if facts["transductive"]
    }
