"""Files that appear under their names only when they are whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vggenc.errors import StoreError


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Give a path to write to, which takes a file's name at the end; after an error nothing is left of it.

    Raises:
        StoreError: it can't be written.
    """
    partial = file.with_name(f".{file.name[:100]}.{os.getpid()}")
    try:
        yield partial
        partial.replace(file)
    except OSError as error:
        raise StoreError(f"{file} can't be written: {error.strerror or error}") from error
    finally:
        with suppress(NotADirectoryError):  # of a path that goes through a file
            partial.unlink(missing_ok=True)
