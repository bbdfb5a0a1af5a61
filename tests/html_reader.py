"""Reads an HTML page as a browser would, for the tests of what writes one."""

from html.parser import HTMLParser


class Reader(HTMLParser):
    """Tags, attributes and texts of a page; every tag must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text) -> None:
        if self.open and self.open[-1] not in ("style", "title") and text.strip():
            self.texts.append(text.strip())
