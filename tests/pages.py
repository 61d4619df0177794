"""Pages taken apart, for the tests of what stands in them."""

from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = ("img", "link", "meta")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tree = ElementTree.TreeBuilder()

    def handle_starttag(self, tag, attrs) -> None:
        self.tree.start(tag, {name: value or "" for name, value in attrs})
        if tag in VOID:
            self.tree.end(tag)

    def handle_endtag(self, tag) -> None:
        self.tree.end(tag)

    def handle_data(self, data) -> None:
        self.tree.data(data)


def parse(text: str) -> ElementTree.Element:
    """The elements of a page; ends that don't fit their beginnings are an error."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader.tree.close()


def text_of(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def section(page: ElementTree.Element, name: str) -> ElementTree.Element:
    return next(each for each in page.iter("section") if each.get("id") == name)


def rows_of(part: ElementTree.Element, table: int = 0) -> list[list[str]]:
    """The text of each cell of a table's body."""
    body = list(part.iter("tbody"))[table]
    return [[text_of(cell) for cell in row] for row in body]
