"""Reading images: every mode and orientation, and the errors for unusable files."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from detectax_eqx.data import DatasetError, load_coco, read_image


def _pixels(height=6, width=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_rgb_is_read_as_stored(tmp_path):
    Image.fromarray(_pixels()).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image, _pixels())
    assert image.flags.writeable


def _gray(pixels):
    return Image.fromarray(pixels[..., 0]), np.repeat(pixels[..., :1], 3, axis=2)


def _bilevel(pixels):
    on = pixels[..., 0] > 127
    return Image.fromarray(on), np.repeat(on[..., None] * np.uint8(255), 3, axis=2)


def _gray_alpha(pixels):
    image = Image.merge("LA", [Image.fromarray(pixels[..., 0]), Image.fromarray(pixels[..., 1])])
    return image, np.repeat(pixels[..., :1], 3, axis=2)


def _alpha(pixels):
    alpha = np.zeros((*pixels.shape[:2], 1), np.uint8)
    return Image.fromarray(np.concatenate([pixels, alpha], axis=2)), pixels


def _palette(pixels):
    colors = np.array([[255, 0, 0], [0, 128, 0], [10, 20, 30]], np.uint8)
    index = pixels[..., 0] % 3
    image = Image.fromarray(index)
    image.putpalette(colors.ravel().tolist())
    return image, colors[index]


def _transparent_palette(pixels):
    image, expected = _palette(pixels)
    image.info["transparency"] = bytes([255, 0, 128])
    return image, expected


def _transparent_entry(pixels):
    image, expected = _palette(pixels)
    image.info["transparency"] = 1
    return image, expected


def _gray16(pixels):
    values = pixels[..., 0].astype(np.uint16) * 257
    return Image.fromarray(values), np.repeat(pixels[..., :1], 3, axis=2)


MODES = [_gray, _bilevel, _gray_alpha, _alpha, _palette, _transparent_palette, _transparent_entry, _gray16]


@pytest.mark.parametrize("make", MODES)
def test_modes(tmp_path, make):
    image, expected = make(_pixels())
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)


def test_sixteen_bits_are_scaled_and_rounded(tmp_path):
    values = np.array([[0, 128, 129, 257, 40000, 65535]], np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name)[..., 1], expected)
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "b.tif")  # mode I
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif")[..., 1], expected)


def test_cmyk_jpeg(tmp_path):
    smooth = np.tile(np.linspace(60, 200, 32, dtype=np.uint8)[:, None, None], (1, 32, 3))
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "a.jpg", quality=98)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.mode == "CMYK"
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - smooth).max() <= 6


# The stored pixels as a viewer shows them, for each EXIF orientation.
ORIENTED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


def _save_oriented(path, orientation, pixels):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_orientations(tmp_path, orientation, suffix):
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(_pixels()).save(path, exif=exif, **options)
    np.testing.assert_array_equal(read_image(path), ORIENTED[orientation](_pixels()))


@pytest.mark.parametrize("orientation", ORIENTED)
def test_the_annotated_size_decides_over_the_orientation(tmp_path, orientation):
    _save_oriented(tmp_path / "a.png", orientation, _pixels(6, 9))
    sideways = orientation >= 5
    shown = read_image(tmp_path / "a.png", size=(9, 6) if sideways else (6, 9))
    np.testing.assert_array_equal(shown, ORIENTED[orientation](_pixels()))
    if sideways:
        np.testing.assert_array_equal(read_image(tmp_path / "a.png", size=(6, 9)), _pixels())
    with pytest.raises(DatasetError, match=r"a\.png.*annotated as 7×6"):
        read_image(tmp_path / "a.png", size=(6, 7))


def test_a_square_image_is_turned(tmp_path):
    _save_oriented(tmp_path / "a.png", 6, _pixels(5, 5))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", size=(5, 5)), np.rot90(_pixels(5, 5), -1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("garbage", [b"", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM"])
def test_garbage_in_place_of_exif_does_not_matter(tmp_path, garbage):
    Image.fromarray(_pixels(16, 24)).save(tmp_path / "a.jpg", exif=garbage)
    assert read_image(tmp_path / "a.jpg").shape == (16, 24, 3)


def _missing(path):
    pass


def _truncated_jpeg(path):
    Image.fromarray(_pixels(64, 64)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-400])


def _truncated_png(path):
    Image.fromarray(_pixels(64, 64)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-400])


def _empty(path):
    path.write_bytes(b"")


def _text(path):
    path.write_text("<html>404</html>")


def _folder(path):
    path.mkdir()


def _thirty_two_bits(path):
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(path, "TIFF")


def _negative(path):
    Image.fromarray(np.full((2, 2), -1, np.int32)).save(path, "TIFF")


def _fractions(path):
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(path, "TIFF")


def _flipped_png(path):
    """Flips a bit of the pixels. They still decompress; only the checksum of the chunk shows the damage."""
    Image.fromarray(_pixels(64, 64)).save(path, "PNG", compress_level=0)
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)


UNUSABLE = [
    (_missing, "no such image file"),
    (_truncated_jpeg, "truncated"),
    (_truncated_png, "cannot be read as an image"),
    (_flipped_png, "checksum"),
    (_empty, "cannot identify"),
    (_text, "cannot identify"),
    (_folder, "cannot be read"),
    (_thirty_two_bits, "32-bit values 70000"),
    (_negative, "32-bit values -1"),
    (_fractions, "fractions"),
]


@pytest.mark.parametrize("make, message", UNUSABLE)
def test_unusable_files_are_named(tmp_path, make, message):
    path = tmp_path / "some image"
    make(path)
    with pytest.raises(DatasetError, match="some image.*" + message):
        read_image(path)


def _gigantic(path, height=13_400, width=13_400):
    """A valid image with more pixels than Pillow reads by default."""
    Image.new("1", (width, height)).save(path, "PNG")


def test_an_image_beyond_the_limit_has_to_be_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    pixels = _pixels(16, 20)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png.*320 pixels.*max_pixels"):
        read_image(tmp_path / "a.png")
    allowed: list[dict[str, Any]] = [{"max_pixels": 320}, {"size": (16, 20)}, {"size": (16, 20), "max_pixels": 1}]
    for options in allowed:
        np.testing.assert_array_equal(read_image(tmp_path / "a.png", **options), pixels)
    for max_pixels in (50, 319):
        with pytest.raises(DatasetError, match=r"a\.png"):
            read_image(tmp_path / "a.png", max_pixels=max_pixels)
    with pytest.raises(DatasetError, match=r"a\.png.*annotated as 9×9"):
        read_image(tmp_path / "a.png", size=(9, 9))
    with pytest.raises(ValueError, match="max_pixels must be positive, got 0"):
        read_image(tmp_path / "a.png", max_pixels=0)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
def test_the_annotated_size_vouches_in_every_format(tmp_path, monkeypatch, format):
    Image.new("L", (40, 30), 200).save(tmp_path / "a.img", format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(tmp_path / "a.img", size=(30, 40)).shape == (30, 40, 3)
    with pytest.raises(DatasetError, match="1200 pixels"):
        read_image(tmp_path / "a.img")


def test_threads_read_large_images_beside_small_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    sizes = [(30, 40), (5, 6), (50, 20), (7, 7)]
    for i, (height, width) in enumerate(sizes):
        Image.new("L", (width, height), i).save(tmp_path / f"{i}.png")
    with ThreadPoolExecutor(8) as executor:
        images = executor.map(lambda i: read_image(tmp_path / f"{i % 4}.png", size=sizes[i % 4]), range(200))
        assert all(image.shape[:2] == sizes[i % 4] and (image == i % 4).all() for i, image in enumerate(images))
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_gigantic_image_is_found_by_its_annotations(tmp_path):
    _gigantic(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 13_400, "width": 13_400}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9000, 9000]}],
        "categories": [{"id": 1, "name": "field"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert load_coco(tmp_path / "train.json", tmp_path).sizes == ((13_400, 13_400),)
    content["images"][0]["height"] = 13_399
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"a\.png.*annotated as 13400×13399"):
        load_coco(tmp_path / "train.json", tmp_path)


@pytest.mark.long
def test_a_gigantic_image_is_read(tmp_path):
    _gigantic(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", size=(13_400, 13_400)).shape == (13_400, 13_400, 3)
    assert read_image(tmp_path / "a.png", max_pixels=13_400**2).shape == (13_400, 13_400, 3)
    with pytest.raises(DatasetError, match="179560000 pixels"):
        read_image(tmp_path / "a.png")


def test_a_backslash_is_named_as_the_reason(tmp_path):
    with pytest.raises(DatasetError, match=r'no such image file.*backslash.*write "photos/a\.png"'):
        read_image(tmp_path / "photos\\a.png")
