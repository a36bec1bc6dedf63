"""Writes a dataset in the YOLO format, or in that of Pascal VOC, as a COCO file for the other scripts.

    python experiments/convert_dataset.py street/data.yaml street/train.json --split train
    python experiments/convert_dataset.py VOCdevkit/VOC2012 voc/trainval.json --split trainval
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
    """The data.yaml of a dataset in the YOLO format, or a folder with the XML files of Pascal VOC."""
    output: Positional[Path]
    """The COCO file to write."""
    split: str | None = None
    """The key of data.yaml that holds the images (default: train), or the name of a list in ImageSets/Main (default:
    all images)."""
    images: Path | None = None
    """The folder for --train-images of train.py. Default: that of the dataset."""


def main(options: Options) -> None:
    """Converts, and prints a summary."""
    if options.input.is_dir():
        dataset, folder = data.load_voc(options.input, options.split), options.input
    else:
        dataset, folder = data.load_yolo(options.input, options.split or "train"), options.input.parent
    data.write_coco(dataset, options.output, options.images or folder)
    count = sum(len(dataset.objects(position).labels) for position in range(len(dataset)))
    console.print(f"{options.output}: {len(dataset):,} images, {count:,} objects; {dataset.report}", highlight=False)


if __name__ == "__main__":
    run(main, Options, __doc__)
