"""A training run's folder: what `run.json` holds, and who writes there."""

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vggenc.errors import StoreError, UsageError
from vggenc.parts import differences
from vggenc.whole import whole_file

RUN = "run.json"
FORMAT = 1
"""Of the folder; a reader refuses a later one."""
GRIDS = "grids"
"""The features folder of its cached maps."""


def is_first() -> bool:
    """Whether this process is the first, or only, one of a training: the one that writes and speaks."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def open_run(folder: Path, facts: dict[str, Any], lock: FileLock) -> None:
    """Lock a run's folder, after checking that it is one of these settings, or empty.

    Raises:
        UsageError: a folder with other files, or a run with other settings.
        StoreError: one that another process writes, or that can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise StoreError(f"{folder} is being written by another process") from None
    except OSError as error:
        raise StoreError(f"{folder} can't be written: {error.strerror or error}") from error
    # What a kill may have left of a run that had only begun is no other file.
    ours = (".vggenc-lock", f".{RUN}")
    names = {file.name for file in folder.iterdir() if not file.name.startswith(ours)}
    try:
        if (folder / RUN).exists():
            found = differences(read_run(folder)["settings"], facts["settings"])
            if found:
                raise UsageError(
                    f"{folder} holds a run with other settings: {'; '.join(found)}. Name another folder."
                )
        elif names:
            raise UsageError(f"{folder} holds other files, such as {min(names)}; name an empty or new folder")
        else:
            write_json(folder / RUN, {**facts, "selection": None})
    except BaseException:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        raise


def read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` holds.

    Raises:
        StoreError: it can't be read.
    """
    try:
        run = json.loads((folder / RUN).read_text())
        if run["format"] > FORMAT:
            raise StoreError(f"{folder} was written by a later version of vggenc")
        fields = {name: run[name] for name in ("format", "settings", "grids", "selection")}
        return {**fields, "data": run.get("data")}  # which the first runs did not note
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder / RUN} can't be read as a run: {error}") from error


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        StoreError: it can't be written.
    """
    with whole_file(file) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
