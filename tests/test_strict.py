"""Every public function that runs JAX, under each of JAX's strict modes, jitted and eager, and on several devices.

Dtype and rank promotion are strict in all tests (conftest.py). In this file, `jax_debug_nans` is on as well; results
and gradients under `jax_enable_x64` equal those without it, with float32 outputs for float32 inputs; and
`jax.shard_map` checks how values vary over the mesh, as it does by default.
"""

from functools import cache
from types import FunctionType

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from detectax_eqx import Targets, evaluate, models, nn, ops, train, zoo

from . import tiny_detector
from .misuse_cases import KEY, OPS, OTHERS, call, f32
from .zoo_names import NAMES


SIDE = tiny_detector.SIDE
CANVAS = {"canvas": (SIDE, SIDE), "min_sizes": [32, 48], "max_size": SIDE}
PACKAGES = ("detectax_eqx.ops", "detectax_eqx.nn", "detectax_eqx.models", "detectax_eqx.train")
CALLS = [
    *(one for one in OPS + OTHERS if one.function.__module__.startswith(PACKAGES)),
    call(nn.relu, f32(2, 3)),
    call(nn.relu6, f32(2, 3)),
    call(nn.hard_sigmoid, f32(2, 3)),
    call(nn.hard_swish, f32(2, 3)),
    call(nn.max_pool2d, f32(2, 7, 5), kernel_size=2, stride=2, round_up=True),
    call(ops.nms, f32(3, 4), f32(3), iou_threshold=0.5),
    call(ops.nms_indices, f32(9, 4), f32(9), iou_threshold=0.5, max_outputs=2),  # greedy selection
    call(ops.roi_align, f32(2, 8, 9), f32(3, 4), output_size=2, spatial_scale=0.25, sampling_ratio=0),
    call(nn.conv2d, f32(32, 6, 6), f32(32, 32, 3, 3), padding=1),  # Winograd's algorithm
    next(one for one in OTHERS if one.function is train.augment)._replace(
        options=CANVAS | {"scale_range": (0.5, 2.0), "key": KEY}
    ),
    call(train.warmup_cosine(0.1, total_steps=9, warmup_steps=2), jnp.int32(5)),
    call(train.warmup_multistep(0.1, milestones=[4], warmup_steps=0), jnp.int32(5)),
]
# These take a detector, and have tests of their own below.
WITH_DETECTOR = {
    "detect",
    "detect_batch",
    "extract",
    "roi_features",
    "dense_detections",
    "make_train_step",
    "init_train_state",
}
WITH_DETECTOR |= {"sgd", "adamw", "shard_batch", "shard_state", "warmup_cosine", "warmup_multistep"}
# These compute nothing on a device: files, options, structure, and building a model, which
# `test_detectors_are_built_under_x64` covers.
HOST = {
    *{"convolution_options", "decayed", "in_backbone", "layer_rates", "num_parameters", "trainable", "no_vectors"},
    *{name for name in dir(nn) if name.startswith(("resne", "wide_resnet", "mobilenet", "vgg", "vit_", "swin_"))},
    *{"faster_rcnn_detectron2", "mask_rcnn_detectron2", "keypoint_rcnn_detectron2", "retinanet_detectron2"},
    *{"selected", "smallest_canvas"},
    *{"faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos", "ssd", "ssdlite", "rf_detr", "rf_detr_seg"},
    *{"detr", "deformable_detr"},
    "xavier_linear",
    *{"latest_checkpoint", "load_checkpoint", "load_latest_checkpoint", "save_checkpoint", "lock_folder", "to_host"},
    "remove_unfinished",
    *{"scale_learning_rate", "local_rows", "make_mesh", "num_parts", "state_shardings", "step_compiler_options"},
    *{name for name, value in vars(evaluate).items() if isinstance(value, FunctionType)},  # NumPy alone
}


def _is_array(value):
    return isinstance(value, np.ndarray | jax.Array)


def _is_float32(value):
    return _is_array(value) and value.dtype == np.float32


def _drawn(tree, seed):
    """The tree with random values in its arrays: boxes with an extent, scores and maps in 0..1, flags."""
    draw = np.random.default_rng(seed)

    def fill(leaf):
        if not _is_array(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        if leaf.dtype == bool:
            return jnp.asarray(draw.uniform(size=leaf.shape) < 0.7)
        if leaf.dtype == np.uint8:
            return jnp.asarray(draw.integers(0, 256, leaf.shape, np.uint8))
        if leaf.dtype != np.float32:
            return jnp.asarray(leaf)  # sizes and indices: other values may be out of range
        if leaf.ndim == 2 and leaf.shape[1] == 4:
            corner = draw.uniform(0, 4, (len(leaf), 2))
            return jnp.asarray(np.concatenate([corner, corner + draw.uniform(1, 6, corner.shape)], 1), jnp.float32)
        return jnp.asarray(draw.uniform(0.1, 1, leaf.shape), jnp.float32)

    return jax.tree.map(fill, tree)


def _with_gradient(one):
    """`arrays -> (result, gradient of the sum of its floats)` for a call, and two examples of its arrays."""
    _, static = eqx.partition((one.arguments, one.options), _is_array)

    def run(arrays):
        floats, rest = eqx.partition(arrays, _is_float32)

        def total(floats):
            arguments, options = eqx.combine(floats, rest, static)
            result = eqx.filter(one.function(*arguments, **options), _is_array)
            inexact = [x for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.inexact)]
            return sum((x.astype(jnp.float32).sum() for x in inexact), jnp.zeros((), jnp.float32)), result

        (_, result), gradient = jax.value_and_grad(total, has_aux=True)(floats)
        return result, gradient

    return run, [eqx.filter(_drawn((one.arguments, one.options), seed), _is_array) for seed in range(2)]


def _id(one):
    return getattr(one.function, "__name__", "call")


@cache
def _reference(index):
    run, examples = _with_gradient(CALLS[index])
    with jax.debug_nans(True):
        return [jax.tree.map(np.asarray, jax.jit(run)(arrays)) for arrays in examples]


def _check_same(found, wanted):
    """Checks that structure, dtypes and values are the same."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        name = jax.tree_util.keystr(path)
        assert one.dtype == two.dtype, name
        if one.dtype != jnp.bfloat16:
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5, err_msg=name)


EVERY_CALL = pytest.mark.parametrize("index", [pytest.param(i, id=f"{_id(one)}-{i}") for i, one in enumerate(CALLS)])


def test_every_public_function_is_in_a_table():
    public = {
        name
        for module in (ops, nn, models, train, evaluate)
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and not name.startswith("_")
    }
    assert public - {_id(one) for one in CALLS} == WITH_DETECTOR | HOST


@EVERY_CALL
def test_traces_under_x64(index):
    """Dtypes are the same as without x64; a promotion is an error."""
    run, examples = _with_gradient(CALLS[index])
    wanted = jax.eval_shape(run, examples[0])
    with jax.enable_x64(True):
        found = jax.eval_shape(run, examples[0])
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, wanted)


@EVERY_CALL
@pytest.mark.long
def test_x64(index):
    run, examples = _with_gradient(CALLS[index])
    wanted = _reference(index)[0]
    with jax.enable_x64(True), jax.debug_nans(True):
        _check_same(jax.jit(run)(examples[0]), wanted)


@EVERY_CALL
@pytest.mark.long
@pytest.mark.parametrize("x64", [False, True])
def test_eager(index, x64):
    run, examples = _with_gradient(CALLS[index])
    with jax.enable_x64(x64), jax.debug_nans(True):
        _check_same(run(examples[0]), _reference(index)[0])


def _mesh():
    return jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])


SHARDED, WHOLE = PartitionSpec("batch"), PartitionSpec()


NO_RULE = "JAX has no rule for a convolution in groups under shard_map where only one operand has a batch"


def _marks(one):
    grouped = one.options.get("groups", 1) > 1
    return [pytest.mark.xfail(raises=NotImplementedError, reason=NO_RULE)] if grouped else []


@pytest.mark.parametrize(
    "index", [pytest.param(i, id=f"{_id(one)}-{i}", marks=_marks(one)) for i, one in enumerate(CALLS)]
)
@pytest.mark.long
def test_checked_shard_map(index):
    """One example on each of two devices."""
    run, examples = _with_gradient(CALLS[index])
    if not jax.tree.leaves(examples[0]):
        pytest.skip("takes no array")
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *examples)
    found = jax.jit(jax.shard_map(jax.vmap(run), mesh=_mesh(), in_specs=SHARDED, out_specs=SHARDED))(batch)
    _check_same(found, jax.tree.map(lambda *leaves: np.stack(leaves), *_reference(index)))


@EVERY_CALL
def test_checked_shard_map_of_one_argument(index):
    """One array varies over the devices, the others do not; only traced, since the check happens at trace time."""
    run, examples = _with_gradient(CALLS[index])
    leaves, structure = jax.tree.flatten(examples[0])
    for position, leaf in enumerate(leaves):

        def one_of_two(stack, position=position):
            return jax.tree.map(
                lambda x: x[None], run(structure.unflatten([*leaves[:position], stack[0], *leaves[position + 1 :]]))
            )

        mapped = jax.shard_map(one_of_two, mesh=_mesh(), in_specs=SHARDED, out_specs=SHARDED)
        jax.eval_shape(mapped, jnp.stack([leaf, leaf]))


IMAGE = jnp.asarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
TARGETS = Targets(
    jnp.asarray([[4.0, 4, 40, 40], [8, 20, 30, 60]], jnp.float32),
    jnp.asarray([0, 2], jnp.int32),
    jnp.asarray([True, True]),
    jnp.ones((2, 14, 14), jnp.float32),
    jnp.asarray([[4.0, 4, 40, 40], [8, 20, 30, 60]], jnp.float32),
    jnp.asarray([[[9.0, 9, 2], [30, 20, 1]], [[10, 30, 0], [20, 50, 2]]], jnp.float32),
)


def _detect(model, image):
    return models.detect(model, image, max_detections=5)


def _loss(model, image):
    losses = model.loss(image, jnp.full(2, SIDE, jnp.int32), TARGETS, key=KEY)
    return sum(x.total for x in losses.values())


FUNCTIONS = pytest.mark.parametrize("function", [_detect, eqx.filter_grad(_loss)], ids=["detect", "loss"])
DETECTORS = pytest.mark.parametrize(
    "detector",
    [tiny_detector.mask_rcnn, tiny_detector.keypoint_rcnn, tiny_detector.retinanet, tiny_detector.fcos],
    ids=lambda f: f.__name__,
)


@pytest.mark.parametrize("name", NAMES)
def test_detectors_are_built_under_x64(name):
    with jax.enable_x64(True):
        model = eqx.filter_eval_shape(zoo.build, name, 3, key=KEY)
    leaves = jax.tree.leaves(model)
    assert {str(leaf.dtype) for leaf in leaves if isinstance(leaf, jax.ShapeDtypeStruct)} == {"float64"}


@DETECTORS
@FUNCTIONS
def test_detector_traces_under_x64(detector, function):
    model = tiny_detector.build(detector)
    wanted = eqx.filter_eval_shape(function, model, IMAGE)
    with jax.enable_x64(True):
        found = eqx.filter_eval_shape(function, model, IMAGE)
        # A model that is built under x64 has float64 parameters.
        wide = eqx.filter_eval_shape(
            lambda: jax.tree.map(lambda x: x.astype(jnp.float64), eqx.filter(model, eqx.is_array))
        )
        eqx.filter_eval_shape(
            lambda wide: function(eqx.combine(wide, eqx.filter(model, eqx.is_array, inverse=True)), IMAGE), wide
        )
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(wanted)]


@DETECTORS
@FUNCTIONS
def test_detector_in_a_checked_shard_map(detector, function):
    """Parameters are on every device; each device has its own image."""
    arrays, static = eqx.partition(tiny_detector.build(detector), eqx.is_array)

    def one(arrays, images):
        result = function(eqx.combine(arrays, static), images[0])
        return jax.tree.map(lambda x: x[None], eqx.filter(result, eqx.is_array))

    spec = SHARDED if function is _detect else WHOLE  # gradients of parameters are summed
    mapped = jax.shard_map(one, mesh=_mesh(), in_specs=(WHOLE, SHARDED), out_specs=spec)
    jax.eval_shape(mapped, arrays, np.stack([IMAGE, IMAGE]))
