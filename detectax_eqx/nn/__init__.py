"""Neural network modules for a single example: convolutions, norms, ResNet, FPN."""

from .._xla import convolution_options as convolution_options
from ._conv import (
    Conv2d as Conv2d,
    Initializer as Initializer,
    Upsample2x2 as Upsample2x2,
    Upsample4x4 as Upsample4x4,
    conv2d as conv2d,
    max_pool2d as max_pool2d,
    relu as relu,
)
from ._fpn import (
    FPN as FPN,
    Backbone as Backbone,
    ConvolvedTop as ConvolvedTop,
    ResNetFPN as ResNetFPN,
    SubsampledTop as SubsampledTop,
)
from ._norm import FrozenBatchNorm as FrozenBatchNorm, GroupNorm as GroupNorm, Norm as Norm
from ._precision import cast as cast
from ._resnet import (
    BasicBlock as BasicBlock,
    Bottleneck as Bottleneck,
    Downsample as Downsample,
    ResNet as ResNet,
    resnet18 as resnet18,
    resnet34 as resnet34,
    resnet50 as resnet50,
    resnet101 as resnet101,
)
