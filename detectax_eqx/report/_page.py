"""Assembles a page: markup, style, scripts and data in one self-contained file."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import files


FOLDER = Path(__file__).parent
# The maximum length of a thumbnail's longest side, in pixels.
THUMBNAIL = 480
JPEG_QUALITY = 72


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


def thumbnail(image: np.ndarray) -> tuple[str, tuple[int, int]]:
    """Shrinks an RGB image to a small JPEG. Returns its data URI and its `(height, width)`."""
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return uri, (picture.height, picture.width)


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")
