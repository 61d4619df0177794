"""The layout of folders and text files in which AwA2 comes, and which LFGAA's code uses."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from vggenc.errors import DataError, UsageError
from vggenc.inputs import SUFFIXES
from vggenc.zsl.data import LISTS, SPLITS, ZSLData, assemble, some, tail


def read(folder: Path, split: str, images: Path) -> ZSLData:
    """Read a data set; see `vggenc.zsl.data.load_data`.

    Raises:
        UsageError: a file that is missing.
        DataError: files that contradict each other.
    """
    names = _read_classes(folder / "classes.txt")
    matrix = folder / "predicate-matrix-continuous.txt"
    attributes = _read_matrix(matrix)
    predicates = folder / "predicates.txt"
    k = len(_lines(predicates)) if predicates.is_file() else attributes.shape[1]
    if attributes.shape != (len(names), k):
        raise DataError(
            "{} is {} x {}, but classes.txt has {} classes".format(matrix, *attributes.shape, len(names))
            + (f" and predicates.txt {k} attributes" if predicates.is_file() else "")
        )
    if split == "ss":
        lists = {part: folder / f"{part}classes.txt" for part in ("train", "test")}
        seen, unseen = (_known(_lines(file), names, file) for file in lists.values())
        chosen = {
            part: [
                f"{name}/{file}" for name in own for file in _class_images(images / name, part == "trainval")
            ]
            for part, own in (("trainval", seen), ("test_unseen", unseen))
        }
    else:
        where = folder / SPLITS[split]
        sets = [where / f"{part}_cls.txt" for part in ("seen", "unseen")]
        seen, unseen = (_known(_lines(file), names, file) for file in sets)
        chosen = {part: [tail(line) for line in _lines(where / f"{part}_{split}.txt")] for part in LISTS}
        _check_there(images, chosen)
    used = [name for name in names if name in {*seen, *unseen}]
    return assemble(
        root=images,
        chosen=chosen,
        class_of=lambda path: PurePosixPath(path).parent.name,
        classes=used,
        attributes=attributes[[names.index(name) for name in used]],
        seen=seen,
        unseen=unseen,
        split=split,
        folder=folder,
    )


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UsageError(f"{file} is missing, which this split needs") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} can't be read: {error}") from error


def _read_classes(file: Path) -> list[str]:
    fields = [line.split(maxsplit=1) for line in _lines(file)]
    for i, line in enumerate(fields, 1):
        if len(line) != 2 or line[0] != str(i):
            raise DataError(
                f"{file} must number its classes from 1 on ('1 antelope'); line {i} is {' '.join(line)!r}"
            )
    names = [name for _, name in fields]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{file} names twice: {some(twice)}")
    return names


def _read_matrix(file: Path) -> NDArray[np.float64]:
    lines = _lines(file)
    try:
        rows = [[float(cell) for cell in line.split()] for line in lines]
    except ValueError as error:
        raise DataError(f"{file} holds something other than numbers: {error}") from error
    if not rows:
        raise DataError(f"{file} is empty")
    if len({len(row) for row in rows}) != 1:
        raise DataError(f"{file} has rows of different lengths: {sorted({len(row) for row in rows})}")
    return np.array(rows)


def _known(names: list[str], classes: Sequence[str], file: Path) -> list[str]:
    if unknown := sorted(set(names) - set(classes)):
        raise DataError(f"{file} names classes that classes.txt doesn't list: {some(unknown)}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{file} names twice: {some(twice)}")
    return names


def _class_images(folder: Path, needed: bool) -> list[str]:
    if not folder.is_dir():
        if needed:
            raise DataError(f"{folder} is missing, the images of a class that is trained on")
        return []
    return sorted(file.name for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _check_there(images: Path, chosen: dict[str, list[str]]) -> None:
    for part, paths in chosen.items():
        if missing := [path for path in paths if not (images / path).is_file()]:
            raise DataError(
                f"{len(missing)} of {len(paths)} images of {part} are missing, such as {images / missing[0]}"
            )
