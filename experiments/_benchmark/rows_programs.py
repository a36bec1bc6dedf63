"""The tables of model size, of compiling, and of techniques, each on against off."""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import inputs
from .agreement import Disagreement
from .bench import Bench, Row, Table, in_seconds, number, ratio_cells
from .process import WorkerError
from .rows_detectors import LEARNING_RATE, QUICK_IMAGE, QUICK_STEP, Work, detection_batch, training_batch


# What was tried of XLA's own options. One that this version does not know ends the process.
XLA_OPTIONS = {
    "cpu": (
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        "--xla_cpu_enable_fast_math=true",
        "--xla_cpu_prefer_vector_width=512",
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
    depths = (18,) if bench.quick else (18, 34, 50, 101)
    names = [f"{kind}_rcnn_resnet{depth}_fpn" for kind in ("faster", "mask") for depth in depths]
    return [Row((name,), partial(_size, bench, name)) for name in names]


def _size(bench: Bench, name: str) -> tuple[str, ...]:
    ours, theirs = (None if w is None else int(w.build("size", name=name)["parameters"]) for w in bench.shared())
    assert ours is not None
    if theirs is not None and theirs != ours:
        raise Disagreement(f"{ours:,} parameters, torchvision's {theirs:,}")
    return number(ours, 0), number(ours * 4e-6, 1), number(ours * 2e-6, 1), number(theirs, 0)


def _compile_rows(bench: Bench) -> list[Row]:
    if bench.quick:
        programs = [("training", Work(*QUICK_STEP))]
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
    with bench.cold_programs() as cache:
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
    """A case of ours with a technique, against the same without.

    - `on`: options of the case. `environment`: variables. `options`, `both`: options and variables of both sides.
    """

    name: str
    case: str
    work: Work
    on: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    both: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def _technique_rows(bench: Bench) -> list[Row]:
    return [
        Row((t.name, f"{t.case}, {t.work.model}, {t.work.images}"), partial(_try, bench, t)) for t in _techniques(bench)
    ]


def _techniques(bench: Bench) -> list[Technique]:
    from detectax_eqx._xla import TRICKS  # only here: this process starts others, and needs no JAX itself

    if bench.quick:
        return [Technique("bfloat16", "inference", Work(*QUICK_IMAGE), {"precision": "bfloat16"})]
    step = Work("faster_rcnn_resnet50_fpn", 2, (320, 480))
    image = Work("faster_rcnn_resnet50_fpn", 1, inputs.IMAGE_SIZE)
    precisions = ("bfloat16",) if bench.on_host else ("bfloat16", "tf32")
    flags = [{"XLA_FLAGS": flag} for flag in XLA_OPTIONS["cpu" if bench.on_host else "accelerator"]]
    rows = [
        Technique(precision, case, work, {"precision": precision})
        for precision in precisions
        for case, work in (("inference", image), ("training", step))
    ]
    rows.append(Technique("gradient checkpointing", "training", step, {"checkpoint": True}))
    if bench.on_host:
        # That scheduler runs what it can at once, and then keeps what checkpointing is to spare.
        name = f"gradient checkpointing, with `{flags[0]['XLA_FLAGS']}`"
        rows.append(Technique(name, "training", step, {"checkpoint": True}, both=flags[0]))
        flags.append({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    for variables in flags:
        name = " ".join(f"{variable}={value}" for variable, value in variables.items())
        rows.append(Technique(f"`{name}`", "training", step, environment=variables))
    # Ways around the compiler, each turned off on its own.
    step, image = Work("mask_rcnn_resnet50_fpn", 2, (320, 480)), Work("mask_rcnn_resnet50_fpn", 1, inputs.IMAGE_SIZE)
    for trick in TRICKS:
        name, off = f"`DETECTAX_PLAIN={trick}`", {"DETECTAX_PLAIN": trick}
        checkpoint = {"checkpoint": True} if trick == "rematerialisation" else {}
        rows.append(Technique(name, "training", step, environment=off, options=checkpoint))
        if not checkpoint:
            rows.append(Technique(name, "inference", image, environment=off))
    return rows


def _try(bench: Bench, technique: Technique) -> tuple[str, ...]:
    work, case = technique.work, technique.case
    # Weights that detect something, if an earlier table has left any.
    weights = bench.weights(work.model)
    options: dict[str, Any] = {"name": work.model, "precision": work.precision} | technique.options
    options["weights"] = weights if weights and Path(weights).exists() else None
    if case == "training":
        arrays, options["learning_rate"] = training_batch(work), LEARNING_RATE
    else:
        arrays = detection_batch(work)
    with bench.ours(technique.both) as off, bench.ours(technique.both | technique.environment) as on:
        try:
            on.about()
        except WorkerError:
            return "—", "—", "refused by this version", "", "—", "—"
        facts = [worker.build(case, arrays, **options | extra) for worker, extra in ((off, {}), (on, technique.on))]
        for worker in (off, on):
            worker.time()
        compared = bench.compare(on, off)
    memory = (number(fact.get("temp MB"), 0) for fact in facts)
    return in_seconds(compared.theirs), in_seconds(compared.ours), *ratio_cells(compared), *memory
