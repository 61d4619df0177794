"""Zero-shot data sets: images, classes, attributes and splits, in the two layouts that are in use."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vggenc.errors import DataError, UsageError, one_of
from vggenc.inputs import SUFFIXES, ImageList

SPLITS = {"ps": "proposed_split", "ss": "standard_split"}
"""Name -> the folder that holds its lists (the folder layout has the standard one's at its top)."""
IMAGES = "JPEGImages"
_LISTS = ("trainval", "test_seen", "test_unseen")
_HELD_OUT = 3  # of as many seen classes, one is for validation, as in xlsa17's AwA and CUB

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ZSLData:
    """The images of one split, their classes, and what each class looks like.

    Attributes:
        root: folder that the paths are relative to.
        paths: image files, `class/file` at their end.
        labels: `(images,)`, each image's row in `classes`.
        classes: names of the classes that the split uses.
        attributes: `(classes, k)`, float32, not negative: AwA2's strengths from 0 to 100, unnormalised.
        seen: rows of the classes that are trained on.
        unseen: rows of the others.
        trainval: images to train on, as rows of `paths`; all of seen classes.
        test_seen: test images of seen classes; none in a standard split.
        test_unseen: test images of unseen classes.
        validation: images of `trainval` of classes that the data set itself holds out; may be empty.
        split: `ps` (proposed), `ss` (standard), or `validation`.
    """

    root: Path
    paths: tuple[str, ...]
    labels: Indices
    classes: tuple[str, ...]
    attributes: NDArray[np.float32]
    seen: Indices
    unseen: Indices
    trainval: Indices
    test_seen: Indices
    test_unseen: Indices
    validation: Indices
    split: str

    @property
    def k(self) -> int:
        """Number of attributes."""
        return int(self.attributes.shape[1])

    def images(self, which: Indices) -> ImageList:
        """Some images, for `vggenc.extract` and the like."""
        return ImageList(str(self.root), [self.paths[i] for i in which])

    def sha256(self) -> str:
        """A hash of who is seen and unseen and which image is where, whatever the layout and order."""
        digest = hashlib.sha256()
        for rows in (self.seen, self.unseen):
            digest.update("\n".join(sorted(self.classes[i] for i in rows)).encode() + b"\0")
        for images in (self.trainval, self.test_seen, self.test_unseen):
            names = sorted(_tail(self.paths[i]) for i in images)
            digest.update("\n".join(names).encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def hold_out(self, seed: int = 0) -> "ZSLData":
        """A split of the seen classes alone, for choosing a model without a look at the unseen ones.

        A third of the seen classes, drawn by `seed` (or those that the data set itself holds out), become
        unseen; of the others' images a fifth, spread evenly, becomes the seen test images.

        Raises:
            DataError: fewer than four seen classes, or all of them held out by the data set itself.
        """
        if len(self.seen) < 4:
            raise DataError(
                f"{len(self.seen)} seen classes are too few to hold some of them out; 4 are needed"
            )
        named = np.unique(self.labels[self.validation])
        if len(named) == len(self.seen):
            raise DataError("every seen class has images for validation, which leaves none to train on")
        drawn = np.random.default_rng(seed).permutation(self.seen)[: max(2, len(self.seen) // _HELD_OUT)]
        unseen = np.sort(named if len(named) else drawn)
        held = np.isin(self.labels[self.trainval], unseen)
        rest = self.trainval[~held]
        turn = np.zeros(len(rest), np.int64)  # counts each class's images
        for row in np.unique(self.labels[rest]):
            mine = self.labels[rest] == row
            turn[mine] = np.arange(mine.sum())
        return replace(
            self,
            seen=np.setdiff1d(self.seen, unseen),
            unseen=unseen,
            trainval=rest[turn % 5 != 4],
            test_seen=rest[turn % 5 == 4],
            test_unseen=self.trainval[held],
            validation=np.array([], np.int64),
            split="validation",
        )


def load_data(folder: str | Path, split: str = "ps", *, images: str | Path | None = None) -> ZSLData:
    """Read a data set in one of the two layouts, and compare all that its files say of each other.

    Folders, as AwA2 comes: `JPEGImages/<class>/*`, `classes.txt` (`number name`),
    `predicate-matrix-continuous.txt`, and `proposed_split/` with `seen_cls.txt`, `unseen_cls.txt`,
    `trainval_ps.txt`, `test_seen_ps.txt`, `test_unseen_ps.txt`; for the standard split, `trainclasses.txt`
    and `testclasses.txt`.

    xlsa17 (Xian et al., TPAMI 2019): `res101.mat`, `att_splits.mat` and `allclasses.txt` beside or above the
    images, whose stored paths are matched by their ends; the standard split's `att_splits.mat` lies in
    `standard_split/`.

    Args:
        folder: the data set.
        split: `ps` or `ss`.
        images: folder of the images; None: `JPEGImages`, or for xlsa17 anywhere below `folder`.

    Raises:
        UsageError: neither layout, or a split that it doesn't have.
        DataError: files that contradict each other; the message names both.
    """
    folder = Path(folder)
    if split not in SPLITS:
        raise one_of("split", split, SPLITS)
    if (folder / "classes.txt").is_file():
        return _read_folders(folder, split, Path(images or folder / IMAGES))
    if (folder / "res101.mat").is_file():
        from vggenc.zsl.xlsa17 import read

        return read(folder, split, Path(images or folder))
    raise UsageError(
        f"{folder} is no zero-shot data set: it has neither classes.txt (folders, as AwA2 comes) nor "
        "res101.mat (xlsa17)"
    )


def _read_folders(folder: Path, split: str, images: Path) -> ZSLData:
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
        chosen = {part: [_tail(line) for line in _lines(where / f"{part}_{split}.txt")] for part in _LISTS}
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
        source=str(folder),
    )


def assemble(
    *,
    root: Path,
    chosen: dict[str, list[str]],
    class_of: Any,
    classes: Sequence[str],
    attributes: NDArray[Any],
    seen: Iterable[str],
    unseen: Iterable[str],
    split: str,
    source: str,
    validation: Iterable[str] = (),
) -> ZSLData:
    """Put together what a layout's files say, after checking that it fits.

    Args:
        root: folder of the images.
        chosen: paths of `trainval`, `test_seen` and `test_unseen`.
        class_of: a path's class.
        classes: names, in the order of `attributes`.
        attributes: `(classes, k)`.
        seen: names of the seen classes.
        unseen: of the unseen ones.
        split: its name.
        source: what errors speak of.
        validation: paths of `trainval` that the data set holds out.

    Raises:
        DataError: an image twice or in a class that its list doesn't take, a class in both sets, without
            attributes or without training images.
    """
    seen, unseen = list(seen), list(unseen)
    if both := sorted(set(seen) & set(unseen)):
        raise DataError(f"{source}: {_some(both)} is both seen and unseen")
    attributes = np.maximum(attributes, 0).astype(np.float32)
    if not np.isfinite(attributes).all():
        raise DataError(
            f"{source}: the attributes of {_some(_rows_where(classes, ~np.isfinite(attributes)))} hold NaN"
        )
    if empty := _rows_where(classes, ~attributes.any(1, keepdims=True)):
        raise DataError(
            f"{source}: {_some(empty)} has no attributes: its row is 0 or missing (-1) throughout"
        )
    paths = [path for part in _LISTS for path in chosen.get(part, [])]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise DataError(f"{source}: {_some(twice)} is listed twice")
    rows = {name: i for i, name in enumerate(classes)}
    for part in _LISTS:
        allowed = set(unseen if part == "test_unseen" else seen)
        wrong = [path for path in chosen.get(part, []) if class_of(path) not in allowed]
        if wrong:
            kind = "unseen" if part == "test_unseen" else "seen"
            raise DataError(
                f"{source}: {part} lists {_some(wrong)}, whose class is not among the {kind} ones"
            )
    if idle := sorted(set(seen) - {class_of(path) for path in chosen["trainval"]}):
        raise DataError(f"{source}: the seen class {_some(idle)} has no image to train on")
    ends = np.cumsum([0, *(len(chosen.get(part, [])) for part in _LISTS)])
    parts = [np.arange(a, b) for a, b in itertools.pairwise(ends.tolist())]
    index = {path: i for i, path in enumerate(paths)}
    return ZSLData(
        root=root,
        paths=tuple(paths),
        labels=np.array([rows[class_of(path)] for path in paths], np.int64),
        classes=tuple(classes),
        attributes=attributes,
        seen=np.array(sorted(rows[name] for name in seen), np.int64),
        unseen=np.array(sorted(rows[name] for name in unseen), np.int64),
        trainval=parts[0],
        test_seen=parts[1],
        test_unseen=parts[2],
        validation=np.array([index[path] for path in validation], np.int64),
        split=split,
    )


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text().splitlines() if line.strip()]
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
        raise DataError(f"{file} names {_some(twice)} twice")
    return names


def _read_matrix(file: Path) -> NDArray[np.float64]:
    lines = _lines(file)
    try:
        rows = [[float(cell) for cell in line.split()] for line in lines]
    except ValueError as error:
        raise DataError(f"{file} holds something other than numbers: {error}") from error
    if len({len(row) for row in rows}) != 1:
        raise DataError(f"{file} has rows of different lengths: {sorted({len(row) for row in rows})}")
    return np.array(rows)


def _known(names: list[str], classes: Sequence[str], file: Path) -> list[str]:
    if unknown := sorted(set(names) - set(classes)):
        raise DataError(
            f"{file} names {_some(unknown)}, which has no attributes: classes.txt doesn't list it"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{file} names {_some(twice)} twice")
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


def _tail(path: str) -> str:
    """`class/file`, of a path with any prefix."""
    return "/".join(PurePosixPath(path.replace("\\", "/")).parts[-2:])


def _rows_where(classes: Sequence[str], bad: Any) -> list[str]:
    return [name for name, row in zip(classes, bad, strict=True) if row.any()]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(str, names[:3])) + more
