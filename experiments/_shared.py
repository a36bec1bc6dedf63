"""Code that the scripts share: option groups, evaluation on a dataset, and the command line."""

import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _programs import keep_programs
from _quiet import without_alarms
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from tyro.constructors import PrimitiveConstructorSpec

import detectax_eqx
from detectax_eqx import data, evaluate, files, models, nn, zoo


if TYPE_CHECKING:
    ModelName = str
else:
    ModelName = Literal[zoo.names()]  # a choice on the command line
Precision = Literal["float32", "bfloat16"]

# Default anchors: one side in pixels per level, and height / width.
ANCHOR_SIZES = tuple(size for (size,) in models.ANCHOR_SIZES)
ASPECT_RATIOS = models.ASPECT_RATIOS

console = Console(markup=False)  # file names and boxes may contain brackets


@dataclass
class DetectorOptions:
    """The detector, and the sizes that it resizes images to."""

    checkpoint: Path | None = None
    """Output folder of train.py (its best checkpoint), or one of its checkpoints."""
    model: Annotated[ModelName | None, tyro.conf.arg(metavar="NAME")] = None
    """Instead of --checkpoint: a detector by name (`detectax list`), with --weights or its published weights."""
    weights: Path | None = None
    """A torchvision .pth or a .safetensors file of --model."""
    norm: zoo.NormName | None = None
    """Norm of the backbone for --weights. Default: that of published weights of this file name, else frozen_batch."""
    min_size: int | None = None
    """Short side in pixels to resize images to. Default: the checkpoint's or the detector's."""
    max_size: int | None = None
    """Longest side in pixels after resizing. Default: the checkpoint's or the detector's."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "min_size max_size"}

    def load(self, precision: Precision = "float32") -> zoo.Predictor:
        """The detector, computing in `precision`."""
        predictor = with_sizes(self._load(), self.min_size, self.max_size)
        if precision == "bfloat16":
            return replace(predictor, model=nn.cast(predictor.model, jnp.bfloat16))
        return predictor

    def _load(self) -> zoo.Predictor:
        if self.checkpoint is not None:
            if self.model is not None or self.weights is not None:
                raise SystemExit("Give either --checkpoint or --model (with or without --weights), not both.")
            return zoo.Predictor.from_checkpoint(self.checkpoint)
        if self.model is None:
            what = "--weights needs --model: which detector they belong to." if self.weights else ""
            raise SystemExit(what or "Give either --checkpoint or --model, with --weights or for published weights.")
        if self.weights is None:
            return zoo.Predictor.pretrained(self.model)
        return zoo.Predictor.from_weights(self.model, self.weights, norm=self.norm)


def _named_numbers(words: list[str]) -> dict[str, float]:
    if len(words) % 2:
        raise ValueError(f"{words[-1]} has no value: give NAME VALUE pairs.")
    return {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}


# Numbers by name, given as NAME VALUE pairs. By its own rule, tyro would take them in another form where there are some
# already, from the run that is resumed or from --options.
NamedNumbers = Annotated[
    dict[str, float],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME FLOAT [NAME FLOAT ...]]",
        instance_from_str=_named_numbers,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
    ),
]


@dataclass
class SelectionOptions:
    """Selection of detections."""

    score_threshold: float | None = None
    """Drop detections with a lower score, 0..1. Default: the detector's own, such as .05."""
    nms_threshold: float | None = None
    """Drop the lower-scoring of two detections of a class with a higher IoU. Default: the detector's, such as .5."""
    max_detections: int | None = None
    """Keep this number of highest-scoring detections per image. Default: the detector's own, such as 100."""
    selection: NamedNumbers = field(default_factory=dict)
    """Other fields of the detector's selection as NAME VALUE pairs, such as pre_nms_top_n 500."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "max_detections", "in 0..1": "score_threshold nms_threshold"}

    def of(self, model: models.AbstractDetector) -> models.Selection:
        """The model's selection with these fields; an option that is `None` keeps the model's value.

        A field in `selection` takes precedence over the option of its name, which may have a default.
        """
        shortcuts = {name: value for name, value in vars(self).items() if name != "selection" and value is not None}
        given = {name: f"--{name.replace('_', '-')}" for name in shortcuts}
        given |= {name: f"--selection {name}" for name in self.selection}
        typed = typed_fields(model.selection, {**shortcuts, **self.selection}, given)
        try:
            return models.selected(model, **typed)
        except ValueError as error:
            raise SystemExit(f"--{'selection' if self.selection else ' --'.join(shortcuts)}: {error}") from None


def typed_fields(owner: Any, values: dict[str, float], options: dict[str, str]) -> dict[str, Any]:
    """Numbers for fields of `owner`, checked, and integers where its own are. `options`: where each was given."""
    typed: dict[str, Any] = {}
    for name, value in values.items():
        what = "in 0..1" if name.endswith(("_threshold", "_iou", "_fraction")) else "at least 0"
        if isinstance(getattr(owner, name, None), int):
            what, value = "a positive whole number", int(value) if value == value // 1 else value
        if not RANGES[what](value):
            raise SystemExit(f"{options[name]} is {value}: it must be {what}.")
        typed[name] = value
    return typed


def with_sampling(model: models.AbstractDetector, fields: dict[str, float]) -> models.AbstractDetector:
    """The detector with these fields of its `sampling`, or of its `matching` if it is a dense one."""
    part = "sampling" if hasattr(model, "sampling") else "matching"
    own = getattr(model, part)
    if unknown := [name for name in fields if not hasattr(own, name)]:
        known = ", ".join(vars(own))
        raise SystemExit(f"--sampling: {type(own).__name__} has no {unknown[0]}; its fields are {known}.")
    typed = typed_fields(own, fields, {name: f"--sampling {name}" for name in fields})
    return replace(model, **{part: replace(own, **typed)})


def with_sizes(predictor: zoo.Predictor, min_size: int | None, max_size: int | None) -> zoo.Predictor:
    """The predictor with other image sizes and matching canvases; unchanged if both sizes are `None`."""
    if min_size is None and max_size is None:
        return predictor
    model, resize = predictor.model, predictor.model.preprocessing.resize
    if not isinstance(resize, models.ShortestEdge):
        raise SystemExit(f"--min-size and --max-size: the detector resizes images by {resize}. Leave them out.")
    resize = replace(resize, min_size=min_size or resize.min_size, max_size=max_size or resize.max_size)
    model = replace(model, preprocessing=replace(model.preprocessing, resize=resize))
    return replace(predictor, model=model, canvases=zoo.canvases(model))


def detect_dataset(
    predictor: zoo.Predictor, dataset: data.CocoDataset, *, allow_renamed: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """`evaluate.detect_dataset` with a progress bar, after a check that categories agree in id and name."""
    file = dataset.annotations_path
    category_ids = predictor.category_ids(dataset.categories, file=file, allow_renamed=allow_renamed)
    if predictor.categories is None:
        names = {category.id: category.name for category in dataset.categories}
        labels = ", ".join(f'{id} "{names[id]}"' for id in category_ids[:3] if id in names)
        console.print(
            f"The weights name no classes; their {len(category_ids)} labels are taken for the ids {category_ids[0]} to "
            f"{category_ids[-1]} of {file}: {labels}, …",
            highlight=False,
        )
    with progress() as bar:
        task = bar.add_task("detecting", total=len(dataset), status="")
        return evaluate.detect_dataset(
            predictor.model,
            dataset,
            category_ids=category_ids,
            canvases=predictor.canvases,
            on_images=lambda count: bar.advance(task, count),
            **options,
        )


# What is scored, by the target that a detector learns it from.
Kind = Literal["bbox", "segm", "keypoints"]
KINDS: dict[Kind, str] = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}
# COCO counts the best 100 detections of each class per image.
COCO_LIMIT = 100


def evaluate_on(
    predictor: zoo.Predictor,
    dataset: data.CocoDataset,
    folder: Path,
    *,
    max_detections: int = COCO_LIMIT,
    **options: Any,
) -> dict[str, evaluate.CocoMetrics]:
    """COCO metrics of all that the model detects; writes `detections.json` and `metrics.json`.

    `max_detections` per image are kept and count, but at least COCO's 100 count.
    """
    detections = detect_dataset(predictor, dataset, max_detections=max_detections, **options)
    results = [result for result in detections if result["category_id"] in dataset.category_ids]
    if len(results) < len(detections):
        console.print(
            f"{len(detections) - len(results)} detections of categories that the annotations lack are left out"
        )
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        evaluate.write_results(results, folder / "detections.json")
    kinds: list[Kind] = [kind for kind, part in KINDS.items() if part in predictor.model.needs]
    return score_results(results, dataset, folder, kinds=kinds, max_detections=max(max_detections, COCO_LIMIT))


def score_results(
    results: list[dict[str, Any]],
    dataset: data.CocoDataset,
    folder: Path,
    *,
    kinds: Sequence[Kind],
    max_detections: int = COCO_LIMIT,
) -> dict[str, evaluate.CocoMetrics]:
    """COCO metrics of each of the `kinds`, also written to `metrics.json` in `folder`.

    Masks are skipped unless every object of the dataset has one, and keypoints unless a category names some.
    `max_detections` of each class count per image; of keypoints, COCO's 20.
    """
    has_masks = all(
        segmentation is not None for i in range(len(dataset)) for segmentation in dataset.objects(i).segmentations
    )
    there = {"bbox": True, "segm": has_masks, "keypoints": dataset.num_keypoints > 0}
    metrics = {
        kind: evaluate.evaluate_coco(
            dataset, results, iou_type=kind, max_detections=None if kind == "keypoints" else max_detections
        )
        for kind in kinds
        if there[kind]
    }
    if not metrics:
        names = " and ".join(KINDS[kind] for kind in kinds)
        raise ValueError(f"the results have {names} alone, and {dataset.annotations_path} has none to compare with.")
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", {kind: asdict(m) for kind, m in metrics.items()})
    return metrics


def write_json(path: Path, value: Any) -> None:
    """`files.write_json` in the first process alone."""
    if jax.process_index() == 0:
        files.write_json(path, value)


RANGES: dict[str, Callable[[float], bool]] = {
    "positive": lambda number: 0 < number < math.inf,
    "at least 0": lambda number: 0 <= number < math.inf,
    "in 0..1": lambda number: 0 <= number <= 1,
    "a positive whole number": lambda number: 1 <= number < math.inf and number == int(number),
    "a positive multiple of 32": lambda number: number > 0 and number % 32 == 0,
}


def check_ranges(options: Any) -> None:
    """Refuses options that are out of range, by name, before anything is read.

    Options, and groups within them, have a class attribute `RANGES`: from the condition on each number to the names of
    options, separated by spaces. `None` is accepted.
    """
    for what, names in getattr(options, "RANGES", {}).items():
        for name in names.split():
            value = getattr(options, name)
            numbers = np.ravel(value) if isinstance(value, tuple) else [value]
            numbers = value.values() if isinstance(value, dict) else numbers
            if value is not None and not all(RANGES[what](number) for number in numbers):
                raise SystemExit(f"--{name.replace('_', '-')} is {value}: it must be {what}.")
    for group in filter(is_dataclass, vars(options).values()):
        check_ranges(group)


def run(
    main: Callable[[Any], Any],
    options: type,
    description: str | None,
    *,
    defaults: Callable[[Sequence[str]], Any] = lambda arguments: None,
) -> None:
    """Runs a script on its command line; an error of the user's files or options is reported without a traceback.

    Compiled programs are cached, see `_programs.py`. A warning takes one line.

    - `defaults`: from the command line to an instance of `options` with the values of options that are not given, or
      `None`.
    """
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    try:
        arguments = sys.argv[1:]
        advanced = getattr(options, "ADVANCED", frozenset())
        if advanced and {"--help", "-h"} & set(arguments):
            options, description = without(options, advanced), f"{description}\nMore options: --help-all"
        arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
        default = defaults(arguments)
        nested = (tyro.conf.OmitArgPrefixes,)  # --lr, not --optimization.lr
        given = tyro.cli(
            options,
            args=arguments,
            prog=os.environ.get("DETECTAX_PROGRAM"),
            description=description,
            config=nested,
            **({} if default is None else {"default": default}),
        )
        if (problem := keep_programs()) is not None:
            console.print(problem, highlight=False, soft_wrap=True)
        with without_alarms():
            main(given)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) or is_ours(error):
            raise SystemExit(f"{type(error).__name__}: {error}") from None
        raise


def without(options: type, advanced: frozenset[str]) -> type:
    """The class of options without its `advanced` groups, for a short `--help`."""
    shown = [(group.name, group.type, group) for group in fields(options) if group.name not in advanced]
    return make_dataclass(options.__name__, shown, kw_only=True)


def is_ours(error: BaseException) -> bool:
    """Whether the package itself raised an error, with a message for users."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").startswith(detectax_eqx.__name__)


def progress() -> Progress:
    """A progress bar: count, a status that is cut on narrow terminals, and remaining time.

    Without a terminal it is silent: logs are printed line by line.
    """
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        TimeRemainingColumn(),
    )
    silent = not (console.is_terminal or console.is_jupyter)
    return Progress(*columns, console=Console(quiet=True) if silent else console, expand=True, disable=silent)


@contextmanager
def hidden(bar: Progress) -> Generator[None, None, None]:
    """Hides a bar within the `with` block, so that others can be shown."""
    bar.stop()
    try:
        yield
    finally:
        bar.start()
