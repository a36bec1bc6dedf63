"""What the scripts share: detectors by name or from a file, and detection over a dataset."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax.random as jr
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from detectax_eqx import data, evaluate, models, nn, train, weights


ModelName = Literal[
    "faster_rcnn_resnet18_fpn",
    "faster_rcnn_resnet34_fpn",
    "faster_rcnn_resnet50_fpn",
    "faster_rcnn_resnet101_fpn",
    "mask_rcnn_resnet18_fpn",
    "mask_rcnn_resnet34_fpn",
    "mask_rcnn_resnet50_fpn",
    "mask_rcnn_resnet101_fpn",
]
NormName = Literal["frozen_batch", "frozen_batch_eps0", "group"]
Model = models.FasterRCNN | models.MaskRCNN

NORMS = {
    "frozen_batch": nn.FrozenBatchNorm,
    "frozen_batch_eps0": partial(nn.FrozenBatchNorm, eps=0.0),
    "group": nn.GroupNorm,
}
console = Console()


@dataclass(frozen=True)
class Detector:
    """A model and what its labels and images mean.

    - `categories`: id and name of each label, or `None` if the weights came without.
    - `min_size`, `max_size`, `canvases`: the sizes at which it looks at images, see `data.make_buckets`.
    """

    model: Model
    categories: tuple[data.Category, ...] | None = None
    min_size: int = 800
    max_size: int = 1333
    canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1088, 1088))

    def category_ids(self, dataset_ids: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The category id of each label.

        A model without categories of its own that has as many classes as the dataset knows them in the order of their
        ids. One with more, such as torchvision's 90 for COCO's 80, knows ids themselves: label + 1.
        """
        if self.categories is not None:
            return tuple(category.id for category in self.categories)
        num_classes = self.model.num_classes
        if dataset_ids is not None and num_classes == len(dataset_ids):
            return dataset_ids
        if dataset_ids is None or num_classes >= max(dataset_ids):
            return tuple(range(1, num_classes + 1))
        raise SystemExit(
            f"The model has {num_classes} classes, but the annotations {len(dataset_ids)} categories with ids up to "
            f"{max(dataset_ids)}: its labels cannot be told. Use the annotations that it was trained for."
        )


def build(name: ModelName, num_classes: int, norm: NormName, seed: int = 0) -> Model:
    """The named detector with random parameters."""
    return getattr(models, name)(num_classes, key=jr.key(seed), norm=NORMS[norm])


class _Saved(NamedTuple):
    """The part of a `TrainState` that detection needs, under the same name."""

    model: Any


def load_run(path: Path) -> Detector:
    """The best detector of a run of `train.py`, or that of one of its checkpoints."""
    if (path / "index.json").exists():
        checkpoint = path
    else:
        checkpoint = next(filter(None, map(train.latest_checkpoint, (path / "best", path / "last", path))), None)
    if checkpoint is None:
        raise SystemExit(f"{path} holds no checkpoint. Give an --output folder of train.py.")
    _, metadata = train.load_checkpoint(checkpoint, {}, partial=True)
    categories = tuple(data.Category(entry["id"], entry["name"]) for entry in metadata["categories"])
    like = eqx.filter_eval_shape(build, metadata["model"], len(categories), metadata["norm"])
    saved, _ = train.load_checkpoint(checkpoint, _Saved(like), partial=True)
    canvases = tuple((height, width) for height, width in metadata["canvases"])
    return Detector(saved.model, categories, metadata["min_size"], metadata["max_size"], canvases)


def load_weights(name: ModelName, norm: NormName, path: Path) -> Detector:
    """The named detector with the weights of a torchvision `.pth` or a `.safetensors` file."""
    is_torch = path.suffix != ".safetensors"
    arrays = weights.read_pth(path) if is_torch else weights.read_safetensors(path)[0]
    ends = "box_predictor.cls_score.bias" if is_torch else "box_head.class_logits.bias"
    outputs = next((array.shape[0] for key, array in arrays.items() if key.endswith(ends)), None)
    if outputs is None:
        raise SystemExit(f"{path} has no entry …{ends}: it does not hold a detector.")
    model = build(name, outputs - 1, norm)
    return Detector(weights.load_torchvision(model, path) if is_torch else weights.load_safetensors(model, path))


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
    short, long = min_size or detector.min_size, max_size or detector.max_size
    low, high = (-(-side // 32) * 32 for side in (short, max(short, long)))
    return replace(detector, min_size=short, max_size=long, canvases=((low, high), (high, low)))


# The layers whose size is the number of classes, by torchvision's names.
PREDICTORS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")


def initialize(model: Model, name: ModelName, norm: NormName, path: Path) -> Model:
    """`model` with the weights of a detector of its name, or of an ImageNet ResNet in its backbone.

    A detector of another number of classes gives all but its predictors, which stay as they are: to be fine-tuned.
    """
    if path.suffix != ".safetensors" and not any(key.startswith("backbone.") for key in weights.read_pth(path)):
        return weights.load_torchvision_backbone(model, path)
    source = load_weights(name, norm, path).model
    arrays = weights.to_torchvision(source)
    if source.num_classes != model.num_classes:
        console.print(
            f"{path} knows {source.num_classes} classes and this model {model.num_classes}: "
            "the layers that tell classes apart start at random.",
            highlight=False,
        )
        own = weights.to_torchvision(model)
        arrays |= {key: array for key, array in own.items() if key.startswith(PREDICTORS)}
    return weights.load_torchvision(model, arrays)


def detect_dataset(
    detector: Detector, dataset: data.CocoDataset, *, batch_size: int = 1, num_threads: int = 2, **options: Any
) -> list[dict[str, Any]]:
    """Detections in every image, in COCO's results format; `options` go to `models.detect_batch`."""
    sizes = {"min_size": detector.min_size, "max_size": detector.max_size}
    buckets = data.make_buckets(dataset.sizes, canvases=detector.canvases, **sizes)
    image_ids = [image.id for image in dataset.images]
    category_ids = detector.category_ids(dataset.category_ids)
    results = []
    with progress() as bar:
        task = bar.add_task("detecting", total=len(dataset), status="")
        for batch in data.eval_batches(dataset, batch_size=batch_size, buckets=buckets, num_threads=num_threads):
            detections = models.detect_batch(detector.model, batch, **sizes, **options)
            results += evaluate.to_coco_results(detections, batch, image_ids=image_ids, category_ids=category_ids)
            bar.advance(task, int(batch.valid.sum()))
    return results


def evaluate_on(
    detector: Detector, dataset: data.CocoDataset, folder: Path, **options: Any
) -> dict[str, evaluate.CocoMetrics]:
    """COCO's numbers for boxes, and masks if there are any; `detections.json` and `metrics.json` go to `folder`."""
    found = detect_dataset(detector, dataset, **options)
    results = [result for result in found if result["category_id"] in dataset.category_ids]
    if len(results) < len(found):
        console.print(f"{len(found) - len(results)} detections of categories that the annotations lack are left aside")
    folder.mkdir(parents=True, exist_ok=True)
    evaluate.write_results(results, folder / "detections.json")
    return score_results(results, dataset, folder, masks=isinstance(detector.model, models.MaskRCNN))


def score_results(
    results: list[dict[str, Any]], dataset: data.CocoDataset, folder: Path, *, masks: bool
) -> dict[str, evaluate.CocoMetrics]:
    """COCO's numbers for boxes, and for `masks` if every object has one; they go to `metrics.json` in `folder`."""
    has_masks = masks and all(
        segmentation is not None for i in range(len(dataset)) for segmentation in dataset.objects(i).segmentations
    )
    metrics = {
        kind: evaluate.evaluate_coco(dataset.annotations_path, results, iou_type=kind)
        for kind in (("bbox", "segm") if has_masks else ("bbox",))
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({kind: asdict(m) for kind, m in metrics.items()}, indent=1))
    return metrics


def run(main: Callable[[Any], Any], options: type, description: str | None) -> None:
    """Runs a script on its command line; an error of the user's files is told in its own words, without a traceback."""
    try:
        main(tyro.cli(options, description=description))
    except (data.DatasetError, weights.WeightsError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def progress() -> Progress:
    """A progress bar with a count, the time left and a status."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    return Progress(*columns, console=console)
