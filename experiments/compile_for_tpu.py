"""Compiles training and detection for TPUs on a machine without one, and reports memory and FLOPs.

    pip install -e '.[tpu]'
    python experiments/compile_for_tpu.py

The TPU compiler in the package `libtpu` runs on any machine and allocates all memory at compile time: a program that it
accepts fits the memory of a core. No program is run, so no speed is measured. Training is the step of train.py, over
all cores of a topology. The exit status is 1 if a program does not fit.

With `LD_PRELOAD=libtcmalloc_minimal.so.4`, compiling a training program takes about ten minutes on a CPU core and 10 GB
of memory (for v6e twenty minutes and 14 GB), and detection three minutes and 6 GB. With glibc's malloc it takes a fifth
more.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import train as script
from _benchmark.pages import cells, render
from _benchmark.tables import FOLDER, TABLES, Measurements, commit
from _options import Options as TrainOptions, architecture, complete, grouped
from _shared import ModelName, check_ranges, console, run
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from detectax_eqx import Batch, Images, Targets, models, train, zoo


# Memory per core in GiB, from the "system architecture" pages of cloud.google.com/tpu/docs.
GIB = {"v3": 16, "v5e": 16, "v6e": 32}
# The side of a decoded COCO image, the side of a mask in the frame of its box, and the number of COCO training images.
SOURCE, MASK, POINTS, COCO = 640, 112, 17, 118_287


@dataclass
class Options:
    """Options of the compilation."""

    topologies: tuple[str, ...] = ("v3:2x2x1", "v5e:2x4", "v6e:2x4")
    """Chips and their layout. v3:2x2x1 is a v3-8, whose four chips have two cores each."""
    models: tuple[ModelName, ...] = ("mask_rcnn_resnet50_fpn", "mask_rcnn_resnet101_fpn")
    """Detectors."""
    batch_size: int = 16
    """Images per step, over all cores."""
    canvases: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800))
    """Heights and widths in pixels of the network's input."""
    tensor: int = 1
    """Cores that compute an image together, over which transformers are cut. Training only."""
    programs: tuple[Literal["training", "detection"], ...] = ("training", "detection")
    """The programs to compile."""
    folder: Path = FOLDER
    """Folder of the measurements and pages. Rows are added to the table `tpu`."""

    RANGES: ClassVar[dict[str, str]] = {"positive": "batch_size tensor", "a positive multiple of 32": "canvases"}


def main(options: Options) -> None:
    """Compiles the programs and writes each row when it is done. Rows of other programs are not changed."""
    check_ranges(options)
    # Without these variables, libtpu looks for a description of the machine and reports that there is none.
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v3-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}
    versions, fits = f"jax {jax.__version__}, libtpu {version('libtpu')}, commit {commit()}", True
    for topology, name, canvas in product(options.topologies, options.models, options.canvases):
        limit = GIB[topology.split(":")[0]]
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
        mesh = train.make_mesh(devices, tensor=options.tensor)
        recipe: dict[str, Any] = {"model": name, "batch_size": options.batch_size, "precision": "bfloat16"}
        cut = ""
        if options.tensor == 1:
            recipe |= {"norm": "frozen_batch", "trainable_layers": 3}
        else:
            recipe |= {"optimizer": "adamw", "gradient_checkpointing": True}
            cut = f", each on {options.tensor} cores, checkpointed"
        programs = {
            "training": (
                f"training in bfloat16, {options.batch_size} images{cut}",
                partial(lower_step, grouped(output=Path(), **recipe), canvas, mesh),
            ),
            "detection": ("detection, an image on each core", partial(lower_detection, name, canvas, mesh)),
        }
        for what, lower_one in (programs[program] for program in options.programs):
            key = topology, f"{name}, {canvas[0]}×{canvas[1]}", what
            memory, flops = measure(lower_one, limit)
            fits &= flops is not None
            columns = (*TABLES["tpu"].keys, *TABLES["tpu"].columns)
            row = dict(zip(columns, (*key, memory, flops, versions), strict=True))
            console.print(" | ".join(cells("tpu", row).values()), highlight=False, soft_wrap=True)
            measurements = Measurements(options.folder)
            keys = sorted({key, *map(TABLES["tpu"].key, measurements.of("tpu"))})
            measurements.add("tpu", row, None, keys=keys)
            render(options.folder)
    if not fits:
        raise SystemExit("Not every program fits its cores: see the table.")


def measure(lower_one: Callable[[], jax.stages.Lowered], limit: int) -> tuple[str, int | None]:
    """Memory and GFLOPs per core. The GFLOPs are `None` if the program does not fit."""
    try:
        program: Any = lower_one().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return f"does not fit {limit} GiB", None
    memory = program.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    used += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return f"{used / 2**30:.2f} of {limit} GiB", round(program.cost_analysis()["flops"] / 1e9)


def lower_step(options: TrainOptions, canvas: tuple[int, int], mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the step of train.py for one canvas."""
    epoch_steps = COCO // options.run.batch_size
    options = complete(options, epoch_steps)
    optimizer = script.make_optimizer(options, script.make_schedule(options, epoch_steps))

    def init():
        model = architecture(options).build(80, key=jr.key(0), checkpoint=options.devices.gradient_checkpointing)
        trainable = models.trainable(model, trainable_layers=options.architecture.trainable_layers or 0)
        return train.init_train_state(model, optimizer, trainable=trainable, key=jr.key(0)), trainable

    state, trainable = eqx.filter_eval_shape(init)
    step = train.make_train_step(script.make_loss(options), optimizer, trainable=trainable, mesh=mesh)
    batch = eqx.filter_eval_shape(
        make_batch, options.run.batch_size, canvas, options.sizes.max_objects, state.model.needs
    )
    state = jax.tree.map(place, state, train.state_shardings(state, mesh))
    batch = shaped(batch, NamedSharding(mesh, PartitionSpec(("data", "model"))))
    return lower(step, state, batch, donate=(0,))


def lower_detection(name: ModelName, canvas: tuple[int, int], mesh: Mesh) -> jax.stages.Lowered:
    """Lowers detection in one image on one core."""
    model = zoo.Architecture(name).shapes(80)
    sizes = jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32)
    image = eqx.filter_eval_shape(jnp.zeros, (SOURCE, SOURCE, 3), jnp.uint8)

    def detect(model, image, source_size, canvas_size):
        return models.detect(model, image, source_size=source_size, canvas_size=canvas_size, canvas=canvas)

    one = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
    return lower(detect, *shaped((model, image, *eqx.filter_eval_shape(lambda: sizes)), one))


def make_batch(batch_size: int, canvas: tuple[int, int], max_objects: int, needs: frozenset[str]) -> Batch:
    """A batch of black images without objects, in the layout of the loader."""
    sizes, ints = jnp.full((batch_size, 2), SOURCE, jnp.int32), jnp.zeros(batch_size, jnp.int32)
    boxes, labels = jnp.zeros((batch_size, max_objects, 4)), jnp.zeros((batch_size, max_objects), jnp.int32)
    masks = (jnp.zeros((batch_size, max_objects, MASK, MASK), jnp.uint8), boxes) if "masks" in needs else ()
    points = jnp.zeros((batch_size, max_objects, POINTS, 3)) if "keypoints" in needs else None
    targets = Targets(boxes, labels, labels > 0, *masks, keypoints=points)
    pixels = jnp.zeros((batch_size, SOURCE, SOURCE, 3), jnp.uint8)
    return Batch(Images(pixels, sizes, sizes, ints, ints == 0, canvas), targets, overflow=ints)


def is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def shaped(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Adds a sharding to the shapes of a tree."""

    return jax.tree.map(lambda leaf: place(leaf, sharding), tree)


def place(leaf: Any, sharding: jax.sharding.Sharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) if is_shape(leaf) else leaf


def lower(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> jax.stages.Lowered:
    """Lowers a function for arguments that are shapes, without compiling it."""
    shapes, static = zip(*(eqx.partition(argument, is_shape) for argument in arguments), strict=True)

    def run(*shapes):
        return function(*map(eqx.combine, shapes, static))

    return jax.jit(run, donate_argnums=donate).lower(*shapes)


if __name__ == "__main__":
    run(main, Options, __doc__)
