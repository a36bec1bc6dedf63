"""torchvision's parameters by name, in both directions: on tiny random models, and the real names and shapes."""

import json
from functools import cache, partial
from pathlib import Path

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx import models, nn, zoo
from detectax_eqx.weights import (
    WeightsError,
    describe,
    load_safetensors,
    load_torchvision,
    load_torchvision_backbone,
    named_leaves,
    read_torchvision,
    save_safetensors,
    to_torchvision,
)


def _body():
    return nn.resnet18(key=jr.key(0), width=8)


def _faster_rcnn(num_classes=3):
    backbone = nn.BackboneWithFPN(_body(), key=jr.key(0), channels=16)
    return models.faster_rcnn(backbone, num_classes, key=jr.key(0), hidden_size=32)


def _mask_rcnn():
    backbone = nn.BackboneWithFPN(_body(), key=jr.key(0), channels=16)
    return models.mask_rcnn(backbone, 3, key=jr.key(0), hidden_size=32, hidden_channels=16)


def _keypoint_rcnn(num_keypoints=5):
    backbone = nn.BackboneWithFPN(_body(), key=jr.key(0), channels=16)
    return models.keypoint_rcnn(
        backbone, 3, key=jr.key(0), num_keypoints=num_keypoints, hidden_size=32, hidden_channels=16, depth=2
    )


def _second(build, **parts):
    """torchvision's second version: norms everywhere, two convolutions in the RPN."""
    backbone = nn.BackboneWithFPN(_body(), key=jr.key(0), channels=16, norm=nn.FrozenBatchNorm)
    head = partial(models.ConvBoxHead, hidden_channels=16)
    return build(backbone, 3, key=jr.key(0), hidden_size=32, rpn_depth=2, box_head=head, **parts)


def _faster_rcnn_v2():
    return _second(models.faster_rcnn)


def _mask_rcnn_v2():
    return _second(models.mask_rcnn, hidden_channels=16, mask_norm=nn.FrozenBatchNorm)


def _dense_backbone():
    top = nn.ConvolvedTop(64, 16, key=jr.key(0))
    return nn.BackboneWithFPN(_body(), key=jr.key(0), channels=16, finest=3, top=top)


def _retinanet(norm=None):
    return models.retinanet(_dense_backbone(), 3, key=jr.key(0), head_norm=norm)


def _fcos():
    return models.fcos(_dense_backbone(), 3, key=jr.key(0))


TWO_STAGE = {"faster_rcnn": _faster_rcnn, "mask_rcnn": _mask_rcnn, "keypoint_rcnn": _keypoint_rcnn}
DENSE = {"retinanet": _retinanet, "retinanet_v2": partial(_retinanet, nn.GroupNorm), "fcos": _fcos}
SECOND = {"faster_rcnn_v2": _faster_rcnn_v2, "mask_rcnn_v2": _mask_rcnn_v2}


def _mobilenet(build):
    """A Faster R-CNN on a narrow MobileNet."""
    backbone = nn.MobileNetFPN(build(key=jr.key(0), width_multiplier=0.25), key=jr.key(0), channels=16)
    return models.faster_rcnn(backbone, 3, key=jr.key(0), hidden_size=32)


def _ssd():
    extras = ((32, 2, 1), (16, 2, 1), (16, 2, 1), (16, 2, 1))
    backbone = nn.SSDVGG(nn.vgg16(key=jr.key(0), width=8), key=jr.key(0), fc_channels=32, extras=extras)
    return models.ssd(backbone, 3, key=jr.key(0))


def _ssdlite():
    body = nn.mobilenet_v3_large(key=jr.key(0), width_multiplier=0.25, reduced_tail=True)
    backbone = nn.SSDMobileNet(body, key=jr.key(0), extras=(32, 16, 16, 16))
    return models.ssdlite(backbone, 3, key=jr.key(0))


MOBILE = {
    "mobilenet_v2": partial(_mobilenet, nn.mobilenet_v2),
    "mobilenet_v3": partial(_mobilenet, nn.mobilenet_v3_large),
}
DETECTORS = TWO_STAGE | SECOND | DENSE
BUILDERS = {"resnet": _body} | DETECTORS | MOBILE | {"ssd": _ssd, "ssdlite": _ssdlite}


@cache
def _shapes(build):
    """The result of `build`, with shapes in place of arrays: nothing is computed."""
    return eqx.filter_eval_shape(build)


def _random(build, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), _shapes(build))


def _check_equal(ours, theirs):
    ours, theirs = named_leaves(ours), named_leaves(theirs)
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def test_round_trips(build):
    model, other = _random(build), _random(build, seed=1)
    arrays = to_torchvision(model)
    assert len(arrays) == len(named_leaves(model))
    loaded = load_torchvision(other, arrays)
    _check_equal(loaded, model)
    _check_equal(load_torchvision(_shapes(build), arrays), model)
    with pytest.raises(ValueError, match="is a shape without values"):
        to_torchvision(_shapes(build))
    again = to_torchvision(loaded)
    assert list(again) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_order_does_not_matter(build):
    model = _random(build)
    arrays = to_torchvision(model)
    _check_equal(load_torchvision(_random(build, seed=1), dict(reversed(arrays.items()))), model)


def test_arrays_are_copies():
    model = _random(_body)
    arrays = to_torchvision(model)
    loaded = load_torchvision(model, arrays)
    for array in arrays.values():
        array[...] = 0
    _check_equal(loaded, model)
    _check_equal(model, _random(_body))


STORED = json.loads((Path(__file__).parent / "data" / "torchvision_names.json").read_text(encoding="utf-8"))


def _names_and_shapes(name, num_classes):
    """Names and shapes of a detector's parameters, as torchvision names them."""
    shapes = eqx.filter_eval_shape(lambda: zoo.build(name, num_classes, key=jr.key(0)))
    arrays = to_torchvision(jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), shapes))  # one byte per number
    return {name: array.shape for name, array in arrays.items()}


@pytest.mark.parametrize("body", STORED["backbones"])
@pytest.mark.parametrize("head", ["faster_rcnn", "mask_rcnn"])
def test_real_names_and_shapes(head, body):
    """With torchvision's 91 outputs, every builder has the names and shapes of torchvision (make_reference.py)."""
    expected = _flat(STORED["backbones"][body], "backbone.") | _flat(STORED["heads"][head])
    assert _names_and_shapes(f"{head}_{body}_fpn", 90) == expected


def test_real_names_and_shapes_of_keypoint_rcnn():
    expected = _flat(STORED["backbones"]["resnet50"], "backbone.") | _flat(STORED["heads"]["keypoint_rcnn"])
    assert _names_and_shapes("keypoint_rcnn_resnet50_fpn", 1) == expected


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in ("second", "dense") for name in STORED[kind]])
def test_real_names_and_shapes_of_other_detectors(kind, name):
    body = _flat(STORED["backbones"]["resnet50"]["body"], "backbone.body.")
    assert _names_and_shapes(name, {"second": 90, "dense": 91}[kind]) == body | _flat(STORED[kind][name])


@pytest.mark.parametrize("name", STORED["whole"])
def test_real_names_and_shapes_of_detectors_with_a_body_of_their_own(name):
    assert _names_and_shapes(name, 90) == _flat(STORED["whole"][name])


def test_real_names_and_shapes_of_a_mobilenets_classifier():
    shapes = eqx.filter_eval_shape(lambda: nn.mobilenet_v2(key=jr.key(0)))
    arrays = to_torchvision(jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), shapes))
    ours = {name: array.shape for name, array in arrays.items()}
    theirs = _flat(STORED["mobilenet_v2"])
    classifier = {name: shape for name, shape in theirs.items() if name not in ours}
    assert ours.items() <= theirs.items()
    assert classifier == {"classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,)}


@pytest.mark.parametrize("build, title", [(nn.mobilenet_v2, "MobileNetV2"), (nn.mobilenet_v3_large, "MobileNetV3")])
def test_a_mobilenets_classifier_loads_into_detectors(build, title):
    body = partial(build, key=jr.key(0), width_multiplier=0.25)

    def detector():
        return models.faster_rcnn(nn.MobileNetFPN(body(), key=jr.key(1), channels=16), 3, key=jr.key(2), hidden_size=32)

    source, model = _random(body, seed=1), _random(detector)
    arrays = to_torchvision(source)
    assert arrays["features.0.0.weight"].shape == (8, 3, 3, 3)
    arrays |= {"classifier.1.weight": np.zeros((1000, 5), np.float32), "classifier.1.bias": np.full(1000, np.nan)}
    loaded = load_torchvision_backbone(model, arrays)
    _check_equal(loaded.backbone.body, source)
    names = to_torchvision(loaded)
    np.testing.assert_array_equal(names["backbone.body.0.0.weight"], arrays["features.0.0.weight"])
    message = f"seems to be a {title} ImageNet classifier with 1000 classes, but the model is a ResNet-18 of width 8."
    with pytest.raises(WeightsError, match=message):
        load_torchvision(_random(_body), arrays)
    with pytest.raises(WeightsError, match=f"seems to be a Faster R-CNN on a {title} with 4 outputs, but the model is"):
        load_torchvision(_random(_faster_rcnn), names)


def test_a_vggs_classifier_loads_into_ssd():
    """torchvision's file for SSD has a classifier with numbers that are not finite."""
    source = _random(partial(nn.vgg16, key=jr.key(0), width=8), seed=1)
    arrays = to_torchvision(source)
    assert arrays["features.28.weight"].shape == (64, 64, 3, 3)
    arrays |= {"classifier.6.weight": np.full((1000, 4), np.nan, np.float32)}
    loaded = load_torchvision_backbone(_random(_ssd), arrays)
    _check_equal(loaded.backbone.body, source)
    np.testing.assert_array_equal(to_torchvision(loaded)["backbone.extra.0.5.weight"], arrays["features.28.weight"])
    for build, body in ((_ssd, "VGG-16"), (_ssdlite, "MobileNetV3")):
        for names in (to_torchvision(_random(build)), named_leaves(_random(build))):
            assert describe(names) == f"a SSD on a {body}"


def _flat(tree, prefix=""):
    """Flattens a tree of names, whose leaves are shapes as text, to dotted names and shapes."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = tuple(int(side) for side in value.split("x"))
    return flat


def _first_name(name):
    """A parameter's name in the first checkpoints that torchvision published."""
    for block in ("inner_blocks", "layer_blocks"):
        for level in "0123":
            name = name.replace(f"{block}.{level}.0.", f"{block}.{level}.")
    name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    for layer in range(4):
        name = name.replace(f"mask_head.{layer}.0.", f"mask_head.mask_fcn{layer + 1}.")
    return name


@pytest.mark.parametrize("build", TWO_STAGE.values(), ids=TWO_STAGE)
def test_first_names(build):
    model = _random(build)
    arrays = {_first_name(name): array for name, array in to_torchvision(model).items()}
    assert {"rpn.head.conv.weight", "backbone.fpn.inner_blocks.0.weight", "backbone.fpn.layer_blocks.3.bias"} <= set(
        arrays
    )
    assert ("roi_heads.mask_head.mask_fcn1.weight" in arrays) == (build is _mask_rcnn)
    _check_equal(load_torchvision(_random(build, seed=1), arrays), model)


def test_first_names_of_dense_detectors():
    """RetinaNet's convolutions were in a list with ReLUs between; FCOS still has such names, for other layers."""
    model = _random(_retinanet)
    arrays = to_torchvision(model)
    first = {}
    for name, array in arrays.items():
        for layer in range(4):
            name = name.replace(f"_head.conv.{layer}.0.", f"_head.conv.{2 * layer}.")
        first[_first_name(name)] = array
    assert {f"head.regression_head.conv.{i}.weight" for i in (0, 2, 4, 6)} < set(first)
    assert list(read_torchvision(first, model)) == list(arrays) and list(read_torchvision(first)) == list(first)
    _check_equal(load_torchvision(_random(_retinanet, seed=1), first), model)
    fcos = _random(_fcos)
    arrays = {_first_name(name): array for name, array in to_torchvision(fcos).items()}
    assert {"head.regression_head.conv.6.weight", "backbone.fpn.inner_blocks.0.weight"} < set(arrays)
    _check_equal(load_torchvision(_random(_fcos, seed=1), arrays), fcos)


def test_counters_are_ignored(build):
    model = _random(build)
    arrays = to_torchvision(model)
    counters = {
        name.replace("running_var", "num_batches_tracked"): np.array(7) for name in arrays if "running_var" in name
    }
    assert counters or build is _ssd  # which has no norms
    _check_equal(load_torchvision(_random(build, seed=1), arrays | counters), model)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "model._orig_mod.", "model.module."])
def test_prefixes_of_wrappers_are_removed(build, prefix):
    model = _random(build)
    arrays = {f"{prefix}{name}": array for name, array in to_torchvision(model).items()}
    _check_equal(load_torchvision(_random(build, seed=1), arrays | {"n_averaged": np.array(3)}), model)


def test_a_prefix_that_some_names_lack_is_none():
    arrays = to_torchvision(_random(_body))
    first, *rest = arrays
    with pytest.raises(WeightsError, match=f"unused in the source: module.{first}"):
        load_torchvision(_random(_body), {f"module.{first}": arrays[first]} | {name: arrays[name] for name in rest})


def test_safetensors_of_either_names(build, tmp_path):
    model, path = _random(build), tmp_path / "model.safetensors"
    for content in (model, to_torchvision(model)):
        save_safetensors(content, path)
        _check_equal(load_torchvision(_random(build, seed=1), path), model)


@pytest.mark.parametrize("build", [_faster_rcnn, _mask_rcnn])
def test_safetensors_under_this_packages_first_names(build, tmp_path):
    """A Mask R-CNN used to contain a Faster R-CNN, and a region proposal network had one convolution."""
    model, path = _random(build), tmp_path / "model.safetensors"
    first = {}
    for name, leaf in named_leaves(model).items():
        name = name.replace("rpn.convs.0.", "rpn.conv.")
        first[name if build is not _mask_rcnn or name.startswith("mask_head.") else f"faster_rcnn.{name}"] = leaf
    save_safetensors(first, path)
    _check_equal(load_torchvision(_random(build, seed=1), path), model)
    _check_equal(load_safetensors(_random(build, seed=1), path), model)
    assert set(read_torchvision(path)) == set(first)


def _of(name):
    """Arrays with the names and shapes of a ResNet in the file of its published classifier."""
    body = eqx.filter_eval_shape(lambda: getattr(nn, name)(key=jr.key(0)))
    arrays = to_torchvision(jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), body))
    return arrays | {"fc.weight": np.zeros((1000, 1), np.float32), "fc.bias": np.zeros(1000, np.float32)}


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101", "resnet152"])
def test_another_resnet_is_named_in_the_first_line(name):
    body = eqx.filter_eval_shape(lambda: nn.resnet18(key=jr.key(0)))
    title = f"ResNet-{name.removeprefix('resnet')}"
    with pytest.raises(WeightsError) as caught:
        load_torchvision(body, _of(name))
    first, rest = str(caught.value).split("\n", 1)
    assert f"seems to be a {title} ImageNet classifier with 1000 classes, but the model is a ResNet-18." in first
    assert "does not fit the model" in rest and caught.value.unused


@pytest.mark.parametrize(
    "name, title",
    [
        ("resnext50_32x4d", "ResNeXt-50 32x4d"),
        ("resnext101_64x4d", "ResNeXt-101 64x4d"),
        ("wide_resnet101_2", "Wide ResNet-101-2"),
    ],
)
def test_other_blocks_are_named_in_the_first_line(name, title):
    body = eqx.filter_eval_shape(lambda: nn.resnet50(key=jr.key(0)))
    with pytest.raises(WeightsError, match=f"seems to be a {title} ImageNet classifier .* the model is a ResNet-50."):
        load_torchvision(body, _of(name))


def test_another_detector_is_named_in_the_first_line(tmp_path):
    boxes, masks = _random(_faster_rcnn), _random(_mask_rcnn)
    here, there = (f"a {kind} R-CNN on a ResNet-18 of width 8 with 4 outputs" for kind in ("Faster", "Mask"))
    with pytest.raises(WeightsError, match=f"seems to be {there}, but the model is {here}."):
        load_torchvision(boxes, to_torchvision(masks))
    with pytest.raises(WeightsError, match=r"seems to be .* with 4 outputs, but the model is .* with 6 outputs"):
        load_torchvision(_shapes(partial(_faster_rcnn, num_classes=5)), to_torchvision(boxes))
    with pytest.raises(WeightsError, match=f"seems to be {here}, but the model is a ResNet-18 of width 8."):
        load_torchvision(_random(_body), to_torchvision(boxes))
    grouped = eqx.filter_eval_shape(lambda: nn.resnet18(key=jr.key(0), width=8, norm=nn.GroupNorm))
    with pytest.raises(WeightsError, match="but the model is a ResNet-18 of width 8 with GroupNorm"):
        load_torchvision(grouped, to_torchvision(_random(_body)))
    for build, kind in ((_retinanet, "RetinaNet"), (_fcos, "FCOS")):
        dense = to_torchvision(_random(build))
        with pytest.raises(WeightsError, match=f"seems to be a {kind} on a ResNet-18 of width 8 with 3 outputs, but"):
            load_torchvision(boxes, dense)
        save_safetensors(_random(build), tmp_path / "dense.safetensors")
        with pytest.raises(WeightsError, match=f"seems to be a {kind} on a ResNet-18 of width 8 with 3 outputs, but"):
            load_safetensors(boxes, tmp_path / "dense.safetensors")
    save_safetensors(masks, tmp_path / "mask.safetensors")
    with pytest.raises(WeightsError, match=f"^.*mask.safetensors seems to be {there}, but the model is {here}."):
        load_safetensors(boxes, tmp_path / "mask.safetensors")


def test_other_dtypes_are_cast():
    model = _random(_body)
    arrays = {name: array.astype(np.float64) for name, array in to_torchvision(model).items()}
    _check_equal(load_torchvision(_random(_body, seed=1), arrays), model)


def test_misfits_are_listed(build):
    model = _random(build)
    arrays = to_torchvision(model)
    names = list(arrays)
    first, last = names[0], names[-1]
    del arrays[first]
    arrays[last] = np.append(arrays[last], 0)
    arrays["somewhere.else"] = np.zeros(1, np.float32)
    with pytest.raises(WeightsError) as caught:
        load_torchvision(model, arrays)
    error, message = caught.value, str(caught.value)
    leaves = list(named_leaves(model))
    assert error.missing == (leaves[0],)
    assert error.unused == ("somewhere.else",)
    assert len(error.mismatched) == 1 and leaves[-1] in error.mismatched[0]
    assert all(entry in message for entry in (*error.missing, *error.unused, *error.mismatched))
    shape = named_leaves(model)[leaves[-1]].shape
    assert str(shape) in message and str((int(np.prod(shape)) + 1,)) in message


def test_other_number_of_classes():
    """Weights for another number of classes do not fit: the four arrays of the box predictor are listed."""
    arrays = to_torchvision(_random(_faster_rcnn))
    other = _random(partial(_faster_rcnn, num_classes=5))
    with pytest.raises(WeightsError) as caught:
        load_torchvision(other, arrays)
    assert not caught.value.missing and not caught.value.unused
    assert len(caught.value.mismatched) == 4
    assert all("class_logits" in line or "box_deltas" in line for line in caught.value.mismatched)


CLASSIFIER = {"fc.weight": np.zeros((10, 64), np.float32), "fc.bias": np.zeros(10, np.float32)}


def test_classifier_of_a_backbone():
    body = _random(_body)
    _check_equal(load_torchvision(_random(_body, seed=1), to_torchvision(body) | CLASSIFIER), body)


@pytest.mark.parametrize("build", DETECTORS.values(), ids=DETECTORS)
def test_load_torchvision_backbone(build):
    body, model = _random(_body, seed=1), _random(build)
    loaded = load_torchvision_backbone(model, to_torchvision(body) | CLASSIFIER)
    _check_equal(loaded.backbone.body, body)
    before, after = named_leaves(model), named_leaves(loaded)
    others = [name for name in before if ".body." not in name]
    assert len(others) > 10
    for name in others:
        np.testing.assert_array_equal(after[name], before[name])


def test_classifier_layer_is_for_backbones_only():
    """In a detector's file, an `fc` layer is unknown and is not ignored."""
    model = _random(_faster_rcnn)
    with pytest.raises(WeightsError) as caught:
        load_torchvision(model, to_torchvision(model) | CLASSIFIER)
    assert set(caught.value.unused) == set(CLASSIFIER)


def test_backbone_of_a_detectors_file():
    """A detector's file is not a classifier's: every parameter is missing, and the message says so."""
    arrays = to_torchvision(_random(_faster_rcnn))
    with pytest.raises(WeightsError, match="missing in the source") as caught:
        load_torchvision(_random(_body), arrays)
    assert len(caught.value.missing) == len(named_leaves(_random(_body)))
    assert len(caught.value.unused) == len(arrays)
