"""Going on with a run: its options, and what may differ from before."""

import hashlib
import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from _options import Options
from _shared import console, write_json
from beartype import BeartypeConf
from beartype.door import is_bearable

from detectax_eqx import data, train


# They belong to the process, not to the run.
PROCESS = ("output", "resume", "coordinator", "num_processes", "process_id")
# They leave the batches and the model of each step as they are, up to rounding. What the data hold is compared itself.
HARMLESS = (
    *("train_annotations", "train_images", "box_format", "allow_renamed", "val_annotations", "val_images"),
    *("epochs", "steps", "threads", "cache", "max_bad_images", "non_finite", "log_every", "checkpoint_every"),
    *("gradient_checkpointing", "parameter_shards"),
)
# `None` leaves these to the rest of the options: on resuming, to what they were.
DEPENDENT = ("norm", "trainable_layers", "lr", "warmup_steps", "decay_epochs")


def saved_options(output: Path) -> Options | None:
    """The options of the run in a folder, or `None` if it has no `options.json`."""
    path = output / "options.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        hints: dict[str, Any] = {field.name: field.type for field in fields(Options)}
        # Options of before some were added lack these; others are of before some were removed.
        values = {name: _typed(content[name], hint) for name, hint in hints.items() if name in content}
        wrong = [name for name in values if not is_bearable(values[name], hints[name], conf=_TOWER)]
        if wrong:
            raise ValueError(f'"{wrong[0]}" is {content[wrong[0]]!r}')
        return Options(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise SystemExit(
            f"{path} is not what train.py writes ({error}). Delete it, and give all options with --resume."
        ) from None


_TOWER = BeartypeConf(is_pep484_tower=True)


def _typed(value: Any, hint: Any) -> Any:
    """A value of JSON as an option of this type."""
    if isinstance(value, list):
        return tuple(_typed(part, None) for part in value)
    is_path = hint in (Path, Path | None)
    return Path(value) if is_path and isinstance(value, str) else value


def options_to_resume(arguments: Sequence[str]) -> Options | None:
    """What options that are not on a command line with `--resume` default to: their values before."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true")
    for name in ("--output", "--epochs", "--steps"):
        parser.add_argument(name, nargs="?")
    given, _ = parser.parse_known_args(arguments)
    saved = saved_options(Path(given.output)) if given.resume and given.output else None
    if saved is None:
        return None
    steps = saved.steps if given.epochs is None else None  # they would count for more than the epochs
    own = {"coordinator": None, "num_processes": None, "process_id": None}
    return replace(saved, output=Path(given.output), resume=False, steps=steps, **own)


def check_options(options: Options, saved: Options, *, going_on: bool) -> Options:
    """Prints which options differ from before, and refuses those that would change the batches or the model.

    - `going_on`: there is a checkpoint. Without one, nothing has to stay as it was.

    Returns the options, with what they leave open as it was before.
    """
    if going_on:
        known = {name: getattr(saved, name) for name in DEPENDENT if getattr(options, name) is None}
        options = replace(options, **known)
    names = [field.name for field in fields(Options) if field.name not in PROCESS]
    changed = {
        name: f"{_show(getattr(saved, name))} → {_show(getattr(options, name))}"
        for name in names
        if getattr(saved, name) != getattr(options, name)
    }
    refused = [name for name in changed if name not in HARMLESS] if going_on else []
    if refused:
        listed = ", ".join(f"--{name.replace('_', '-')} ({changed[name]})" for name in refused)
        raise SystemExit(
            f"--resume cannot change {listed}: the run in {options.output} would not be the same. Leave "
            f"{'it' if len(refused) == 1 else 'them'} out, or start a new run in another --output."
        )
    for name, change in changed.items():
        console.print(f"Changed since before: --{name.replace('_', '-')} {change}", highlight=False, soft_wrap=True)
    return options


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def save_options(options: Options) -> None:
    """Writes what `saved_options` reads."""
    write_json(options.output / "options.json", asdict(options))


def restore(
    options: Options,
    before: Options | None,
    train_set: data.CocoDataset,
    state: train.TrainState,
    so_far: dict[str, Any],
) -> tuple[train.TrainState, dict[str, Any]]:
    """State and `so_far` of the last checkpoint, if there is one; data and classes must be those of `before`."""
    last = options.output / "last"
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
        [data.Category(entry["id"], entry["name"]) for entry in restored.metadata["categories"]],
        found_in=str(options.train_annotations),
        known_in=str(last),
        allow_renamed=options.allow_renamed,
    )
    check_data(train_set, restored.metadata, options.train_annotations)
    so_far = so_far | restored.metadata["so_far"]
    if before is not None and before.val_annotations != options.val_annotations:
        so_far["best"] = -1.0  # which was of other images
    console.print(f"Going on at step {int(restored.tree.step)} from {last}", highlight=False)
    return restored.tree, so_far


def check_version(folder: Path) -> None:
    """Refuses to go on with a run whose checkpoints are of before detectors had their preprocessing with them."""
    try:
        metadata = train.load_latest_checkpoint(folder, {}, partial=True).metadata
    except FileNotFoundError:
        return
    if "min_size" in metadata and "preprocessing" not in metadata:
        raise SystemExit(
            f"--resume cannot go on with {folder}, which an earlier version of train.py wrote. Its detector still "
            f"loads: write it by export.py --checkpoint {folder.parent} --output detector.safetensors, and start a new "
            "run in another --output with --init detector.safetensors."
        )


def describe_data(dataset: data.CocoDataset) -> dict[str, Any]:
    """What of a dataset determines the batches: counts, and a checksum of sizes, names and objects."""
    digest, count = hashlib.sha256(), 0
    for index, image in enumerate(dataset.images):
        objects = dataset.objects(index)
        count += int((~objects.crowd).sum())
        digest.update(repr((image.id, image.file, image.height, image.width)).encode())
        for array in (objects.boxes, objects.labels, objects.crowd):
            digest.update(array.tobytes())
    return {"images": len(dataset), "objects": count, "sha256": digest.hexdigest()}


def check_data(dataset: data.CocoDataset, saved: dict[str, Any], annotations: str | None) -> None:
    """Refuses data that differ from what a checkpoint's metadata say of them. Old ones do not."""
    before, now = saved.get("data"), describe_data(dataset)
    if before is not None and before != now:
        raise SystemExit(
            f"--resume goes on with the data of before, but {annotations} differs: {before['images']} images and "
            f"{before['objects']} objects then, {now['images']} and {now['objects']} now, or others of them. Restore "
            "it, or start a new run in another --output."
        )
