"""Nearest neighbours of an image in a features folder."""

import heapq
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from vggenc.checkpoint import load
from vggenc.encoder import VGG19Encoder
from vggenc.errors import ImageError, UsageError
from vggenc.images import decode
from vggenc.options import Options
from vggenc.parts import compared, image_file, iter_parts, read_manifest, vectors
from vggenc.pipeline import iter_features, parameters_sha256
from vggenc.places import is_url
from vggenc.sheets import Panel, draw, missing
from vggenc.weights import REGISTRY

_EXACT_IN_NUMPY = 100_000
"""Rows up to which faiss, where it is installed, isn't asked."""
_COLUMNS = 5
"""Of a contact sheet."""


class Neighbour(NamedTuple):
    """A row of a features folder, and the cosine between its vector and the query's."""

    path: str
    cosine: float


def similar(
    query: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    by: str | None = None,
    top: int = 12,
    weights: str | None = None,
    device: Any = "cpu",
) -> list[Neighbour]:
    """The images of a features folder whose vectors have the largest cosine with an image's.

    The vector of an image that is a row of the folder is taken from there; that of another one is computed
    as the folder's were, but in fp32. All rows are compared, a part at a time.

    Args:
        query: an image file, by path or URL.
        folder: what `extract` wrote, finished.
        by: the output to compare, a column with vectors; None: the deepest.
        top: how many, at most; 1 or more.
        weights: what the folder was computed with, for an image that is no row of it; None: the weights that
            have the name in its manifest.
        device: where that image's vector is computed.

    Returns:
        Neighbours with falling cosine, the query itself first where it is a row.

    Raises:
        UsageError: no features folder, no such column, other weights than the folder's.
        ImageError: a query that can't be read.
        StoreError: a folder that isn't finished or is damaged.
    """
    if top < 1:
        raise UsageError(f"top must be 1 or more; got {top}")
    manifest = read_manifest(folder)
    settings = manifest["settings"]
    output = compared(manifest, by)
    if output is None:
        raise UsageError(f"{folder} holds whole maps only; similar needs pooled outputs (--pool avg or max)")
    file = query if is_url(query) else os.path.abspath(query)
    place = os.path.relpath(file, manifest["root"])
    name = os.fsencode(Path(place).as_posix()).decode("utf-8", "backslashreplace")
    vector = _stored(folder, output, name)
    if vector is None:
        vector = _computed(query, output, settings, weights, device)
    unit = vector / max(float(np.linalg.norm(vector)), 1e-30)
    with_faiss = manifest["rows"] > _EXACT_IN_NUMPY and importlib.util.find_spec("faiss") is not None
    best: list[tuple[float, int, str]] = []
    begin = 0
    for table in iter_parts(folder, ["path", output]):
        matrix, kept = vectors(table[output])
        matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-30)
        scores, rows = _largest(matrix, unit, top, with_faiss=with_faiss)
        places = kept[rows]
        paths = table["path"].take(places).to_pylist()
        found = zip(scores.tolist(), (-(begin + places)).tolist(), paths, strict=True)
        best = heapq.nlargest(top, [*best, *found])  # the earlier row first where cosines are equal
        begin += len(table)
    return [Neighbour(path, min(score, 1.0)) for score, _, path in best]


def _stored(folder: str | os.PathLike[str], output: str, name: str) -> NDArray[np.float32] | None:
    for table in iter_parts(folder, ["path", output]):
        found = table.filter(pc.field("path") == name)
        if len(found):
            matrix, _ = vectors(found[output])
            return matrix[0] if len(matrix) else None
    return None


def _computed(
    query: str | os.PathLike[str], output: str, settings: dict[str, Any], weights: str | None, device: Any
) -> NDArray[np.float32]:
    if weights is None:
        weights = settings["weights"]
        if weights not in {entry.name for entry in REGISTRY}:
            raise UsageError(
                f"{os.fspath(query)} is no row of the folder, which was computed with {weights!r}; name the "
                "file of these weights with --weights (weights=)"
            )
    checkpoint = load(weights, settings["backbone"])
    encoder = VGG19Encoder(checkpoint.k or 1, weights=checkpoint)
    if parameters_sha256(encoder, settings["outputs"]) != settings["parameters_sha256"]:
        raise UsageError(f"the folder was computed with other weights ({settings['weights']}) than {weights}")
    options = Options(
        pool=settings["pool"],
        image_size=settings["preprocess"]["crop"],
        full_decode=settings["full_decode"],
        max_pixels=settings["max_pixels"],
        num_workers=0,
        allow_untrained=True,
    )
    (batch,) = iter_features(query, encoder.to(device), [output], options=options)
    if batch.rows[0].error:
        raise ImageError(f"{os.fspath(query)}: {batch.rows[0].error}")
    return batch.features[output].reshape(-1).astype(np.float32)


def _largest(
    matrix: NDArray[np.float32], unit: NDArray[np.float32], top: int, *, with_faiss: bool
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The largest products of rows with a vector, and the rows."""
    top = min(top, len(matrix))
    if with_faiss and top:
        import faiss

        scores, rows = faiss.knn(unit[None], matrix, top, metric=faiss.METRIC_INNER_PRODUCT)
        return scores[0], rows[0]
    scores = matrix @ unit
    rows = np.argsort(-scores, kind="stable")[:top]
    return scores[rows], rows


def contact_sheet(
    query: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    neighbours: list[Neighbour],
    *,
    by: str | None = None,
) -> Image.Image:
    """The query and what `similar` found by an output, in order; a file that is gone is a grey square."""
    manifest = read_manifest(folder)

    def panel(file: str | os.PathLike[str], *lines: str) -> Panel:
        try:
            image = decode(file)
        except ImageError as error:
            image = missing(str(error))
        return Panel(image, lines)

    panels = [panel(query, f"query, cosines of {compared(manifest, by)}", os.path.basename(query))]
    for path, cosine in neighbours:
        panels.append(panel(image_file(manifest["root"], path), f"{cosine:.4f}", path))
    return draw([panels[i : i + _COLUMNS] for i in range(0, len(panels), _COLUMNS)])
