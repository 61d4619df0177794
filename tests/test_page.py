import numpy as np
import pytest
from pages import parse, rows_of, text_of
from PIL import Image

from vggenc import StoreError
from vggenc.charts import COLOURS, SHAPES, Curve, Point, chart, confusion_matrix, scatter
from vggenc.page import (
    Cell,
    Html,
    Section,
    facts,
    markup,
    missing,
    page,
    percent,
    picture,
    table,
    tag,
    write_page,
)

HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J\u202e"
SHOWN = "<script>alert(1)</script>\"'&\\x1b[2J\\u202e"


def test_text_is_escaped_wherever_it_is_put():
    places = [
        tag("p", {"title": HOSTILE}, HOSTILE),
        facts({HOSTILE: HOSTILE}),
        table(HOSTILE, [HOSTILE], [[HOSTILE], [Cell(HOSTILE, HOSTILE)]], anchors=[HOSTILE, HOSTILE]),
        picture(Image.new("RGB", (4, 4)), HOSTILE, HOSTILE),
        missing(HOSTILE, HOSTILE, HOSTILE),
        scatter(HOSTILE, np.eye(2), [Point(HOSTILE, HOSTILE, HOSTILE)] * 2),
        chart(HOSTILE, HOSTILE, [Curve(HOSTILE, [(1, 2.0)], 0)]),
        confusion_matrix(HOSTILE, [HOSTILE], np.array([[1]])),
        Html(page(HOSTILE, HOSTILE, [Section(HOSTILE, markup(HOSTILE))])),
    ]
    for place in places:
        assert "<script>alert" not in place
        assert "\x1b" not in place
        assert "\u202e" not in place
        tree = parse(f"<div>{place}</div>")
        held = [*tree.itertext(), *(value for each in tree.iter() for value in each.attrib.values())]
        assert SHOWN in held or any(SHOWN in text for text in held)


def test_columns_of_numbers_are_known_and_carry_what_they_are_sorted_by():
    tree = parse(
        table(
            "t",
            ["n", "share", "word"],
            [[10, percent(0.5), "b"], [None, percent(None), 2], [9, percent(1), "a"]],
        )
    )
    heads = list(tree.iter("th"))
    assert [head.get("class") for head in heads] == ["number", "number", None]
    assert [head.get("aria-sort") for head in heads] == ["none"] * 3
    assert [[cell.get("data-key") for cell in row.iter("td")] for row in tree.find(".//tbody")] == [
        [None, "50.0", None],
        ["", "", None],
        [None, "100", None],
    ]
    assert rows_of(tree) == [["10", "50.0", "b"], ["-", "-", "2"], ["9", "100.0", "a"]]


def test_a_page_forbids_all_that_it_does_not_hold():
    tree = parse(page("title", "lead", [Section("Part one", tag("p", {}, "text"))]))
    [policy] = [meta.get("content") for meta in tree.iter("meta") if meta.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules["script-src"].startswith("'sha256-")
    assert set(rules) == {"default-src", "img-src", "style-src", "script-src", "base-uri", "form-action"}
    assert tree.get("lang") == "en"
    assert [text_of(h1) for h1 in tree.iter("h1")] == ["title"]
    assert [link.get("href") for link in tree.find(".//nav")] == ["#part-one"]


def test_numbers_of_a_confusion_matrix_stand_in_their_places():
    tree = parse(confusion_matrix("m", ["cat", "dog"], np.array([[3, 1], [0, 2]])))
    assert rows_of(tree) == [["cat", "3", "1"], ["dog", "", "2"]]
    assert [text_of(head) for head in tree.find(".//thead").iter("th")] == ["true \\ predicted", "cat", "dog"]


def test_a_map_keeps_proportions_inside_its_frame():
    places = np.array([[0, 0], [100, 0], [0, 50]])
    tree = parse(scatter("m", places, [Point("g", str(i), None) for i in range(3)]))
    [drawing] = [svg for svg in tree.iter("svg") if svg.get("role") == "img"]
    (ax, ay), (bx, by), (cx, cy) = ((float(c.get("cx")), float(c.get("cy"))) for c in drawing.iter("circle"))
    assert ay == by
    assert ax == cx
    assert bx - ax == pytest.approx(2 * (cy - ay), abs=0.2)
    assert all(0 < x < 600 and 0 < y < 400 for x, y in ((ax, ay), (bx, by), (cx, cy)))


def test_small_groups_share_a_colour_where_there_are_too_many():
    most = COLOURS * len(SHAPES)
    points = [Point(f"g{i:02}", "", None) for i in range(most + 3) for _ in range(40 - i)]
    tree = parse(scatter("m", np.random.default_rng(0).random((len(points), 2)), points))
    names = [text_of(button) for button in tree.iter("button")]
    assert len(names) == most
    assert names[0] == "g0040"
    assert names[-1] == f"others (4 folders){sum(40 - i for i in range(most - 1, most + 3))}"
    styles = [button.get("data-group") for button in tree.iter("button")]
    assert len(set(styles)) == most
    assert {group.get("data-group") for group in tree.iter("g")} == set(styles)


def test_a_curve_rises_where_its_values_do():
    tree = parse(chart("loss", "mean", [Curve("a", [(1, 1.0), (2, 3.0), (3, 2.0)], 0)], mark=2))
    first, second, third = (float(dot.get("cy")) for dot in tree.iter("circle"))
    assert second < third < first  # y points down
    [mark] = [line for line in tree.iter("line") if line.get("class") == "mark"]
    assert mark.get("x1") == list(tree.iter("circle"))[1].get("cx")


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path):
    write_page(tmp_path / "a.html", "one")
    write_page(tmp_path / "a.html", "two")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.html", "two")]
    with pytest.raises(StoreError, match="can't be written"):
        write_page(tmp_path / "nowhere" / "a.html", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="can't be written"):
        write_page(tmp_path / "folder", "text")
    assert {file.name for file in tmp_path.iterdir()} == {"a.html", "folder"}
