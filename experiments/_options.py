"""The options of train.py in groups, and the defaults that depend on the run."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from _shared import ModelName, NamedNumbers, Precision, with_sampling

from detectax_eqx import data, models, zoo


Tracker = Literal["tensorboard", "wandb"]


@dataclass(kw_only=True)
class DataOptions:
    """Images and annotations to train and evaluate on."""

    train_annotations: str | None = None
    """COCO JSON of the training images: a path or a URL. Required without --resume or --options."""
    train_images: str | None = None
    """Folder that file names in it refer to: a path or a URL. Required without --resume or --options."""
    val_annotations: str | None = None
    """COCO JSON to evaluate on after each epoch. Without it the last checkpoint counts as the best."""
    val_images: str | None = None
    """Folder of the validation images. Default: --train-images."""


@dataclass(kw_only=True)
class ModelOptions:
    """Detector and initial weights."""

    model: Annotated[ModelName, tyro.conf.arg(metavar="NAME")] = "mask_rcnn_resnet50_fpn"
    """Detector to train, see `detectax list`. A mask detector needs a segmentation for every object."""
    init: Path | None = None
    """Initial weights: .pth or .safetensors of the detector, whatever its classes, or of an ImageNet classifier."""
    precision: Precision = "float32"
    """Dtype of convolutions and matrix products. Parameters, losses and box arithmetic stay float32."""


@dataclass(kw_only=True)
class SizeOptions:
    """Image sizes and capacities. Detectors with other sizes, such as SSD, have those by default."""

    min_sizes: tuple[int, ...] = (800,)
    """Short sides in pixels to resize images to; each image draws one each time."""
    max_size: int = 1333
    """Longest side in pixels after resizing; takes precedence over --min-sizes."""
    canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1088, 1088))
    """Heights and widths in pixels that images are padded to, multiples of 32. One program per canvas. For detectors
    that resize to a square, such as RF-DETR, each batch draws one of several, which its images fill."""
    max_objects: int = 100
    """Objects per image that are trained on; the rest is left out, counted and reported."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "canvases min_sizes max_size max_objects"}

    @property
    def limits(self) -> dict[str, int]:
        """The largest `min_size` and the `max_size`, as `Preprocessing.limits`."""
        return {"min_size": max(self.min_sizes), "max_size": self.max_size}


@dataclass(kw_only=True)
class RunOptions:
    """Length of the run, and its output."""

    output: Path
    """Folder for checkpoints and metrics. One that holds a run already needs --resume."""
    resume: bool = False
    """Continue from the last checkpoint in --output. Options that are not given keep their values."""
    options: Path | None = None
    """For options that are not given: the options.json of another run, or a recipe such as vitdet_b or swin_b."""
    epochs: int = 12
    """Passes over the training images, unless --steps is given."""
    steps: int | None = None
    """Steps to train for, instead of --epochs."""
    patience: int | None = None
    """Stop after this number of epochs without a better AP of the validation images. Default: no early stop."""
    batch_size: int = 16
    """Images per step over all devices, a multiple of their number times --accumulate."""
    seed: int = 0
    """Seed of initial weights, image order and augmentation."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "epochs steps patience batch_size", "at least 0": "seed"}


@dataclass(kw_only=True)
class ArchitectureOptions:
    """Parts of the detector, and which of them are trained."""

    norm: zoo.NormName | None = None
    """Norm of the backbone (torchvision's COCO weights: frozen_batch_eps0). Default: frozen_batch with --init,
    else group."""
    trainable_layers: int | None = None
    """Trained stages of the backbone, counted from the top: ResNets have 5, MobileNets 6. Default: 3 with --init, else
    all."""
    anchor_sizes: tuple[float, ...] | None = None
    """Side in pixels of the square anchor per level, after resizing. Default: the detector's own."""
    aspect_ratios: tuple[float, ...] | None = None
    """Height / width of the anchors. Default: the detector's own."""
    sampling: NamedNumbers = field(default_factory=dict)
    """Fields of the detector's sampling or matching of targets as NAME VALUE pairs, such as box_samples 128."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "anchor_sizes aspect_ratios", "at least 0": "trainable_layers"}


@dataclass(kw_only=True)
class OptimizerOptions:
    """Optimiser and learning rate."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float | None = None
    """Learning rate at 16 images per step, scaled linearly with --batch-size. Default: sgd .02, adamw .0001."""
    schedule: Literal["multistep", "cosine"] = "multistep"
    """After the warm-up: a tenth after each of --decay-epochs, or a cosine to 0."""
    warmup_steps: int | None = None
    """Steps of linear warm-up from a thousandth of the rate. Default: a tenth of the run, at most 500."""
    decay_epochs: tuple[float, ...] | None = None
    """Epochs after which multistep decays. Default: 8 and 11 of 12, in proportion for other lengths."""
    momentum: float = 0.9
    """Momentum of sgd, 0..1."""
    weight_decay: float = 1e-4
    """Weight decay of trained parameters."""
    decay_vectors: bool = True
    """Whether norms, biases and positions decay too, as in torchvision."""
    part_lr: NamedNumbers = field(default_factory=dict)
    """Factors of the learning rate of parts of the detector, as NAME VALUE pairs such as backbone .1."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each stage of the backbone to the one below, such as .7 for ViT-B."""
    clip_norm: float | None = None
    """Clip the gradient to this global norm. Default: no clipping."""
    ema: float | None = None
    """Evaluate and save an exponential moving average of the model with this decay per step, such as .999."""
    non_finite: Literal["stop", "skip"] = "stop"
    """On a loss or gradient that is not finite: stop, or skip the step and count it."""

    RANGES: ClassVar[dict[str, str]] = {
        "positive": "lr part_lr clip_norm",
        "at least 0": "weight_decay decay_epochs warmup_steps",
        "in 0..1": "momentum ema layer_decay",
    }


@dataclass(kw_only=True)
class AugmentationOptions:
    """Random changes to training images."""

    flip: float = 0.5
    """Probability of a horizontal flip, 0..1."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter: range of scales relative to the canvas, such as 0.1 2.0. Default: none."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "jitter", "in 0..1": "flip"}


@dataclass(kw_only=True)
class ReadingOptions:
    """Reading of annotations and images."""

    box_format: data.BoxFormat = "xywh"
    """Format of "bbox" in the annotations. xywh is COCO's; normalized: fractions of the image's sides."""
    allow_renamed: bool = False
    """Accept other category names for the same ids, in validation or with --resume (then the new names count)."""
    threads: int = 2
    """Decoding threads per process."""
    cache: Path | None = None
    """Folder for decoded training images, which reads about twice as fast. Default: decode each time."""
    max_bad_images: int = 10
    """Unreadable images to leave out and report before the run ends."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "threads", "at least 0": "max_bad_images"}


@dataclass(kw_only=True)
class LoggingOptions:
    """Log lines and checkpoints."""

    log_every: int = 20
    """Steps between log lines and lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written after each epoch."""
    track: tuple[Tracker, ...] = ()
    """Also log to these: tensorboard (package tensorboardX) writes to --output/tensorboard, wandb to your account."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "log_every checkpoint_every"}


@dataclass(kw_only=True)
class DeviceOptions:
    """Memory, several devices, several machines."""

    gradient_checkpointing: bool = False
    """Recompute the backbone's blocks in the backward pass: less memory, more time."""
    accumulate: int = 1
    """Parts in which a device takes its share of a batch: less memory, more time, the same update."""
    parameter_shards: int = 1
    """Devices that share one copy of parameters and optimiser state (FSDP)."""
    tensor_shards: int = 1
    """Devices that compute an image together: heads and MLPs of transformers are cut over them."""
    coordinator: str | None = None
    """host:port of process 0, or `auto` on Slurm, MPI and TPU pods. Default: one process."""
    num_processes: int | None = None
    """Number of processes, with --coordinator HOST:PORT."""
    process_id: int | None = None
    """Number of this process from 0, with --coordinator HOST:PORT."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "accumulate parameter_shards tensor_shards"}


@dataclass(kw_only=True)
class Options:
    """Options of a training run. `--help` leaves out the groups in `ADVANCED`; `--help-all` shows every group."""

    data: DataOptions = field(default_factory=DataOptions)
    detector: ModelOptions = field(default_factory=ModelOptions)
    sizes: SizeOptions = field(default_factory=SizeOptions)
    run: RunOptions
    architecture: ArchitectureOptions = field(default_factory=ArchitectureOptions)
    optimization: OptimizerOptions = field(default_factory=OptimizerOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    reading: ReadingOptions = field(default_factory=ReadingOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    devices: DeviceOptions = field(default_factory=DeviceOptions)

    ADVANCED: ClassVar[frozenset[str]] = frozenset(
        {"architecture", "optimization", "augmentation", "reading", "logging", "devices"}
    )


def grouped(**values: Any) -> Options:
    """The options of these names, each in its group; others have their defaults."""
    types = option_types()
    if unknown := [name for name in values if name not in types]:
        raise TypeError(f"there is no option {unknown[0]!r}")
    groups: dict[str, Any] = {group.name: group.type for group in fields(Options)}
    for name, group in groups.items():
        groups[name] = group(**{one.name: values[one.name] for one in fields(group) if one.name in values})
    return Options(**groups)


def flat(options: Options) -> dict[str, Any]:
    """Every option by its name; `grouped` reverses it."""
    return {name: value for group in vars(options).values() for name, value in vars(group).items()}


def option_types() -> dict[str, Any]:
    """The type of every option."""
    groups: list[Any] = [group.type for group in fields(Options)]
    return {option.name: option.type for group in groups for option in fields(group)}


# The field's "1x" recipe: 12 epochs, decays after 8 and 11, a warm-up of 500 of some 90,000 steps.
RECIPE_EPOCHS, RECIPE_DECAYS = 12, (8, 11)
WARMUP_STEPS, WARMUP_SHARE = 500, 0.1
LEARNING_RATES = {"sgd": 0.02, "adamw": 1e-4}


def architecture(options: Options, dataset: data.CocoDataset | None = None) -> zoo.Architecture:
    """What the model is built from. A detector of keypoints has as many as the `dataset`, if it is given."""
    parts = options.architecture
    chosen = zoo.Architecture(options.detector.model, parts.norm or "group", parts.anchor_sizes, parts.aspect_ratios)
    if dataset is None or "keypoints" not in chosen.shapes(1).needs:
        return chosen
    return replace(chosen, num_keypoints=dataset.num_keypoints)


def total_steps(options: Options, epoch_steps: int) -> int:
    """Steps of the whole run."""
    return options.run.steps or options.run.epochs * epoch_steps


def complete(options: Options, epoch_steps: int) -> Options:
    """The options with a value in place of each default that depends on the run."""
    steps = total_steps(options, epoch_steps)
    epochs = options.run.epochs if options.run.steps is None else steps / epoch_steps
    imported = options.detector.init is not None
    defaults = {
        "norm": "frozen_batch" if imported else "group",
        "trainable_layers": 3 if imported else len(architecture(options).shapes(1).backbone.stages),
        "lr": LEARNING_RATES[options.optimization.optimizer],
        "warmup_steps": min(WARMUP_STEPS, int(WARMUP_SHARE * steps)),
        "decay_epochs": tuple(round(decay * epochs / RECIPE_EPOCHS, 3) for decay in RECIPE_DECAYS),
    }
    values = flat(options)
    return grouped(**values | {name: value for name, value in defaults.items() if values[name] is None})


def with_own_sizes(options: Options, model: models.AbstractDetector) -> Options:
    """The options with the detector's own image sizes in place of the defaults.

    If some sizes are given, only a detector that resizes to a square has its own in place of the others.
    """
    given = {name: value for name, value in vars(options.sizes).items() if value != getattr(SizeOptions(), name)}
    resize = model.preprocessing.resize
    if isinstance(resize, models.Square):
        resize = models.Square(max(given.get("min_sizes", (resize.size,))))
        model = replace(model, preprocessing=replace(model.preprocessing, resize=resize))
    elif given.keys() - {"max_objects"}:
        return options
    limits = model.preprocessing.limits
    own = {"min_sizes": (int(limits["min_size"]),), "max_size": int(limits["max_size"])}
    return grouped(**flat(options) | own | {"canvases": zoo.canvases(model)} | given)


def draws_canvases(options: Options, model: models.AbstractDetector) -> bool:
    """Whether each batch draws its canvas: for a detector that resizes to a square, if there are several."""
    return isinstance(model.preprocessing.resize, models.Square) and len(options.sizes.canvases) > 1


def detection_canvases(options: Options, model: models.AbstractDetector) -> tuple[tuple[int, int], ...]:
    """The canvases of validation and of the trained detector: its own where the batches draw theirs."""
    return zoo.canvases(model) if draws_canvases(options, model) else options.sizes.canvases


def check_sense(options: Options) -> None:
    """Refuses options that contradict each other, before anything is read."""
    if options.data.train_annotations is None or options.data.train_images is None:
        raise SystemExit(
            "--train-annotations and --train-images are required"
            + (f": {options.run.output} has no options.json to take them from." if options.run.resume else ".")
        )
    if options.run.patience is not None and options.data.val_annotations is None:
        raise SystemExit("--patience needs validation images to score by: give --val-annotations.")
    jitter = options.augmentation.jitter
    if jitter is not None and jitter[0] > jitter[1]:
        raise SystemExit(f"--jitter is {jitter}: the first must not be larger than the second.")


def check_model(options: Options, model: models.AbstractDetector) -> None:
    """Refuses options that the detector has no use for. Its shapes are enough."""
    levels, divisor = len(model.backbone.strides), model.backbone.divisor
    sizes, canvases = options.architecture.anchor_sizes, options.sizes.canvases
    if sizes is not None and len(sizes) != levels:
        raise SystemExit(f"--anchor-sizes is {sizes}: it must be {levels} numbers, one per level.")
    if any(side % divisor for canvas in canvases for side in canvas):
        raise SystemExit(f"--canvases is {canvases}: its sides must be multiples of {divisor}.")
    layers, stages = options.architecture.trainable_layers, len(model.backbone.stages)
    if layers is not None and layers > stages:
        raise SystemExit(f"--trainable-layers is {layers}: the backbone has {stages}.")
    with_sampling(model, options.architecture.sampling)
    parts = [name for name, part in vars(model).items() if models.num_parameters(part)]
    if unknown := [name for name in options.optimization.part_lr if name not in parts]:
        raise SystemExit(f"--part-lr: {type(model).__name__} has no {unknown[0]}; its parts are {', '.join(parts)}.")


def check_promise(options: Options, epoch_steps: int) -> None:
    """Refuses options with which a new run cannot learn."""
    steps, warmup = total_steps(options, epoch_steps), options.optimization.warmup_steps
    if warmup is not None and warmup >= steps:
        raise SystemExit(
            f"--warmup-steps is {warmup}, but the run has {steps} steps and would end before its learning rate is "
            "reached. Leave the option out, or train for longer (--epochs, --steps)."
        )
    init, norm = options.detector.init, options.architecture.norm
    if init is not None and not init.exists():
        raise SystemExit(f"--init is {init}: there is no such file.")
    if init is None and norm in ("frozen_batch", "frozen_batch_eps0"):
        raise SystemExit(
            f"--norm is {norm}, which takes its statistics from imported weights: without --init there are none. "
            "Give --init, or leave the option out to train from scratch with group."
        )
