"""One HTML file to look inside the memories of a model, which needs no other file, no server and no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

from pkmem.files.documents import save_text
from pkmem.inspecting.content import Content

_GENERATOR = '<meta name="generator" content="pkmem inspect">'
_SCRIPTS = ("data.js", "map.js", "panels.js", "page.js")  # one after the other


def require_own_page(out: Path) -> None:
    """Refuses to write over anything but a page of `pkmem inspect`.

    Raises:
        ValueError: there is something else.
    """
    folder = next((folder for folder in out.parents if folder.exists()), Path())
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a directory: choose another --page")
    if out.is_dir():
        raise ValueError(f"{out} is a directory: give --page the name of a file, such as {out / 'memory.html'}")
    if out.exists() or out.is_symlink():
        with out.open("rb") as file:
            if _GENERATOR.encode() not in file.read(1000):
                raise ValueError(f"{out} is there and is no page of `pkmem inspect`: choose another --page")


def write_page(out: Path, content: Content) -> None:
    """Writes the page, over an earlier one if there is one; its folder is made.

    What came from a model or a text stands in it as data, never as HTML, and the page may run its own script alone: its
    content security policy names that by its hash, and allows no connection.

    Args:
        out: the file.
        content: what it shows.

    Raises:
        ValueError: `out` holds something that is no such page.
    """
    require_own_page(out)
    script, style = "".join(map(_part, _SCRIPTS)), _part("page.css")
    facts = content.facts | {"blocks": {name: [b.dtype, b.shape] for name, b in content.blocks.items()}}
    data = [f'<script type="application/json" id="facts">{_json(facts)}</script>']
    data += [
        f'<script type="application/octet-stream" id="{name}">{block.text}</script>'
        for name, block in content.blocks.items()
    ]
    parts = {
        "generator": _GENERATOR,
        "policy": f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        "title": html.escape(_readable(f"Inside {content.facts['model']}")),
        "style": style,
        "script": script,
        "data": "\n".join(data),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_text(out, re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], _part("page.html")))


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(document: Any) -> str:
    """JSON that ends no element and begins no comment, whatever its strings hold."""
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", json.dumps(document, allow_nan=False))


def _readable(text: str) -> str:
    """A text that UTF-8 and HTML can hold: of a file name in another encoding, and without what no page may have."""
    return re.sub(r"[\x00-\x1f\x7f]", "\ufffd", text.encode("utf-8", "replace").decode())
