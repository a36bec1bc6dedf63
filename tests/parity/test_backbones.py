"""torchvision's ImageNet classifiers as backbones: their maps and gradients, in double precision."""

from functools import partial

import pytest


torch = pytest.importorskip("torch", reason="torch is not installed; `make parity` runs this")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed; `make parity` runs this")

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from detectax_eqx import nn
from detectax_eqx.weights import load_torchvision, to_torchvision

from .double import double_precision, in_double
from .torchvision_models import arrays_of


BODIES = (
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "vgg16",
)
SIDES = (64, 96)


def classifier(name):
    """torchvision's classifier in double precision, with random statistics in its frozen norms."""
    torch.manual_seed(0)
    norm = {} if name == "vgg16" else {"norm_layer": torchvision.ops.FrozenBatchNorm2d}
    model = getattr(torchvision.models, name)(weights=None, **norm)
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            for array, low, high in ((module.weight, 0.6, 1.0), (module.bias, -0.1, 0.1)):
                array.uniform_(low, high)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
        elif isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.weight.data.mul_(module.groups**0.5)  # else features vanish
    return model.double()


def maps_of(name, model, image):
    """The maps of the classifier's stages."""
    if name.startswith(("res", "wide")):
        x, maps = model.maxpool(model.relu(model.bn1(model.conv1(image)))), []
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = stage(x)
            maps.append(x)
        return maps
    x, maps = image, []
    for i, layer in enumerate(model.features):
        before, x = x, layer(x)
        strided = getattr(layer, "_is_cn", False) or i in (0, len(model.features) - 1)
        if isinstance(layer, torch.nn.MaxPool2d):
            maps.append(before)
        elif strided and name != "vgg16":
            maps.append(x)
    return maps


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", BODIES)
def test_maps_and_gradients(name):
    theirs = classifier(name)
    image = np.random.default_rng(0).normal(size=(3, *SIDES))
    tensor = torch.tensor(image[None], requires_grad=True)
    expected = maps_of(name, theirs, tensor)
    # Scaled, so that the gradients of maps of any size are comparable.
    scales = [float(x.detach().abs().mean()) for x in expected]
    torch.stack([torch.cos(x / scale).sum() for x, scale in zip(expected, scales, strict=True)]).sum().backward()
    gradients = {key: p.grad.numpy() for key, p in theirs.named_parameters() if p.grad is not None}
    arrays = {key: array.astype(np.float32) for key, array in arrays_of(theirs).items()}  # exact
    body = load_torchvision(eqx.filter_eval_shape(partial(getattr(nn, name), key=jr.key(0))), arrays)
    with double_precision():

        @eqx.filter_jit
        @partial(eqx.filter_value_and_grad, has_aux=True)
        def total(both):
            maps = both[0](both[1])
            return sum(jnp.cos(x / scale).sum() for x, scale in zip(maps, scales, strict=True)), maps

        (_, maps), (grads, image_gradient) = total((in_double(body), jnp.asarray(image)))
        ours = to_torchvision(grads)
    assert len(maps) == len(expected)
    for a, b, scale in zip(maps, expected, scales, strict=True):
        np.testing.assert_allclose(np.asarray(a) / scale, b[0].detach().numpy() / scale, atol=1e-10)
    gradients |= {"image": tensor.grad[0].numpy()}
    ours |= {"image": np.asarray(image_gradient)}
    worst = max(np.linalg.norm(ours[key] - g) / np.linalg.norm(g) for key, g in gradients.items())
    print(f"{name}: {len(gradients)} gradients, largest relative difference {worst:.1e}")
    # The derivative of torch's hard sigmoid is 1 / 6 in float32, whatever its input.
    assert worst < (1e-7 if name == "mobilenet_v3_large" else 1e-9)
    back = to_torchvision(body)
    assert {key for key in arrays if not key.startswith(("fc.", "classifier."))} == set(back)
