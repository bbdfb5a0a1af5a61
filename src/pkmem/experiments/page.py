"""A page of headings, paragraphs, tables and pictures, written as Markdown and as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pkmem.files.documents import save_text

_GENERATOR = '<meta name="generator" content="pkmem report">'
_COMMENT = "<!-- made by pkmem report, which writes over this file -->"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1500px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"
    "caption{text-align:left;font-weight:600;padding:.3em 0}"
    "th,td{border-bottom:1px solid #ddd;padding:.25em .5em;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}th{background:#f4f4f4}"
    "img{max-width:100%;height:auto}code{font-size:85%}"
)


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 6."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of plain texts."""

    texts: list[str]


@dataclass(frozen=True)
class Table:
    """A table of plain texts.

    Args:
        caption: what it shows.
        columns: heads of the columns.
        rows: as many texts each as there are columns.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG that lies in the page's folder.

    Args:
        file: its name there.
        caption: what it shows.
    """

    file: str
    caption: str


Block = Heading | Paragraph | Items | Table | Picture


def write_page(folder: Path, title: str, blocks: Iterable[Block]) -> Path:
    """Writes index.html, which holds the pictures, and index.md, which only names them, over such a page if there is one.

    Args:
        folder: where the pictures are.
        title: of the page.
        blocks: the page, top to bottom.

    Returns:
        the HTML file.
    """
    blocks = [Heading(title, 1), *blocks]
    body = "\n".join(_html(block, folder) for block in blocks)
    document = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">{_GENERATOR}'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )
    save_text(folder / "index.md", "\n\n".join([_COMMENT, *map(_markdown, blocks)]) + "\n")
    save_text(folder / "index.html", document)
    return folder / "index.html"


def is_page(folder: Path) -> bool:
    """Whether a folder holds a page that `write_page` made: its index.html or, where that is not kept, its index.md."""
    for name, mark in (("index.html", _GENERATOR), ("index.md", _COMMENT)):
        if (folder / name).exists():
            return mark in (folder / name).read_text(encoding="utf-8", errors="replace")[:1000]
    return False


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Items(texts):
            return "<ul>\n" + "\n".join(f"<li>{html.escape(text)}</li>" for text in texts) + "\n</ul>"
        case Table(caption, columns, rows):
            lines = [_html_row("th", columns), *(_html_row("td", row) for row in rows)]
            return f"<table><caption>{html.escape(caption)}</caption>\n" + "\n".join(lines) + "\n</table>"
        case Picture(file, caption):
            data, text = base64.b64encode((folder / file).read_bytes()).decode(), html.escape(caption)
            return (
                f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
            )


def _html_row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
        case Table(caption, columns, rows):
            lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
            cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
            return f"{caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells)
        case Picture(file, caption):
            return f"Picture: {caption} ({file})"  # a name: index.md is kept where its pictures are not
