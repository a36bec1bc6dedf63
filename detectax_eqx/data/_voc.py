"""Reads datasets in the format of Pascal VOC: an XML file for each image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ._coco import parse_content
from ._dataset import CocoDataset
from ._images import list_images, shown_size
from ._report import BadImageError, Collector, DatasetError
from ._values import show


def load_voc(
    folder: str | Path,
    split: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    first_pixel: int = 1,
    check_images: bool = True,
) -> CocoDataset:
    """Reads boxes of a dataset in Pascal VOC's format and checks them as `load_coco` does.

    Objects marked `difficult` become crowd regions: they are neither trained on nor counted as missed. Ids of
    categories, images and annotations count from 1, in the order of `classes`, of the files' names, and of the objects
    in the files. Masks are not read.

    - `folder`: that of `Annotations`, `JPEGImages` and `ImageSets`; or any folder that holds images and, beside each,
      its XML file, as Roboflow and LabelImg write them.
    - `split`: the name of a list in `ImageSets/Main`, such as `"trainval"`. Default: all images with an XML file.
    - `classes`: their names, in the order of the labels. Default: those in all XML files of the folder, sorted.
    - `first_pixel`: the coordinate of the first pixel. Boxes contain their last pixel: in VOC's files, from 1, a box of
      a whole image is `(1, 1, width, height)`.
    - `check_images`: see `load_coco`.

    Raises a `DatasetError` that lists every problem with its file and remedy, and a `ValueError` unless `first_pixel`
    is 0 or 1.

    >>> import tempfile
    >>> from PIL import Image
    >>> box = "<bndbox><xmin>11</xmin><ymin>1</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
    >>> with tempfile.TemporaryDirectory() as name:
    ...     Image.new("RGB", (40, 20)).save(f"{name}/a.png")
    ...     text = f"<annotation><object><name>cat</name>{box}</object></annotation>"
    ...     _ = Path(name, "a.xml").write_text(text)
    ...     dataset = load_voc(name)
    >>> dataset.objects(0).boxes.tolist(), [category.name for category in dataset.categories]
    ([[10.0, 0.0, 30.0, 20.0]], ['cat'])
    """
    if first_pixel not in (0, 1):
        raise ValueError(f"first_pixel must be 0 or 1, got {first_pixel}.")
    folder = Path(folder)
    standard = (folder / "Annotations").is_dir()
    pictures, files = (folder / name if standard else folder for name in ("JPEGImages", "Annotations"))
    problems = Collector(folder)
    places = {path.stem: path for path in list_images(pictures) if path.parent == pictures}
    trees = {path.stem: _read(path, problems) for path in sorted(files.glob("*.xml"))}
    if not trees:
        raise DatasetError(f"{folder}: there are no XML files. Give a folder of Pascal VOC, or one that holds them.")
    names = list(classes) if classes is not None else _names(trees.values())
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for stem in list(trees) if split is None else _split(folder, split):
        tree, path = trees.get(stem), places.get(stem)
        where = {"image_id": len(images) + 1, "image_file": f"{stem}.xml"}
        if path is None or stem not in trees:
            what = f"there is no {'image' if path is None else 'XML file'} of this name."
            problems.error("missing file", what, "Add it, or remove the entry.", **where)
        elif tree is not None and (size := _size(tree, path, problems, where)) is not None:
            images.append({"id": len(images) + 1, "file_name": path.as_posix(), "height": size[0], "width": size[1]})
            for entry in _objects(tree, names, first_pixel, problems, where):
                annotations.append(entry | {"id": len(annotations) + 1})
    problems.report()
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": id, "name": name} for id, name in enumerate(names, start=1)],
    }
    return parse_content(content, folder, Path(), "xyxy", check_images=check_images)


def _read(path: Path, problems: Collector) -> ElementTree.Element | None:
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        problems.error("unreadable file", f"{path}: {error}.", "Write it again, as XML.")
        return None


def _names(trees: Any) -> list[str]:
    return sorted({_text(entry, "name") for tree in trees if tree is not None for entry in tree.iter("object")} - {""})


def _split(folder: Path, split: str) -> list[str]:
    """The names of the images in a list. Those of a class have a second column, which is not used."""
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        found = sorted(file.stem for file in path.parent.glob("*.txt") if "_" not in file.stem)
        raise DatasetError(f"{path}: no such list. Choose one of {show(found)}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read: {error}.") from error
    return [line.split()[0] for line in lines if line.strip()]


def _size(tree: ElementTree.Element, path: Path, problems: Collector, where: dict[str, Any]) -> tuple[int, int] | None:
    """`(height, width)` as annotated, or that of the image if there is none."""
    written = [_text(tree, f"size/{side}") for side in ("height", "width")]
    if all(side.isdecimal() and int(side) > 0 for side in written):
        return int(written[0]), int(written[1])
    try:
        return shown_size(path)
    except BadImageError as error:
        problems.error("unusable image", str(error), "Write it again, or remove it.", **where)
        return None


def _objects(
    tree: ElementTree.Element, names: list[str], first_pixel: int, problems: Collector, where: dict[str, Any]
) -> list[dict[str, Any]]:
    """COCO's annotations of the objects in a file, with boxes `(x0, y0, x1, y1)`, without ids."""
    entries = []
    for number, entry in enumerate(tree.iter("object"), start=1):
        name = _text(entry, "name")
        sides = [_text(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x0, y0, x1, y1 = map(float, sides)
        except ValueError:
            what = f"xmin, ymin, xmax and ymax of object {number} are {show(sides)}."
            problems.error("wrong box", what, "Make them numbers.", **where)
            continue
        if name not in names:
            what = f"object {number} is of {show(name)}, which is not among the classes {show(names)}."
            problems.error("unknown class", what, "Correct it, or add the class.", **where)
            continue
        entries.append(
            {
                "image_id": where["image_id"],
                "category_id": names.index(name) + 1,
                "bbox": [x0 - first_pixel, y0 - first_pixel, x1 - first_pixel + 1, y1 - first_pixel + 1],
                "iscrowd": int(_text(entry, "difficult") == "1"),
            }
        )
    return entries


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()
