"""What the scripts share: detectors by name or from a file, and detection over a dataset."""

import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import tyro
from _programs import keep_programs
from _quiet import without_alarms
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

import detectax_eqx
from detectax_eqx import data, evaluate, models, nn, train, weights, zoo


if TYPE_CHECKING:
    ModelName = str
else:
    ModelName = Literal[zoo.names()]  # a choice on the command line
NormName = Literal["frozen_batch", "frozen_batch_eps0", "group"]
Model = models.AbstractDetector

# The usual anchors: one side in pixels for each level, and height / width.
ANCHOR_SIZES = tuple(size for (size,) in models.ANCHOR_SIZES)
ASPECT_RATIOS = models.ASPECT_RATIOS

NORMS = {
    "frozen_batch": nn.FrozenBatchNorm,
    "frozen_batch_eps0": partial(nn.FrozenBatchNorm, eps=0.0),
    "group": nn.GroupNorm,
}
console = Console(markup=False)  # what is printed may hold brackets of its own: names of files, boxes


@dataclass(frozen=True)
class Detector:
    """A model and what its labels and images mean.

    - `categories`: id and name of each label, or `None` if the weights came without.
    - `canvases`: what images are laid on after the resize of `model.preprocessing`, see `data.make_buckets`.
    """

    model: Model
    categories: tuple[data.Category, ...] | None = None
    canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1088, 1088))

    def category_ids(
        self,
        categories: Sequence[data.Category] | None = None,
        *,
        file: str | Path = "the annotations",
        allow_renamed: bool = False,
    ) -> tuple[int, ...]:
        """The category id of each label, checked against the `categories` of an annotation file, if there is one.

        A model without categories of its own that has as many classes as the file knows them in the order of their
        ids. One with more, such as torchvision's 90 for COCO's 80, knows ids themselves: label + 1.

        - `file`: what messages call it. `allow_renamed`: its names may differ from the model's.
        """
        if self.categories is not None:
            if categories is not None:
                data.check_categories(
                    categories,
                    self.categories,
                    found_in=str(file),
                    known_in="the model",
                    same_ids=False,
                    allow_renamed=allow_renamed,
                )
            return tuple(category.id for category in self.categories)
        num_classes = self.model.num_classes
        ids = None if categories is None else tuple(category.id for category in categories)
        if ids is not None and num_classes == len(ids):
            return ids
        if ids is None or num_classes >= max(ids):
            return tuple(range(1, num_classes + 1))
        raise SystemExit(
            f"The model has {num_classes} classes, but {file} {len(ids)} categories with ids up to {max(ids)}: its "
            "labels is unknown. Use the annotations that it was trained for."
        )


def build(
    name: ModelName,
    num_classes: int,
    norm: NormName,
    seed: int = 0,
    *,
    checkpoint: bool = False,
    anchor_sizes: tuple[float, ...] | None = None,
    aspect_ratios: tuple[float, ...] | None = None,
) -> Model:
    """The named detector with random parameters; `checkpoint` for gradient checkpointing.

    Anchors have one side per level and are by default the detector's own.
    """
    parts: dict[str, Any] = {}
    if anchor_sizes is not None:
        parts["anchor_sizes"] = tuple((size,) for size in anchor_sizes)
    if aspect_ratios is not None:
        parts["aspect_ratios"] = aspect_ratios
    try:
        return zoo.build(name, num_classes, key=jr.key(seed), norm=NORMS[norm], checkpoint=checkpoint, **parts)
    except TypeError as error:
        unknown = [part for part in parts if f"unexpected keyword argument '{part}'" in str(error)]
        if not unknown:
            raise
        raise SystemExit(f"--{unknown[0].replace('_', '-')}: {name} takes none. Leave it out.") from None


def detector_without(target: str, *, like: ModelName) -> ModelName:
    """The detector that does not need a kind of target, and whose name ends most like another's."""
    shapes = {name: eqx.filter_eval_shape(partial(zoo.build, key=jr.key(0)), name, 1) for name in zoo.names()}
    names = [name for name, model in shapes.items() if target not in model.needs]
    return max(names, key=lambda name: max(i for i in range(len(like) + 1) if name.endswith(like[len(like) - i :])))


def sizes_of(model: Model) -> dict[str, Any]:
    """The resize of a model's preprocessing as `data.make_buckets` takes it."""
    resize = model.preprocessing.resize
    if isinstance(resize, models.Square):
        return {"min_size": resize.size, "max_size": resize.size}  # on its one canvas
    return {"min_size": resize.min_size, "max_size": resize.max_size}


def preprocessing_of(about: dict[str, Any]) -> models.Preprocessing:
    """A model's preprocessing from what checkpoints and exports hold of it, `dataclasses.asdict` in JSON.

    Files from before there was a choice have `min_size` and `max_size` alone.
    """
    if "preprocessing" not in about:
        return models.Preprocessing(models.ShortestEdge(about["min_size"], about["max_size"]))
    fields = about["preprocessing"]
    resize = (models.Square if "size" in fields["resize"] else models.ShortestEdge)(**fields["resize"])
    return models.Preprocessing(resize, tuple(fields["mean"]), tuple(fields["std"]))


def load_run(path: Path) -> Detector:
    """The best detector of a run of `train.py`, or that of one of its checkpoints; the average, if one was kept.

    A damaged checkpoint of a run is reported, and the one before it used. One that was asked for by its own path is not
    replaced by another.
    """
    folder = next(filter(train.latest_checkpoint, (path / "best", path / "last", path)), None)
    if folder is None:
        _, metadata = train.load_checkpoint(path, {}, partial=True)
    else:
        metadata = train.load_latest_checkpoint(folder, {}, partial=True).metadata
    try:
        categories = categories_of(metadata)
        canvases = tuple((height, width) for height, width in metadata["canvases"])
        preprocessing = preprocessing_of(metadata)
        part = "ema" if metadata["ema"] else "model"  # of the `TrainState`
        # Checkpoints from before there was a choice do not say.
        names = [key for key in ("anchor_sizes", "aspect_ratios") if metadata.get(key) is not None]
        anchors = {key: tuple(map(float, metadata[key])) for key in names}
        like = eqx.filter_eval_shape(partial(build, **anchors), metadata["model"], len(categories), metadata["norm"])
        like = replace(like, preprocessing=preprocessing)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SystemExit(f"{path}: its metadata is not what train.py writes ({error!r}).") from None
    load = partial(load_newest, folder) if folder else partial(train.load_checkpoint, path)
    if "preprocessing" in metadata:
        return Detector(load({part: like}, partial=True)[0][part], categories, canvases)
    paths = {name: f"{part}/{before}" for name, before in weights.earlier_paths(like).items()}
    leaves = weights.named_leaves(like)
    saved, _ = load({before: leaves[name] for name, before in paths.items()}, partial=True)
    arrays = {name: saved[before] for name, before in paths.items()}
    return Detector(weights.replace_leaves(like, arrays, source=str(path)), categories, canvases)


def categories_of(metadata: dict[str, Any]) -> tuple[data.Category, ...]:
    """The categories that a checkpoint knows."""
    return tuple(data.Category(entry["id"], entry["name"]) for entry in metadata["categories"])


def load_newest(folder: Path, like: Any, *, partial: bool = False) -> tuple[Any, dict[str, Any]]:
    """The output of `train.load_checkpoint` for the newest intact checkpoint; damaged ones are reported."""
    restored = train.load_latest_checkpoint(folder, like, partial=partial)
    for error in restored.refused:
        console.print(f"{error} {restored.path} is used instead.", highlight=False, soft_wrap=True)
    return restored.tree, restored.metadata


def load_weights(name: ModelName, norm: NormName, path: Path) -> Detector:
    """The named detector with the weights of a torchvision `.pth` or a `.safetensors` file.

    Categories and image sizes are those that `save_detector` put into the file, if it wrote it.
    """
    num_classes = count_classes(name, norm, path)
    model = eqx.filter_eval_shape(build, name, num_classes, norm)
    detector = Detector(weights.load_torchvision(model, path))
    if path.suffix != ".safetensors":
        return detector
    about = weights.read_safetensors(path)[1].get(ABOUT)
    if about is None:
        console.print(
            f"{path} does not say at which sizes it was trained: images are resized by {model.preprocessing.resize}, "
            "unless --min-size and --max-size say otherwise.",
            highlight=False,
            soft_wrap=True,
        )
        return detector
    try:
        return with_about(detector, json.loads(about))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SystemExit(f"{path}: its metadata {ABOUT!r} is not what save_detector writes ({error!r}).") from None


def count_classes(name: ModelName, norm: NormName, path: Path) -> int:
    """The number of classes of the weights of a named detector, from the arrays whose shapes depend on it."""
    few, more = (array_shapes(eqx.filter_eval_shape(build, name, count, norm)) for count in (1, 2))
    arrays = weights.read_torchvision(path, eqx.filter_eval_shape(build, name, 1, norm))
    found = set()
    for key in few.keys() & arrays.keys():
        shape = arrays[key].shape
        for axis, (one, two) in enumerate(zip(few[key], more[key], strict=True)):
            if one != two and axis < len(shape):  # sides grow by as much with every class
                found.add((shape[axis] - one) / (two - one) + 1)
    if not found:
        missing = next(key for key in few if few[key] != more[key])
        raise SystemExit(
            f"{path} seems to be {weights.describe(arrays) or 'no model of torchvision or this package'}: "
            f"it has no entry {missing}, so it does not hold a {name}."
        )
    counts = [int(count) for count in found if count >= 1 and count == int(count)]
    return counts[0] if counts else 1  # of arrays that do not agree, `load_torchvision` says which


def array_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of each of a model's arrays by torchvision's names; the model may be one of shapes alone."""
    leaves, structure = jax.tree.flatten(model)
    arrays = [hasattr(leaf, "shape") for leaf in leaves]
    # Each array's position in its place: as a number it takes no memory, which the shape might.
    numbers = [np.array(i) if is_array else leaves[i] for i, is_array in enumerate(arrays)]
    named = weights.to_torchvision(jax.tree.unflatten(structure, numbers))
    return {name: leaves[int(number)].shape for name, number in named.items()}


ABOUT = "detector"  # the metadata of a safetensors file that holds what `Detector` does beside the model


def save_detector(detector: Detector, path: Path) -> None:
    """Writes a `.safetensors` file of the weights, with the categories and image sizes that `load_weights` reads."""
    about = {
        "categories": None if detector.categories is None else [asdict(c) for c in detector.categories],
        "preprocessing": asdict(detector.model.preprocessing),
        "canvases": detector.canvases,
    }
    weights.save_safetensors(detector.model, path, metadata={ABOUT: json.dumps(about)})


def with_about(detector: Detector, about: dict[str, Any]) -> Detector:
    """A detector with what `save_detector` wrote beside its weights."""
    categories, num_classes = about["categories"], detector.model.num_classes
    if categories is not None:
        categories = tuple(data.Category(entry["id"], entry["name"]) for entry in categories)
        if len(categories) != num_classes:
            raise ValueError(f"{len(categories)} categories for {num_classes} classes")
    canvases = tuple((int(height), int(width)) for height, width in about["canvases"])
    return Detector(replace(detector.model, preprocessing=preprocessing_of(about)), categories, canvases)


def load_detector(
    name: ModelName | None,
    norm: NormName,
    path: Path | None,
    checkpoint: Path | None,
    min_size: int | None,
    max_size: int | None,
) -> Detector:
    """A detector from either of the two kinds of file that the scripts take, looking at images of a given size."""
    if (path is None) == (checkpoint is None):
        raise SystemExit("Give either --weights (with --model) or --checkpoint.")
    if checkpoint is not None:
        detector = load_run(checkpoint)
    elif name is not None and path is not None:
        detector = load_weights(name, norm, path)
    else:
        raise SystemExit("--weights needs --model: which detector they belong to.")
    if min_size is None and max_size is None:
        return detector
    model, resize = detector.model, detector.model.preprocessing.resize
    if not isinstance(resize, models.ShortestEdge):
        raise SystemExit(f"--min-size and --max-size: the detector resizes images by {resize}. Leave them out.")
    short, long = min_size or resize.min_size, max_size or resize.max_size
    wide = models.smallest_canvas((int(short), int(max(short, long))), divisor=model.backbone.divisor)
    preprocessing = replace(model.preprocessing, resize=models.ShortestEdge(short, long))
    return replace(detector, model=replace(model, preprocessing=preprocessing), canvases=(wide, wide[::-1]))


def selection_of(model: Model, fields: dict[str, float], **shortcuts: float | None) -> models.Selection:
    """The model's selection with the `fields` of `--selection`, and those options that are fields of their own.

    An option that is `None` leaves the field as it is.
    """
    given = {**fields, **{name: value for name, value in shortcuts.items() if value is not None}}
    own, typed = vars(model.selection), {}
    for name, value in given.items():
        option = f"--selection {name}" if name in fields else f"--{name.replace('_', '-')}"
        what = "in 0..1" if name.endswith("_threshold") else "at least 0"
        if isinstance(own.get(name), int):
            what, value = "a positive whole number", int(value) if value == value // 1 else value
        if not RANGES[what](value):
            raise SystemExit(f"{option} is {value}: it must be {what}.")
        typed[name] = value
    try:
        return models.selected(model, **typed)
    except ValueError as error:
        raise SystemExit(f"--{'selection' if fields else ' --'.join(shortcuts)}: {error}") from None


def initialize(model: Model, name: ModelName, norm: NormName, path: Path) -> Model:
    """`model` with the weights of a detector of its name, or of an ImageNet ResNet in its backbone.

    A detector of another number of classes gives all but the layers that depend on it, which stay as they are: to be
    fine-tuned. So it is with anchors.
    """
    if not any(key.startswith("backbone.") for key in weights.read_torchvision(path, model)):
        return weights.load_torchvision_backbone(model, path)
    source = load_weights(name, norm, path).model
    arrays, own = weights.to_torchvision(source), weights.to_torchvision(model)
    if source.num_classes != model.num_classes:
        console.print(
            f"{path} knows {source.num_classes} classes and this model {model.num_classes}: "
            "the layers that tell classes apart start at random.",
            highlight=False,
        )
        few, more = (array_shapes(eqx.filter_eval_shape(build, name, count, norm)) for count in (1, 2))
        arrays |= {key: own[key] for key in own if few[key] != more[key]}
    others = {key: own[key] for key in own if own[key].shape != arrays[key].shape}
    if others:
        console.print(
            f"{path} has another number of anchors: the layers that tell them apart start at random.", highlight=False
        )
        arrays |= others
    return weights.load_torchvision(model, arrays)


def detect_dataset(
    detector: Detector,
    dataset: data.CocoDataset,
    *,
    batch_size: int = 1,
    num_threads: int = 2,
    allow_renamed: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Detections in every image, in COCO's results format; `options` go to `models.detect_batch`.

    The dataset's categories have to be the model's, by id and name, or by id alone with `allow_renamed`. Every device
    looks at `batch_size` images per step. Several processes share the images, and each returns all results.
    """
    mesh = train.make_mesh(jax.local_devices())
    model = train.shard_state(detector.model, mesh)
    sizes = sizes_of(detector.model)
    max_source = data.source_limit(detector.canvases)
    buckets = data.make_buckets(dataset.sizes, canvases=detector.canvases, max_source=max_source, **sizes)
    image_ids = [image.id for image in dataset.images]
    file = dataset.annotations_path
    category_ids = detector.category_ids(dataset.categories, file=file, allow_renamed=allow_renamed)
    if detector.categories is None:
        names = {category.id: category.name for category in dataset.categories}
        labels = ", ".join(f'{id} "{names[id]}"' for id in category_ids[:3] if id in names)
        console.print(
            f"The weights name no classes; their {len(category_ids)} labels are taken for the ids {category_ids[0]} to "
            f"{category_ids[-1]} of {file}: {labels}, …",
            highlight=False,
        )
    results = []
    with progress() as bar:
        task = bar.add_task("detecting", total=len(dataset), status="")
        for images in data.eval_batches(
            dataset,
            batch_size=batch_size * mesh.size,
            buckets=buckets,
            num_threads=num_threads,
            shard=(jax.process_index(), jax.process_count()),
        ):
            detections = models.detect_batch(model, images, mesh=mesh, **options)
            results += evaluate.to_coco_results(detections, images, image_ids=image_ids, category_ids=category_ids)
            bar.advance(task, int(images.valid.sum()) * jax.process_count())
    return gather(results) if jax.process_count() > 1 else results


def gather(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of all processes, which must call it together."""
    text = np.frombuffer(json.dumps(results).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(text.size))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(lengths.max()) - text.size)))
    parts = [json.loads(text[:length].tobytes()) for text, length in zip(texts, lengths, strict=True)]
    return [result for part in parts for result in part]


# COCO counts the best 100 detections of each class per image.
COCO_LIMIT = 100


def evaluate_on(
    detector: Detector, dataset: data.CocoDataset, folder: Path, *, max_detections: int = COCO_LIMIT, **options: Any
) -> dict[str, evaluate.CocoMetrics]:
    """COCO's numbers for boxes, and masks if there are any; `detections.json` and `metrics.json` go to `folder`.

    `max_detections` are kept per image. As many count, and no fewer than COCO's 100, which then are all.
    """
    found = detect_dataset(detector, dataset, max_detections=max_detections, **options)
    results = [result for result in found if result["category_id"] in dataset.category_ids]
    if len(results) < len(found):
        console.print(f"{len(found) - len(results)} detections of categories that the annotations lack are left aside")
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        evaluate.write_results(results, folder / "detections.json")
    kinds = ("bbox", "segm") if "masks" in detector.model.needs else ("bbox",)
    return score_results(results, dataset, folder, kinds=kinds, max_detections=max(max_detections, COCO_LIMIT))


def score_results(
    results: list[dict[str, Any]],
    dataset: data.CocoDataset,
    folder: Path,
    *,
    kinds: Sequence[Literal["bbox", "segm"]],
    max_detections: int = COCO_LIMIT,
) -> dict[str, evaluate.CocoMetrics]:
    """COCO's numbers of each of the `kinds`; they go to `metrics.json` in `folder`.

    Masks are left out unless every object of the dataset has one. `max_detections` of each class count per image.
    """
    has_masks = all(
        segmentation is not None for i in range(len(dataset)) for segmentation in dataset.objects(i).segmentations
    )
    metrics = {
        kind: evaluate.evaluate_coco(dataset, results, iou_type=kind, max_detections=max_detections)
        for kind in kinds
        if kind == "bbox" or has_masks
    }
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", {kind: asdict(m) for kind, m in metrics.items()})
    return metrics


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, which appears complete or not at all. Of several processes, the first one does."""
    if jax.process_index() > 0:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, default=str, indent=1))
    temporary.replace(path)


RANGES: dict[str, Callable[[float], bool]] = {
    "positive": lambda number: 0 < number < math.inf,
    "at least 0": lambda number: 0 <= number < math.inf,
    "in 0..1": lambda number: 0 <= number <= 1,
    "a positive whole number": lambda number: 1 <= number < math.inf and number == int(number),
    "a positive multiple of 32": lambda number: number > 0 and number % 32 == 0,
}


def check_ranges(options: Any, ranges: dict[str, str]) -> None:
    """Refuses options that are out of range, by name, before anything is read.

    `ranges`: names of options, with spaces between, by what each of their numbers has to be (`RANGES`). `None` is fine.
    """
    for what, names in ranges.items():
        for name in names.split():
            value = getattr(options, name)
            numbers = np.ravel(value) if isinstance(value, tuple) else [value]
            if value is not None and not all(RANGES[what](number) for number in numbers):
                raise SystemExit(f"--{name.replace('_', '-')} is {value}: it must be {what}.")


def run(
    main: Callable[[Any], Any],
    options: type,
    description: str | None,
    *,
    defaults: Callable[[Sequence[str]], Any] = lambda arguments: None,
) -> None:
    """Runs a script on its command line; an error of the user's files or options is reported without a traceback.

    Compiled programs are kept for the next start, see `_programs.py`. Warnings are one line each.

    - `defaults`: from the command line to an instance of `options` that holds what is not given there, or `None`.
    """
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    try:
        default = defaults(sys.argv[1:])
        given = tyro.cli(options, description=description, **({} if default is None else {"default": default}))
        if (problem := keep_programs()) is not None:
            console.print(problem, highlight=False, soft_wrap=True)
        with without_alarms():
            main(given)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) or is_ours(error):
            raise SystemExit(f"{type(error).__name__}: {error}") from None
        raise


def is_ours(error: BaseException) -> bool:
    """Whether the package raised an error itself, in words for its user."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "").startswith(detectax_eqx.__name__)


def progress() -> Progress:
    """A progress bar: the count first, then a status, which gives way where the line is short, and the time left.

    Without a terminal it shows nothing: what belongs into a log is printed line by line.
    """
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        TimeRemainingColumn(),
    )
    silent = not (console.is_terminal or console.is_jupyter)
    return Progress(*columns, console=Console(quiet=True) if silent else console, expand=True, disable=silent)
