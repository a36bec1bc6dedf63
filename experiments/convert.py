"""Reads a detector's weights and writes them in another form.

    python experiments/convert.py maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth mine.safetensors \
        --model mask_rcnn_resnet50_fpn
    python experiments/convert.py runs/mine torchvision.safetensors --names torchvision

Reads a torchvision `.pth` or a `.safetensors` file of `--model`, or a run of train.py; nothing in a `.pth` file is ever
executed. Writes a `.safetensors` file: with this package's names, class names and image sizes, as `--weights` of the
other scripts takes it, or with torchvision's names, for `load_state_dict(safetensors.torch.load_file(...))`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from _shared import ModelName, console, run
from tyro.conf import Positional

from detectax_eqx import weights, zoo


@dataclass
class Options:
    """Options of a conversion."""

    input: Positional[Path]
    """A .pth or .safetensors file of --model, or an output folder of train.py."""
    output: Positional[Path]
    """The .safetensors file to write."""
    model: ModelName | None = None
    """Which detector the file is of. A run of train.py knows."""
    norm: zoo.NormName | None = None
    """Norm of the backbone. Default: what published weights of that file name were trained with, else frozen_batch."""
    names: Literal["detectax", "torchvision"] = "detectax"
    """How the arrays are named."""


RANGES: dict[str, str] = {}


def main(options: Options) -> None:
    """Converts, and says what was written."""
    if options.output.suffix != ".safetensors":
        raise SystemExit(f"The output must end in .safetensors, got {options.output}.")
    if options.input.is_dir():
        predictor = zoo.Predictor.from_checkpoint(options.input)
    elif options.model is None:
        raise SystemExit(f"--model is missing: which detector {options.input} is of.")
    else:
        predictor = zoo.Predictor.from_weights(options.model, options.input, norm=options.norm)
    if options.names == "torchvision":
        weights.save_safetensors(weights.to_torchvision(predictor.model), options.output)
    else:
        predictor.save_weights(options.output)
    size = options.output.stat().st_size / 1e6
    console.print(f"{options.output}: {predictor.model.num_classes} classes, {size:.1f} MB", highlight=False)


if __name__ == "__main__":
    run(main, Options, __doc__)
