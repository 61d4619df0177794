"""From input files to features: a batch at a time, or as a folder on disk."""

import hashlib
import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vggenc.checkpoint import state_sha256
from vggenc.compute import FeatureBatch, as_pixels, chunked, compute, joined, shown
from vggenc.encoder import VGG19Encoder
from vggenc.engines import Engine
from vggenc.images import ImageDataset
from vggenc.inputs import ImageList, Inputs, find_images
from vggenc.loading import load_batches
from vggenc.options import Cluster, Options, check_outputs
from vggenc.stages import OUTPUTS, STAGE_NAMES
from vggenc.store import FAILURES_SHOWN, Store, Tally
from vggenc.trunks import CALIBRATION_IMAGES


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
        inputs: files, folders, glob patterns, `@list.txt` and URLs, as in `vggenc.inputs.find_images`.
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
    cluster: Cluster | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """Write the features of many images to a folder, resuming what an earlier run left there.

    Args:
        inputs: files, folders, glob patterns, `@list.txt` and URLs, as in `vggenc.inputs.find_images`.
        encoder: runs where it lies, in evaluation mode; its own modes and values stay as they are.
        outputs: names, as for `VGG19Encoder.encode`.
        output: the folder or its URL; see `read_features` for what it holds.
        options: how; None: the defaults of `Options`.
        cluster: the Ray cluster that computes; None: this process.
        overwrite: replace an earlier run with other settings.
        progress: show a bar on standard error where that is a terminal.

    Raises:
        UsageError: as for `iter_features`, or a folder that holds other things or a run with other settings.
        StoreError: a folder that another process writes, or that can't be written; an object store or a
            cluster that doesn't answer.
        KeyboardInterrupt: with the number of rows in the folder, once that is this run's.
    """
    begun = time.perf_counter()
    options = options or Options()
    names = check_outputs(outputs)
    first_part = None
    with ExitStack() as stack:
        workers = None
        if cluster is not None:
            from vggenc.cluster import Workers

            workers = stack.enter_context(Workers(cluster))
            options = workers.resolved(options)
        engine = _engine(encoder, names, options)
        images = find_images(inputs)
        store = Store(
            output,
            settings=_settings(encoder, engine, options),
            root=images.root,
            inputs=_fingerprint(images),
            vectors={name: int(np.prod(shape)) for name, shape in engine.shapes.items() if len(shape) < 3},
            rows=len(images.paths),
            part_size=options.rows_per_part,
            dtype=options.dtype,
            overwrite=overwrite,
        )
        stack.enter_context(store)
        stack.enter_context(_telling(store))
        tallies = store.tallies()
        missing = [part for part in range(store.parts()) if part not in tallies]
        computed = sum(len(store.part_rows(part)) for part in missing)
        start = time.perf_counter()
        if missing:
            if workers is None or engine.calibrates:
                _prepare(engine, images, options, store, resumed=len(missing) < store.parts())
            if workers is None:
                start = time.perf_counter()
                made = _here(images, engine, store, missing, options, progress)
            else:
                made = workers.run(images, encoder, engine, store, missing, options, progress=progress)
            for part, tally in stack.enter_context(closing(made)):
                tallies[part] = tally
                first_part = first_part or time.perf_counter() - begun
        seconds = time.perf_counter() - start
    failures = [failure for part in sorted(tallies) for failure in tallies[part].failures]
    return Summary(
        images=store.rows,
        failed=sum(tally.failed for tally in tallies.values()),
        failures=tuple(failures[:FAILURES_SHOWN]),
        computed=computed,
        seconds=seconds,
        first_part=first_part,
        engine=engine.name,
        precision=engine.precision,
        folder=str(store.folder),
    )


def _here(
    images: ImageList, engine: Engine, store: Store, parts: Sequence[int], options: Options, progress: bool
) -> Generator[tuple[int, Tally], None, None]:
    """Compute and write parts in this process; one is written while the next is computed."""
    lacking = sum(len(store.part_rows(part)) for part in parts)
    chunks = [chunk for part in parts for chunk in chunked(store.part_rows(part), options.batch_size)]
    bare = compute(images, engine, chunks, options)
    written: tuple[int, Future[Tally]] | None = None
    with (
        ThreadPoolExecutor(1) as thread,
        closing(shown(bare, store.rows, store.rows - lacking, progress=progress)) as batches,
    ):
        for part in parts:
            collected: list[FeatureBatch] = []
            while sum(len(batch.rows) for batch in collected) < len(store.part_rows(part)):
                collected.append(next(batches))
                if written and written[1].done():  # a full disk shows now
                    yield written[0], written[1].result()
                    written = None
            if written:
                yield written[0], written[1].result()
            written = part, thread.submit(store.writer.write, part, *joined(collected))
        if written:
            yield written[0], written[1].result()


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
        **engine.settings(),
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
    count = len(images.paths)
    spread = np.linspace(0, count - 1, min(count, CALIBRATION_IMAGES)).astype(int)
    dataset = ImageDataset(images, engine.preprocess, options)
    batches = load_batches(dataset, [[int(i)] for i in spread], options.num_workers)
    sample = (as_pixels(batch) for _, batch in batches if batch is not None)
    if store is None:
        engine.prepare(sample)
        return
    with store.calibrated(resumed=resumed) as file:
        engine.prepare(sample, file)


def _fingerprint(images: ImageList) -> str:
    """A hash of the names and sizes of the input files, in order."""
    digest = hashlib.sha256()
    for index, path in enumerate(images.paths):
        digest.update(f"{path}\0{images.size(index)}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
