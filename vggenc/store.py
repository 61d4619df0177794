"""Writing a features folder: parts that are whole or absent, a manifest that tells what they are."""

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Sequence
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

from vggenc.errors import StoreError, UsageError
from vggenc.images import Row
from vggenc.parts import FORMAT, MANIFEST, STAMP, check_parts, part_file, read_manifest, stamp

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
        names = {file.name for file in self.folder.iterdir()}
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
        self._write(MANIFEST, lambda file: file.write_text(text))

    def parts(self) -> int:
        """How many parts the whole run has."""
        return -(-self.rows // self.part_size)

    def missing(self) -> list[int]:
        """The numbers of the parts that aren't there yet."""
        return [part for part in range(self.parts()) if not part_file(self.folder, part).exists()]

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
        says = {STAMP: stamp(self._manifest, part)}
        table = pa.Table.from_arrays(arrays, schema=self._schema.with_metadata(says))
        if maps:  # first, since the table's name is what makes the part count
            self._write(
                part_file(self.folder, part, "safetensors").name,
                lambda file: save_file(maps, file, metadata=says),
            )
        self._write(
            part_file(self.folder, part).name,
            lambda file: pq.write_table(table, file, compression="zstd", write_page_checksum=True),
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


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two manifests differ, each as `name: there, now here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*here, *(key for key in there if key not in here)]
        pairs = [(there.get(key), here.get(key), f"{name}.{key}".lstrip(".")) for key in keys]
        return [text for pair in pairs for text in differences(*pair)]
    if there == here:
        return []
    return ["the input files differ" if name == "inputs_sha256" else f"{name} was {there!r}, now {here!r}"]
