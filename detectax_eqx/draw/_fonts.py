"""Fonts for class names in any script: the requested font, Pillow's default, and installed fonts as a fallback."""

import os
import shutil
import subprocess
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from PIL import ImageDraw, ImageFont


FontFile = str | os.PathLike
# A Unicode noncharacter. Fonts draw it as they draw any character that they lack.
_NO_CHARACTER = "\uffff"
# File names of installed fonts with a large character set, for systems without fontconfig (macOS, Windows).
_INSTALLED = (
    *("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf"),
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf"),
    *("msyh.ttc", "YuGothM.ttc", "malgun.ttf", "segoeui.ttf", "Nirmala.ttc", "leelawui.ttf"),
)


class Face(NamedTuple):
    """How to draw text: the requested font file, if any, and the font size in pixels."""

    font: str | None
    size: int


def face(image_size: tuple[int, int], font_size: int | None, font: FontFile | None) -> Face:
    """Returns the face of labels, of `font_size` pixels or in proportion to the image's `(height, width)`."""
    size = max(10, round(min(image_size) / 38)) if font_size is None else font_size
    return Face(None if font is None else os.fspath(font), size)


def measure(text: str, face: Face) -> tuple[float, int, int]:
    """Returns the width of a text and the pixels above and below its baseline, which depend only on its fonts."""
    runs = _runs(text, face)
    fonts = [_fonts(face)[0], *(font for _, font in runs)]
    above = max(font.getmetrics()[0] for font in fonts)
    below = max(round(font.getbbox("Ag", anchor="ls")[3]) for font in fonts)
    return sum(font.getlength(part) for part, font in runs), above, below


def write(
    canvas: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, face: Face, ink: tuple[int, int, int]
) -> None:
    """Draws a text with its top left corner at `corner`, each part in the first font that has its characters."""
    x, y = corner
    baseline = y + measure(text, face)[1]
    for part, font in _runs(text, face):
        canvas.text((x, baseline), part, font=font, fill=ink, anchor="ls")
        x += font.getlength(part)


def drawable(names: Sequence[str], face: Face) -> list[str]:
    """Escapes the characters that no font has, for example as `\\u732b`, with a single warning."""
    return escape(
        names,
        lambda character: _font_of(character, face) is not None,
        "Pass font= (predict.py: --font) a font file that has them.",
    )


def escape(names: Iterable[str], has: Callable[[str], bool], remedy: str) -> list[str]:
    """Escapes every character for which `has` is false, so that different names remain distinguishable.

    Unprintable characters such as line breaks are escaped as well. A single warning lists the printable ones.
    """
    names = [unicodedata.normalize("NFC", name) for name in names]  # combines letters with their accents
    characters = [character for character in sorted(set("".join(names))) if not _is_blank(character)]
    missing = [character for character in characters if character.isprintable() and not has(character)]
    controls = [character for character in characters if not character.isprintable()]
    escaped = {character: character.encode("unicode_escape").decode() for character in missing + controls}
    if missing:
        listed, example = " ".join(missing), escaped[missing[0]]
        warnings.warn(
            f"No available font has the characters {listed}: they are drawn as {example} and so on. {remedy}",
            stacklevel=2,
        )
    return ["".join(escaped.get(character, character) for character in name) for name in names]


@lru_cache(maxsize=4096)
def installed_font(character: str) -> str | None:
    """Returns the file of an installed font that has a character, or `None`."""
    matches = (path for path in _candidates(character) if has(_load(path, 20), character))
    return next(matches, None)


def has(font: ImageFont.FreeTypeFont | None, character: str) -> bool:
    """Whether a font has a character, i.e. draws it differently from a code point that no font has."""
    if font is None:
        return False
    glyphs = []
    for code_point in (character, _NO_CHARACTER):
        mask: Any = font.getmask(code_point)
        glyphs.append((font.getlength(code_point), font.getbbox(code_point), bytes(mask)))
    return glyphs[0] != glyphs[1]


def _is_blank(character: str) -> bool:
    """Whether a character has no glyph of its own: spaces, joiners and directional marks."""
    return character == " " or unicodedata.category(character) in ("Zs", "Cf")


def _runs(text: str, face: Face) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """Splits a text into runs, each with a font that has its characters. Blanks belong to the run before them."""
    first, runs = _fonts(face)[0], []
    for character in text:
        font = runs[-1][1] if runs and _is_blank(character) else _font_of(character, face) or first
        if runs and runs[-1][1] is font:
            runs[-1] = runs[-1][0] + character, font
        else:
            runs.append((character, font))
    return runs


@lru_cache(maxsize=4096)
def _font_of(character: str, face: Face) -> ImageFont.FreeTypeFont | None:
    for font in _fonts(face):
        if _is_blank(character) or has(font, character):
            return font
    path = installed_font(character)
    return None if path is None else _load(path, face.size)


@lru_cache(maxsize=64)
def _fonts(face: Face) -> tuple[ImageFont.FreeTypeFont, ...]:
    """Returns the requested font, if any, and Pillow's default."""
    default: Any = ImageFont.load_default(face.size)  # with a size, always a scalable font
    if face.font is None:
        return (default,)
    if not os.path.isfile(face.font):
        raise FileNotFoundError(f"There is no font file {face.font}.")
    try:
        return ImageFont.truetype(face.font, face.size), default
    except OSError as error:
        raise ValueError(f"{face.font} is not a font that Pillow can use ({error}).") from None


@lru_cache(maxsize=64)
def _load(path: str, size: int) -> ImageFont.FreeTypeFont | None:
    """Loads an installed font. Returns `None` if it is missing or not scalable."""
    try:
        return ImageFont.truetype(path, size)
    except OSError:
        return None


def _candidates(character: str) -> list[str]:
    """Returns the files of installed fonts that may have a character."""
    if (program := shutil.which("fc-list")) is None:
        return list(_INSTALLED)
    pattern = f":charset={ord(character):x}:scalable=true"
    try:
        listing = subprocess.run([program, pattern, "file"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return list(_INSTALLED)
    files = [line.rstrip(": ") for line in listing.stdout.splitlines()]
    # Upright regular fonts first: they have the shortest names of their families.
    return sorted(files, key=lambda path: (len(os.path.basename(path)), path))
