"""Drawings in a page, as SVG and tables: points on a map, curves, a confusion matrix."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vggenc.page import Html, join, scrolling, tag

COLOURS = 6
"""In `page.css`, as `c0` to `c5`; `c6` is for the rest."""
SHAPES = ("circle", "triangle")
OTHERS = "others"
_WIDTH, _HEIGHT, _MARGIN = 600, 400, 14
_MANY = 500
"""Points that are drawn smaller."""
_CHART = (400, 240)
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 12, 34
"""Room around a chart's curves, for labels."""


class Point(NamedTuple):
    """One of a map."""

    group: str
    name: str
    link: str | None


class Curve(NamedTuple):
    """A line of a chart, through `(x, y)`."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


def scatter(label: str, places: NDArray[Any], points: Sequence[Point]) -> Html:
    """Points coloured by group, with their names on hovering, and a legend that lifts out a group.

    Args:
        label: what is seen, for those who can't.
        places: `(points, 2)`, in any unit, the same for both axes.
        points: what they are. The largest groups have a colour and shape of their own, the rest share one.
    """
    counts = Counter(point.group for point in points)
    ranked = sorted(counts, key=lambda group: (-counts[group], group))
    most = COLOURS * len(SHAPES)
    own = ranked if len(ranked) <= most else ranked[: most - 1]
    styles = {group: (f"c{i % COLOURS}", SHAPES[i // COLOURS]) for i, group in enumerate(own)}
    rest = ("c6", "circle")
    drawn: dict[tuple[str, str], list[Html]] = {style: [] for style in (rest, *styles.values())}
    size = 4.5 if len(points) <= _MANY else 3
    for (x, y), point in zip(_fitted(places), points, strict=True):
        style = styles.get(point.group, rest)
        dot = _dot(style[1], x, y, size, tag("title", {}, point.name))
        drawn[style].append(tag("a", {"href": point.link, "tabindex": -1}, dot) if point.link else dot)
    groups = [
        tag("g", {"class": style[0], "data-group": "-".join(style)}, *dots)
        for style, dots in drawn.items()
        if dots
    ]
    names = [(group, style, counts[group]) for group, style in styles.items()]
    if others := sum(counts.values()) - sum(count for *_, count in names):
        names.append((f"{OTHERS} ({len(ranked) - len(own)} folders)", rest, others))
    legend = [
        tag(
            "button",
            {"type": "button", "aria-pressed": "false", "data-group": "-".join(style)},
            tag(
                "svg",
                {"viewBox": "0 0 14 14", "aria-hidden": "true", "class": style[0]},
                _dot(style[1], 7, 7, 5),
            ),
            name,
            tag("small", {}, count),
        )
        for name, style, count in names
    ]
    drawing = tag("svg", {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "role": "img", "aria-label": label}, *groups)
    return tag(
        "div",
        {"class": "map"},
        tag("div", {"class": "legend", "role": "group", "aria-label": "Groups"}, *legend),
        drawing,
    )


def _fitted(places: NDArray[Any]) -> list[tuple[float, float]]:
    """Places in the drawing's box, by one factor for both axes, in its middle."""
    low, high = places.min(0), places.max(0)
    room = np.array([_WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN])
    span = high - low
    factor = min((r / s for r, s in zip(room, span, strict=True) if s > 0), default=1.0)
    middle = np.array([_WIDTH, _HEIGHT]) / 2
    return [(float(x), float(y)) for x, y in (places - (low + high) / 2) * factor + middle]


def _dot(shape: str, x: float, y: float, size: float, *inside: object) -> Html:
    if shape == "circle":
        return tag("circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": size}, *inside)
    wide = size * 1.15
    return tag("path", {"d": f"M{x:.1f} {y - wide:.1f}l{wide:.1f} {2 * size:.1f}h{-2 * wide:.1f}z"}, *inside)


def chart(title: str, unit: str, curves: Sequence[Curve], *, mark: float | None = None) -> Html:
    """Curves over whole numbers from 1 on, such as epochs, with a legend.

    Args:
        title: what they show.
        unit: what the numbers along the left are.
        curves: with finite values.
        mark: where along x a vertical line is drawn; None: nowhere.
    """
    from matplotlib.ticker import MaxNLocator

    xs, ys = (np.array([point[i] for curve in curves for point in curve.points]) for i in (0, 1))
    steps = MaxNLocator(5).tick_values(min(0.0, ys.min()), ys.max() or 1.0)
    bottom, top = float(steps[0]), float(steps[-1])
    last = max(float(xs.max()), 2)
    width, height = _CHART

    def across(x: float) -> float:
        return _LEFT + (x - 1) / (last - 1) * (width - _LEFT - _RIGHT - 8)

    def down(y: float) -> float:
        return _TOP + (top - y) / (top - bottom) * (height - _TOP - _BOTTOM)

    parts = []
    for step in steps:
        line = {"x1": _LEFT, "x2": width - _RIGHT, "y1": f"{down(step):.1f}", "y2": f"{down(step):.1f}"}
        parts.append(tag("line", {"class": "axis", **line}))
        place = {"x": _LEFT - 6, "y": f"{down(step) + 4:.1f}", "text-anchor": "end"}
        parts.append(tag("text", place, f"{step:g}"))
    for step in MaxNLocator(8, integer=True).tick_values(1, last):
        if 1 <= step <= last:
            place = {"x": f"{across(step):.1f}", "y": height - _BOTTOM + 16, "text-anchor": "middle"}
            parts.append(tag("text", place, f"{step:g}"))
    parts.append(tag("text", {"x": width - _RIGHT, "y": height - 4, "text-anchor": "end"}, "epoch"))
    if mark is not None:
        at = f"{across(mark):.1f}"
        parts.append(tag("line", {"class": "mark", "x1": at, "x2": at, "y1": _TOP, "y2": height - _BOTTOM}))
    for curve in curves:
        style = f"c{curve.colour}" + (" dashed" if curve.dashed else "")
        places = [(across(x), down(y)) for x, y in curve.points]
        parts.append(
            tag("path", {"class": style, "d": "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)})
        )
        for (x, y), (epoch, value) in zip(places, curve.points, strict=True):
            told = tag("title", {}, f"{curve.name}, epoch {epoch:g}: {value:.4g}")
            dot = {"class": style, "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": 2.5}
            parts.append(tag("circle", dot, told))
    said = "; ".join(f"{c.name} from {c.points[0][1]:.4g} to {c.points[-1][1]:.4g}" for c in curves)
    drawing = {
        "viewBox": f"0 0 {width} {height}",
        "role": "img",
        "aria-label": f"{title}, {unit}, by epoch: {said}",
    }
    keys = [
        tag(
            "span",
            {},
            tag(
                "svg",
                {"viewBox": "0 0 28 14", "aria-hidden": "true"},
                tag(
                    "path",
                    {"class": f"c{curve.colour}" + (" dashed" if curve.dashed else ""), "d": "M0 7H28"},
                ),
            ),
            curve.name,
        )
        for curve in curves
    ]
    return tag(
        "figure",
        {"class": "chart"},
        tag("figcaption", {}, f"{title}, {unit}"),
        tag("svg", drawing, *parts),
        tag("div", {"class": "legend"}, *keys),
    )


def confusion_matrix(label: str, classes: Sequence[str], counts: NDArray[np.int64]) -> Html:
    """Counts as a table that scrolls in a box of its own, shaded by their share of the row.

    Args:
        label: what is counted.
        classes: names of rows and columns.
        counts: `(classes, classes)`: a row a true class, a column a predicted one.
    """
    head = tag(
        "tr",
        {},
        tag("th", {"scope": "col"}, "true \\ predicted"),
        *(tag("th", {"scope": "col"}, tag("span", {"title": name}, name)) for name in classes),
    )
    totals = counts.sum(1)
    body = []
    for i, name in enumerate(classes):
        cells = []
        for j, count in enumerate(counts[i]):
            style = f"--s:{math.sqrt(count / totals[i]):.2f}" if count else None
            cells.append(tag("td", {"class": "true" if i == j else None, "style": style}, count or ""))
        body.append(tag("tr", {}, tag("th", {"scope": "row"}, tag("span", {"title": name}, name)), *cells))
    whole = tag(
        "table",
        {"class": "confusion"},
        tag("caption", {}, label),
        tag("thead", {}, head),
        tag("tbody", {}, join(body)),
    )
    return scrolling(label, whole)
