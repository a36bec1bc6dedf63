"""The tables of model size, of compiling, and of techniques, each on against off."""

import time
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from . import inputs
from .agreement import Disagreement
from .bench import Bench, Row, Table, number, ratio_cells
from .process import WorkerError, side_by_side
from .rows_detectors import LEARNING_RATE, Work, detection_batch, training_batch


# What was tried of XLA's own options. One that this version does not know ends the process.
XLA_OPTIONS = {
    "cpu": (
        "--xla_cpu_enable_fast_math=true",
        "--xla_cpu_prefer_vector_width=512",
        "--xla_cpu_enable_concurrency_optimized_scheduler=true",
        "--xla_cpu_use_onednn=true",
    ),
    "accelerator": ("--xla_gpu_triton_gemm_any=true", "--xla_gpu_enable_latency_hiding_scheduler=true"),
}


def size_table() -> Table:
    """Parameters and megabytes of every detector."""
    columns = ("parameters", "float32 MB", "bfloat16 or float16 MB", "torchvision's parameters")
    return Table("size", ("model",), columns, _size_rows)


def compile_table() -> Table:
    """What is waited for before the first step."""
    columns = (
        "cold s", "cached s", "process to result, cold s", "process to result, cached s", "peak MB, cold",
        "programs an epoch",
    )  # fmt: skip
    return Table("compile", ("program", "model", "images"), columns, _compile_rows)


def techniques_table() -> Table:
    """Ours alone, each technique on against off."""
    columns = ("off s", "on s", "ratio", "spread", "temporaries off MB", "on MB")
    return Table("techniques", ("technique", "work"), columns, _technique_rows)


def _size_rows(bench: Bench) -> list[Row]:
    names = [f"{kind}_rcnn_resnet{depth}_fpn" for kind in ("faster", "mask") for depth in (18, 34, 50, 101)]
    return [Row((name,), partial(_size, bench, name)) for name in names]


def _size(bench: Bench, name: str) -> tuple[str, ...]:
    ours, theirs = (None if w is None else int(w.build("size", name=name)["parameters"]) for w in bench.shared())
    assert ours is not None
    if theirs is not None and theirs != ours:
        raise Disagreement(f"{ours:,} parameters, torchvision's {theirs:,}")
    return number(ours, 0), number(ours * 4e-6, 1), number(ours * 2e-6, 1), number(theirs, 0)


def _compile_rows(bench: Bench) -> list[Row]:
    if bench.quick:
        programs = [("training", Work("faster_rcnn_resnet18_fpn", 2, (160, 256)))]
    else:
        models = ("faster_rcnn_resnet50_fpn", "mask_rcnn_resnet50_fpn")
        programs = [("training", Work(model, 2, (320, 480))) for model in models]
        programs += [("inference", Work(model, 1, inputs.IMAGE_SIZE)) for model in models]
    return [Row((case, work.model, work.images), partial(_compile, bench, case, work)) for case, work in programs]


def _compile(bench: Bench, case: str, work: Work) -> tuple[str, ...]:
    """In two fresh processes, the first with an empty cache."""
    options: dict[str, Any] = {"name": work.model, "precision": work.precision, "weights": None}
    if case == "training":
        arrays, options["learning_rate"] = training_batch(work), LEARNING_RATE
    else:
        arrays = detection_batch(work)
    compiling, whole, peaks, buckets = [], [], [], None
    with TemporaryDirectory() as cache:
        environment = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
        for _ in ("cold", "cached"):
            began = time.perf_counter()
            with bench.ours(environment) as ours:
                facts = ours.build(case, arrays, **options)
                ours.time()
                whole.append(time.perf_counter() - began)
                compiling.append(facts["trace s"] + facts["compile s"])
                peaks.append(facts["building MB"])
                if case == "training":
                    sizes = np.array(inputs.coco_sizes(np.random.default_rng(0), 5000))
                    buckets = ours.build("buckets", {"sizes": sizes})["buckets"]
    return *(number(seconds, 1) for seconds in (*compiling, *whole)), number(peaks[0], 0), number(buckets, 0)


@dataclass(frozen=True)
class Technique:
    """A case of ours with some options or variables of the environment, against the same without."""

    name: str
    work: str
    case: str
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]
    on: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def _technique_rows(bench: Bench) -> list[Row]:
    return [Row((t.name, t.work), partial(_try, bench, t)) for t in _techniques(bench)]


def _techniques(bench: Bench) -> list[Technique]:
    body, size = ("resnet18", (160, 256)) if bench.quick else ("resnet50", (320, 480))
    images = np.random.default_rng(0).standard_normal((2, 3, *size), np.float32)
    backbone = {"body": body, "weights": None, "backward": True}
    work = f"backbone + FPN, {body}, 2 × {size[0]}×{size[1]}, forward + backward"
    flags = XLA_OPTIONS["cpu" if bench.on_host else "accelerator"][: 1 if bench.quick else None]
    return [
        Technique(
            f"`XLA_FLAGS={flag}`", work, "backbone", {"images": images}, backbone, environment={"XLA_FLAGS": flag}
        )
        for flag in flags
    ]


def _try(bench: Bench, technique: Technique) -> tuple[str, ...]:
    with bench.ours() as off, bench.ours(technique.environment) as on:
        try:
            on.about()
        except WorkerError:
            return "—", "—", "refused by this version", "", "—", "—"
        facts = [
            worker.build(technique.case, technique.arrays, **{**technique.options, **options})
            for worker, options in ((off, {}), (on, technique.on))
        ]
        for worker in (off, on):
            worker.time()
        compared = side_by_side(on, off, budget=bench.budget)
    memory = (number(fact.get("temp MB"), 0) for fact in facts)
    return number(compared.theirs), number(compared.ours), *ratio_cells(compared), *memory
