"""Reads image files of any mode and orientation as RGB pixels."""

import os
from io import BufferedReader, BytesIO
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from ._pixel_limit import allow_pixels
from ._report import BadImageError
from ._store import Location, read_bytes, to_location


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
# The transposition that undoes each EXIF orientation (EXIF 2.32, section 4.6.4): a camera held sideways stores the rows
# of an image as columns.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The orientations that swap width and height.
SIDEWAYS = (5, 6, 7, 8)
# The last bytes of a complete file.
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xae\x42\x60\x82"}
# What Pillow raises for an image that exceeds its pixel limit.
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Lists the image files in a folder and its subfolders, sorted: those whose suffix is in `IMAGE_SUFFIXES`."""
    files = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)


def read_image(
    path: str | Path | Image.Image, *, size: tuple[int, int] | None = None, max_pixels: int | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image from a file, an http, https, gs or s3 URL, or a Pillow image, as `(h, w, 3)` uint8 RGB.

    Gray, palette, CMYK and 1-bit images are converted to RGB. An alpha channel is dropped without blending. 16-bit gray
    is scaled, not clipped: 65535 becomes 255. Only the first frame of an animation is read.

    The EXIF orientation is applied, so that the image has the orientation in which viewers show it. If `size` is given,
    it is the `(height, width)` that the annotations refer to. The orientation is then ignored if only the size before
    applying it equals `size`, since the annotator did not see it. If both sizes are equal, it is applied.

    A small file can decompress to gigabytes of pixels. An image beyond Pillow's limit of 179 million pixels is
    therefore read only if it has the annotated `size`, or at most `max_pixels` pixels.

    Raises a `BadImageError` (a `DatasetError`) that names the file if it is missing, truncated or not an image, if it
    holds 32-bit integers outside 0..65535 or floating-point values, whose range is unknown, if its size equals `size`
    neither before nor after the orientation is applied, or if it has too many pixels. Raises a `ValueError` if
    `max_pixels` is not positive, and a `ConnectionError` with the URL and status if a server does not return the image.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("L", (3, 2), 200).save(f"{folder}/gray.png")
    ...     image = read_image(f"{folder}/gray.png")
    >>> image.shape, image[0, 0].tolist()
    ((2, 3, 3), [200, 200, 200])
    """
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels must be positive, got {max_pixels}.")
    if isinstance(path, Image.Image):
        return np.array(_upright_rgb(path, size, "the Pillow image"))
    return np.array(open_rgb(to_location(path), size, max_pixels))


def open_rgb(location: Location, size: tuple[int, int] | None, max_pixels: int | None = None) -> Image.Image:
    """Reads an image as `read_image` does, but returns a Pillow image."""
    allowed = max_pixels if size is None else max(max_pixels or 0, size[0] * size[1])
    try:
        with allow_pixels(allowed), _open(location) as file, _checked(file) as image:
            # Check before decoding: a small file can decompress to gigabytes of pixels.
            if size is not None and size not in ((image.height, image.width), (image.width, image.height)):
                raise _wrong_size(location, (image.height, image.width), size)
            if allowed is not None and image.height * image.width > allowed:
                raise _too_large(location, image.height * image.width, allowed)
            return _upright_rgb(image, size, location)
    except (BadImageError, ConnectionError):
        raise
    except FileNotFoundError:
        raise BadImageError(f"{location}: no such image file.{_backslash(location)}") from None
    except BOMB as error:
        raise _bomb(location, size, error) from None
    except Exception as error:  # Pillow's readers raise errors of many types
        raise BadImageError(f"{location}: cannot be read as an image: {error}") from error


def _upright_rgb(image: Image.Image, size: tuple[int, int] | None, location: Location) -> Image.Image:
    image.load()
    transposition = TRANSPOSITIONS.get(_orientation(image)) if _is_upright(image, location, size) else None
    image = _to_rgb(image)
    return image if transposition is None else image.transpose(transposition)


def _open(location: Location) -> BufferedReader | BytesIO:
    return location.open("rb") if isinstance(location, Path) else BytesIO(read_bytes(location))


def _checked(file: BufferedReader | BytesIO) -> Image.Image:
    """Opens an image. The checksums of a PNG are verified, after which Pillow requires the file to be opened again."""
    image = Image.open(file)
    if image.format != "PNG":
        return image
    image.verify()
    file.seek(0)
    return Image.open(file)


def check_image(location: Location, size: tuple[int, int]) -> tuple[str, str] | None:
    """Checks quickly that an image exists, is complete and has this `(height, width)`, by the rule of `read_image`.

    Local JPEG and PNG files with the right last bytes are not decoded. All other images, and remote ones, are.

    Returns the problem and its remedy, or `None`.
    """
    if not isinstance(location, Path):
        try:
            open_rgb(location, size)
        except BadImageError as error:
            return str(error), "Add the file, write it again, or correct its entry and the folder."
        return None
    try:
        with allow_pixels(size[0] * size[1]), Image.open(location) as image:
            _is_upright(image, location, size)
            end = ENDS.get(image.format or "")
            if end is None or _last_bytes(location, len(end)) != end:
                image.load()
    except (BadImageError, *BOMB) as error:
        what = error if isinstance(error, BadImageError) else _bomb(location, size, error)
        return str(what), 'Correct "width" and "height", and check that the boxes belong to this image.'
    except FileNotFoundError:
        remedy = "Add the file, correct the folder, or remove the image's entry."
        return f"{location}: no such image file.", _backslash(location).strip() or remedy
    except Exception as error:
        return f"{location}: cannot be read as an image: {error}.", "Fetch or write the file again."
    return None


def shown_size(path: Path) -> tuple[int, int]:
    """Returns `(height, width)` of an image as viewers show it, without decoding its pixels.

    Raises a `BadImageError` that names the file if it is missing or not an image.
    """
    try:
        with Image.open(path) as image:
            turned = _orientation(image) in SIDEWAYS
            return (image.width, image.height) if turned else (image.height, image.width)
    except FileNotFoundError:
        raise BadImageError(f"{path}: no such image file.") from None
    except BOMB as error:
        raise BadImageError(f"{path}: {error}") from None
    except Exception as error:  # Pillow's readers raise errors of many types
        raise BadImageError(f"{path}: cannot be read as an image: {error}.") from error


def _last_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - count))
        return file.read()


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # malformed EXIF data does not affect the pixels
        return 1


def _is_upright(image: Image.Image, location: Location, size: tuple[int, int] | None) -> bool:
    """Whether `size` is that of the image as shown (true) or as stored (false). Raises a `BadImageError` otherwise."""
    stored = image.height, image.width
    shown = (image.width, image.height) if _orientation(image) in SIDEWAYS else stored
    if size is None or shown == size:
        return True
    if stored == size:
        return False
    raise _wrong_size(location, shown, size)


def _backslash(location: Location) -> str:
    """A hint for a file name with Windows path separators; empty for other names."""
    name = location.name if isinstance(location, Path) else unquote(location.rsplit("/", 1)[-1])
    if "\\" not in name:
        return ""
    right = name.replace("\\", "/")
    return f' Its "file_name" has a backslash, which is a path separator on Windows only: write "{right}".'


def _bomb(location: Location, size: tuple[int, int] | None, error: Exception) -> BadImageError:
    if size is not None:
        return BadImageError(f"{location}: {error} It is annotated as {size[1]}×{size[0]}.")
    return BadImageError(f"{location}: {error} If you trust the file, pass its number of pixels as max_pixels.")


def _too_large(location: Location, pixels: int, allowed: int) -> BadImageError:
    return BadImageError(f"{location}: has {pixels:,} pixels, more than max_pixels={allowed:,}.")


def _wrong_size(location: Location, found: tuple[int, int], size: tuple[int, int]) -> BadImageError:
    return BadImageError(f"{location}: is {found[1]}×{found[0]} pixels, but annotated as {size[1]}×{size[0]}.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # I;16, I;16B, I: Pillow's conversion clips at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"32-bit values {values.min()}..{values.max()} have no known range; save it with 16 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("fractions have no known range; save it with 8 or 16 bits")
    if "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
