"""From input files to features: a batch at a time, or as a folder on disk."""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow.compute as pc

from vggenc.checkpoint import state_sha256
from vggenc.compute import FeatureBatch, as_pixels, chunked, compute, shown
from vggenc.encoder import VGG19Encoder
from vggenc.engines import Engine
from vggenc.errors import StoreError
from vggenc.images import ImageDataset
from vggenc.inputs import ImageList, Inputs, find_images
from vggenc.loading import load_batches
from vggenc.options import Options, check_outputs
from vggenc.parts import read_features
from vggenc.stages import OUTPUTS, STAGE_NAMES
from vggenc.store import CALIBRATED, Store
from vggenc.trunks import CALIBRATION_IMAGES

_VALUE_PACKAGES = ("vggenc", "torchvision", "pillow")
_FAILURES_SHOWN = 5


@dataclass(frozen=True)
class Summary:
    """What a run over a folder came to.

    Attributes:
        images: rows in the folder.
        failed: how many of them have the status `failed`.
        failures: path and reason of the first few.
        computed: rows that this run made; the others were there from earlier.
        seconds: spent on them.
        first_part: seconds from the call until the first part was written; None where there was none.
        engine: what computed.
        precision: with which arithmetic.
        folder: where the features lie.
    """

    images: int
    failed: int
    failures: tuple[tuple[str, str], ...]
    computed: int
    seconds: float
    first_part: float | None
    engine: str
    precision: str
    folder: str

    @property
    def images_per_second(self) -> float | None:
        """Rows made by this run in a second; None where it made none."""
        return self.computed / self.seconds if self.computed else None


def iter_features(
    inputs: Inputs,
    encoder: VGG19Encoder,
    outputs: Iterable[str] = STAGE_NAMES,
    *,
    options: Options | None = None,
    progress: bool = False,
) -> Iterator[FeatureBatch]:
    """Compute features batch by batch, without a folder on disk.

    Args:
        inputs: files, folders, glob patterns and `@list.txt`, as in `vggenc.inputs.find_images`.
        encoder: runs where it lies, in evaluation mode; its own modes and values stay as they are.
        outputs: names, as for `VGG19Encoder.encode`.
        options: how; None: the defaults of `Options`.
        progress: show a bar on standard error where that is a terminal.

    Yields:
        `options.batch_size` rows at a time, in input order.

    Raises:
        UsageError: inputs that don't exist, unknown outputs, or outputs that were never trained.
    """
    options = options or Options()
    engine = _engine(encoder, outputs, options)
    images = find_images(inputs)
    _prepare(engine, images, options)
    rows = range(len(images.paths))
    batches = compute(images, engine, chunked(rows, options.batch_size), options)
    return shown(batches, len(rows), progress=progress)


def extract(
    inputs: Inputs,
    encoder: VGG19Encoder,
    outputs: Iterable[str] = STAGE_NAMES,
    output: str | os.PathLike[str] = "features",
    *,
    options: Options | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """Write the features of many images to a folder, resuming what an earlier run left there.

    Args:
        inputs: files, folders, glob patterns and `@list.txt`, as in `vggenc.inputs.find_images`.
        encoder: runs where it lies, in evaluation mode; its own modes and values stay as they are.
        outputs: names, as for `VGG19Encoder.encode`.
        output: the folder; see `read_features` for what it holds.
        options: how; None: the defaults of `Options`.
        overwrite: replace an earlier run with other settings.
        progress: show a bar on standard error where that is a terminal.

    Raises:
        UsageError: as for `iter_features`, or a folder that holds other things or a run with other settings.
        StoreError: a folder that another process writes, or that can't be written.
        KeyboardInterrupt: with the number of rows in the folder, once that is this run's.
    """
    begun = time.perf_counter()
    options = options or Options()
    engine = _engine(encoder, outputs, options)
    images = find_images(inputs)
    maps = [name for name, shape in engine.shapes.items() if len(shape) == 3]
    store = Store(
        output,
        settings=_settings(encoder, engine, options),
        root=images.root,
        inputs=_fingerprint(images),
        vectors={name: int(np.prod(shape)) for name, shape in engine.shapes.items() if name not in maps},
        rows=len(images.paths),
        part_size=options.rows_per_part,
        dtype=options.dtype,
        overwrite=overwrite,
    )
    first_part = None

    def write(part: int, collected: list[FeatureBatch]) -> None:
        nonlocal first_part
        rows = [row for batch in collected for row in batch.rows]
        arrays = {
            name: np.concatenate([batch.features[name] for batch in collected]) for name in engine.shapes
        }
        whole = {name: arrays.pop(name) for name in maps}
        store.write(part, rows, arrays, whole)
        first_part = first_part or time.perf_counter() - begun

    # A part is written while the next one is computed.
    with store, _telling(store), ThreadPoolExecutor(1) as writer:
        missing = store.missing()
        if missing:
            _prepare(engine, images, options, store, resumed=len(missing) < store.parts())
        computed = sum(len(store.part_rows(part)) for part in missing)
        chunks = [chunk for part in missing for chunk in chunked(store.part_rows(part), options.batch_size)]
        start = time.perf_counter()
        bare = compute(images, engine, chunks, options)
        with closing(shown(bare, store.rows, store.rows - computed, progress=progress)) as batches:
            written: Future[None] | None = None
            for part in missing:
                collected: list[FeatureBatch] = []
                while sum(len(batch.rows) for batch in collected) < len(store.part_rows(part)):
                    collected.append(next(batches))
                    if written and written.done():  # a full disk shows now
                        written.result()
                if written:
                    written.result()
                written = writer.submit(write, part, collected)
            if written:
                written.result()
        seconds = time.perf_counter() - start
        table = read_features(output, ["path", "status", "error"])
    bad = table.filter(pc.field("status") != "ok")
    return Summary(
        images=store.rows,
        failed=bad.num_rows,
        failures=tuple((row["path"], row["error"]) for row in bad.slice(0, _FAILURES_SHOWN).to_pylist()),
        computed=computed,
        seconds=seconds,
        first_part=first_part,
        engine=engine.name,
        precision=engine.precision,
        folder=os.fspath(output),
    )


@contextmanager
def _telling(store: Store) -> Iterator[None]:
    """Let an interruption say how many rows are kept."""
    try:
        yield
    except KeyboardInterrupt:
        lacking = sum(len(store.part_rows(part)) for part in store.missing())
        raise KeyboardInterrupt(store.rows - lacking) from None


def _engine(encoder: VGG19Encoder, outputs: Iterable[str], options: Options) -> Engine:
    names = check_outputs(outputs)
    if not options.allow_untrained:
        encoder.check_trained(names)
    return Engine(encoder, names, options)


def _settings(encoder: VGG19Encoder, engine: Engine, options: Options) -> dict[str, Any]:
    """All that decides the values of a row."""
    used = engine.settings()
    return {
        "weights": encoder.weights_name,
        "weights_sha256": encoder.weights_sha256,
        "parameters_sha256": parameters_sha256(encoder, engine.shapes),
        "backbone": encoder.backbone,
        "outputs": engine.shapes,
        "pool": options.pool,
        "preprocess": asdict(engine.preprocess),
        "full_decode": options.full_decode,
        "max_pixels": options.max_pixels,
        "dtype": options.dtype,
        **used,
        "versions": {**{name: version(name) for name in _VALUE_PACKAGES}, **used["versions"]},
    }


def parameters_sha256(encoder: VGG19Encoder, outputs: Iterable[str]) -> str:
    """A hash of the values behind some outputs."""
    modules = {module for name in outputs for module in OUTPUTS[name]}
    return state_sha256({k: v for k, v in encoder.state_dict().items() if k.split(".")[0] in modules})


def _prepare(
    engine: Engine, images: ImageList, options: Options, store: Store | None = None, *, resumed: bool = False
) -> None:
    """Build what computes; it may calibrate itself on images spread evenly over the inputs, once a folder."""
    if not engine.calibrates:
        engine.prepare()
        return
    file = store.folder / CALIBRATED if store else None
    if file and resumed and not file.exists():
        raise StoreError(f"{file} is gone, which the finished parts were computed with; replace the run")
    count = len(images.paths)
    spread = np.linspace(0, count - 1, min(count, CALIBRATION_IMAGES)).astype(int)
    dataset = ImageDataset(images, engine.preprocess, options)
    batches = load_batches(dataset, [[int(i)] for i in spread], options.num_workers)
    engine.prepare((as_pixels(batch) for _, batch in batches if batch is not None), file)


def _fingerprint(images: ImageList) -> str:
    """A hash of the names and sizes of the input files, in order."""
    digest = hashlib.sha256()
    for index, path in enumerate(images.paths):
        try:
            size = os.stat(images.file(index)).st_size
        except (OSError, ValueError):  # such as a NUL in a name from a list
            size = -1
        digest.update(f"{path}\0{size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
