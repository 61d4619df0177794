"""Files and folders by path or, in an object store, by URL (`s3://bucket/photos`); free of torch."""

import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

from vggenc.errors import StoreError, UsageError, VggencError

T = TypeVar("T")
S = TypeVar("S")
MOST_BYTES = 1 << 30
"""Of an image in an object store, which is read as a whole."""
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_MAGIC = re.compile(r"[*?[]")
_LISTINGS = {"use_listings_cache": False}
"""Another process may write there meanwhile."""
_AT_ONCE = 32
_ABSENT = (FileNotFoundError, NotADirectoryError)


def is_url(name: object) -> TypeGuard[str]:
    """Whether a name is a URL, not a path on this machine."""
    return isinstance(name, str) and _URL.match(name) is not None


def place(name: str | os.PathLike[str]) -> Path:
    """A path; for a URL an object that does what a path does (a `upath.UPath`).

    Raises:
        UsageError: a URL whose file system isn't known or not installed.
    """
    if not isinstance(name, str | os.PathLike):  # a place already
        return name
    if not is_url(name):
        return Path(name)
    if str(name).startswith("file:///"):
        return Path(str(name).removeprefix("file://"))
    from upath import UPath

    with answering(name):
        folder = UPath(str(name), protocol=None, **_LISTINGS)
        folder.fs  # noqa: B018  # imports what reads such URLs
        return cast(Path, folder)


def is_remote(folder: Path) -> bool:
    """Whether what `place` gave lies in an object store."""
    return not isinstance(folder, Path)


def listed(url: str, suffixes: tuple[str, ...]) -> dict[str, int]:
    """Files at a URL, and their sizes in bytes, in sorted order.

    Args:
        url: of a file, of a folder, or a glob pattern that matches such.
        suffixes: of the files that count in a folder, at any depth.

    Raises:
        UsageError: a URL whose file system isn't known, not installed, or doesn't let this be listed.
        StoreError: the storage doesn't answer.
    """
    with answering(url), suppress(*_ABSENT):
        system, path = _system(url)
        matches = system.glob(path, detail=True) if _MAGIC.search(path) else {}
        named = {name: facts for name, facts in matches.items() if facts["type"] == "file"}
        for folder in matches.keys() - named.keys() if matches else {path}:
            top = {facts["name"]: facts for facts in system.ls(folder, detail=True)}
            below = [name for name, facts in top.items() if facts["type"] == "directory"]
            with ThreadPoolExecutor(_AT_ONCE) as threads:  # a store lists a thousand files at a time
                for found in threads.map(lambda name: system.find(name, detail=True), below):
                    top.update(found)
            for name, facts in top.items():
                if facts["type"] == "file" and (name == path or name.lower().endswith(suffixes)):
                    named[name] = facts
        return {system.unstrip_protocol(name): facts["size"] for name, facts in sorted(named.items())}
    return {}


def fetch(urls: Sequence[str]) -> list[bytes | OSError]:
    """The contents of files of one object store, read at the same time; an error where one isn't to be had.

    Raises:
        StoreError: the storage doesn't answer.
    """
    with answering(urls[0]):
        system, _ = _system(urls[0])
        paths = [system._strip_protocol(url) for url in urls]
        found: list[Any] = system.cat_ranges(
            paths, [0] * len(paths), [MOST_BYTES] * len(paths), on_error="return"
        )
        for i, data in enumerate(found):
            if isinstance(data, OSError) and data.errno == errno.EINVAL:  # no byte in an empty file
                found[i] = b""
            elif isinstance(data, BaseException) and not isinstance(data, (*_ABSENT, PermissionError)):
                raise data
    return found


def each(function: Callable[[T], S], items: Sequence[T], folder: Path) -> Iterator[S]:
    """A function of some things in a folder, in order; in an object store, which is slow, of many at once."""
    if not is_remote(folder):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for start in range(0, len(items), _AT_ONCE):
            yield from threads.map(function, items[start : start + _AT_ONCE])


def contents(name: str) -> bytes:
    """What is in a file by path or URL.

    Raises:
        OSError: it isn't to be had.
        UsageError, StoreError: as for `fetch`.
    """
    if not is_url(name):
        return Path(name).read_bytes()
    [found] = fetch([name])
    if isinstance(found, OSError):
        raise found
    return found


@contextmanager
def answering(name: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the libraries behind a URL, as this package's; of no effect on a path.

    Raises:
        UsageError: a URL whose file system isn't known, not installed or refuses.
        StoreError: anything else but a missing file.
    """
    if isinstance(name, Path):
        yield
        return
    url = str(name)
    try:
        yield
    except (VggencError, *_ABSENT):
        raise
    except ImportError as error:
        raise UsageError(f"{url} needs another package: {error}") from error
    except ValueError as error:
        raise UsageError(f"{url} can't be read as a URL: {error}") from error
    except PermissionError as error:
        raise UsageError(f"{url} refuses: {error}") from error
    except Exception as error:  # each library has its own for a network that is down
        raise StoreError(f"{url} can't be reached: {error}; once it can, the same command goes on") from error


def _system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    return cast(tuple[Any, str], url_to_fs(url, **_LISTINGS))
