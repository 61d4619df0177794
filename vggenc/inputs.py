"""From what the user names to a list of image files, without torch."""

import glob
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vggenc.errors import UsageError
from vggenc.places import contents, is_url, listed

# Pillow's names of the formats that are read, and the suffixes by which a folder's images are known.
# Formats that run other programs (EPS) or that no photograph comes in are left out; HEIC is listed so
# that such a file becomes a failed row instead of being passed over in silence.
FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".mpo",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "ICO": (".ico",),
    "TGA": (".tga",),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heif"),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)


class ImageList(NamedTuple):
    """The input files of a run, in order.

    Attributes:
        root: a folder, or the URL of one.
        paths: relative to it, with forward slashes.
        sizes: in bytes, -1 where unknown; None: as the files say.
    """

    root: str
    paths: list[str]
    sizes: list[int] | None = None

    def file(self, index: int) -> str:
        """Where the file of a row lies: its path or URL."""
        return os.path.join(self.root, self.paths[index])

    def size(self, index: int) -> int:
        """Bytes in the file of a row; -1 where that can't be told."""
        if self.sizes is not None:
            return self.sizes[index]
        try:
            return os.stat(self.file(index)).st_size
        except (OSError, ValueError):  # such as a NUL in a name from a list
            return -1

    def part(self, rows: range) -> "ImageList":
        """Some of them."""
        start, stop = rows.start, rows.stop
        return ImageList(self.root, self.paths[start:stop], self.sizes and self.sizes[start:stop])


Inputs = ImageList | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def find_images(inputs: Inputs) -> ImageList:
    """List image files in a fixed order, each once.

    Args:
        inputs: one or more of: a file; a folder (searched through all levels for the suffixes of `FORMATS`,
            in sorted order); a glob pattern (`**` for any depth); `@list.txt`, a UTF-8 file that names one
            file a line, relative to the working directory, where blank lines are skipped and every other
            line is a name. Files named one by one need no known suffix. URLs (`s3://bucket/photos`) stand
            for the same in an object store; a run is of one store, or of this machine. An `ImageList` is
            handed back as it is.

    Returns:
        The files. `root` is the folder if it is the only input, else the deepest folder common to all files
        that exist. A file of a list that doesn't exist, or a sub-folder that can't be listed, stands there by
        its own name, so that it isn't passed over.

    Raises:
        UsageError: an input that doesn't exist, no image at all, or URLs of another store beside paths.
        StoreError: an object store that doesn't answer.
    """
    if isinstance(inputs, ImageList):
        return inputs
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    names = [os.fspath(name) for name in given]
    files: dict[str, int] = {}
    for name in names:
        for file, size in _expand(name):
            files.setdefault(file if is_url(file) else os.path.abspath(file), size)
    if not files:
        raise UsageError(f"no images in {', '.join(names) or 'an empty list of inputs'}")
    stores = {file.split("://")[0] if is_url(file) else "" for file in files}
    if len(stores) > 1:
        kinds = ", ".join(f"{store}://" if store else "this machine" for store in sorted(stores))
        raise UsageError(f"inputs must be of one store; got files of {kinds}")
    if store := min(stores):
        return _in_store(f"{store}://", names, files)
    if len(names) == 1 and os.path.isdir(names[0]):
        root = os.path.abspath(names[0])
    else:
        here = [file for file in files if os.path.lexists(file)] or files
        root = os.path.commonpath({os.path.dirname(file) for file in here})
    return ImageList(root, [Path(os.path.relpath(file, root)).as_posix() for file in files])


def _in_store(store: str, names: Sequence[str], files: dict[str, int]) -> ImageList:
    """Files by URL, below the folder that is the only input, else below the deepest common one."""
    if len(names) == 1 and all(file.startswith(names[0].rstrip("/") + "/") for file in files):
        root = names[0].rstrip("/")
    else:
        root = store + posixpath.commonpath({posixpath.dirname(file.removeprefix(store)) for file in files})
    start = len(root) if root.endswith("/") else len(root) + 1
    return ImageList(root, [file[start:] for file in files], list(files.values()))


def _expand(name: str) -> Iterator[tuple[str, int]]:
    """The files of an input, and their sizes in bytes where listing tells them, else -1."""
    if is_url(name):
        files = listed(name, SUFFIXES)
        if not files:
            raise UsageError(f"no images at {name}")
        yield from files.items()
    elif os.path.isdir(name):
        yield from ((file, -1) for file in sorted(_walk(name, frozenset())))
    elif os.path.lexists(name):
        yield name, -1
    elif name.startswith("@"):
        try:
            if not is_url(name[1:]) and Path(name[1:]).is_char_device():
                raise UsageError(f"the list {name[1:]} is a device")
            text = contents(name[1:]).decode("utf-8-sig", "surrogateescape")
        except OSError as error:
            raise UsageError(f"the list {name[1:]} can't be read: {error.strerror or error}") from error
        yield from ((line.removesuffix("\r"), -1) for line in text.split("\n") if line.strip())
    elif matches := sorted(glob.glob(name, recursive=True)):
        for match in matches:
            yield from _expand(match)
    else:
        raise UsageError(f"no such file or folder: {name}")


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Image files below `folder`, in no order; links are followed, but never into a folder they lie in."""
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError:
        yield folder  # becomes a failed row
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    for entry in entries:
        if os.path.isdir(entry.path):
            yield from _walk(entry.path, above | {identity})
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path
