"""Neural network modules for a single example: convolutions, norms, attention, backbones, pyramids."""

from .._xla import convolution_options as convolution_options
from ._attention import (
    MLP as MLP,
    LayerScale as LayerScale,
    PositionBias as PositionBias,
    Positions as Positions,
    RelativeOffsets as RelativeOffsets,
    SelfAttention as SelfAttention,
    TransformerBlock as TransformerBlock,
    attention as attention,
    drop_path as drop_path,
    gelu as gelu,
    linear as linear,
)
from ._conv import (
    Conv2d as Conv2d,
    Initializer as Initializer,
    Upsample2x2 as Upsample2x2,
    Upsample4x4 as Upsample4x4,
    conv2d as conv2d,
    max_pool2d as max_pool2d,
    relu as relu,
    silu as silu,
)
from ._fpn import (
    FPN as FPN,
    Backbone as Backbone,
    BackboneWithFPN as BackboneWithFPN,
    ConvolvedTop as ConvolvedTop,
    SubsampledTop as SubsampledTop,
)
from ._mobilenet import (
    Activation as Activation,
    ConvNorm as ConvNorm,
    InvertedResidual as InvertedResidual,
    LinearBottleneck as LinearBottleneck,
    MobileNet as MobileNet,
    MobileNetFPN as MobileNetFPN,
    SqueezeExcitation as SqueezeExcitation,
    hard_sigmoid as hard_sigmoid,
    hard_swish as hard_swish,
    mobilenet_v2 as mobilenet_v2,
    mobilenet_v3_large as mobilenet_v3_large,
    relu6 as relu6,
)
from ._norm import (
    FrozenBatchNorm as FrozenBatchNorm,
    GroupNorm as GroupNorm,
    LayerNorm as LayerNorm,
    LayerNorm2d as LayerNorm2d,
    Norm as Norm,
)
from ._precision import cast as cast
from ._projected_resnet import ProjectedLevels as ProjectedLevels, ProjectedResNet as ProjectedResNet
from ._query_layers import (
    DeformableAttention as DeformableAttention,
    QueryAttention as QueryAttention,
    ReLUMLP as ReLUMLP,
    xavier_linear as xavier_linear,
)
from ._resnet import (
    BasicBlock as BasicBlock,
    Bottleneck as Bottleneck,
    Downsample as Downsample,
    ResNet as ResNet,
    resnet18 as resnet18,
    resnet34 as resnet34,
    resnet50 as resnet50,
    resnet101 as resnet101,
    resnet152 as resnet152,
    resnext50_32x4d as resnext50_32x4d,
    resnext101_32x8d as resnext101_32x8d,
    resnext101_64x4d as resnext101_64x4d,
    wide_resnet50_2 as wide_resnet50_2,
    wide_resnet101_2 as wide_resnet101_2,
)
from ._sine import sine_embedding as sine_embedding, sine_positions as sine_positions
from ._ssd import (
    SSDVGG as SSDVGG,
    SeparableConv2d as SeparableConv2d,
    SSDBackbone as SSDBackbone,
    SSDExtra as SSDExtra,
    SSDMobileNet as SSDMobileNet,
)
from ._swin import (
    PatchMerging as PatchMerging,
    Swin as Swin,
    SwinStage as SwinStage,
    swin_b as swin_b,
    swin_l as swin_l,
    swin_s as swin_s,
    swin_t as swin_t,
)
from ._vgg import VGG as VGG, vgg16 as vgg16
from ._vit import (
    PatchPositions as PatchPositions,
    SimpleLevel as SimpleLevel,
    ViT as ViT,
    ViTFPN as ViTFPN,
    vit_b as vit_b,
    vit_h as vit_h,
    vit_l as vit_l,
)
from ._windowed_vit import (
    C2f as C2f,
    ClassToken as ClassToken,
    ProjectedViT as ProjectedViT,
    WindowedViT as WindowedViT,
)
from ._windows import Groups as Groups, Windows as Windows
