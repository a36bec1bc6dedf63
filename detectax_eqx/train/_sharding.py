"""Data parallelism over a mesh of devices, with the state replicated, sharded or cut by tensor parallelism."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree, Shaped


# Examples are sharded over these axes, parameters over `model` and `tensor`.
AXES = ("data", "model")


def make_mesh(devices: Sequence[Any] | None = None, *, model: int = 1, tensor: int = 1) -> Mesh:
    """A mesh with the axes `data`, `model` and `tensor` over `devices` (default: all devices of all processes).

    - `model`: the number of devices that share one copy of the parameters and the optimiser's state, each holding a
      shard. With 1, every device has a full copy. With the number of all devices, there is a single copy (fully
      sharded, arXiv:1910.02054, stage 3). With a number between, each group of `model` neighbouring devices has a copy.
    - `tensor`: the number of neighbouring devices that compute the same examples together (tensor parallelism,
      arXiv:1909.08053). The heads of attention and the hidden values of MLPs are cut over them, where their numbers
      divide evenly; all else is computed on each of them.

    A batch is sharded over `data` and `model`.

    Raises a `ValueError` if `model` or `tensor` or their product does not divide the number of devices.

    >>> dict(make_mesh(jax.devices()[:1]).shape)
    {'data': 1, 'model': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    for name, count in (("model", model), ("tensor", tensor), ("model * tensor", model * tensor)):
        if count < 1 or not devices or len(devices) % count:
            raise ValueError(f"{name} must divide the number of devices, {len(devices)}, got {count}.")
    shape = (len(devices) // (model * tensor), model, tensor)
    return jax.make_mesh(shape, (*AXES, "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def num_parts(mesh: Mesh) -> int:
    """The number of parts into which a batch is sharded: one for each group of `tensor` devices.

    >>> num_parts(make_mesh(jax.devices()[:1]))
    1
    """
    return mesh.size // mesh.shape["tensor"]


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Shards the first axis of every array of `batch` equally over the mesh, in `num_parts(mesh)` parts.

    A step made for the mesh computes the same as a step on one device, up to the order of summation. With several
    processes, `batch` holds this process's rows of the global batch, `local_rows(mesh, batch_size)`.

    Raises a `ValueError` if the first axis is not a multiple of the number of this process's parts.

    >>> shard_batch(np.zeros((4, 3)), make_mesh(jax.devices()[:1])).shape
    (4, 3)
    """
    groups = mesh.devices.reshape(num_parts(mesh), -1)
    local = sum(any(device in mesh.local_devices for device in group) for group in groups)
    sharding = NamedSharding(mesh, PartitionSpec(AXES))

    def put(path: tuple, leaf: Any) -> Any:
        if not _is_array(leaf):
            return leaf
        if leaf.ndim == 0 or leaf.shape[0] % local:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has shape {leaf.shape}; its first axis must be a multiple of the "
                f"{local} parts of a batch on the devices of the mesh."
            )
        total, each = leaf.shape[0] // local * num_parts(mesh), leaf.shape[0] // local
        rows = local_rows(mesh, total).tolist()

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start = rows.index(index[0].start or 0)
            return leaf[start : start + each]

        return jax.make_array_from_callback((total, *leaf.shape[1:]), sharding, part)

    return jax.tree_util.tree_map_with_path(put, batch)


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " b"]:
    """The rows of the global batch that belong to this process's devices, in ascending order.

    Raises a `ValueError` if `batch_size` is not a multiple of the number of parts, `num_parts(mesh)`.

    >>> local_rows(make_mesh(jax.devices()[:1]), 4).tolist()
    [0, 1, 2, 3]
    """
    parts = num_parts(mesh)
    if batch_size < 1 or batch_size % parts:
        raise ValueError(f"batch_size must be a multiple of the {parts} parts that the mesh takes, got {batch_size}.")
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    rows = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in rows if part is not None]))


def shard_state(state: PyTree, mesh: Mesh) -> PyTree:
    """Shards or replicates every array of `state`, for example of a `TrainState`, over the mesh.

    An array is cut over `tensor` along the axis, if any, that the module holding it names in `tensor_axes`. It is
    sharded over `model` along its longest other axis that divides evenly (the first, if several are equally long). It
    is replicated over all other axes of the mesh. With several processes, each passes the whole state.

    >>> shard_state(jnp.zeros(3), make_mesh(jax.devices()[:1])).sharding.is_fully_replicated
    True
    """

    def put(leaf: Any, sharding: Any) -> Any:
        if not _is_array(leaf):
            return leaf
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        data = np.asarray(jr.key_data(leaf) if _is_key(leaf) else leaf)
        whole = jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])
        return jr.wrap_key_data(whole, impl=jr.key_impl(leaf)) if _is_key(leaf) else whole

    return jax.tree.map(put, state, state_shardings(state, mesh))


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """The shardings that `shard_state` gives to the arrays of a state. The state may consist of shapes.

    >>> state_shardings(jax.ShapeDtypeStruct((3,), "float32"), make_mesh(jax.devices()[:1])).spec == PartitionSpec()
    True
    """
    specs = state_specs(state, mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec) if isinstance(spec, PartitionSpec) else spec, specs)


def to_host(tree: PyTree) -> PyTree:
    """A copy of `tree` with whole NumPy arrays, gathered from all shards. Typed keys remain typed keys.

    With several processes, all of them must call it together, and each gets the whole arrays.

    >>> type(to_host(jnp.zeros(3))).__name__
    'ndarray'
    """

    def fetch(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if _is_key(leaf):
            return jr.wrap_key_data(jnp.asarray(host_copy(jr.key_data(leaf))), impl=jr.key_impl(leaf))
        return host_copy(leaf)

    return jax.tree.map(fetch, tree)


def host_copy(array: jax.Array | np.ndarray) -> Shaped[np.ndarray, "..."]:
    """Copies a whole array to the host.

    The result is never a view: on a CPU, a view would share memory that the next step overwrites.
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.array(array, order="C", copy=True)


def state_specs(tree: PyTree, mesh: Mesh) -> PyTree:
    """The partition specs that `shard_state` uses for the arrays of a tree; other leaves stay."""
    count = mesh.shape["tensor"]

    def is_cut(node: object) -> bool:
        return count > 1 and hasattr(type(node), "tensor_axes")

    def of(node: Any) -> PyTree:
        axes = node.tensor_axes(count) if is_cut(node) else {}

        def spec(path: tuple, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return _spec(leaf.shape, mesh, axes.get(name)) if hasattr(leaf, "shape") else leaf

        return jax.tree_util.tree_map_with_path(spec, node)

    return jax.tree.map(of, tree, is_leaf=is_cut)


def _spec(shape: tuple[int, ...], mesh: Mesh, cut: int | None) -> PartitionSpec:
    names: list[str | None] = [None] * len(shape)
    if cut is not None:
        names[cut] = "tensor"
    size = mesh.shape["model"]
    axes = [axis for axis, length in enumerate(shape) if size > 1 and axis != cut and length and length % size == 0]
    if axes:
        names[max(axes, key=lambda axis: shape[axis])] = "model"
    while names and names[-1] is None:
        names.pop()
    return PartitionSpec(*names)


def gather_pieces(tree: PyTree, specs: PyTree) -> PyTree:
    """Gathers from their shards, within `shard_map`, whole arrays or the device's pieces of those cut over `tensor`.

    `specs` holds their partition specs.
    """

    def gather(piece: jax.Array, spec: PartitionSpec) -> jax.Array:
        return lax.all_gather(piece, "model", axis=spec.index("model"), tiled=True) if "model" in spec else piece

    return jax.tree.map(gather, tree, specs)


def sum_over_parts(tree: PyTree) -> PyTree:
    """Sums over all parts of the batch, within `shard_map`."""
    axes = tuple(axis for axis in AXES if lax.axis_size(axis) > 1)
    return lax.psum(tree, axes) if axes else tree


def sum_to_pieces(tree: PyTree, specs: PyTree) -> PyTree:
    """Sums arrays over all parts of the batch, within `shard_map`. Each device keeps only its shard of the sum."""
    # Across CPU processes, reduce-scatter sometimes returns wrong sums (jax 0.10.2, jax-ml/jax#40830).
    unreliable = jax.default_backend() == "cpu" and jax.process_count() > 1

    def reduce(whole: jax.Array, spec: PartitionSpec) -> jax.Array:
        if "model" not in spec:
            return sum_over_parts(whole)
        axis = spec.index("model")
        if unreliable:
            length = whole.shape[axis] // lax.axis_size("model")
            return lax.dynamic_slice_in_dim(lax.psum(whole, AXES), lax.axis_index("model") * length, length, axis)
        piece = lax.psum_scatter(whole, "model", scatter_dimension=axis, tiled=True)
        return lax.psum(piece, "data") if lax.axis_size("data") > 1 else piece

    return jax.tree.map(reduce, tree, specs)


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
