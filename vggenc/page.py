"""Parts of a self-contained HTML page: escaped markup, tables that sort, pictures, the page around them."""

import base64
import hashlib
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from vggenc import __version__
from vggenc.console import printable
from vggenc.errors import VggencError
from vggenc.images import read
from vggenc.whole import whole_file

_STYLE, _SCRIPT = (files("vggenc").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
_LONG = 44
"""Characters of a fact."""
_VOID = ("img", "link", "meta")
"""Elements that have no end."""


class Html(str):
    """Markup. Any other string is text, which is escaped where it is put into markup."""


class Cell(NamedTuple):
    """A table's cell that shows something other than what it is sorted by."""

    value: float | str | None
    """None: unknown, sorted last."""
    shown: object


class Section(NamedTuple):
    """A part of a page under a heading of its own."""

    title: str
    body: Html


def markup(value: object) -> Html:
    """What stands for a value in a page: markup as it is, anything else as escaped, printable text."""
    return value if isinstance(value, Html) else Html(html.escape(printable(str(value))))


def join(parts: Iterable[object]) -> Html:
    """Several values, one after the other."""
    return Html("".join(map(markup, parts)))


def tag(name: str, attributes: Mapping[str, object] | None = None, *children: object) -> Html:
    """An element; its attributes are escaped, and so are children that aren't markup.

    Args:
        name: of the element.
        attributes: None as a value leaves one out.
        children: markup, or anything that is then shown as text.
    """
    given = "".join(
        f' {key}="{html.escape(printable(str(value)))}"'
        for key, value in (attributes or {}).items()
        if value is not None
    )
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{join(children)}</{name}>")


def facts(values: Mapping[str, object]) -> Html:
    """Names and what they are, long ones over the whole width; those without a value are left out."""
    there = {name: str(value) for name, value in values.items() if value not in (None, "")}
    return tag(
        "dl",
        {},
        *(
            tag(
                "div",
                {"class": "wide" if len(value) > _LONG else None},
                tag("dt", {}, name),
                tag("dd", {}, value),
            )
            for name, value in there.items()
        ),
    )


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    anchors: Sequence[str] | None = None,
) -> Html:
    """A table in a box of its own that scrolls; a click on a column's header sorts by it.

    Args:
        caption: what it shows.
        columns: their headers.
        rows: cells: `Cell`, a number, text, or None. A column of numbers is sorted by value, and None last.
        anchors: a name for each row, to link to.
    """
    cells = [[cell if isinstance(cell, Cell) else Cell(_key(cell), cell) for cell in row] for row in rows]
    numeric = [
        all(isinstance(cell.value, (int, float, type(None))) for cell in column)
        for column in zip(*cells, strict=True)
    ] or [False] * len(columns)
    head = [
        tag(
            "th",
            {"scope": "col", "aria-sort": "none", "class": "number" if number else None},
            tag("button", {"type": "button"}, name),
        )
        for name, number in zip(columns, numeric, strict=True)
    ]
    body = [
        tag(
            "tr",
            {"id": anchors[i] if anchors else None},
            *(_data_cell(*pair) for pair in zip(row, numeric, strict=True)),
        )
        for i, row in enumerate(cells)
    ]
    return scrolling(
        caption,
        tag(
            "table",
            {},
            tag("caption", {}, caption),
            tag("thead", {}, tag("tr", {}, *head)),
            tag("tbody", {}, *body),
        ),
    )


def _key(value: object) -> float | str | None:
    return value if isinstance(value, (int, float)) else None if value is None else str(value)


def _data_cell(cell: Cell, number: bool) -> Html:
    shown = "-" if cell.shown is None else cell.shown
    key = "" if cell.value is None else cell.value
    attributes = {"class": "number" if number else None, "data-key": None if shown == key else key}
    return tag("td", attributes, shown)


def scrolling(label: str, content: Html) -> Html:
    """A box that scrolls where its content is too large for it, also by the keyboard."""
    return tag("div", {"class": "scroll", "role": "region", "aria-label": label, "tabindex": 0}, content)


def percent(share: float | None) -> Cell:
    """A share from 0 to 1, as a bar and in percent."""
    if share is None:
        return Cell(None, None)
    bar = tag("span", {"class": "bar"}, tag("span", {"style": f"width:{100 * share:.1f}%"}))
    return Cell(round(100 * share, 3), join([bar, tag("span", {}, f"{100 * share:.1f}")]))


def jpeg(image: Image.Image) -> str:
    """An RGB picture as a `data:` address."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def picture(image: Image.Image, alt: str, caption: object) -> Html:
    """An RGB picture with its description, over a caption."""
    size = {"width": image.width, "height": image.height}
    return tag(
        "figure", {}, tag("img", {"src": jpeg(image), "alt": alt, **size}), tag("figcaption", {}, caption)
    )


def missing(reason: str, name: str, caption: object) -> Html:
    """What stands in the place of a picture that can't be shown."""
    tile = tag("div", {"class": "missing", "role": "img", "aria-label": f"{name}: {reason}"}, reason)
    return tag("figure", {}, tile, tag("figcaption", {}, caption))


def thumbnail(file: str | Path, name: str, *, side: int, max_pixels: int) -> Html:
    """The middle of an image file as a small square; where it can't be read, a tile that says why.

    Args:
        file: its path.
        name: what it is called.
        side: pixels.
        max_pixels: as for `vggenc.images.read`.
    """
    caption = tag("span", {"title": name}, name.rsplit("/", 1)[-1])
    try:
        image = read(file, max_pixels=max_pixels, enough=side).image
    except VggencError as error:
        return missing(f"can't be shown: {error}", name, caption)
    return picture(ImageOps.fit(image, (side, side)), name, caption)


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """A whole HTML document, which refers to nothing outside itself.

    Args:
        title: what it is of.
        lead: a sentence on what came of it.
        sections: under headings, to which links lead.
    """
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        tag("meta", {"charset": "utf-8"}),
        tag("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("title", {}, title),
        tag("link", {"rel": "icon", "href": "data:,"}),  # else a browser asks a server for one
        tag("style", {}, Html(_STYLE)),
    ]
    names = [section.title.lower().replace(" ", "-") for section in sections]
    links = [
        tag("a", {"href": f"#{name}"}, section.title) for name, section in zip(names, sections, strict=True)
    ]
    body = [
        tag(
            "header",
            {},
            tag("h1", {}, title),
            tag("p", {}, lead),
            tag("nav", {"aria-label": "Parts"}, *links),
        ),
        tag(
            "main",
            {},
            *(
                tag("section", {"id": name}, tag("h2", {}, section.title), section.body)
                for name, section in zip(names, sections, strict=True)
            ),
        ),
        tag(
            "footer", {}, f"Made by vggenc {__version__}. This file needs nothing else, and asks no network."
        ),
        tag("script", {}, Html(_SCRIPT)),
    ]
    document = tag("html", {"lang": "en"}, tag("head", {}, *head), tag("body", {}, *body))
    return f"<!doctype html>\n{document}\n"


def write_page(file: Path, text: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        StoreError: it can't be written.
    """
    with whole_file(file) as partial:
        partial.write_text(text, "utf-8")
