"""From what the user names to a list of image files, without torch."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from vggenc.errors import UsageError

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
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)


class ImageList(NamedTuple):
    """The input files of a run, in order: `paths` are relative to the folder `root`, with forward slashes."""

    root: str
    paths: list[str]

    def file(self, index: int) -> str:
        """Where the file of a row lies."""
        return os.path.join(self.root, self.paths[index])


Inputs = ImageList | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def find_images(inputs: Inputs) -> ImageList:
    """List image files in a fixed order, each once.

    Args:
        inputs: one or more of: a file; a folder (searched through all levels for the suffixes of `FORMATS`,
            in sorted order); a glob pattern (`**` for any depth); `@list.txt`, a UTF-8 file that names one
            file a line, relative to the working directory, where blank lines are skipped and every other
            line is a name. Files named one by one need no known suffix. An `ImageList` is handed back as it
            is.

    Returns:
        The files. `root` is the folder if it is the only input, else the deepest folder common to all files
        that exist. A file of a list that doesn't exist, or a sub-folder that can't be listed, stands there by
        its own name, so that it isn't passed over.

    Raises:
        UsageError: an input that doesn't exist, or no image at all.
    """
    if isinstance(inputs, ImageList):
        return inputs
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    names = [os.fspath(name) for name in given]
    files = dict.fromkeys(os.path.abspath(file) for name in names for file in _expand(name))
    if not files:
        raise UsageError(f"no images in {', '.join(names) or 'an empty list of inputs'}")
    if len(names) == 1 and os.path.isdir(names[0]):
        root = os.path.abspath(names[0])
    else:
        here = [file for file in files if os.path.lexists(file)] or files
        root = os.path.commonpath([os.path.dirname(file) for file in here])
    return ImageList(root, [Path(os.path.relpath(file, root)).as_posix() for file in files])


def _expand(name: str) -> Iterator[str]:
    if os.path.isdir(name):
        yield from sorted(_walk(name, frozenset()))
    elif os.path.lexists(name):
        yield name
    elif name.startswith("@"):
        try:
            if Path(name[1:]).is_char_device():
                raise UsageError(f"the list {name[1:]} is a device")
            text = Path(name[1:]).read_bytes().decode("utf-8-sig", "surrogateescape")
        except OSError as error:
            raise UsageError(f"the list {name[1:]} can't be read: {error.strerror}") from error
        yield from (line.removesuffix("\r") for line in text.split("\n") if line.strip())
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
        elif entry.name.lower().endswith(tuple(SUFFIXES)):
            yield entry.path
