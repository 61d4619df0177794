"""A small attribute data set that is drawn, in AwA2's layout, to try everything at once."""

import itertools
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from vggenc.errors import UsageError
from vggenc.zsl.data import IMAGES, SPLITS

SIDE = 96
"""Pixels of a picture."""
COLOURS = {"red": (208, 42, 42), "green": (44, 160, 60), "blue": (48, 84, 208), "yellow": (232, 204, 40)}
SHAPES = ("disc", "square", "triangle", "ring")
TEXTURES = ("plain", "striped", "dotted")
SIZES = {"small": 0.24, "large": 0.36}
POSITIONS = {"high": -0.16, "low": 0.16}
_GROUPS = (tuple(COLOURS), SHAPES, TEXTURES, tuple(SIZES), tuple(POSITIONS))
ATTRIBUTES = tuple(word for group in _GROUPS for word in group)
"""Words for colour, shape, texture, size and position; a class has one of each."""
SEEN, UNSEEN = 16, 5
"""Classes."""


def make_toy(folder: str | Path, *, images: int = 40, seed: int = 0) -> None:
    """Draw a data set of 21 classes, each a combination of five words, 5 of them unseen.

    Every word of an unseen class is also one of some seen classes. A quarter of the seen classes' images are
    for testing. The same seed draws the same files.

    Args:
        folder: a new or empty one.
        images: pictures a class, 4 or more.
        seed: of the classes' choice and the pictures.

    Raises:
        UsageError: fewer images, or a folder that holds files.
    """
    folder = Path(folder)
    if images < 4:
        raise UsageError(f"images must be 4 or more; got {images}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and isn't empty; name a new folder")
    rng = np.random.default_rng(seed)
    classes = _choose(rng)
    names = ["+".join(words) for words in classes]
    seen, unseen = names[:SEEN], names[SEEN:]
    split = folder / SPLITS["ps"]
    split.mkdir(parents=True)
    trainval: list[str] = []
    test_seen: list[str] = []
    test_unseen: list[str] = []
    for name, words in zip(names, classes, strict=True):
        (folder / IMAGES / name).mkdir(parents=True)
        for i in range(images):
            path = f"{name}/{i:03}.png"
            _draw(words, rng).save(folder / IMAGES / path)
            part = test_unseen if name in unseen else test_seen if i % 4 == 3 else trainval
            part.append(path)
    rows = [[100.0 * (word in words) for word in ATTRIBUTES] for words in classes]
    files = {
        folder / "classes.txt": [f"{i:5}\t{name}" for i, name in enumerate(names, 1)],
        folder / "predicates.txt": [f"{i:5}\t{word}" for i, word in enumerate(ATTRIBUTES, 1)],
        folder / "predicate-matrix-continuous.txt": [" ".join(f"{x:6.2f}" for x in row) for row in rows],
        folder / "trainclasses.txt": seen,
        folder / "testclasses.txt": unseen,
        split / "seen_cls.txt": seen,
        split / "unseen_cls.txt": unseen,
        split / "trainval_ps.txt": trainval,
        split / "test_seen_ps.txt": test_seen,
        split / "test_unseen_ps.txt": test_unseen,
    }
    for file, lines in files.items():
        file.write_text("".join(f"{line}\n" for line in lines))


def _choose(rng: Generator) -> list[tuple[str, ...]]:
    """Classes that differ in two words or more; the seen ones first, which have every word twice or more."""
    everything = list(itertools.product(*_GROUPS))
    while True:
        chosen: list[tuple[str, ...]] = []
        for i in rng.permutation(len(everything)):
            words = everything[i]
            if all(sum(a != b for a, b in zip(words, other, strict=True)) >= 2 for other in chosen):
                chosen.append(words)
            if len(chosen) == SEEN + UNSEEN:
                break
        counts = [sum(word in words for words in chosen[:SEEN]) for word in ATTRIBUTES]
        if len(chosen) == SEEN + UNSEEN and min(counts) >= 2:
            return chosen


def _draw(words: tuple[str, ...], rng: Generator) -> Image.Image:
    """One picture: a shape on a soft background; each draw moves, turns, tints and blurs it a little."""
    colour, shape, texture, size, position = words
    scale = 2  # drawn larger and shrunk, for smooth edges
    side = SIDE * scale
    coarse = Image.fromarray(rng.integers(90, 200, (5, 5, 3), dtype=np.uint8))
    picture = coarse.resize((side, side), Image.Resampling.BICUBIC)
    radius = SIZES[size] * rng.uniform(0.9, 1.1) * side
    fill = tuple(int(x) for x in np.clip(np.array(COLOURS[colour]) + rng.integers(-18, 19, 3), 0, 255))
    tile = Image.new("RGB", (side, side), fill)
    marks = ImageDraw.Draw(tile)
    dark = tuple(x // 4 for x in fill)
    pitch = side // 12
    if texture == "striped":
        for x in range(0, side, pitch):
            marks.rectangle((x, 0, x + pitch // 2, side), fill=dark)
    elif texture == "dotted":
        for x, y in itertools.product(range(0, side, pitch), repeat=2):
            marks.ellipse((x, y, x + pitch // 2, y + pitch // 2), fill=dark)
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    middle = side / 2
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    if shape == "disc":
        pen.ellipse(box, fill=255)
    elif shape == "square":
        pen.rectangle(tuple(middle + 0.85 * (x - middle) for x in box), fill=255)
    elif shape == "triangle":
        pen.regular_polygon((middle, middle, radius * 1.1), 3, fill=255)
    else:
        pen.ellipse(box, fill=255)
        pen.ellipse(tuple(middle + 0.55 * (x - middle) for x in box), fill=0)
    angle = float(rng.uniform(-15, 15))
    shift = (
        int(rng.uniform(-0.08, 0.08) * side),
        int((POSITIONS[position] + rng.uniform(-0.03, 0.03)) * side),
    )
    tile, mask = (image.rotate(angle, Image.Resampling.BILINEAR) for image in (tile, mask))
    picture.paste(tile, shift, mask)
    picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.6))))
