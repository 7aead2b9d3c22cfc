"""A strict reader of the pages that runs leave."""

from html.parser import HTMLParser

VOID = ("meta", "circle", "path")
"""Tags that close by themselves."""
FOREIGN = ("href", "src", "onload", "onerror", "onclick")
"""What would fetch or run something."""


class Page(HTMLParser):
    """The cells, texts and curves of a page; complains of tags that do not close and of whatever is not in the file.

    ``rows``: cells of every table's rows; ``figures``: what pictures show; ``lines``: how many points the curves have,
    without those that are drawn thin; ``text``: all that is read.
    """

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.figures: list[str] = []
        self.lines: list[int] = []
        self.titles: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert not any(name in given for name in FOREIGN) and tag not in ("script", "link", "img", "iframe")
        if tag == "svg":
            self.figures.append(str(given["aria-label"]))
        if tag == "path" and "class" not in given:
            self.lines.append(str(given["d"]).count("L") + 1)
        if "title" in given:
            self.titles.append(str(given["title"]))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.text += data
        if "tr" in self.open and self.rows[-1]:
            self.rows[-1][-1] += data
