"""Panels with captions on a grid, as one picture (extra `viz`)."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vggenc.whole import whole_file

SIDE = 180
"""Pixels of a panel's square."""
_GAP, _TEXT = 12, 13
_PAPER, _INK, _EMPTY = "white", (25, 25, 25), (232, 232, 232)
_FAINTEST, _STRONGEST = 0.3, 0.9
"""Opacity of the smallest and the largest value of a heat map."""
_GREYS = (45, 200)
"""Black and white of the picture below a heat map, so that colours show on dark and light ones."""


class Panel(NamedTuple):
    """A picture, of any shape, and the lines below it; without a picture the text stands in its place."""

    image: Image.Image | None
    lines: tuple[str, ...]


def draw(rows: Sequence[Sequence[Panel]], *, side: int = SIDE) -> Image.Image:
    """Panels in rows of equal height, each picture fitted whole into a square."""
    font = _font(_TEXT)
    line = _TEXT + 4
    below = [max((len(panel.lines) for panel in row if panel.image), default=0) for row in rows]
    heights = [side + count * line for count in below]
    width = max(map(len, rows)) * (side + _GAP) + _GAP
    page = Image.new("RGB", (width, sum(heights) + _GAP * (len(rows) + 1)), _PAPER)
    pen = ImageDraw.Draw(page)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for i, (image, lines) in enumerate(row):
            left, text_top = _GAP + i * (side + _GAP), top
            if image is not None:
                small = fit(image, side)
                page.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))
                text_top += side + 3
            for j, text in enumerate(lines):
                pen.text((left, text_top + j * line), _shorten(text, font, side), fill=_INK, font=font)
        top += height + _GAP
    return page


def fit(image: Image.Image, side: int) -> Image.Image:
    """The whole picture at the size at which its longer side is `side`."""
    share = side / max(image.size)
    size = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    return image.resize(size, Image.Resampling.LANCZOS if share < 1 else Image.Resampling.NEAREST)


def missing(text: str, side: int = SIDE) -> Image.Image:
    """A grey square in the place of a picture, which says why."""
    image = Image.new("RGB", (side, side), _EMPTY)
    font = _font(_TEXT)
    ImageDraw.Draw(image).text((8, side // 2 - _TEXT), _shorten(text, font, side - 16), fill=_INK, font=font)
    return image


def heat(values: NDArray[Any], square: NDArray[np.uint8]) -> Image.Image:
    """A heat map over a picture in grey.

    Args:
        values: `(h, w)`; 0 and below are darkest, the largest is brightest.
        square: `(H, W, 3)`, what the values were computed from.
    """
    share = np.clip(values / max(float(values.max()), 1e-12), 0, 1).astype(np.float32)
    side = (square.shape[1], square.shape[0])
    share = np.asarray(Image.fromarray(share).resize(side, Image.Resampling.BILINEAR))[..., None]
    low, high = _GREYS
    grey = low + np.asarray(Image.fromarray(square).convert("L"), np.float32)[..., None] * (high - low) / 255
    opacity = _FAINTEST + (_STRONGEST - _FAINTEST) * share
    return Image.fromarray((grey * (1 - opacity) + _colours(share[..., 0]) * opacity).astype(np.uint8))


def scale(text: tuple[str, ...]) -> Panel:
    """The colours of heat maps from 0 on, with a text below."""
    bar = np.repeat(np.linspace(0, 1, SIDE, dtype=np.float32)[None], SIDE // 8, axis=0)
    return Panel(Image.fromarray(_colours(bar).astype(np.uint8)), text)


def save(image: Image.Image, file: Path) -> None:
    """Write a PNG file, in a folder that is made if need be.

    Raises:
        StoreError: it can't be written.
    """
    with whole_file(file) as partial:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, "PNG")


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _colours(values: NDArray[np.float32]) -> NDArray[Any]:
    """RGB from 0 to 255 of values from 0 to 1."""
    import matplotlib

    return np.asarray(matplotlib.colormaps["inferno"](values))[..., :3] * 255


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text that fits a width, its middle left out where it is too long."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if font.getlength(text) <= width:
        return text
    keep = len(text) - 1
    while keep > 2 and font.getlength(short := f"{text[: keep // 2]}…{text[-((keep + 1) // 2) :]}") > width:
        keep -= 1
    return short
