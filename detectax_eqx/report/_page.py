"""Assembles a page: markup, style, scripts and data in one self-contained file."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import files


FOLDER = Path(__file__).parent


def file_name(location: str | Path) -> str:
    """The last part of a path or URL."""
    return str(location).rpartition("/")[2]


def write_page(path: Path, *, title: str, body: str, scripts: Sequence[str], data: dict[str, Any]) -> None:
    """Writes `page.html` with its placeholders filled in. `body` and `scripts` are files in this module's folder.

    The data is embedded as JSON. Each `<` in it is escaped, so that no name or text can close the script element.
    """
    content = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "{{title}}": html.escape(title),
        "{{style}}": _read("page.css"),
        "{{body}}": _read(body),
        "{{script}}": "\n".join(_read(script) for script in scripts),
        "{{data}}": content,
    }
    text = _read("page.html")
    for mark, part in parts.items():
        before, after = text.split(mark)
        text = before + part + after
    with files.whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
