"""The layout of xlsa17 (Xian et al., TPAMI 2019), which most zero-shot repositories read: in and out."""

from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vggenc.errors import DataError, UsageError
from vggenc.inputs import find_images
from vggenc.whole import whole_file
from vggenc.zsl.data import SPLITS, ZSLData, assemble

FEATURES, ATTRIBUTES, CLASSES = "res101.mat", "att_splits.mat", "allclasses.txt"
_LOCATIONS = {"trainval": "trainval_loc", "test_seen": "test_seen_loc", "test_unseen": "test_unseen_loc"}


def read(folder: Path, split: str, images: Path) -> ZSLData:
    """Read a data set; see `vggenc.zsl.data.load_data`.

    Raises:
        UsageError: a file that is missing.
        DataError: files that contradict each other.
    """
    file = folder / ATTRIBUTES if split == "ps" else folder / SPLITS[split] / ATTRIBUTES
    if not file.is_file():
        raise UsageError(f"{file} is missing, which this split needs")
    features, splits = _load(folder / FEATURES), _load(file)
    labels = _numbers(features, "labels", folder / FEATURES)
    stored = [_text(name) for name in np.ravel(_field(features, "image_files", folder / FEATURES))]
    if len(stored) != len(labels):
        raise DataError(f"{folder / FEATURES} has {len(labels)} labels for {len(stored)} image_files")
    names = _class_names(folder, splits)
    attributes = np.asarray(splits.get("original_att", splits.get("att")), np.float64)
    if attributes.ndim != 2 or attributes.shape[1] != len(names):
        raise DataError(
            f"{file}: the attributes are {attributes.shape}, but must be (k, {len(names)}), a column a class"
        )
    if labels.min() < 1 or labels.max() > len(names):
        raise DataError(
            f"{folder / FEATURES}: labels must be 1 to {len(names)}, not {labels.min()} to {labels.max()}"
        )
    places = {}
    for part, key in (*_LOCATIONS.items(), ("validation", "val_loc")):
        given = key in splits or part in ("trainval", "test_unseen")
        places[part] = _numbers(splits, key, file) if given else np.array([], np.int64)
        if len(places[part]) and (places[part].min() < 1 or places[part].max() > len(labels)):
            raise DataError(
                f"{file}: {key} must be 1 to {len(labels)}, not {places[part].min()} to {places[part].max()}"
            )
    found = _match(stored, images)
    if twice := [path for path, count in Counter(found).items() if count > 1]:
        raise DataError(f"{folder / FEATURES}: {twice[0]} is in image_files twice")
    class_of = {found[i]: names[labels[i] - 1] for i in range(len(labels))}
    chosen = {part: [found[i - 1] for i in places[part]] for part in _LOCATIONS}
    seen = {class_of[path] for path in chosen["trainval"]}
    unseen = {class_of[path] for path in chosen["test_unseen"]}
    used = [i for i, name in enumerate(names) if name in seen | unseen]
    held = {found[i - 1] for i in places["validation"]}
    return assemble(
        root=images,
        chosen=chosen,
        class_of=class_of.__getitem__,
        classes=[names[i] for i in used],
        attributes=attributes.T[used],
        seen=sorted(seen),
        unseen=sorted(unseen),
        split=split,
        folder=folder,
        validation=[path for path in chosen["trainval"] if path in held],
    )


def write(folder: Path, data: ZSLData, features: NDArray[np.float32]) -> None:
    """Write features and splits as other repositories read them.

    Args:
        folder: created if it doesn't exist.
        data: what the rows are.
        features: `(images, d)`, in the order of `data.paths`.
    """
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    images = {
        "features": np.ascontiguousarray(features.T),
        "labels": data.labels[:, None] + 1,
        "image_files": np.array([[str(data.root / path)] for path in data.paths], object),
    }
    unit = data.attributes / np.linalg.norm(data.attributes, axis=1, keepdims=True)
    validation = data.hold_out() if len(data.seen) >= 4 else None
    train, val = (
        (validation.trainval, validation.test_unseen) if validation else (data.trainval, data.trainval[:0])
    )
    if validation:
        train = np.sort(np.concatenate([train, validation.test_seen]))
    splits = {
        "att": unit.T,
        "original_att": data.attributes.T,
        "allclasses_names": np.array([[name] for name in data.classes], object),
        **{key: getattr(data, part)[:, None] + 1 for part, key in _LOCATIONS.items()},
        "train_loc": train[:, None] + 1,
        "val_loc": val[:, None] + 1,
    }
    for name, content in ((FEATURES, images), (ATTRIBUTES, splits)):
        with whole_file(folder / name) as partial:
            savemat(partial, content, appendmat=False)
    (folder / CLASSES).write_text("".join(f"{name}\n" for name in data.classes))


def _load(file: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        return dict(loadmat(file))
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise DataError(f"{file} can't be read as a MATLAB file: {error}") from error


def _field(content: dict[str, Any], key: str, file: Path) -> Any:
    if key not in content:
        raise DataError(f"{file} has no {key}")
    return content[key]


def _numbers(content: dict[str, Any], key: str, file: Path) -> NDArray[np.int64]:
    return np.ravel(_field(content, key, file)).astype(np.int64)


def _text(cell: Any) -> str:
    while isinstance(cell, np.ndarray) and cell.size:
        cell = cell.flat[0]
    return str(cell)


def _class_names(folder: Path, splits: dict[str, Any]) -> list[str]:
    if "allclasses_names" in splits:
        return [_text(name) for name in np.ravel(splits["allclasses_names"])]
    file = folder / CLASSES
    if not file.is_file():
        raise UsageError(f"{file} is missing, and {ATTRIBUTES} has no allclasses_names")
    return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]


def _match(stored: list[str], images: Path) -> list[str]:
    """The file below `images` for each stored path: the longest common end, `class/file` at least."""
    here: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for path in find_images(images).paths:
        here[PurePosixPath(path).name].append(PurePosixPath(path).parts)
    found, missing = [], []
    for name in stored:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        same = here.get(parts[-1], [])
        fit = [there for there in same if _shared(there, parts) >= min(2, len(there), len(parts))]
        ranked = sorted(fit, key=lambda there: -_shared(there, parts))
        if not ranked:
            missing.append(name)
            continue
        if len(ranked) > 1 and _shared(ranked[0], parts) == _shared(ranked[1], parts):
            raise DataError(
                f"{'/'.join(ranked[0])} and {'/'.join(ranked[1])} both fit the stored path {name}"
            )
        found.append("/".join(ranked[0]))
    if missing:
        raise DataError(
            f"{len(missing)} of {len(stored)} images are missing below {images}, such as {missing[0]}"
        )
    return found


def _shared(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count
