"""The features folder: parts that are whole or absent, a manifest that tells what they are, reading back."""

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.numpy import save_file
from typing_extensions import Self

from vggenc.errors import StoreError, UsageError, one_of
from vggenc.images import Row

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the folder; a reader refuses a later one."""
CALIBRATED = "calibrated.xml"
"""Of the engine openvino in int8: the model that the parts were computed with; its values are in a `.bin`."""
_OURS = re.compile(r"part-\d{5,}\.(parquet|safetensors)|calibrated\.(xml|bin)|manifest\.json|\.vggenc-.*")
_ROW_FIELDS = [
    ("path", pa.string()),
    ("status", pa.string()),
    ("error", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
]


class Store:
    """A features folder that this process writes, locked against others while the context is open.

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

    Raises:
        UsageError: on entering, a folder with other files or other settings.
        StoreError: on entering, a folder that another process writes or that can't be written.
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
        self.folder = Path(folder)
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
        self._schema = pa.schema([*_ROW_FIELDS, *columns])
        self._lock = FileLock(self.folder / ".vggenc-lock", timeout=0)

    def __enter__(self) -> Self:
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file, not a folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
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

    def _acquire(self) -> None:
        owner = Path(self._lock.lock_file)
        try:
            self._lock.acquire()
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
        for rest in self.folder.glob(".vggenc-*"):  # the lock's file, and what a killed process left
            rest.unlink(missing_ok=True)
        self._lock.release()

    def _open(self) -> None:
        found = _read_manifest(self.folder)
        foreign = [file.name for file in self.folder.iterdir() if not _OURS.fullmatch(file.name)]
        if found is None and foreign:
            raise UsageError(
                f"{self.folder} holds other files, such as {min(foreign)}; name an empty or new folder"
            )
        if found is not None and self.overwrite:
            # The manifest goes last, so that a kill in between leaves a folder that is still known as ours.
            for file in sorted(self.folder.iterdir(), reverse=True):
                if _OURS.fullmatch(file.name) and file.name not in (MANIFEST, ".vggenc-lock"):
                    file.unlink()
            found = None
        if found is None:
            text = json.dumps(self._manifest, indent=2) + "\n"
            self._write(MANIFEST, lambda file: file.write_text(text))
        elif changed := differences({**found, "root": self._manifest["root"]}, self._manifest):
            raise UsageError(
                f"{self.folder} holds a run with other settings: {'; '.join(changed)}. "
                "Name another folder, or replace that run with --overwrite (overwrite=True)."
            )

    def parts(self) -> int:
        """How many parts the whole run has."""
        return -(-self.rows // self.part_size)

    def missing(self) -> list[int]:
        """The numbers of the parts that aren't there yet."""
        return [part for part in range(self.parts()) if not _part_file(self.folder, part).exists()]

    def part_rows(self, part: int) -> range:
        """The rows of a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.rows))

    def write(
        self,
        part: int,
        rows: Sequence[Row],
        vectors: dict[str, NDArray[Any]],
        maps: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        """Write a part; it appears under its name only when it is whole.

        Args:
            part: its number.
            rows: one for each input file, in order.
            vectors: `(len(rows), length)` for each output; values of failed rows are written as null.
            maps: `(len(rows), C, H, W)` for each whole map, NaN for failed rows.

        Raises:
            StoreError: it can't be written; earlier parts are untouched.
        """
        failed = np.array([row.status != "ok" for row in rows])
        arrays = [
            pa.array(column, kind)
            for column, (_, kind) in zip(zip(*rows, strict=True), _ROW_FIELDS, strict=True)
        ]
        for field in list(self._schema)[len(_ROW_FIELDS) :]:
            values = pa.array(np.ascontiguousarray(vectors[field.name]).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(values, type=field.type, mask=pa.array(failed)))
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        if maps:  # first, since the table's name is what makes the part count
            self._write(_part_file(self.folder, part, "safetensors").name, lambda file: save_file(maps, file))
        self._write(
            _part_file(self.folder, part).name, lambda file: pq.write_table(table, file, compression="zstd")
        )

    def _write(self, name: str, write: Any) -> None:
        partial = self.folder / f".vggenc-{name}"
        try:
            write(partial)
            if name != MANIFEST:
                shutil.copymode(self.folder / MANIFEST, partial)  # some writers' own is for the owner only
            with partial.open("rb+") as stream:
                os.fsync(stream.fileno())
            partial.replace(self.folder / name)
        except Exception as error:  # each writer has its own errors for a full disk
            partial.unlink(missing_ok=True)
            raise StoreError(f"{self.folder / name} can't be written: {error}") from error


def read_features(
    folder: str | os.PathLike[str], columns: Iterable[str] | None = None, *, partial: bool = False
) -> pa.Table:
    """Read what `vggenc extract` wrote.

    Args:
        folder: the features folder.
        columns: names to read; None: all.
        partial: read the parts there are, even if the run isn't finished.

    Returns:
        One row an input file, in input order: `path`, `status`, `error`, `width`, `height` and a fixed-size
        list for each output, null where `status` is `failed`. The manifest stands in the schema's metadata.

    Raises:
        UsageError: no such folder, or no such column.
        StoreError: the run isn't finished, or a part is damaged.
    """
    if isinstance(columns, str):
        raise UsageError(f"columns must be a list of names, such as [{columns!r}]; got a string")
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise UsageError(f"{folder} is no features folder: it has no {MANIFEST}")
    count = -(-manifest["rows"] // manifest["part_size"])
    files = [file for part in range(count) if (file := _part_file(folder, part)).exists()]
    if len(files) < count and not partial:
        raise StoreError(
            f"{folder} has {len(files)} of {count} parts; finish it with the command that began it, or read "
            "what is there with partial=True"
        )
    if not files:
        raise StoreError(f"{folder} has no finished part yet")
    names = None if columns is None else list(columns)
    try:
        there = pq.read_schema(files[0]).names
        for name in names or ():
            if name in manifest["settings"].get("outputs", {}) and name not in there:
                raise UsageError(
                    f"{folder} holds whole maps of {name}, in its safetensors files, not in the table"
                )
            if name not in there:
                raise one_of("a column", name, there)
        table = pa.concat_tables([pq.read_table(file, columns=names) for file in files])
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{folder} can't be read: {error}") from error
    return table.replace_schema_metadata({"vggenc": json.dumps(manifest)})


def _part_file(folder: Path, part: int, suffix: str = "parquet") -> Path:
    return folder / f"part-{part:05d}.{suffix}"


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] > FORMAT:
            raise StoreError(f"{folder} was written by a later version of vggenc")
        return dict(manifest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / MANIFEST} can't be read as a manifest: {error}") from error


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two manifests differ, each as `name: there, now here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*here, *(key for key in there if key not in here)]
        pairs = [(there.get(key), here.get(key), f"{name}.{key}".lstrip(".")) for key in keys]
        return [text for pair in pairs for text in differences(*pair)]
    if there == here:
        return []
    return ["the input files differ" if name == "inputs_sha256" else f"{name} was {there!r}, now {here!r}"]
