"""Reads datasets in the YOLO format: a folder of images, a text file of labels for each, and a `data.yaml`."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ._coco import CHECKING_THREADS, parse_content
from ._dataset import CocoDataset
from ._images import list_images, shown_size
from ._report import BadImageError, Collector, DatasetError
from ._values import show


FORMAT = 'Make it "class cx cy w h", or "class x1 y1 x2 y2 x3 y3 …" for a polygon, in fractions of the image.'


def load_yolo(file: str | Path, split: str = "train", *, check_images: bool = True) -> CocoDataset:
    """Reads one split of a dataset in Ultralytics' YOLO format and checks it as `load_coco` does.

    The label file of `…/images/a/street.jpg` is `…/labels/a/street.txt`. Each of its lines is an object: its class, and
    the centre, width and height of its box, or the points of a polygon around it, in fractions of the image. An image
    without a label file has no objects. Ids of categories are the classes; images and annotations are numbered from 1
    in the order of the files' names and of the lines.

    - `file`: the `data.yaml`, with `names`, and for each split a folder, a text file that lists images, or a list of
      either, relative to `path` (default: the folder of the file). Paths that begin with `../`, which Roboflow writes,
      may also be relative to that folder itself.
    - `split`: `"train"`, `"val"` or `"test"`, or any other key of the file.
    - `check_images`: see `load_coco`. Sizes are read from the images in any case.

    Raises a `DatasetError` that lists every problem with its file, line and remedy, also for poses (`kpt_shape`).

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as name:
    ...     folder = Path(name)
    ...     for part in ("images", "labels"):
    ...         (folder / part).mkdir()
    ...     Image.new("RGB", (40, 20)).save(folder / "images" / "a.png")
    ...     _ = (folder / "labels" / "a.txt").write_text("1 0.5 0.5 0.5 1")
    ...     _ = (folder / "data.yaml").write_text("{train: images, names: [cat, dog]}")
    ...     dataset = load_yolo(folder / "data.yaml")
    >>> dataset.objects(0).boxes.tolist(), dataset.objects(0).labels.tolist()
    ([[10.0, 0.0, 30.0, 20.0]], [1])
    """
    file = Path(file)
    about = _read_yaml(file)
    names = _names(about, file)
    if split not in about or about[split] is None:
        splits = [key for key in ("train", "val", "test") if about.get(key)]
        raise DatasetError(f'{file}: has no "{split}". Add it, or choose one of {show(splits)}.')
    paths = sorted({path for part in _parts(about[split], file, split) for path in _images(part, about, file)})
    if not paths:
        raise DatasetError(f'{file}: there are no images in "{split}": {show(about[split])}.')
    problems = Collector(file)
    with ThreadPoolExecutor(CHECKING_THREADS) as executor:
        entries = list(executor.map(lambda numbered: _entry(*numbered), enumerate(paths, start=1)))
    images = [entry for entry in entries if isinstance(entry, dict)]
    for error in (entry for entry in entries if isinstance(entry, BadImageError)):
        problems.error("unusable image", str(error), "Write it again, or remove it.")
    labels = {image["id"]: label_file(Path(image["file_name"])) for image in images}
    if images and not any(path.is_file() for path in labels.values()):
        raise DatasetError(f"{file}: no image of {split} has a label file, the first not {labels[images[0]['id']]}.")
    annotations: list[dict[str, Any]] = []
    for image in images:
        for entry in _objects(labels[image["id"]], image, set(names), problems):
            annotations.append(entry | {"id": len(annotations) + 1})
    problems.report()
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": id, "name": name} for id, name in names.items()],
    }
    return parse_content(content, file, Path(), "normalized_cxcywh", check_images=check_images)


def label_file(image: Path) -> Path:
    """The label file of an image: the last `images` in its path becomes `labels`.

    >>> label_file(Path("data/images/train/street.jpg")).as_posix()
    'data/labels/train/street.txt'
    """
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        about = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{file}: no such file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DatasetError(f"{file}: cannot be read as YAML: {error}") from error
    if not isinstance(about, dict):
        raise DatasetError(f"{file}: must hold keys and values, but is {show(about)}.")
    if "kpt_shape" in about:
        raise DatasetError(f'{file}: has "kpt_shape". Poses are read from COCO files only: convert them.')
    return about


def _names(about: dict[str, Any], file: Path) -> dict[int, str]:
    """The name of each class."""
    names = about.get("names")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    sound = isinstance(names, dict) and names and all(type(id) is int and id >= 0 for id in names)
    if not sound or not isinstance(names, dict):
        raise DatasetError(
            f'{file}: "names" is {show(names)}. Make it a list of names, or a mapping from class to name.'
        )
    if "nc" in about and about["nc"] != len(names):
        raise DatasetError(f'{file}: "nc" is {show(about["nc"])}, but there are {len(names)} "names". Correct either.')
    return {id: str(names[id]) for id in sorted(names)}


def _parts(value: Any, file: Path, split: str) -> list[str]:
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise DatasetError(f'{file}: "{split}" is {show(value)}. Make it a path, or a list of paths.')
    return parts


def _images(part: str, about: dict[str, Any], file: Path) -> list[Path]:
    """The images of a folder, or those that a text file lists."""
    root = Path(file.parent, str(about.get("path") or ""))
    roots = [root, file.parent]  # the first may be where the dataset was made
    places = [place / name for name in dict.fromkeys((part, part.removeprefix("../"))) for place in roots]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise DatasetError(f"{file}: there is no {places[0]}. Correct the path.")
    if place.is_dir():
        return list_images(place)
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{place}: cannot be read as a list of images: {error}.") from error
    # A line that begins with "./" is relative to the list, others to the dataset.
    return [Path(place.parent if line.startswith("./") else root, line.strip()) for line in lines if line.strip()]


def _entry(id: int, path: Path) -> dict[str, Any] | BadImageError:
    """COCO's entry of an image, or why there is none."""
    try:
        height, width = shown_size(path)
    except BadImageError as error:
        return error
    return {"id": id, "file_name": path.as_posix(), "height": height, "width": width}


def _objects(labels: Path, image: dict[str, Any], classes: set[int], problems: Collector) -> Iterator[dict[str, Any]]:
    """COCO's annotations of the lines of a label file, in fractions of the image, without ids."""
    try:
        lines = labels.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        problems.error("unreadable labels", f"{labels}: {error}.", "Write it again, as text.", image_id=image["id"])
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = {"image_id": image["id"], "image_file": Path(image["file_name"]).name}
        what = f"line {number} of {labels} is {show(line)}."
        values = _numbers(line)
        if values is None or not (len(values) == 5 or (len(values) >= 7 and len(values) % 2)):
            problems.error("wrong label", what, FORMAT, **where)
        elif values[0] not in classes:
            problems.error("unknown class", what, f'Correct it, or add class {values[0]:g} to "names".', **where)
        else:
            yield {"image_id": image["id"], "category_id": int(values[0]), **_shape(values[1:])}


def _numbers(line: str) -> list[float] | None:
    """The numbers of a line, or `None` if it has anything else."""
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


def _shape(values: list[float]) -> dict[str, Any]:
    """The box of an object `(cx, cy, w, h)`, or a polygon and the box around it."""
    if len(values) == 4:
        return {"bbox": values}
    xs, ys = values[::2], values[1::2]
    (left, right), (top, bottom) = (min(xs), max(xs)), (min(ys), max(ys))
    box = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    return {"bbox": box, "segmentation": [values]}
