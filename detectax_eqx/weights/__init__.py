"""Reads and writes weights: of torchvision, Detectron2, RF-DETR and DETR, `.pth` and `.pkl` files, and safetensors."""

from ._describe import describe as describe
from ._detectron2 import (
    detectron2_shapes as detectron2_shapes,
    load_detectron2 as load_detectron2,
    load_detectron2_backbone as load_detectron2_backbone,
    read_detectron2 as read_detectron2,
    to_detectron2 as to_detectron2,
)
from ._detr import (
    detr_shapes as detr_shapes,
    load_detr as load_detr,
    read_detr as read_detr,
    to_detr as to_detr,
)
from ._names import current_name as current_name
from ._pkl import read_pkl as read_pkl
from ._pth import read_pth as read_pth
from ._rf_detr import (
    load_rf_detr as load_rf_detr,
    read_rf_detr as read_rf_detr,
    rf_detr_shapes as rf_detr_shapes,
    to_rf_detr as to_rf_detr,
)
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
from ._transformers import load_transformer as load_transformer, read_transformer as read_transformer
from ._trees import WeightsError as WeightsError, named_leaves as named_leaves, replace_leaves as replace_leaves
