"""Measures this machine and writes the tables of BENCHMARKS.md.

    python experiments/benchmark.py                       # everything, about half an hour on two CPU cores
    python experiments/benchmark.py --quick               # small sizes, about two minutes

Where torchvision can be imported it runs beside ours in the same call, in turn (A B A B …), operators after a check
that both give the same result; a row then has its time and the ratio. Rows of other hardware stay as they are.
"""

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from _shared import console

from detectax_eqx import Targets, models, ops


# The peer, where it is installed.
torchvision = import_module("_torchvision") if find_spec("torchvision") else None
MEASURED = ("faster_rcnn_resnet50_fpn", "mask_rcnn_resnet50_fpn")
Row = tuple[str, ...]


@dataclass
class Options:
    """Options of the benchmark."""

    quick: bool = False
    """Small sizes and few repeats; the rows say so."""
    repeats: int = 5
    """Timed runs of each side; the median counts."""
    file: Path = Path(__file__).parents[1] / "BENCHMARKS.md"
    """The file whose tables are replaced."""


def main(options: Options) -> None:
    """Measures table after table and writes each as soon as it is there."""
    tables: dict[str, tuple[Row, Callable[[Options], list[Row]]]] = {
        "size": (("model", "parameters", "float32 MB", "bfloat16 MB", "torchvision's parameters"), size_rows),
        "ops": (("operator", "ours ms", "torchvision ms", "ratio", "spread"), op_rows),
        "inference": (("model", "image", "ours s", "torchvision s", "ratio", "spread"), inference_rows),
        "training": (
            ("model", "batch", "ours s/step", "torchvision s/step", "ratio", "compile s", "temp MB"),
            training_rows,
        ),
    }
    for name, (header, measure) in tables.items():
        console.print(f"{name} …")
        rows = measure(options)
        for row in rows:
            console.print("  " + " | ".join(row), highlight=False)
        write_table(options.file, name, hardware(), header, rows, quick=options.quick)


def hardware() -> str:
    """What a figure of this run was measured on."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.devices())} × {device.device_kind}"
    cpu = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )

    return f"{os.cpu_count()} CPU cores ({cpu[1].strip() if cpu else platform.processor()})"


def write_table(file: Path, name: str, machine: str, header: Row, rows: list[Row], *, quick: bool) -> None:
    """Replaces the rows of this machine in the table between the markers `name`; others stay."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = file.read_text()
    if begin not in text or end not in text:
        raise SystemExit(f"{file} has no markers {begin} … {end}.")
    before, rest = text.split(begin, 1)
    old, after = rest.split(end, 1)
    machine = machine + (", quick" if quick else "")
    kept = [line for line in old.splitlines()[3:] if line.startswith("|") and f"| {machine} |" not in line]
    versions = f"jax {version('jax')}" + (f", torchvision {version('torchvision')}" if torchvision else "")
    head = (*header, "hardware", "versions", "commit")
    lines = ["", "| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |", *kept]
    lines += ["| " + " | ".join((*row, machine, versions, commit())) + " |" for row in rows]
    file.write_text(before + begin + "\n".join(lines) + "\n" + end + after)


def commit() -> str:
    """The commit that is measured."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def side_by_side(ours: Callable, theirs: Callable | None, repeats: int) -> tuple[float, float | None, str]:
    """Median seconds of both, run in turn, and the least and greatest ratio of a pair."""
    ours()
    if theirs is not None:
        theirs()
    a, b = [], []
    for _ in range(repeats):
        a.append(clock(ours))
        if theirs is not None:
            b.append(clock(theirs))
    if not b:
        return statistics.median(a), None, ""
    ratios = [y / x for x, y in zip(a, b, strict=True)]
    return statistics.median(a), statistics.median(b), f"{min(ratios):.2f}–{max(ratios):.2f}"


def clock(run: Callable) -> float:
    """Seconds until the result is there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def times(ours: float, theirs: float | None, *, scale: float, digits: int) -> Row:
    """Cells for our time, theirs and their ratio."""
    if theirs is None:
        return f"{ours * scale:.{digits}f}", "`make bench` with torchvision", ""
    return f"{ours * scale:.{digits}f}", f"{theirs * scale:.{digits}f}", f"{theirs / ours:.2f}×"


def size_rows(options: Options) -> list[Row]:
    """Parameters and megabytes of every detector, at COCO's 90 ids."""
    published = {"faster_rcnn_resnet50_fpn": "41,755,286", "mask_rcnn_resnet50_fpn": "44,401,393"}
    rows = []
    for kind in ("faster", "mask"):
        for depth in (18, 34, 50, 101):
            name = f"{kind}_rcnn_resnet{depth}_fpn"
            count = models.num_parameters(eqx.filter_eval_shape(getattr(models, name), 90, key=jr.key(0)))
            rows.append((name, f"{count:,}", f"{count * 4e-6:.1f}", f"{count * 2e-6:.1f}", published.get(name, "—")))
    return rows


def op_rows(options: Options) -> list[Row]:
    """Operators on random boxes and maps of an 800×1216 image, each after a check that both sides agree."""
    rng = np.random.default_rng(0)
    rows = []

    def random_boxes(n: int) -> np.ndarray:
        corners = rng.uniform(0, (1100, 700), (n, 2))
        sides = np.exp(rng.uniform(np.log(16), np.log(400), (n, 2)))
        return np.minimum(np.concatenate([corners, corners + sides], axis=1), [1216, 800] * 2).astype(np.float32)

    def add(name: str, ours: Callable, theirs: Callable | None) -> None:
        if theirs is not None:
            np.testing.assert_allclose(np.asarray(ours()), np.asarray(theirs()), atol=1e-3, err_msg=name)
        a, b, spread = side_by_side(ours, theirs, options.repeats)
        rows.append((name, *times(a, b, scale=1e3, digits=2), spread))

    keep = jax.jit(partial(ops.nms, iou_threshold=0.5))
    for n in (1000,) if options.quick else (1000, 10_000):
        boxes, scores = random_boxes(n), rng.permutation(n).astype(np.float32)
        arrays = jnp.asarray(boxes), jnp.asarray(scores)
        add(f"nms, {n:,} boxes", partial(keep, *arrays), torchvision and torchvision.nms(boxes, scores, 0.5))

    channels, count = (64, 200) if options.quick else (256, 1000)
    boxes, strides = random_boxes(count), (4, 8, 16, 32)
    maps = [rng.normal(size=(channels, 800 // s, 1216 // s)).astype(np.float32) for s in strides]
    align = partial(ops.multilevel_roi_align, output_size=7, strides=strides, sampling_ratio=2, aligned=False)
    arrays = [jnp.asarray(m) for m in maps], jnp.asarray(boxes)
    theirs = torchvision and torchvision.multilevel_roi_align(maps, boxes, (800, 1216))
    add(f"multi-level RoIAlign, {count}×{channels}×7×7", partial(jax.jit(align), *arrays), theirs)

    masks = rng.uniform(size=(100, 28, 28)).astype(np.float32)
    paste = jax.jit(partial(ops.paste_masks, image_size=(800, 1216)))
    arrays = jnp.asarray(masks), jnp.asarray(boxes[:100])
    theirs = torchvision and torchvision.paste_masks(masks, boxes[:100], (800, 1216))
    add("mask paste, 100 onto 800×1216", partial(paste, *arrays), theirs)
    return rows


def inference_rows(options: Options) -> list[Row]:
    """Whole detection of one image at equal random weights; masks stay in their boxes on our side."""
    size = (320, 480) if options.quick else (800, 1216)
    sizes = {"min_size": min(size), "max_size": max(size)}
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    detect = eqx.filter_jit(models.detect)
    rows = []
    for name in MEASURED[: 1 if options.quick else None]:
        model = getattr(models, name)(90, key=jr.key(0))
        theirs = torchvision and torchvision.inference(name, model, image, **sizes)
        a, b, spread = side_by_side(partial(_boxes, detect, model, image, sizes), theirs, options.repeats)
        rows.append((name, f"{size[0]}×{size[1]}", *times(a, b, scale=1, digits=2), spread))
    return rows


def _boxes(detect, model, image, sizes):
    return detect(model, image, **sizes).boxes


def training_rows(options: Options) -> list[Row]:
    """Forward and backward of a step on two images with five objects each; the optimiser is left out."""
    size, objects = (160, 256) if options.quick else (320, 480), 5
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, *size, 3)).astype(np.uint8)
    corners = rng.uniform(0, (size[1] - 80, size[0] - 80), (2, objects, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 80, (2, objects, 2))], axis=2).astype(np.float32)
    labels = rng.integers(0, 90, (2, objects)).astype(np.int32)
    masks = np.full((2, objects, 28, 28), 255, np.uint8)
    targets = jax.tree.map(jnp.asarray, Targets(boxes, labels, np.ones((2, objects), bool), masks, boxes))
    rows = []
    for name in MEASURED[: 1 if options.quick else None]:
        model = getattr(models, name)(90, key=jr.key(0))
        loss = models.mask_rcnn_loss if name.startswith("mask") else models.faster_rcnn_loss

        def total(model, loss=loss):
            def one(image, target, key):
                return loss(model, image, jnp.array(size, jnp.int32), target, key=key)

            terms = jax.vmap(one)(jnp.asarray(images), targets, jr.split(jr.key(0), 2))
            return sum(jax.tree.map(jnp.sum, term).mean() for term in terms.values())

        arrays, static = eqx.partition(model, eqx.is_array)
        gradient = jax.jit(
            lambda arrays, static=static, total=total: eqx.filter_grad(total)(eqx.combine(arrays, static))
        )
        began = time.perf_counter()
        step = gradient.lower(arrays).compile()
        compiling = time.perf_counter() - began
        analysis = step.memory_analysis()
        memory = f"{analysis.temp_size_in_bytes / 1e6:.0f}" if analysis else "not told by this platform"
        theirs = torchvision and torchvision.training(name, model, images, boxes, labels)
        a, b, _ = side_by_side(partial(step, arrays), theirs, max(3, options.repeats // 2))
        rows.append((name, f"2 × {size[0]}×{size[1]}", *times(a, b, scale=1, digits=2), f"{compiling:.0f}", memory))
    return rows


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
