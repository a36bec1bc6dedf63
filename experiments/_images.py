"""Finds image files, and gives unique names to the pictures made of them."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from _shared import console

from detectax_eqx import data


# Files that predict.py writes beside its pictures. A folder with both is an output folder, not a folder of images.
RESULTS = ("detections.json", "images.json")


def find_images(inputs: Sequence[Path], output: Path | None = None) -> list[tuple[Path, Path]]:
    """Returns every image file of `inputs` once, with its name: the path below the given folder, or the file's name.

    Files given explicitly are taken whatever their suffix. Folders are searched at any depth for files with an image
    suffix, without `output` and other output folders of predict.py, which are printed. With several folders, names
    begin with the folder's name.

    >>> find_images([Path("street.jpg")])
    [(PosixPath('street.jpg'), PosixPath('street.jpg'))]
    """
    folders = [path for path in inputs if path.is_dir()]
    images = {}
    for path in inputs:
        if path in folders:
            top = Path(path.resolve().name) if len(folders) > 1 else Path()
            pairs = [(file, top / file.relative_to(path)) for file in sorted(_walk(path, output))]
        else:
            pairs = [(path, Path(path.name))]
        for file, name in pairs:
            images.setdefault(os.path.abspath(file), (file, name))
    return list(images.values())


def _walk(folder: Path, output: Path | None) -> Iterator[Path]:
    """The image files of a folder, at any depth."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        for name in folders.copy():
            is_output = output is not None and (here / name).resolve() == output.resolve()
            if is_output or all((here / name / result).is_file() for result in RESULTS):
                folders.remove(name)
                if not is_output:
                    console.print(
                        f"{here / name} is skipped: it was written by predict.py.", highlight=False, soft_wrap=True
                    )
        yield from (here / name for name in files if Path(name).suffix.lower() in data.IMAGE_SUFFIXES)


def unique_targets(images: Sequence[tuple[Path, Path]], output: Path) -> list[Path]:
    """Returns a file `output / (name + ".png")` for each image, all distinct and none an image itself.

    If names collide, the first part of the later one gets a number: `x.png` becomes `x-2.png.png`, `a/x.png` becomes
    `a-2/x.png.png`. Names that differ in case or Unicode normalisation count as equal, as some file systems do.
    """
    files = {_folded(path) for path, _ in images} | {_folded(output / name) for name in RESULTS}
    folders: set[str] = set()
    used: Counter[str] = Counter()
    targets = []
    for _, name in images:
        key = _folded(name)
        while True:
            used[key] += 1
            target = output / f"{_numbered(name, used[key])}.png"
            parents = {_folded(parent) for parent in target.parents if output in parent.parents}
            if _folded(target) not in files and _folded(target) not in folders and not parents & files:
                break
        files.add(_folded(target))
        folders |= parents
        targets.append(target)
    return targets


def _numbered(name: Path, number: int) -> Path:
    first, *rest = name.parts
    stem, suffix = (first, "") if rest else os.path.splitext(first)
    return name if number == 1 else Path(f"{stem}-{number}{suffix}", *rest)


def _folded(path: Path) -> str:
    """A key for a path that ignores case and Unicode normalisation."""
    return unicodedata.normalize("NFC", os.path.abspath(path)).casefold()
