"""Extraction on a Ray cluster: Ray Data places the work, moves what is between, and repeats what is lost."""

import copy
import importlib.util
import logging
import os
import pickle
import signal
import socket
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import Self

from vggenc.compute import chunked, computed, joined
from vggenc.encoder import VGG19Encoder
from vggenc.engines import DECODING, Engine, pick, without
from vggenc.errors import StoreError, UsageError, VggencError
from vggenc.images import ImageDataset, Preprocess, Row
from vggenc.inputs import ImageList
from vggenc.loading import Pixels, load_batches
from vggenc.options import Cluster, Options
from vggenc.parts import differences
from vggenc.places import is_url
from vggenc.progress import progress_bar
from vggenc.stages import MODULES, OUTPUTS
from vggenc.store import CALIBRATED, PartWriter, Store, Tally

_BLOCKS = 10_000
"""Of a run, at most; Ray Data keeps a list of them."""
_PATIENCE = 10
"""Seconds that the head of a cluster is given to accept a connection."""
Item = dict[str, Any]
"""A part on its way: `part`, its number, and what is known of it so far."""


class Workers:
    """A connection to a cluster, and what computes there, while the context is open.

    Raises:
        UsageError: on entering, without the extra `ray`, or a cluster that lacks what is asked.
        StoreError: on entering, a cluster that doesn't answer.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __enter__(self) -> Self:
        if not importlib.util.find_spec("ray"):
            raise UsageError("a cluster needs its extra: pip install 'vggenc[ray]'")
        import ray

        self._ours = not ray.is_initialized()
        if self._ours:
            self._connect()
        try:
            self._look()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        if self._ours:
            ray.shutdown()

    def _connect(self) -> None:
        import ray

        address = None if self._cluster.address == "auto" else self._cluster.address
        # Ray warns of each actor that its arguments may be lost with this process, which ends the run anyway;
        # and then it says that it was told not to.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        main = threading.current_thread() is threading.main_thread()
        terminated = signal.getsignal(signal.SIGTERM)
        try:
            if address and address != "local":  # Ray would go on trying for minutes
                host, port = address.rsplit(":", 1)
                socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
            with _silence():
                ray.init(address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
            if main and terminated is not None:  # Ray has put its own there
                signal.signal(signal.SIGTERM, terminated)
        except (OSError, RuntimeError, ValueError) as error:
            hint = "" if "RAY_AUTH_MODE" in os.environ else " (if it has tokens: RAY_AUTH_MODE=token)"
            raise StoreError(f"the cluster {self._cluster.address} doesn't answer: {error}{hint}") from error

    def _look(self) -> None:
        """What a worker gets: a GPU and a core; without GPUs, all of a node but what decodes for it."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        gpus = sum(node.get("GPU", 0) for node in nodes)
        cores = min((node["CPU"] for node in nodes if node.get("CPU", 0) >= 1), default=0)
        if not cores:
            raise UsageError("the cluster has no node with a core")
        device = self._cluster.device
        self.device = torch.device("cuda" if device == "cuda" or (device == "auto" and gpus) else "cpu")
        self._threads: int | None = None
        self._decoding: dict[str, float] = {"num_cpus": 1}
        self._computing: dict[str, float] = {"num_cpus": 1, "num_gpus": 1}
        if self.device.type == "cpu":
            self._decoding["num_cpus"] = min(1, cores / 4)  # so little that no node has room for two workers
            self._computing = {"num_cpus": cores - self._decoding["num_cpus"]}
            self._threads = int(cores)
        elif not gpus:
            raise UsageError("the cluster has no GPU; use the device cpu")

    def resolved(self, options: Options) -> Options:
        """Options with the engine and precision that they come to on the workers' hardware.

        Raises:
            UsageError: as for `vggenc.engines.pick`.
        """
        import ray

        picking: Any = ray.remote(_pick)
        with _told():
            found = ray.get(picking.options(**self._computing).remote(options, self.device))
        if isinstance(found, VggencError):
            raise found
        return replace(options, engine=found[0], precision=found[1])

    def run(
        self,
        images: ImageList,
        encoder: VGG19Encoder,
        engine: Engine,
        store: Store,
        parts: Sequence[int],
        options: Options,
        *,
        progress: bool,
    ) -> Generator[tuple[int, Tally], None, None]:
        """Compute and write parts; they come in any order."""
        import ray
        import ray.data

        if self._ours:
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it has to say comes as exceptions
        items = [{"part": part, "images": pickle.dumps(images.part(store.part_rows(part)))} for part in parts]
        calibrated: dict[str, bytes] = {}
        if engine.calibrates:
            with store.calibrated(resumed=True) as file:
                calibrated = {one.name: one.read_bytes() for one in (file, file.with_suffix(".bin"))}
        here = engine.settings()
        outputs = tuple(engine.shapes)
        needed = {module for name in outputs for module in OUTPUTS[name]}
        values = without(encoder, set(MODULES) - needed)
        if engine.device.type != "cpu":
            values = copy.deepcopy(values).cpu()
        computer = {
            "values": ray.put((values, calibrated)),
            "outputs": outputs,
            "options": options,
            "device": self.device,
            "threads": self._threads,
            "writer": store.writer,
        }
        pool = ray.data.ActorPoolStrategy
        count = self._cluster.workers
        blocks: Any = ray.data.from_items(items, override_num_blocks=min(len(items), _BLOCKS))
        blocks.context.enable_progress_bars = False
        data = blocks.map(
            _Decoder,
            fn_constructor_kwargs={
                "preprocess": engine.preprocess,
                "options": options,
                "versions": {name: here["versions"][name] for name in DECODING},
            },
            compute=pool(min_size=1, max_size=None),
            **self._decoding,
        ).map(
            _Computer,
            fn_constructor_kwargs=computer,
            # With two threads one writes a part while the other one computes the next. A CPU is kept busy
            # longer by a part, and a quarter slower in threads of their own, which give back memory at once.
            compute=pool(
                min_size=count or 1,
                max_size=count,
                max_concurrent_calls_per_actor=2 if self.device.type == "cuda" else 1,
                enable_true_multi_threading=True,
            ),
            **self._computing,
        )
        lacking = sum(len(store.part_rows(part)) for part in parts)
        failed = 0
        with _told(), progress_bar(store.rows, shown=progress, initial=store.rows - lacking) as bar:
            for item in data.iter_rows():
                if item.get("error"):
                    raise pickle.loads(item["error"])
                tally: Tally = pickle.loads(item["tally"])
                failed += tally.failed
                bar.set_postfix(failed=failed, refresh=False)
                bar.update(tally.rows)
                yield item["part"], tally
        if missing := store.missing():
            raise StoreError(f"part {missing[0]} was written, but isn't in {store.folder} on this machine")


def _pick(options: Options, device: torch.device) -> tuple[str, str] | VggencError:
    try:
        return pick(options, device)
    except VggencError as error:
        return error


class _Step:
    """Something done to each part; an error of this package goes on in its item, since Ray would bury it."""

    def __call__(self, item: Item) -> Item:
        if item.get("error"):
            return item
        try:
            return {"part": item["part"], **self.do(item)}
        except VggencError as error:
            return {"part": item["part"], "error": pickle.dumps(error)}

    def do(self, item: Item) -> Item:
        """What is known of the part after the step."""
        raise NotImplementedError


class _Decoder(_Step):
    """Reads and decodes, in a process of its own that may die: `rows`, and `pixels` of the good ones."""

    def __init__(self, preprocess: Preprocess, options: Options, versions: dict[str, str]) -> None:
        self._preprocess, self._options, self._versions = preprocess, options, versions

    def do(self, item: Item) -> Item:
        _check_same(self._versions, {name: version(name) for name in self._versions})
        images: ImageList = pickle.loads(item["images"])
        if not is_url(images.root) and not os.path.isdir(images.root):
            raise UsageError(f"{socket.gethostname()} has no {images.root}, which all nodes must see")
        dataset = ImageDataset(images, self._preprocess, self._options)
        rows: list[Row] = []
        squares = [np.empty((0, self._preprocess.crop, self._preprocess.crop, 3), np.uint8)]
        chunks = chunked(range(len(images.paths)), self._options.batch_size)
        for found, pixels in load_batches(dataset, chunks, 1):
            rows += found
            squares += [] if pixels is None else [np.asarray(pixels)]
        return {"rows": pickle.dumps(rows), "pixels": np.concatenate(squares)}


class _Computer(_Step):
    """Computes and writes; it takes the weights once. What is left of the part is its `tally`."""

    def __init__(
        self,
        values: Any,
        outputs: tuple[str, ...],
        options: Options,
        device: torch.device,
        threads: int | None,
        writer: PartWriter,
    ) -> None:
        self._values, self._outputs, self._options = values, outputs, options
        self._device, self._threads, self._writer = device, threads, writer
        self._computing = threading.Lock()

    @cached_property
    def _engine(self) -> Engine:
        import ray

        if self._threads is not None:
            torch.set_num_threads(self._threads)
        encoder, calibrated = ray.get(self._values)
        engine = Engine(encoder.to(self._device), self._outputs, self._options)
        here = engine.settings()
        _check_same({name: self._writer.manifest["settings"][name] for name in here}, here)
        with tempfile.TemporaryDirectory() as scratch:
            for name, content in calibrated.items():
                (Path(scratch) / name).write_bytes(content)
            engine.prepare(file=Path(scratch) / CALIBRATED if calibrated else None)
        return engine

    def do(self, item: Item) -> Item:
        batches = _batches(pickle.loads(item["rows"]), item["pixels"], self._options.batch_size)
        with self._computing:
            batch = joined(list(computed(batches, self._engine)))
        return {"tally": pickle.dumps(self._writer.write(int(item["part"]), *batch))}


def _check_same(there: dict[str, Any], here: dict[str, Any]) -> None:
    """See that this node has the versions and means that the manifest names."""
    if found := differences(there, here):
        raise UsageError(f"{socket.gethostname()} would compute otherwise: {'; '.join(found)}")


def _batches(rows: list[Row], pixels: NDArray[np.uint8], size: int) -> Iterator[tuple[list[Row], Pixels]]:
    """The rows of a part, some at a time, and the pixels of the good ones among them."""
    start = 0
    for chunk in chunked(range(len(rows)), size):
        some = rows[chunk.start : chunk.stop]
        good = sum(row.status == "ok" for row in some)
        yield some, pixels[start : start + good].copy() if good else None
        start += good


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing reaches standard error, not even from code that isn't Python's."""
    with open(os.devnull, "w") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def _told() -> Iterator[None]:
    """Ray's errors as one of this package."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise StoreError(f"the cluster gave up: {reason}; the same command goes on") from error
