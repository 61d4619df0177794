"""Writing a features folder: parts that are whole or absent, a manifest that tells what they are."""

import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.numpy import save_file
from typing_extensions import Self

from vggenc.errors import StoreError, UsageError
from vggenc.images import Row
from vggenc.parts import (
    FORMAT,
    MANIFEST,
    STAMP,
    check_parts,
    differences,
    iter_parts,
    names_in,
    part_file,
    read_manifest,
    stamp,
)
from vggenc.places import answering, is_remote, place
from vggenc.whole import whole_file

CALIBRATED = "calibrated.xml"
"""Of the engine openvino in int8: the model that the parts were computed with; its values are in a `.bin`."""
_OURS = re.compile(r"part-\d{5,}\.(parquet|safetensors)|calibrated\.(xml|bin)|manifest\.json|\.vggenc-.*")
FAILURES_SHOWN = 5
_ROW_FIELDS = [
    ("path", pa.string()),
    ("status", pa.string()),
    ("error", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
]
_ROW_COLUMNS = [name for name, _ in _ROW_FIELDS]


class Tally(NamedTuple):
    """What a part came to."""

    rows: int
    failed: int
    failures: list[tuple[str, str]]
    """Path and reason of the first few."""


@dataclass(frozen=True)
class PartWriter:
    """Writes the parts of one run, wherever this lies: it can be sent to other processes and machines.

    Attributes:
        folder: as `vggenc.places.place` gives it.
        manifest: of the run.
        schema: of the table.
    """

    folder: Path
    manifest: dict[str, Any]
    schema: pa.Schema

    def write(self, part: int, rows: Sequence[Row], values: dict[str, NDArray[Any]]) -> Tally:
        """Write a part; it appears under its name only when it is whole.

        Args:
            part: its number.
            rows: one for each input file, in order.
            values: of each output, `(len(rows), ...)`; of failed rows they are written as null. Whole maps,
                `(len(rows), C, H, W)`, get a file of their own, with NaN for failed rows.

        Raises:
            StoreError: it can't be written; earlier parts are untouched.
        """
        failed = np.array([row.status != "ok" for row in rows])
        maps = {name: value for name, value in values.items() if name not in self.schema.names}
        arrays = [
            pa.array(column, kind)
            for column, (_, kind) in zip(zip(*rows, strict=True), _ROW_FIELDS, strict=True)
        ]
        for field in list(self.schema)[len(_ROW_FIELDS) :]:
            vectors = pa.array(np.ascontiguousarray(values[field.name]).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(vectors, type=field.type, mask=pa.array(failed)))
        says = {STAMP: stamp(self.manifest, part)}
        table = pa.Table.from_arrays(arrays, schema=self.schema.with_metadata(says))
        if maps:  # first, since the table's name is what makes the part count
            self.put(
                part_file(self.folder, part, "safetensors").name,
                lambda file: save_file(maps, file, metadata=says),
            )
        self.put(
            part_file(self.folder, part).name,
            # A dictionary of floats that never repeat would make them half as large again.
            lambda file: pq.write_table(
                table, file, compression="zstd", use_dictionary=_ROW_COLUMNS, write_page_checksum=True
            ),
        )
        return _tally(table)

    def put(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write a file of the folder with a function that takes a path.

        Raises:
            StoreError: it can't be written.
        """
        try:
            with whole_file(self.folder / name, ".vggenc-") as partial:
                write(partial)
                if not is_remote(self.folder):
                    if name != MANIFEST:  # some writers' own mode is for the owner only
                        shutil.copymode(self.folder / MANIFEST, partial)
                    with partial.open("rb+") as stream:
                        os.fsync(stream.fileno())
        except StoreError:
            raise
        except Exception as error:  # each writer has its own errors for a full disk
            raise StoreError(f"{self.folder / name} can't be written: {error}") from error


class Store:
    """A features folder that this process writes, locked against others while the context is open.

    In an object store there is no lock: of two processes with other settings the later one is refused by the
    manifest, and two with the same settings write the same parts.

    Args:
        folder: created if it doesn't exist; an existing one must be empty or hold a run with these settings.
        settings: what decides the values, as JSON; a run with others into the same folder is refused.
        root: the folder that the rows' paths are relative to; of no effect but to be read.
        inputs: a hash of the input files; a run over others is refused.
        vectors: length of the vector of each output in the table.
        rows: number of rows of the whole run.
        part_size: rows in a part; the last may have fewer.
        dtype: of the values, `float32` or `float16`.
        overwrite: remove what an earlier run left in the folder; never files of other origin.

    Attributes:
        writer: writes its parts.

    Raises:
        UsageError: on entering, a folder with other files or other settings.
        StoreError: on entering, a folder that another process writes, that can't be written, or with a part
            that is damaged or of another run.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        settings: dict[str, Any],
        root: str,
        inputs: str,
        vectors: dict[str, int],
        rows: int,
        part_size: int,
        dtype: str,
        overwrite: bool = False,
    ) -> None:
        self.folder = place(folder)
        self.rows = rows
        self.part_size = part_size
        self.overwrite = overwrite
        self._manifest = {
            "format": FORMAT,
            "root": root,
            "rows": rows,
            "inputs_sha256": inputs,
            "part_size": part_size,
            "settings": json.loads(json.dumps(settings)),
        }
        value = pa.float32() if dtype == "float32" else pa.float16()
        columns = [(name, pa.list_(value, length)) for name, length in vectors.items()]
        self.writer = PartWriter(self.folder, self._manifest, pa.schema([*_ROW_FIELDS, *columns]))
        self._lock = None if is_remote(self.folder) else FileLock(self.folder / ".vggenc-lock", timeout=0)

    def __enter__(self) -> Self:
        with answering(self.folder):
            if self.folder.exists() and not self.folder.is_dir():
                raise UsageError(f"{self.folder} is a file, not a folder")
        if self._lock is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._acquire(self._lock)
            except OSError as error:
                raise StoreError(f"{self.folder} can't be written: {error.strerror or error}") from error
        try:
            self._open()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _acquire(self, lock: FileLock) -> None:
        owner = Path(lock.lock_file)
        try:
            lock.acquire()
        except Timeout:
            holder = owner.read_text(errors="replace").strip() or "another process"
            raise StoreError(f"{self.folder} is being written by {holder}") from None
        try:
            owner.write_text(
                f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n"
            )
        except OSError:  # a full disk
            self._release()
            raise

    def _release(self) -> None:
        if self._lock is not None:
            for rest in self.folder.glob(".vggenc-*"):  # the lock's file, and what a killed process left
                rest.unlink(missing_ok=True)
            self._lock.release()

    def _open(self) -> None:
        names = names_in(self.folder)
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        if foreign and MANIFEST not in names:
            raise UsageError(
                f"{self.folder} holds other files, such as {min(foreign)}; name an empty or new folder"
            )
        if self.overwrite:
            # The manifest goes last, so that a kill in between leaves a folder that is still known as ours.
            for name in sorted(names - {MANIFEST, *foreign}, reverse=True):
                if name != ".vggenc-lock":
                    (self.folder / name).unlink()
        elif MANIFEST in names:
            found = read_manifest(self.folder)
            if changed := differences({**found, "root": self._manifest["root"]}, self._manifest):
                raise UsageError(
                    f"{self.folder} holds a run with other settings: {'; '.join(changed)}. "
                    "Name another folder, or replace that run with --overwrite (overwrite=True)."
                )
            check_parts(self.folder, found)
            return
        elif parts := sorted(name for name in names if not name.startswith(".vggenc-")):
            raise UsageError(
                f"{self.folder} has lost its {MANIFEST}, which says what {parts[0]} is; put it back, name "
                "another folder, or replace that run with --overwrite (overwrite=True)"
            )
        text = json.dumps(self._manifest, indent=2) + "\n"
        self.writer.put(MANIFEST, lambda file: file.write_text(text))

    def parts(self) -> int:
        """How many parts the whole run has."""
        return -(-self.rows // self.part_size)

    def missing(self) -> list[int]:
        """The numbers of the parts that aren't there yet."""
        names = names_in(self.folder)
        return [part for part in range(self.parts()) if part_file(self.folder, part).name not in names]

    def part_rows(self, part: int) -> range:
        """The rows of a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.rows))

    @contextmanager
    def calibrated(self, *, resumed: bool) -> Iterator[Path]:
        """Where the calibrated model of the engine openvino lies on this machine, or is to be written.

        Args:
            resumed: there are parts that were computed with it.

        Raises:
            StoreError: it is gone, or can't be written.
        """
        file = self.folder / CALIBRATED
        there = file.exists()
        if resumed and not there:
            raise StoreError(f"{file} is gone, which the finished parts were computed with; replace the run")
        if not is_remote(file):
            yield file
            return
        with tempfile.TemporaryDirectory() as scratch:
            for suffix in (".bin", ".xml") if there else ():
                (Path(scratch) / CALIBRATED).with_suffix(suffix).write_bytes(
                    file.with_suffix(suffix).read_bytes()
                )
            yield Path(scratch) / CALIBRATED
            for made in sorted(Path(scratch).iterdir()) if not there else ():  # .bin before .xml
                self.writer.put(made.name, partial(shutil.copyfile, made))

    def tallies(self) -> dict[int, Tally]:
        """What the parts came to that are there, by number."""
        there = sorted(set(range(self.parts())).difference(self.missing()))
        tables = iter_parts(self.folder, ["path", "status", "error"], partial=True) if there else ()
        return dict(zip(there, map(_tally, tables), strict=True))


def _tally(table: pa.Table) -> Tally:
    bad = table.filter(pc.field("status") != "ok")
    failures = [(row["path"], row["error"]) for row in bad.slice(0, FAILURES_SHOWN).to_pylist()]
    return Tally(table.num_rows, bad.num_rows, failures)
