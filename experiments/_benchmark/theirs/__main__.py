"""The worker of torchvision's side."""
# pyright: reportMissingImports=false

import torch
import torchvision

from ..worker import Device, serve
from . import data, detectors, exports, ops


def main() -> None:
    """Serves until the benchmark has no more to ask."""
    about = {
        "versions": {"torch": torch.__version__.split("+")[0], "torchvision": torchvision.__version__.split("+")[0]}
    }
    detectors.set_precision("float32")
    if ops.DEVICE.type == "cpu":
        device = Device(about)
    else:
        device = Device(about, torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats)
    serve(ops.CASES | detectors.CASES | exports.CASES | data.CASES, device)


main()
