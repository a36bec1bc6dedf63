"""torchvision detectors at random weights that still detect something, and real images to run them on."""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from experiments._torchvision import arrays_of as arrays_of, random_detector as random_detector


def real_images(count: int) -> list[np.ndarray]:
    """Real photographs, portrait and landscape alternating, from a folder of COCO images beside the repository."""
    folder = Path(__file__).parents[3] / "shared" / "data" / "coco-mini" / "val2017"
    if not folder.is_dir():
        return []
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.jpg"))]
    # Each size compiles a program: the most common sizes come first.
    common = Counter(image.shape for image in images)
    images.sort(key=lambda image: (-common[image.shape], image.shape))
    wide = [image for image in images if image.shape[0] <= image.shape[1]]
    tall = [image for image in images if image.shape[0] > image.shape[1]]
    return [image for pair in zip(tall, wide, strict=False) for image in pair][:count]
