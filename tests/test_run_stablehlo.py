"""run_stablehlo.py reads images as training does, without importing the package, and reports errors in one line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from detectax_eqx import data


ROOT = Path(__file__).parents[1]
RUN = ROOT / "experiments" / "run_stablehlo.py"
REFUSED = object()


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(RUN.parent)
    import run_stablehlo

    return run_stablehlo


def pixels(height=6, width=9):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def in_mode(mode, **info):
    def make():
        image = Image.fromarray(pixels()).convert(mode)
        image.info |= info
        return image

    return make


def numbers(values, dtype):
    return lambda: Image.fromarray(np.array(values).astype(dtype))


def oriented(orientation):
    def save(path):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(pixels()).save(path, exif=exif)

    return save


def animated(path):
    first, second = Image.fromarray(pixels()), Image.fromarray(255 - pixels())
    first.save(path, save_all=True, append_images=[second])


def cut_short(path):
    Image.fromarray(pixels(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-400])


def flipped(path):
    """Flips one bit of the pixels: they still unpack, but the chunk's checksum does not match."""
    Image.fromarray(pixels(64, 64)).save(path, compress_level=0)
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)


def garbage_exif(path):
    Image.fromarray(pixels(16, 24)).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")


SIXTEEN = [[0, 128, 129, 257, 40000, 65535]]
# Files by name: an image to save there, or a function that writes it.
SAVED = {
    "1.png": in_mode("1"),
    "L.png": in_mode("L"),
    "L-transparent.png": in_mode("L", transparency=7),
    "LA.png": in_mode("LA"),
    "P.png": in_mode("P"),
    "P-transparent-entry.png": in_mode("P", transparency=1),
    "P-transparent-bytes.png": in_mode("P", transparency=bytes([255, 0, 128])),
    "P-transparent.gif": in_mode("P", transparency=1),
    "PA.tif": in_mode("PA"),
    "RGB.png": in_mode("RGB"),
    "RGB-transparent.png": in_mode("RGB", transparency=(1, 2, 3)),
    "RGB.jpg": in_mode("RGB"),
    "RGBA.png": in_mode("RGBA"),
    "RGBA.webp": in_mode("RGBA"),
    "CMYK.jpg": in_mode("CMYK"),
    "CMYK.tif": in_mode("CMYK"),
    "YCbCr.tif": in_mode("YCbCr"),
    "I16.png": numbers(SIXTEEN, np.uint16),
    "I16.tif": numbers(SIXTEEN, np.uint16),
    "I16B.tif": numbers(SIXTEEN, ">u2"),
    "I.tif": numbers(SIXTEEN, np.int32),
    "I-beyond.tif": numbers([[0, 70000]], np.int32),
    "I-negative.tif": numbers([[-1, 7]], np.int32),
    "F.tif": numbers([[0.25, 0.5]], np.float32),
}
WRITTEN = {
    **{f"EXIF-{i}{suffix}": oriented(i) for i in range(1, 9) for suffix in (".jpg", ".png", ".tif", ".webp")},
    **{f"animated{suffix}": animated for suffix in (".gif", ".png", ".webp", ".tif")},
    "EXIF-garbage.jpg": garbage_exif,
    "cut.png": cut_short,
    "cut.jpg": cut_short,
    "bit.png": flipped,
    "empty.png": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_text("<html>404</html>"),
    "folder.png": lambda path: path.mkdir(),
    "missing.png": lambda path: None,
}
CASES = WRITTEN | {name: (lambda path, make=make: make().save(path)) for name, make in SAVED.items()}


def result(read, path) -> Any:
    try:
        return read(path)
    except Exception:
        return REFUSED


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("name", CASES)
def test_one_rule_of_reading(script, tmp_path, name):
    path = tmp_path / name
    CASES[name](path)
    wanted, found = result(data.read_image, path), result(script.read_image, path)
    if wanted is REFUSED:
        assert found is REFUSED
    else:
        assert found.dtype == np.uint8 and found.shape == wanted.shape
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_the_table_has_both_outcomes(tmp_path):
    refused = {"I-beyond.tif", "I-negative.tif", "F.tif", "cut.png", "cut.jpg", "bit.png", "empty.png", "text.png"}
    refused |= {"folder.png", "missing.png"}
    for name, write in CASES.items():
        write(tmp_path / name)
        assert (result(data.read_image, tmp_path / name) is REFUSED) == (name in refused), name


def test_sixteen_bits_are_not_clipped(script, tmp_path):
    """A ramp over the whole 16-bit range has its mean in the middle of the 8-bit range."""
    ramp = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert script.read_image(tmp_path / "a.png").mean() == pytest.approx(ramp.mean() / 257, abs=0.1)


ABOUT = {
    "class_names": ["a"],
    "shapes": [{"name": "x", "batch": 1, "source": [48, 64], "canvas": [64, 96]}],
    "preprocessing": {"resize": {"min_size": 64, "max_size": 96}},
    "outputs": ["boxes", "scores", "labels", "valid"],
    "num_weights": 0,
}


def write_detector(path, **changes):
    """Writes a file of the right form without a program, which files that are rejected before it runs do not need."""
    import jax

    newest = jax.export.maximum_supported_calling_convention_version
    about = ABOUT | {"jax": jax.__version__, "calling_convention": newest} | changes
    np.savez(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8))


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), "not a complete .npz file written by export.py"),
        (lambda path: path.write_text("x"), "not a complete .npz file written by export.py"),
        (lambda path: np.savez(path, x=np.zeros(2)), "holds no detector"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: write_detector(path, calling_convention=99), "reads conventions"),
    ],
)
def test_a_detector_that_is_none(tmp_path, write, words):
    path = tmp_path / "detector.npz"
    write(path)
    done = subprocess.run([sys.executable, RUN, path, "x.png"], capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"{path}: ") and words in line


def test_images_that_cannot_be_used(tmp_path):
    """Each is reported in one line that names it; the other images are still processed."""
    detector, large, text = (tmp_path / name for name in ("detector.npz", "large.png", "text.png"))
    write_detector(detector)
    text.write_text("x")
    Image.fromarray(pixels(50, 64)).save(large)
    missing = tmp_path / "missing.png"
    done = subprocess.run([sys.executable, RUN, detector, missing, text, large], capture_output=True, text=True)
    *lines, last = done.stderr.splitlines()
    assert done.returncode == 1 and not done.stdout and last == "3 of 3 files failed."
    for line, path, words in zip(
        lines, (missing, text, large), ("No such file", "cannot identify image file", "up to 48×64 pixels"), strict=True
    ):
        assert line.startswith(f"{path}: ") and words in line
    assert "50×64" in lines[2] and "--source" in lines[2]
