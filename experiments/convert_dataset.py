"""Writes one split of a dataset in the YOLO format as a COCO file, for the other scripts.

    python experiments/convert_dataset.py street/data.yaml street/train.json --split train
    python experiments/train.py --train-annotations street/train.json --train-images street …

Images stay where they are: the names in the file are relative to `--images`. Everything that is wrong with the dataset
is listed first, and nothing is written then.
"""

from dataclasses import dataclass
from pathlib import Path

from _shared import console, run
from tyro.conf import Positional

from detectax_eqx import data


@dataclass
class Options:
    """Options of a conversion."""

    input: Positional[Path]
    """The data.yaml of the dataset."""
    output: Positional[Path]
    """The COCO file to write."""
    split: str = "train"
    """The key of data.yaml that holds the images."""
    images: Path | None = None
    """The folder for --train-images of train.py. Default: the folder of the input."""


def main(options: Options) -> None:
    """Converts, and prints a summary."""
    dataset = data.load_yolo(options.input, options.split)
    data.write_coco(dataset, options.output, options.images or options.input.parent)
    count = sum(len(dataset.objects(position).labels) for position in range(len(dataset)))
    console.print(f"{options.output}: {len(dataset):,} images, {count:,} objects; {dataset.report}", highlight=False)


if __name__ == "__main__":
    run(main, Options, __doc__)
