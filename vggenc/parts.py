"""What a features folder holds, and reading it: each part is checked to be what its name says."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vggenc.errors import StoreError, UsageError, one_of
from vggenc.places import answering, each, is_remote, is_url, place
from vggenc.stages import OUTPUTS

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the folder; a reader refuses a later one."""
STAMP = "vggenc"
"""Key of a file's metadata under which it says which part of which run it is."""
_AGAIN = "remove it, and the command that began the run computes it again"
_LONGEST_HEAD = 100_000_000
"""Bytes, which safetensors allows."""
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
    folder = place(folder)
    manifest = read_manifest(folder)
    files = check_parts(folder, manifest) if partial else _finished_parts(folder, manifest)
    if not files:
        raise StoreError(f"{folder} has no finished part yet")
    names = None if columns is None else list(columns)
    with _reading(files[0]) as source:
        there = pq.read_schema(source).names
    for name in names or ():
        if name in manifest["settings"].get("outputs", {}) and name not in there:
            raise UsageError(
                f"{folder} holds whole maps of {name}, in its safetensors files, not in the table"
            )
        if name not in there:
            raise one_of("a column", name, there)

    def read(file: Path) -> pa.Table:
        with _reading(file) as source:
            table = pq.read_table(source, columns=names, page_checksum_verification=True)
        return table.replace_schema_metadata()

    yield from each(read, files, folder)


def map_files(folder: str | os.PathLike[str]) -> list[tuple[Path, int]]:
    """The safetensors files of a finished run with whole maps, in order, each with its number of rows.

    Raises:
        UsageError: no such folder.
        StoreError: the run isn't finished, or a part is damaged or of another run.
    """
    folder = Path(folder)  # what maps the files into memory needs them here
    files = _finished_parts(folder, read_manifest(folder))
    return [(file.with_suffix(".safetensors"), pq.read_metadata(file).num_rows) for file in files]


def part_file(folder: Path, part: int, suffix: str = "parquet") -> Path:
    """Where a part lies: its table, or its maps."""
    return folder / f"part-{part:05d}.{suffix}"


def names_in(folder: Path) -> set[str]:
    """What lies in a folder; in an object store, one that doesn't exist holds nothing."""
    with answering(folder):
        try:
            return {file.name for file in folder.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            if is_remote(folder):
                return set()
            raise


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
    folder = place(folder)
    try:
        with answering(folder):
            text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        if manifest["format"] > FORMAT:
            raise StoreError(f"{folder} was written by a later version of vggenc")
        return {name: manifest[name] for name in _FIELDS}
    except (FileNotFoundError, NotADirectoryError):
        why = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
        if any(map(_PART.fullmatch, names_in(folder) if folder.is_dir() else ())):
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
    if is_url(root) or os.path.lexists(file):
        return file
    raw = re.sub(rb"\\x([89a-f][0-9a-f])", lambda match: bytes.fromhex(match[1].decode()), path.encode())
    return os.path.join(root, os.fsdecode(raw))


def check_parts(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    """The parts that are there, each whole as far as its ends tell, of this run, and in its place."""
    with_maps = any(len(shape) == 3 for shape in manifest["settings"].get("outputs", {}).values())
    parts = sorted(int(match[1]) for name in names_in(folder) if (match := _PART.fullmatch(name)))
    return list(each(lambda part: _checked(folder, manifest, part, with_maps), parts, folder))


def _checked(folder: Path, manifest: dict[str, Any], part: int, with_maps: bool) -> Path:
    file = part_file(folder, part)
    with _reading(file) as source:
        head = pq.read_metadata(source)
        stamps = {(head.metadata or {}).get(STAMP.encode(), b"").decode()}
    if with_maps:
        with _reading(part_file(folder, part, "safetensors")) as source:
            stamps.add(_maps_metadata(source).get(STAMP, ""))
    size = manifest["part_size"]
    if stamps != {stamp(manifest, part)} or head.num_rows != min(size, manifest["rows"] - part * size):
        raise StoreError(f"{file} isn't part {part} of the run in this folder; {_AGAIN}")
    return file


def _maps_metadata(source: Path | IO[bytes]) -> dict[str, str]:
    """What a safetensors file says of itself; its length is compared with what it should hold."""
    if isinstance(source, Path):
        with safe_open(source, "np") as values:
            return values.metadata() or {}
    size = int.from_bytes(source.read(8), "little")
    head = json.loads(source.read(min(size, _LONGEST_HEAD)))
    says: dict[str, str] = head.pop("__metadata__", {})
    if source.seek(0, os.SEEK_END) != 8 + size + max(one["data_offsets"][1] for one in head.values()):
        raise SafetensorError("it is cut off")
    return says


def _finished_parts(folder: Path, manifest: dict[str, Any]) -> list[Path]:
    files = check_parts(folder, manifest)
    count = -(-manifest["rows"] // manifest["part_size"])
    if len(files) < count:
        raise StoreError(
            f"{folder} has {len(files)} of {count} parts; the command that began it finishes it (in Python, "
            "read_features with partial=True reads what is there)"
        )
    return files


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two manifests differ, each as `name: there, now here`."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*here, *(key for key in there if key not in here)]
        pairs = [(there.get(key), here.get(key), f"{name}.{key}".lstrip(".")) for key in keys]
        return [text for pair in pairs for text in differences(*pair)]
    if there == here:
        return []
    return ["the input files differ" if name == "inputs_sha256" else f"{name} was {there!r}, now {here!r}"]


@contextmanager
def _reading(file: Path) -> Iterator[Path | IO[bytes]]:
    """What a library reads a part from, and its errors with the way out."""
    with answering(file):
        try:
            if not is_remote(file):
                yield file
            else:
                with file.open("rb") as stream:
                    yield stream
        except FileNotFoundError as error:
            raise StoreError(f"{file} is missing, though its table is there; {_AGAIN}") from error
        except (OSError, KeyError, json.JSONDecodeError, pa.ArrowException, SafetensorError) as error:
            raise StoreError(f"{file} is damaged: {error}; {_AGAIN}") from error
