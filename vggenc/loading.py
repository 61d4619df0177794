"""Decoded batches in order, from processes of their own that may die."""

import contextlib
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vggenc.errors import VggencError
from vggenc.images import ImageDataset, Row, Source

Pixels = Tensor | NDArray[np.uint8] | None
"""`(n, H, W, 3)`, uint8; None for no image."""
PATIENCE = 120
"""Seconds that a worker is given for one file."""


def load_batches(
    dataset: ImageDataset,
    chunks: Sequence[Sequence[int]],
    num_workers: int | None,
    *,
    pinned: bool = False,
) -> Iterator[tuple[list[Row], Pixels]]:
    """Decoded batches in order; a worker that dies or hangs costs at most the files that are to blame."""
    workers = _cores() - 1 if num_workers is None else num_workers
    done = 0
    while done < len(chunks):
        for batch in _until_a_worker_dies(dataset, chunks[done:], workers, pinned=pinned):
            yield batch
            done += 1
        if done < len(chunks):  # a file of this batch or of a later one killed its worker
            rows: list[Row] = []
            squares: list[Tensor] = []
            for index in chunks[done]:
                begun = time.monotonic()
                for row, square in _until_a_worker_dies(dataset, [[index]], 1):
                    rows += row
                    squares += [] if square is None else [torch.as_tensor(square)]
                    break
                else:
                    slow = time.monotonic() - begun >= PATIENCE
                    why = f"took more than {PATIENCE} s" if slow else "the process that decoded it died"
                    rows.append(dataset.failed(index, why))
            yield rows, torch.cat(squares) if squares else None
            done += 1


def _until_a_worker_dies(
    dataset: ImageDataset, batches: Sequence[Sequence[int]], workers: int, *, pinned: bool = False
) -> Iterator[tuple[list[Row], Pixels]]:
    files = _Files(dataset, limited=workers > 0 and hasattr(signal, "alarm"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        iterator = iter(
            DataLoader(
                files,
                batch_sampler=batches,  # type: ignore[arg-type]  # a range serves as a list of rows
                num_workers=min(workers, len(batches)),
                collate_fn=_collate,
                pin_memory=pinned,
                worker_init_fn=init_worker(),
            )
        )
    # Starting workers installs a handler for SIGCHLD that raises when one dies, in the middle of whatever
    # runs just then, such as writing a part. Without it the death shows where the next batch is awaited.
    quiet = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if quiet else None
    try:
        yield from iterator
    except VggencError as error:  # a worker's comes with its traceback as text
        raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from None
    except (RuntimeError, EOFError, OSError) as error:
        # The latter two where a worker dies while it hands over the memory of a batch.
        if not workers or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
            raise
    finally:
        del iterator  # ends the other workers
        if quiet and threading.current_thread() is threading.main_thread():  # not in a collector elsewhere
            signal.signal(signal.SIGCHLD, before)


class _Files(Dataset[tuple[Row, Tensor | None]]):
    """A dataset that is read a batch at a time; `limited`, a file that takes too long ends the process."""

    def __init__(self, dataset: ImageDataset, *, limited: bool) -> None:
        self.dataset = dataset
        self.limited = limited

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Row, Tensor | None]]:
        return [self._item(*pair) for pair in zip(indices, self.dataset.sources(indices), strict=True)]

    def _item(self, index: int, source: Source) -> tuple[Row, Tensor | None]:
        if not self.limited:
            return self.dataset.item(index, source)
        signal.alarm(PATIENCE)
        item = self.dataset.item(index, source)
        signal.alarm(0)
        return item


def _collate(items: Sequence[tuple[Row, Tensor | None]]) -> tuple[list[Row], Pixels]:
    """Rows, and the pixels of the good ones as one array `(n, H, W, 3)`."""
    rows = [row for row, _ in items]
    squares = [pixels.permute(1, 2, 0) for _, pixels in items if pixels is not None]
    if not squares:
        return rows, None
    # A worker stacks them right in shared memory. Where there is too little of it (64 MiB in a container),
    # the queue would lose the batch and the main process wait for ever: then they travel through the pipe.
    try:
        return rows, default_collate(squares)
    except RuntimeError:
        return rows, torch.stack(squares).numpy()


def init_worker() -> Callable[[int], None]:
    """What a worker of this process does first."""
    return partial(_init_worker, os.getpid())


def _init_worker(main: int, _: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if hasattr(os, "pidfd_open"):
        threading.Thread(target=_die_with, args=(main,), daemon=True).start()


def _die_with(main: int) -> None:
    """End this worker once the main process is dead.

    PyTorch's own watch looks at the parent, which is a fork server where that is how processes start.
    """
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(main)], [], [])
    os._exit(1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
