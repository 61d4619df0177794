"""What a features folder holds, and reading it: each part is checked to be what its name says."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vggenc.errors import StoreError, UsageError, one_of
from vggenc.stages import OUTPUTS

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the folder; a reader refuses a later one."""
STAMP = "vggenc"
"""Key of a file's metadata under which it says which part of which run it is."""
_AGAIN = "remove it, and the command that began the run computes it again"
_PART = re.compile(r"part-(\d{5,})\.parquet")
_FIELDS = ("format", "root", "rows", "inputs_sha256", "part_size", "settings")
"""Of the manifest."""


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
    tables = list(iter_parts(folder, columns, partial=partial))
    metadata = {"vggenc": json.dumps(read_manifest(folder))}
    return pa.concat_tables(tables).replace_schema_metadata(metadata)


def iter_parts(
    folder: str | os.PathLike[str], columns: Iterable[str] | None = None, *, partial: bool = False
) -> Iterator[pa.Table]:
    """Read what `vggenc extract` wrote, a part at a time; as `read_features` but for the metadata."""
    if isinstance(columns, str):
        raise UsageError(f"columns must be a list of names, such as [{columns!r}]; got a string")
    folder = Path(folder)
    manifest = read_manifest(folder)
    files = check_parts(folder, manifest) if partial else _finished_parts(folder, manifest)
    if not files:
        raise StoreError(f"{folder} has no finished part yet")
    names = None if columns is None else list(columns)
    there = pq.read_schema(files[0]).names
    for name in names or ():
        if name in manifest["settings"].get("outputs", {}) and name not in there:
            raise UsageError(
                f"{folder} holds whole maps of {name}, in its safetensors files, not in the table"
            )
        if name not in there:
            raise one_of("a column", name, there)
    for file in files:
        with _reading(file):
            table = pq.read_table(file, columns=names, page_checksum_verification=True)
        yield table.replace_schema_metadata()


def map_files(folder: str | os.PathLike[str]) -> list[tuple[Path, int]]:
    """The safetensors files of a finished run with whole maps, in order, each with its number of rows.

    Raises:
        UsageError: no such folder.
        StoreError: the run isn't finished, or a part is damaged or of another run.
    """
    folder = Path(folder)
    files = _finished_parts(folder, read_manifest(folder))
    return [(file.with_suffix(".safetensors"), pq.read_metadata(file).num_rows) for file in files]


def part_file(folder: Path, part: int, suffix: str = "parquet") -> Path:
    """Where a part lies: its table, or its maps."""
    return folder / f"part-{part:05d}.{suffix}"


def stamp(manifest: dict[str, Any], part: int) -> str:
    """What a part says of itself: its number, and a hash of the run it belongs to."""
    run = {key: value for key, value in manifest.items() if key != "root"}
    digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode())
    return f"part {part} of {digest.hexdigest()[:32]}"


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `manifest.json` says: `root`, `rows`, `part_size`, `inputs_sha256`, `settings`.

    Raises:
        UsageError: no features folder.
        StoreError: it is damaged, or of a later version.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] > FORMAT:
            raise StoreError(f"{folder} was written by a later version of vggenc")
        return {name: manifest[name] for name in _FIELDS}
    except (FileNotFoundError, NotADirectoryError):
        why = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
        if any(folder.glob("part-*.parquet")):
            why += ", though it has parts: put it back, or extract again with --overwrite"
        raise UsageError(f"{folder} is no features folder: {why}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{folder / MANIFEST} can't be read as a manifest ({error}); put it back, or extract again with "
            "--overwrite (overwrite=True)"
        ) from error


def compared(manifest: dict[str, Any], by: str | None) -> str | None:
    """The output to compare images by: `by`, else the deepest one with vectors; None where all are maps.

    Raises:
        UsageError: `by` is no output with vectors.
    """
    vectors = [name for name, shape in manifest["settings"]["outputs"].items() if len(shape) < 3]
    if by is None:
        return max(vectors, key=lambda name: len(OUTPUTS[name]), default=None)
    if by not in vectors:
        raise one_of("by", by, vectors)
    return by


def vectors(column: pa.ChunkedArray) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The vectors of a column, `(n, d)`, and the rows that have one."""
    values = column.combine_chunks()
    rows = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
    flat = values.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return flat.reshape(len(rows), column.type.list_size), rows


def image_file(root: str, path: str) -> str:
    r"""Where the image of a row lies; bytes that aren't UTF-8 stand as `\xNN` in its path."""
    file = os.path.join(root, path)
    if os.path.lexists(file):
        return file
    raw = re.sub(rb"\\x([89a-f][0-9a-f])", lambda match: bytes.fromhex(match[1].decode()), path.encode())
    return os.path.join(root, os.fsdecode(raw))


def check_parts(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """The parts that are there, each whole as far as its ends tell, of this run, and in its place."""
    rows, size = manifest["rows"], manifest["part_size"]
    with_maps = any(len(shape) == 3 for shape in manifest["settings"].get("outputs", {}).values())
    files = {int(match[1]): file for file in folder.iterdir() if (match := _PART.fullmatch(file.name))}
    for part, file in sorted(files.items()):
        with _reading(file):
            head = pq.read_metadata(file)
            stamps = {(head.metadata or {}).get(STAMP.encode(), b"").decode()}
        if with_maps:
            with _reading(part_file(folder, part, "safetensors")) as maps, safe_open(maps, "np") as values:
                stamps.add((values.metadata() or {}).get(STAMP, ""))
        expected = min(size, rows - part * size)
        if stamps != {stamp(manifest, part)} or head.num_rows != expected:
            raise StoreError(f"{file} isn't part {part} of the run in this folder; {_AGAIN}")
    return [file for _, file in sorted(files.items())]


def _finished_parts(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    files = check_parts(folder, manifest)
    count = -(-manifest["rows"] // manifest["part_size"])
    if len(files) < count:
        raise StoreError(
            f"{folder} has {len(files)} of {count} parts; the command that began it finishes it (in Python, "
            "read_features with partial=True reads what is there)"
        )
    return files


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """Errors of the libraries that read a part, with the way out."""
    try:
        yield file
    except FileNotFoundError as error:
        raise StoreError(f"{file} is missing, though its table is there; {_AGAIN}") from error
    except (OSError, pa.ArrowException, SafetensorError) as error:
        raise StoreError(f"{file} is damaged: {error}; {_AGAIN}") from error
