"""Checks that a model and a file, or two files, assign the same category names to the same ids."""

from collections.abc import Sequence
from pathlib import Path

from ._coco import read_annotations
from ._dataset import Category
from ._report import Collector, DatasetError
from ._store import to_location
from ._validate import parse_categories


# An error message lists at most this many differences, followed by the number of the others.
MAX_LISTED = 3


def check_categories(
    found: Sequence[Category],
    known: Sequence[Category],
    *,
    found_in: str,
    known_in: str,
    same_ids: bool = True,
    allow_renamed: bool = False,
) -> None:
    """Raises a `DatasetError` if the categories `found` in a file differ from the `known` ones in id or name.

    - `found_in`, `known_in`: names of the two sources for error messages.
    - `same_ids`: require the same ids in both. Otherwise, each may have ids that the other lacks, as long as they share
      at least one.
    - `allow_renamed`: compare ids and numbers of keypoints only, not names.

    >>> model, file = [Category(1, "cat"), Category(2, "dog")], [Category(1, "dog"), Category(2, "cat")]
    >>> check_categories(file, model, found_in="val.json", known_in="the model")
    Traceback (most recent call last):
    detectax_eqx.data._report.DatasetError: val.json and the model disagree on categories: id 1 is "dog" in val.json ...
    """
    ours, theirs = ({category.id: category.name for category in part} for part in (found, known))
    differences = []
    if same_ids or not ours.keys() & theirs.keys():
        for one, other, place in ((ours, theirs, found_in), (theirs, ours, known_in)):
            differences += [f'id {id} ("{one[id]}") is only in {place}' for id in sorted(one.keys() - other.keys())]
    if not allow_renamed:
        renamed = sorted(id for id in ours.keys() & theirs.keys() if ours[id] != theirs[id])
        differences += [f'id {id} is "{ours[id]}" in {found_in} and "{theirs[id]}" in {known_in}' for id in renamed]
        ids = {name: id for id, name in theirs.items()}
        moved = sorted(id for id, name in ours.items() if id not in theirs and name in ids)
        if not same_ids:
            differences += [
                f'"{ours[id]}" is id {id} in {found_in} and id {ids[ours[id]]} in {known_in}' for id in moved
            ]
    differences += _keypoint_differences(found, known, found_in, known_in, allow_renamed=allow_renamed)
    if not differences:
        return
    rest = f", and {len(differences) - MAX_LISTED} more" if len(differences) > MAX_LISTED else ""
    remedy = "Make ids and names the same"
    if ours.keys() == theirs.keys() or (not same_ids and ours.keys() & theirs.keys()):
        remedy += f"; if only names have changed, allow_renamed=True (--allow-renamed) uses those of {found_in}"
    raise DatasetError(
        f"{found_in} and {known_in} disagree on categories: {'; '.join(differences[:MAX_LISTED])}{rest}. {remedy}."
    )


def _keypoint_differences(
    found: Sequence[Category], known: Sequence[Category], found_in: str, known_in: str, *, allow_renamed: bool
) -> list[str]:
    """The categories whose keypoints differ in number or name. One without keypoints agrees with any."""
    points = {category.id: category.keypoints for category in known}
    differences = []
    for category in found:
        ours, theirs = category.keypoints, points.get(category.id, ())
        if not ours or not theirs:
            continue
        if len(ours) != len(theirs):
            counts = f"{len(ours)} keypoints in {found_in} and {len(theirs)} in {known_in}"
            differences.append(f"id {category.id} has {counts}")
        elif ours != theirs and not allow_renamed:
            at = next(k for k in range(len(ours)) if ours[k] != theirs[k])
            names = f'"{ours[at]}" in {found_in} and "{theirs[at]}" in {known_in}'
            differences.append(f"keypoint {at + 1} of id {category.id} is {names}")
    return differences


def read_categories(annotations: str | Path) -> tuple[Category, ...]:
    """Reads the categories of a COCO-format file, sorted by id. The rest of the file is not checked.

    Raises a `DatasetError` if the categories are missing or malformed, and whatever `read_annotations` raises.

    >>> import tempfile
    >>> from detectax_eqx.data import write_shapes_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     categories = read_categories(write_shapes_dataset(folder, num_images=2, seed=0)[0])
    >>> [(category.id, category.name) for category in categories]
    [(1, 'circle'), (3, 'square'), (4, 'triangle'), (7, 'star')]
    """
    entries = read_annotations(annotations).get("categories")
    if not isinstance(entries, list) or not entries:
        raise DatasetError(f'{annotations}: "categories" is not a list of objects with "id" and "name".')
    problems = Collector(to_location(annotations))
    categories = parse_categories(entries, problems)
    problems.report()
    return categories
