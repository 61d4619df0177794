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
from vggenc.inputs import ImageList

SPLITS = {"ps": "proposed_split", "ss": "standard_split"}
"""Name -> the folder that holds its lists (the folder layout has the standard one's at its top)."""
IMAGES = "JPEGImages"
LISTS = ("trainval", "test_seen", "test_unseen")
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
        folder: what the data set was read from.
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
    folder: Path

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
            names = sorted(tail(self.paths[i]) for i in images)
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
        from vggenc.zsl import folders

        return folders.read(folder, split, Path(images or folder / IMAGES))
    if (folder / "res101.mat").is_file():
        from vggenc.zsl import xlsa17

        return xlsa17.read(folder, split, Path(images or folder))
    raise UsageError(
        f"{folder} is no zero-shot data set: it has neither classes.txt (folders, as AwA2 comes) nor "
        "res101.mat (xlsa17)"
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
    folder: Path,
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
        folder: what is read, of which errors speak.
        validation: paths of `trainval` that the data set holds out.

    Raises:
        DataError: an image twice or in a class that its list doesn't take, a class in both sets, without
            attributes or without training images, no test image of an unseen class.
    """
    seen, unseen = list(seen), list(unseen)
    if both := sorted(set(seen) & set(unseen)):
        raise DataError(f"{folder}: both seen and unseen: {some(both)}")
    attributes = np.maximum(attributes, 0).astype(np.float32)
    if odd := _rows_where(classes, ~np.isfinite(attributes)):
        raise DataError(f"{folder}: NaN or infinity in the attributes of {some(odd)}")
    if empty := _rows_where(classes, ~attributes.any(1, keepdims=True)):
        raise DataError(f"{folder}: no attributes (0 or -1 throughout) for {some(empty)}")
    paths = [path for part in LISTS for path in chosen.get(part, [])]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise DataError(f"{folder}: listed twice: {some(twice)}")
    rows = {name: i for i, name in enumerate(classes)}
    for part in LISTS:
        allowed = set(unseen if part == "test_unseen" else seen)
        wrong = [path for path in chosen.get(part, []) if class_of(path) not in allowed]
        if wrong:
            kind = "unseen" if part == "test_unseen" else "seen"
            raise DataError(f"{folder}: {part} lists images of classes that aren't {kind}: {some(wrong)}")
    if idle := sorted(set(seen) - {class_of(path) for path in chosen["trainval"]}):
        raise DataError(f"{folder}: no image to train on for {some(idle)}")
    if not chosen["test_unseen"]:
        raise DataError(f"{folder}: no test image of an unseen class")
    ends = np.cumsum([0, *(len(chosen.get(part, [])) for part in LISTS)])
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
        folder=folder,
    )


def tail(path: str) -> str:
    """`class/file`, of a path with any prefix."""
    return "/".join(PurePosixPath(path.replace("\\", "/")).parts[-2:])


def _rows_where(classes: Sequence[str], bad: Any) -> list[str]:
    return [name for name, row in zip(classes, bad, strict=True) if row.any()]


def some(names: Sequence[str]) -> str:
    """The first few of some names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(str, names[:3])) + more
