"""Files that appear under their names only when they are whole."""

import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vggenc.errors import StoreError
from vggenc.places import answering, is_remote


@contextmanager
def whole_file(file: Path, mark: str = ".") -> Iterator[Path]:
    """Give a path to write to, which takes a file's name at the end; after an error nothing is left of it.

    Args:
        file: in a folder that is there, or of an object store, which the file is sent to at the end.
        mark: what the name begins with until then.

    Raises:
        StoreError: it can't be written.
    """
    if is_remote(file):
        with tempfile.TemporaryDirectory() as folder, _told(file):
            partial = Path(folder) / file.name
            yield partial
            with answering(file):
                file.fs.put_file(str(partial), file.path)  # type: ignore[attr-defined]  # a UPath
        return
    # Another process, perhaps on another machine, may write the same file.
    partial = file.with_name(f"{mark}{file.name[:100]}.{uuid.uuid4().hex[:8]}")
    try:
        with _told(file):
            yield partial
            partial.replace(file)
    finally:
        with suppress(NotADirectoryError):  # of a path that goes through a file
            partial.unlink(missing_ok=True)


@contextmanager
def _told(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{file} can't be written: {error.strerror or error}") from error
