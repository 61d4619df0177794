"""A page on a features folder: what it holds, what failed, which images are alike."""

import itertools
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vggenc.charts import Point, scatter
from vggenc.page import Html, Section, facts, join, page, table, tag, thumbnail
from vggenc.parts import compared, image_file, iter_parts, read_features, read_manifest, vectors
from vggenc.progress import progress_bar

SAMPLE = 2000
"""Rows that stand for all, where there are more; so many failures are listed, too."""
_CLUSTERS = 12
_TYPICAL = 8
"""Images shown of a cluster."""
_SIDE = 128
"""Pixels of a thumbnail."""
_FEW = 10
"""Different images, below which there are no neighbours to lay a map out by."""
_DIGITS = 4
"""Behind the point, of vectors at length 1; the rest may be rounding."""
_ROW_COLUMNS = ("path", "status", "error", "width", "height")


@dataclass(frozen=True, eq=False)
class _Good:
    """The sampled rows that are ok: which of the sample they are, and what is known of each."""

    places: NDArray[np.int64]
    paths: list[str]
    folders: list[str]
    by: str
    values: NDArray[np.float32]
    labels: NDArray[np.int64]
    middles: NDArray[np.float32]
    """Of the clusters, the largest first."""


def features_page(folder: Path, *, by: str | None = None, progress: bool = False) -> str:
    """A page on what `vggenc extract` wrote, finished or not; the same folder and images give the same page.

    Args:
        folder: the features folder.
        by: the output that map and clusters are made of; None: the deepest one.
        progress: show a bar on standard error, where that is a terminal, while images are read.

    Raises:
        UsageError: no features folder, or an output that isn't in its table.
        StoreError: a part that is damaged, or none at all yet.
    """
    manifest = read_manifest(folder)
    by = compared(manifest, by)
    rows = read_features(folder, _ROW_COLUMNS, partial=True)
    failed = rows.filter(pc.field("status") != "ok").select(["path", "error"])
    spread = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE)).astype(int)
    sample = rows.take(spread)
    good = np.flatnonzero([status == "ok" for status in sample["status"].to_pylist()])
    clusters: dict[int, int] = {}
    if by and len(good):
        paths = sample["path"].take(good).to_pylist()
        values = _sampled(folder, by, spread[good])
        found = _Good(good, paths, _folders(paths), by, values, *_clusters(values))
        clusters = dict(zip(good.tolist(), found.labels.tolist(), strict=True))
        alike = [
            Section("Map", _map(found, [f"#row-{number}" for number in spread[good]])),
            Section("Clusters", _tiles(found, manifest, progress)),
        ]
    else:
        why = "no row is ok" if by else "the folder holds whole maps only; --pool avg makes vectors of them"
        alike = [Section("Map", tag("p", {}, f"There is no map, and there are no clusters: {why}."))]
    unfinished = len(rows) < manifest["rows"]
    lead = f"{len(rows):,} images, {len(failed):,} of them failed"
    if unfinished:
        lead += f"; the run isn't finished, {manifest['rows'] - len(rows):,} more are to come"
    if len(sample) < len(rows):
        lead += f"; {len(sample):,} rows, spread evenly, stand for all in map, clusters and rows"
    sections = [
        Section("Summary", _summary(folder, manifest, len(rows), len(failed))),
        Section("Failures", _failures(failed)),
        *alike,
        Section("Rows", _rows(sample, spread, clusters, len(rows))),
    ]
    return page(f"Features in {folder.absolute().name}", f"{lead}.", sections)


def _summary(folder: Path, manifest: dict[str, Any], rows: int, failed: int) -> Html:
    settings = manifest["settings"]
    outputs = (f"{name} ({' x '.join(map(str, shape))})" for name, shape in settings["outputs"].items())
    return facts(
        {
            "Rows": f"{rows:,}" if rows == manifest["rows"] else f"{rows:,} of {manifest['rows']:,} so far",
            "Failed": f"{failed:,}",
            "Engine": f"{settings['engine']}, {settings['precision']}",
            "Weights": f"{settings['weights']} ({settings['backbone']})",
            "Their sha256": settings["weights_sha256"] and settings["weights_sha256"][:16],
            "Outputs": ", ".join(outputs),
            "Pooling": f"{settings['pool']}, {settings['dtype']}",
            "Image size": "{0} x {0} pixels".format(settings["preprocess"]["crop"]),
            "Images from": manifest["root"],
            "Versions": ", ".join(f"{name} {number}" for name, number in settings["versions"].items()),
        }
    )


def _failures(failed: pa.Table) -> Html:
    if not len(failed):
        return tag("p", {}, "None: every image could be used.")
    shown = [[row["path"], row["error"]] for row in failed.slice(0, SAMPLE).to_pylist()]
    parts = [table("Files that could not be used, and why", ["Path", "Reason"], shown)]
    if more := len(failed) - len(shown):
        parts.append(tag("p", {"class": "note"}, f"The first {len(shown):,}; {more:,} more failed."))
    return join(parts)


def _rows(sample: pa.Table, numbers: NDArray[np.int64], clusters: dict[int, int], total: int) -> Html:
    cells = [
        [
            int(numbers[i]),
            row["path"],
            row["status"],
            row["width"],
            row["height"],
            clusters[i] + 1 if i in clusters else None,
        ]
        for i, row in enumerate(sample.to_pylist())
    ]
    columns = ["Row", "Path", "Status", "Width", "Height", "Cluster"]
    anchors = [f"row-{number}" for number in numbers]
    note = "All rows" if len(cells) == total else f"{len(cells):,} of {total:,} rows, spread evenly"
    return table(f"{note}; sizes in pixels", columns, cells, anchors=anchors)


def _sampled(folder: Path, by: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Vectors of some rows, all of them ok, at length 1, so that distances go by direction."""
    from sklearn.preprocessing import normalize

    found, begin = [], 0
    for part in iter_parts(folder, [by], partial=True):
        mine = rows[(rows >= begin) & (rows < begin + len(part))] - begin
        found.append(vectors(part[by].take(mine))[0])
        begin += len(part)
    unit: NDArray[np.float32] = normalize(np.concatenate(found))
    return unit


def _clusters(values: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Each row's cluster, the largest first, and the clusters' middles."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    different = _different(values)
    count = min(different, _CLUSTERS, max(2, round((len(values) / 2) ** 0.5)))
    with threadpool_limits(1), warnings.catch_warnings():  # threads would add up in another order each time
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer clusters, as of images that are the same
        found = KMeans(count, n_init=4, random_state=0).fit(values)
    sizes = np.bincount(found.labels_, minlength=count)
    order = np.argsort(-sizes, kind="stable")
    return np.argsort(order)[found.labels_], found.cluster_centers_[order[: np.count_nonzero(sizes)]]


def lay_out(values: NDArray[np.float32]) -> NDArray[np.floating]:
    """Places in the plane, `(rows, 2)`, near each other for rows that are alike, and wider than high.

    By t-SNE (van der Maaten and Hinton, JMLR 2008); a handful of rows by their two main axes.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    different = _different(values)
    with threadpool_limits(1):
        if different >= _FEW:
            perplexity = min(30, (different - 1) / 3)
            values = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(values)
        left, sizes, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
    main = (left * sizes)[:, :2].round(_DIGITS)
    return np.pad(main, ((0, 0), (0, 2 - main.shape[1])))


def _different(values: NDArray[np.float32]) -> int:
    """How many different rows there are, apart from rounding."""
    return len(np.unique(values.round(_DIGITS), axis=0))


def _map(good: _Good, links: list[str]) -> Html:
    points = [Point(*each) for each in zip(good.folders, good.paths, links, strict=True)]
    label = f"Map of {len(points)} images of {len(set(good.folders))} folders by their {good.by} features"
    drawing = scatter(label, lay_out(good.values), points)
    text = (
        f"Each point is an image, coloured by its folder; images with similar {good.by} features lie near "
        "each other, far distances say little (t-SNE of vectors at length 1). A point's name shows under the "
        "pointer, and a click leads to its row. A folder's name lifts out its points."
    )
    return join([tag("p", {"class": "note"}, text), drawing])


def _folders(paths: list[str]) -> list[str]:
    """The topmost folder in which the paths differ, of each."""
    parents = [PurePosixPath(path).parent.parts for path in paths]
    levels = zip(*parents, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, levels))
    return [parts[shared] if len(parts) > shared else "top level" for parts in parents]


def _tiles(good: _Good, manifest: dict[str, Any], progress: bool) -> Html:
    text = f"Images with similar {good.by} features (k-means of vectors at length 1), typical ones first."
    parts = [tag("p", {"class": "note"}, text)]
    members = [np.flatnonzero(good.labels == i) for i in range(len(good.middles))]
    total = sum(min(_TYPICAL, len(rows)) for rows in members)
    with progress_bar(total, shown=progress, desc="thumbnails") as bar:
        for i, rows in enumerate(members):
            far = np.linalg.norm(good.values[rows] - good.middles[i], axis=1)
            tiles = []
            for row in rows[np.argsort(far, kind="stable")[:_TYPICAL]]:
                path, most_pixels = good.paths[row], manifest["settings"]["max_pixels"]
                tile = thumbnail(image_file(manifest["root"], path), path, side=_SIDE, max_pixels=most_pixels)
                tiles.append(tag("li", {}, tile))
                bar.update()
            most = Counter(good.folders[row] for row in rows).most_common(3)
            named = ", ".join(f"{group} ({count})" for group, count in most)
            rest = len(rows) - sum(count for _, count in most)
            parts += [
                tag("h3", {}, f"Cluster {i + 1}: {len(rows):,} images"),
                tag("p", {"class": "note"}, named + (f", others ({rest})" if rest else "")),
                tag("ul", {"class": "tiles"}, *tiles),
            ]
    return join(parts)
