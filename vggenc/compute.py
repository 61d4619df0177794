"""From decoded batches to rows with features; values that aren't finite make a row a failed one."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vggenc.engines import Arrays, Engine
from vggenc.images import ImageDataset, Row
from vggenc.inputs import ImageList
from vggenc.loading import Pixels, load_batches
from vggenc.options import Options
from vggenc.progress import progress_bar


class FeatureBatch(NamedTuple):
    """Some rows and their features.

    Attributes:
        rows: one an input file, in input order: `path`, `status`, `error`, `width`, `height`.
        features: `(len(rows), ...)` for each output; NaN where the row's status is `failed`.
    """

    rows: list[Row]
    features: dict[str, NDArray[np.floating]]


def chunked(rows: range, size: int) -> list[range]:
    """Some rows, at most `size` at a time."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def compute(
    images: ImageList, engine: Engine, chunks: Sequence[range], options: Options
) -> Generator[FeatureBatch, None, None]:
    """The features of some rows of a list of files, a chunk at a time, in order; failed rows among them."""
    dataset = ImageDataset(images, engine.preprocess, options)
    on_gpu = engine.device.type == "cuda"
    yield from computed(load_batches(dataset, chunks, options.num_workers, pinned=on_gpu), engine)


def computed(
    batches: Iterable[tuple[list[Row], Pixels]], engine: Engine
) -> Generator[FeatureBatch, None, None]:
    """The features of decoded batches, in order."""
    waiting: deque[tuple[list[Row], Callable[[], Arrays]]] = deque()
    for rows, batch in batches:
        waiting.append((rows, dict if batch is None else engine.submit(as_pixels(batch))))
        if len(waiting) >= engine.in_flight:
            yield _batch(engine, *waiting.popleft())
    while waiting:
        yield _batch(engine, *waiting.popleft())


def joined(batches: Sequence[FeatureBatch]) -> FeatureBatch:
    """Several batches as one."""
    rows = [row for batch in batches for row in batch.rows]
    names = batches[0].features
    return FeatureBatch(
        rows, {name: np.concatenate([one.features[name] for one in batches]) for name in names}
    )


def shown(
    batches: Generator[FeatureBatch, None, None], total: int, done: int = 0, *, progress: bool
) -> Generator[FeatureBatch, None, None]:
    """The batches, with a bar that tells rows and failures."""
    failed = 0
    with progress_bar(total, shown=progress, initial=done) as bar, closing(batches):
        for batch in batches:
            failed += sum(row.status != "ok" for row in batch.rows)
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(len(batch.rows))
            yield batch


def as_pixels(batch: Tensor | NDArray[np.uint8]) -> Tensor:
    """What an engine takes, `(n, 3, H, W)`, of a decoded batch `(n, H, W, 3)`."""
    return torch.as_tensor(batch).permute(0, 3, 1, 2)


def _batch(engine: Engine, rows: list[Row], finish: Callable[[], Arrays]) -> FeatureBatch:
    """Rows and the features of the good ones among them, put in their places."""
    good = np.array([row.status == "ok" for row in rows])
    found = finish()
    features = {
        name: np.full((len(rows), *shape), np.nan, engine.dtype) for name, shape in engine.shapes.items()
    }
    for name, values in found.items():
        features[name][good] = values
    for i in np.flatnonzero(good):
        if bad := [name for name, values in features.items() if not np.isfinite(values[i]).all()]:
            error = f"NaN or infinity in {', '.join(bad)} ({engine.precision}, {engine.dtype})"
            rows[i] = rows[i]._replace(status="failed", error=error)
            for values in features.values():
                values[i] = np.nan
    return FeatureBatch(rows, features)
