"""Reads and writes weights: torchvision checkpoints, `.pth` and `.pkl` files, and safetensors."""

from ._describe import describe as describe
from ._names import current_name as current_name
from ._pkl import read_pkl as read_pkl
from ._pth import read_pth as read_pth
from ._safetensors import (
    load_safetensors as load_safetensors,
    read_safetensors as read_safetensors,
    save_safetensors as save_safetensors,
)
from ._torchvision import (
    load_torchvision as load_torchvision,
    load_torchvision_backbone as load_torchvision_backbone,
    read_torchvision as read_torchvision,
    to_torchvision as to_torchvision,
)
from ._trees import WeightsError as WeightsError, named_leaves as named_leaves, replace_leaves as replace_leaves
