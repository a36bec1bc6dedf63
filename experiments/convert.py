"""Reads a detector's weights and writes them in another form.

    python experiments/convert.py maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth mine.safetensors \
        --model mask_rcnn_resnet50_fpn
    python experiments/convert.py runs/mine torchvision.safetensors --names torchvision

Reads a torchvision `.pth` or a `.safetensors` file of `--model`, or a run of train.py; code in a `.pth` file is never
executed. Writes a `.safetensors` file: for `--weights` of the other scripts, with class names and image sizes, or with
torchvision's parameter names, for `load_state_dict(safetensors.torch.load_file(...))`.
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
    """The detector that the file belongs to; not needed for a run of train.py."""
    norm: zoo.NormName | None = None
    """Norm of the backbone. Default: that of published weights of this file name, else frozen_batch."""
    names: Literal["detectax", "torchvision"] = "detectax"
    """Names of the arrays."""


def main(options: Options) -> None:
    """Converts, and prints a summary."""
    if options.output.suffix != ".safetensors":
        raise SystemExit(f"The output must end in .safetensors, got {options.output}.")
    if options.input.is_dir():
        predictor = zoo.Predictor.from_checkpoint(options.input)
    elif options.model is None:
        raise SystemExit(f"--model is missing: give the name of the detector in {options.input}.")
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
