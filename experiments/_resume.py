"""Resuming a run: its options, and which of them may change."""

import hashlib
import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from _options import Options, flat, grouped, option_types
from _shared import console, write_json
from beartype import BeartypeConf
from beartype.door import is_bearable

from detectax_eqx import data, train


RECIPES = Path(__file__).parent / "recipes"
# Options of the process, not of the run.
PROCESS = ("output", "resume", "options", "coordinator", "num_processes", "process_id")
# Options that change neither batches nor model, up to rounding. The content of the data is compared separately.
HARMLESS = (
    *("train_annotations", "train_images", "box_format", "allow_renamed", "val_annotations", "val_images"),
    *(
        "epochs",
        "steps",
        "patience",
        "threads",
        "cache",
        "max_bad_images",
        "non_finite",
        "log_every",
        "checkpoint_every",
        "track",
    ),
    *("gradient_checkpointing", "parameter_shards", "tensor_shards"),
)
# Options whose default depends on other options. A resumed run keeps their previous values.
DEPENDENT = ("norm", "trainable_layers", "lr", "warmup_steps", "decay_epochs")


def saved_options(output: Path) -> Options | None:
    """The options of the run in a folder, or `None` if it has no `options.json`."""
    path = output / "options.json"
    remedy = "Delete it, and give all options with --resume."
    return read_options(path, output=output, remedy=remedy) if path.is_file() else None


def recipe_or_file(given: str) -> Path:
    """The file that `--options` names, or that of the recipe of this name."""
    recipes = {path.stem: path for path in sorted(RECIPES.glob("*.json"))}
    path = recipes.get(given, Path(given))
    if not path.is_file():
        raise SystemExit(f"--options is {given}: there is no such file, and recipes are {', '.join(recipes)}.")
    return path


def read_options(path: Path, *, output: Any, remedy: str) -> Options:
    """The options in a file that `save_options` wrote, for a run in `output`."""
    try:
        content = json.loads(path.read_text())
        types = option_types()
        # Files of earlier versions lack options that were added since, and hold others that were removed.
        values = {name: _typed(content[name], type) for name, type in types.items() if name in content}
        if not values:
            raise ValueError("it holds no option")
        wrong = [name for name in values if not is_bearable(values[name], types[name], conf=_TOWER)]
        if wrong:
            raise ValueError(f'"{wrong[0]}" is {content[wrong[0]]!r}')
        return grouped(**values | dict.fromkeys(PROCESS) | {"output": output, "resume": False})
    except (ValueError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path} is not what train.py writes ({error}). {remedy}") from None


_TOWER = BeartypeConf(is_pep484_tower=True)


def _typed(value: Any, type: Any) -> Any:
    """Converts a JSON value to an option of this type."""
    if isinstance(value, list):
        return tuple(_typed(part, None) for part in value)
    is_path = type in (Path, Path | None)
    return Path(value) if is_path and isinstance(value, str) else value


def given_before(arguments: Sequence[str]) -> Options | None:
    """Values of options that are not on the command line: those of the run to resume, or of the file of `--options`.

    `None` if the command line names neither.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true")
    for name in ("--output", "--options", "--epochs", "--steps"):
        parser.add_argument(name, nargs="?")
    given, _ = parser.parse_known_args(arguments)
    if given.resume and given.options:
        raise SystemExit("--options is for a new run: --resume takes the options of the run in --output.")
    if given.options:
        remedy = "Give the options.json of a run's folder."
        before = read_options(recipe_or_file(given.options), output=tyro.MISSING, remedy=remedy)
    else:
        before = saved_options(Path(given.output)) if given.resume and given.output else None
    if before is not None and given.epochs is not None:
        before.run.steps = None  # it would take precedence over the epochs
    return before


def check_options(options: Options, saved: Options, *, going_on: bool) -> Options:
    """Prints which options differ from before, and refuses those that would change the batches or the model.

    - `going_on`: whether there is a checkpoint. Without one, every option may change.

    Returns the options, in which unset ones have their previous values.
    """
    before, now = flat(saved), flat(options)
    if going_on:
        now |= {name: before[name] for name in DEPENDENT if now[name] is None}
    changed = {
        name: f"{_show(before[name])} → {_show(now[name])}"
        for name in now
        if name not in PROCESS and before[name] != now[name]
    }
    refused = [name for name in changed if name not in HARMLESS] if going_on else []
    if refused:
        listed = ", ".join(f"--{name.replace('_', '-')} ({changed[name]})" for name in refused)
        raise SystemExit(
            f"--resume cannot change {listed}: the run in {options.run.output} would not be the same. Leave "
            f"{'it' if len(refused) == 1 else 'them'} out, or start a new run in another --output."
        )
    for name, change in changed.items():
        console.print(f"Changed since before: --{name.replace('_', '-')} {change}", highlight=False, soft_wrap=True)
    return grouped(**now)


def _show(value: Any) -> str:
    if isinstance(value, dict):
        value = tuple(part for pair in value.items() for part in pair) or "none"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def save_options(options: Options) -> None:
    """Writes `options.json` in the run's folder."""
    write_json(options.run.output / "options.json", flat(options))


def restore(
    options: Options,
    before: Options | None,
    train_set: data.CocoDataset,
    state: train.TrainState,
    so_far: dict[str, Any],
) -> tuple[train.TrainState, dict[str, Any]]:
    """Returns the state and `so_far` of the last checkpoint, or the given ones if there is none.

    The data and the classes must be the same as in the checkpoint.
    """
    last = options.run.output / "last"
    check_version(last)
    try:
        restored = train.load_latest_checkpoint(last, state)
    except FileNotFoundError:
        console.print("Nothing was saved yet: starting at step 0")
        return state, so_far
    for error in restored.refused:
        console.print(f"{error} {restored.path} is used instead.", highlight=False, soft_wrap=True)
    data.check_categories(
        train_set.categories,
        [data.Category.from_fields(entry) for entry in restored.metadata["categories"]],
        found_in=str(options.data.train_annotations),
        known_in=str(last),
        allow_renamed=options.reading.allow_renamed,
    )
    check_data(train_set, restored.metadata, options.data.train_annotations)
    so_far = so_far | restored.metadata["so_far"]
    if before is not None and before.data.val_annotations != options.data.val_annotations:
        so_far["best"], so_far["best_step"] = -1.0, 0  # the previous best score is of other images
    console.print(f"Going on at step {int(restored.tree.step)} from {last}", highlight=False)
    return restored.tree, so_far


def check_version(folder: Path) -> None:
    """Refuses to resume from checkpoints of earlier versions, which do not include the detector's preprocessing."""
    try:
        metadata = train.load_latest_checkpoint(folder, {}, partial=True).metadata
    except FileNotFoundError:
        return
    if "min_size" in metadata and "preprocessing" not in metadata:
        raise SystemExit(
            f"--resume cannot go on with {folder}, which an earlier version of train.py wrote. Its detector still "
            f"loads: write it with export.py --checkpoint {folder.parent} --output detector.safetensors, and start a "
            "new run in another --output with --init detector.safetensors."
        )


def describe_data(dataset: data.CocoDataset) -> dict[str, Any]:
    """The part of a dataset that determines the batches: counts, and a checksum of sizes, names and objects."""
    digest, count = hashlib.sha256(), 0
    for index, image in enumerate(dataset.images):
        objects = dataset.objects(index)
        count += int((~objects.crowd).sum())
        digest.update(repr((image.id, image.file, image.height, image.width)).encode())
        for array in (objects.boxes, objects.labels, objects.crowd):
            digest.update(array.tobytes())
    return {"images": len(dataset), "objects": count, "sha256": digest.hexdigest()}


def check_data(dataset: data.CocoDataset, saved: dict[str, Any], annotations: str | None) -> None:
    """Refuses data that differ from the description in a checkpoint's metadata. Old checkpoints have none."""
    before, now = saved.get("data"), describe_data(dataset)
    if before is not None and before != now:
        raise SystemExit(
            f"--resume needs the same data as before, but {annotations} differs: {before['images']} images and "
            f"{before['objects']} objects before, {now['images']} and {now['objects']} now, with other content. "
            "Restore it, or start a new run in another --output."
        )
