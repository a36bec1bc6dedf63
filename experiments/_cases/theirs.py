"""torchvision's worker: the cases of `ours` with torchvision's detectors and operators."""
# pyright: reportMissingImports=false

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torchvision
from _benchmark.inputs import IMAGE_SIZE, NUM_CLASSES, STRIDES, ellipses, totals
from _benchmark.worker import Arrays, Case, Side
from _torchvision import arrays_of, new_detector, random_detector
from pycocotools import mask as coco_masks
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import ops
from torchvision.datasets import CocoDetection
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.transforms import v2


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POOLER = ops.MultiScaleRoIAlign([str(level) for level in range(len(STRIDES))], 7, 2)
CODER = BoxCoder((1.0, 1.0, 1.0, 1.0))
MATCHER = Matcher(0.7, 0.3, allow_low_quality_matches=True)


def on_device(arrays: Any) -> Any:
    """Moves arrays, or lists and dictionaries of them, to the measured device as tensors."""
    if isinstance(arrays, Mapping):
        return {name: on_device(array) for name, array in arrays.items()}
    return [on_device(a) for a in arrays] if isinstance(arrays, list) else torch.from_numpy(arrays).to(DEVICE)


def to_host(result: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Converts named results to arrays."""
    return {name: value.detach().cpu().numpy() for name, value in result.items()}


def ready(function: Callable[[], Any], *, gradients: bool = False) -> Callable[[], Any]:
    """Makes a function wait for its result. It runs in inference mode unless `gradients` are needed."""

    def run() -> Any:
        with torch.inference_mode(not gradients):
            result = function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def operator(function: Callable[..., Any], arrays: Arrays, **options: Any) -> Case:
    """Returns a case for a function of tensors, with gradients if `arrays` contains a cotangent."""
    run = partial(function, **on_device(arrays), **options)
    return Case(ready(run, gradients="cotangent" in arrays), to_host)


def box_selection(boxes, scores):
    """Runs the part of `RoIHeads.postprocess_detections` that follows box decoding."""
    labels = torch.arange(scores.shape[1], device=DEVICE).view(1, -1).expand_as(scores).reshape(-1)  # (p k)
    boxes, scores = boxes.reshape(-1, 4), scores.reshape(-1)  # (p k, 4), (p k)
    inds = torch.where(scores > 0.05)[0]
    boxes, scores, labels = boxes[inds], scores[inds], labels[inds]
    keep = ops.batched_nms(boxes, scores, labels, 0.5)[:100]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


def roi_align(maps, boxes):
    return {"pooled": POOLER({str(i): level[None] for i, level in enumerate(maps)}, [boxes], [IMAGE_SIZE])}


def roi_align_gradient(maps, boxes, cotangent):
    maps = [level.detach().requires_grad_() for level in maps]
    gradients = torch.autograd.grad(roi_align(maps, boxes)["pooled"], maps, cotangent)
    return {f"gradient{i}": gradient for i, gradient in enumerate(gradients)}


def paste_masks(masks, boxes, *, image_size, threshold=None):
    pasted = paste_masks_in_image(masks[:, None], boxes, image_size)[:, 0]
    return {"pasted": pasted if threshold is None else pasted > threshold}


OPERATORS: dict[str, Callable[..., Any]] = {
    "nms": lambda boxes, scores, iou_threshold=0.5: {"keep": ops.nms(boxes, scores, iou_threshold)},
    "box_selection": box_selection,
    "roi_align": roi_align,
    "roi_align_gradient": roi_align_gradient,
    "paste_masks": paste_masks,
    "redraw_masks": paste_masks,  # torchvision cannot reuse the memory of a result
    "mask_targets": lambda masks, rois, matched, **_: {"targets": project_masks_on_boxes(masks, rois, matched, 28)},
    "pairwise_iou": lambda boxes, anchors: {"iou": ops.box_iou(boxes, anchors)},
    "decode_boxes": lambda deltas, anchors: {"boxes": CODER.decode_single(deltas, anchors)},
    "match_boxes": lambda iou: {"matches": MATCHER(iou)},
    "resize": lambda planes, canvas, **_: {
        "image": functional.interpolate(planes, size=canvas, mode="bilinear", align_corners=False)
    },
}


def load(name: str, weights: str, size: tuple[int, int]) -> torch.nn.Module:
    """Builds a detector with random weights, and writes them to the file `weights` for the other side."""
    sizes = {} if name.startswith("ssd") else {"min_size": min(size), "max_size": max(size)}
    model = random_detector(name, num_outputs=num_outputs(name), **sizes)
    np.savez(weights, **arrays_of(model))  # type: ignore[arg-type]
    return model.to(DEVICE)


def backbone(arrays: Arrays, *, name: str, weights: str, backward: bool) -> Case:
    net, images = load(name, weights, IMAGE_SIZE).backbone, on_device(arrays["images"])
    parameters = list(net.parameters())
    shown = {"stem": net.body.conv1.weight, "top": net.fpn.layer_blocks[3][0].weight}
    positions = {name: next(i for i, p in enumerate(parameters) if p is shown[name]) for name in shown}

    def forward():
        return {f"p{level}": output for level, output in enumerate(net(images).values(), 2)}

    def gradient():
        gradients = torch.autograd.grad(sum((output**2).mean() for output in forward().values()), parameters)
        return {name: gradients[i] for name, i in positions.items()}

    return Case(ready(gradient if backward else forward, gradients=backward), to_host)


def inference(arrays: Arrays, *, name: str, weights: str, precision: str) -> Case:
    images = list(arrays["images"])
    model, mixed = load(name, weights, images[0].shape[:2]).eval(), set_precision(precision)

    def run():
        with mixed:
            return model([to_tensor(image) for image in images])

    def detections(result: Any) -> list[dict[str, np.ndarray]]:
        found = [to_host(one) for one in result]
        for one in found:
            one["labels"] -= num_outputs(name) - NUM_CLASSES
            if "masks" in one:
                one["masks"] = np.packbits(one["masks"][:, 0] > 0.5, axis=-1)
        return found

    return Case(ready(run), detections)


def onnx(arrays: Arrays, *, name: str, weights: str, precision: str) -> Case:
    """Returns a case for torch's ONNX export in onnxruntime, from one uint8 image on the host."""
    import onnxruntime

    (image,) = arrays["images"]
    model = load(name, weights, image.shape[:2]).eval()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "detector.onnx"
        torch.onnx.export(model, ([to_tensor(image)],), file, opset_version=17, dynamo=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def detections(result: list[Any]) -> list[Arrays]:
        return [{"boxes": result[0], "labels": result[1] - 1, "scores": result[2]}]

    return Case(lambda: session.run(None, {given.name: to_tensor(image).numpy()}), detections)


def training(arrays: Arrays, *, name: str, weights: str, precision: str, learning_rate: float) -> Case:
    images = list(arrays["images"])
    size = images[0].shape[:2]
    model, mixed = load(name, weights, size).train(), set_precision(precision)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=1e-4)
    labels = (arrays["labels"] + num_outputs(name) - NUM_CLASSES).astype(np.int64)
    targets = [{"boxes": b, "labels": k} for b, k in zip(arrays["boxes"], labels, strict=True)]
    if hasattr(model, "roi_heads") and model.roi_heads.has_mask():
        targets = [{**target, "masks": ellipses(target["boxes"], size)} for target in targets]

    def run():
        with mixed:
            losses = model([to_tensor(image) for image in images], on_device(targets))
            total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return losses

    return Case(ready(run, gradients=True), to_host)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Converts a uint8 image on the host to the detectors' input."""
    return torch.from_numpy(image).to(DEVICE).permute(2, 0, 1).float() / 255


def set_precision(precision: str) -> torch.autocast:
    """Sets full float32 or TF32, and returns the autocast context for bfloat16 (automatic mixed precision)."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bfloat16")


def size(arrays: Arrays, *, name: str) -> Case:
    """Counts the trainable parameters of the named detector."""
    with torch.device("meta"):
        model = new_detector(name, num_outputs(name))
    return Case(lambda: None, facts={"parameters": sum(parameter.numel() for parameter in model.parameters())})


@cache
def num_outputs(name: str) -> int:
    """Returns the detector's number of classes; all but RetinaNet and FCOS count the background."""
    with torch.device("meta"):
        return NUM_CLASSES + (not isinstance(new_detector(name), RetinaNet | FCOS))


class Coco(CocoDetection):
    """COCO images as float tensors, with targets in the detectors' format."""

    def __init__(self, folder: Path, *, masks: bool):
        super().__init__(str(folder / "images"), str(folder / "annotations.json"))
        self._masks = masks
        self._to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float, scale=True)])

    def __getitem__(self, index):
        image, annotations = super().__getitem__(index)
        width, height = image.size
        boxes = torch.as_tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=width)
        boxes[:, 1::2].clamp_(min=0, max=height)
        target = {"boxes": boxes, "labels": torch.tensor([a["category_id"] for a in annotations])}
        if self._masks:
            target["masks"] = torch.stack([polygon_mask(a["segmentation"], height, width) for a in annotations])
        return self._to_tensor(image), target


def polygon_mask(polygons, height: int, width: int) -> torch.Tensor:
    """Rasterises the polygons of an object."""
    mask = torch.as_tensor(coco_masks.decode(coco_masks.frPyObjects(polygons, height, width)), dtype=torch.uint8)
    return mask.any(dim=2)


def collate(examples):
    """Collates into lists of images and targets, because sizes differ."""
    return tuple(zip(*examples, strict=True))


def feed(arrays: Arrays, *, folder: str, masks: bool, batch_size: int, workers: int) -> Case:
    options = {"shuffle": True, "num_workers": workers, "collate_fn": collate, "persistent_workers": True}
    loader = DataLoader(Coco(Path(folder), masks=masks), batch_size, **options)

    def described(batch):
        pictures, targets = batch
        pixels = sum(int((picture.double() * 255).round().sum()) for picture in pictures)
        corners = sum(target["boxes"].double().sum(dim=0).numpy() for target in targets)
        area = sum(float(target["masks"].sum()) for target in targets if "masks" in target)
        return len(pictures), pixels, sum(len(target["labels"]) for target in targets), corners, area

    return Case(lambda: sum(len(images) for images, _ in loader), lambda _: totals(map(described, loader)))


if __name__ == "__main__":
    set_precision("float32")
    cases = {name: partial(operator, function) for name, function in OPERATORS.items()}
    others = (backbone, inference, onnx, training, size, feed)
    versions = {package.__name__: package.__version__.split("+")[0] for package in (torch, torchvision)}
    memory = () if DEVICE.type == "cpu" else (torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats)
    Side(cases | {case.__name__: case for case in others}, {"versions": versions}, *memory).serve()
