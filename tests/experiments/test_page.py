"""Pages: one HTML file that needs no other, and the same in Markdown."""

import base64
from pathlib import Path

from html_reader import Reader
from pkmem.experiments.page import Heading, Items, Paragraph, Picture, Table, is_page, write_page

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
BLOCKS = [
    Heading("<One> & two"),
    Paragraph("s² slots < 5"),
    Items(["first", "second <b>"]),
    Table("A | B", ["model", "x|y"], [["a<b", "1"], ["c", "2"]]),
    Picture("dot.png", 'a "dot"'),
]


def write(folder: Path) -> Path:
    (folder / "dot.png").write_bytes(PNG)
    return write_page(folder, "A <page>", BLOCKS)


def test_html_has_every_block_and_needs_no_other_file(tmp_path: Path) -> None:
    page = Reader(write(tmp_path).read_text())
    assert page.texts == [
        *(
            "A <page>",
            "<One> & two",
            "s² slots < 5",
            "first",
            "second <b>",
            "A | B",
            "model",
            "x|y",
            "a<b",
            "1",
            "c",
            "2",
        ),
        'a "dot"',
    ]
    (image,) = [attributes for tag, attributes in page.seen if tag == "img"]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG
    assert {tag for tag, _ in page.seen}.isdisjoint({"script", "link", "iframe"})
    assert not [name for _, attributes in page.seen for name in attributes if name == "href"]


def test_markdown_has_every_block(tmp_path: Path) -> None:
    assert write(tmp_path).with_suffix(".md").read_text() == (
        "<!-- made by pkmem report, which writes over this file -->\n\n# A <page>\n\n"
        "## <One> & two\n\ns² slots < 5\n\n- first\n- second <b>\n\n"
        "A | B\n\n| model | x\\|y |\n| --- | ---: |\n| a<b | 1 |\n| c | 2 |\n\n"
        'Picture: a "dot" (dot.png)\n'
    )


def test_a_page_is_known_from_other_files(tmp_path: Path) -> None:
    assert not is_page(tmp_path)
    (tmp_path / "index.html").write_text("<html></html>")
    assert not is_page(tmp_path)
    write(tmp_path)
    assert is_page(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dot.png", "index.html", "index.md"]


def test_its_markdown_alone_is_a_page_and_beside_a_foreign_html_is_not(tmp_path: Path) -> None:
    html = write(tmp_path)
    html.unlink()
    assert is_page(tmp_path)  # as in a clone of a repository that keeps index.md alone
    html.write_text("<html></html>")
    assert not is_page(tmp_path)
    html.unlink()
    (tmp_path / "index.md").write_text("# Product-key memories: the experiments\n")
    assert not is_page(tmp_path)
    assert is_page(Path(__file__).parents[2] / "experiments" / "results" / "report")
