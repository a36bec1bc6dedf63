"""Image files: every format damaged at random, and headers that claim too much."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from detectax_eqx.data import read_image

from . import Case, damage


SIZE = (40, 56)
# Formats without a checksum of their pixels, in which a flipped bit cannot be detected.
UNCHECKED = ("JPEG", "BMP", "TIFF", "GIF", "WEBP")


def pixels():
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.stack([4 * x, 6 * y, 2 * (x + y)], axis=2).astype(np.uint8)


def make(content, folder, size=SIZE):
    path = folder / "picture.img"
    path.write_bytes(content)
    return lambda: read_image(path, size=size)


def cases():
    for number, kind in enumerate(("PNG", *UNCHECKED)):
        stream = io.BytesIO()
        Image.fromarray(pixels()).save(stream, kind)
        stream.seek(0)
        expected = np.asarray(Image.open(stream).convert("RGB"))

        def check(image, kind=kind, expected=expected):
            assert image.shape == (*SIZE, 3) and image.dtype == np.uint8
            assert kind in UNCHECKED or np.array_equal(image, expected)
            return "harmless" if np.array_equal(image, expected) else "not detected by the format"

        for what, changed in damage(stream.getvalue(), np.random.default_rng(number), flips=25, cuts=4):
            yield Case(f"image: {kind} {what}", lambda folder, c=changed: make(c, folder), ("picture.img",), check)
    for what, content in bombs().items():
        yield Case(f"image: {what}", lambda folder, c=content: make(c, folder), ("picture.img",))
    yield Case(
        "image: a bomb without an annotated size",
        lambda folder: make(bombs()["a PNG of 60,000×60,000 pixels"], folder, size=None),
        ("picture.img",),
    )


def png(width, height, data=b""):
    """A PNG with a header of the given size and the given compressed bytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bombs():
    return {
        "a PNG of 60,000×60,000 pixels": png(60_000, 60_000, zlib.compress(bytes(10_000_000))),
        "a PNG of 9,000×9,000 pixels": png(9_000, 9_000, zlib.compress(bytes(10_000_000))),
        "a PNG without width": png(0, 40),
        "a PNG without pixels": png(SIZE[1], SIZE[0]),
        "a PNG of too few pixels": png(SIZE[1], SIZE[0], zlib.compress(bytes(100))),
        "a PNG of 2^31 rows": png(1, 2**31 - 1),
        "text": b"no image",
        "a zip archive": b"PK\x03\x04" + bytes(100),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 56 40\n(/etc/passwd) run\n",
    }
