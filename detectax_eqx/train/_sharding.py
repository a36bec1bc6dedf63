"""Data parallelism over a mesh of devices, with the state replicated or sharded."""

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


# Examples are sharded over both axes, parameters over `model` only.
AXES = ("data", "model")


def make_mesh(devices: Sequence[Any] | None = None, *, model: int = 1) -> Mesh:
    """A mesh with the axes `data` and `model` over `devices` (default: all devices of all processes).

    - `model`: the number of devices that share one copy of the parameters and the optimiser's state, each holding a
      shard. With 1, every device has a full copy. With the number of all devices, there is a single copy (fully
      sharded, arXiv:1910.02054, stage 3). With a number between, each group of `model` neighbouring devices has a copy.

    A batch is sharded over both axes, so that no two devices compute the same examples.

    Raises a `ValueError` if `model` does not divide the number of devices.

    >>> dict(make_mesh(jax.devices()[:1]).shape)
    {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if model < 1 or not devices or len(devices) % model:
        raise ValueError(f"model must divide the number of devices, {len(devices)}, got {model}.")
    shape = (len(devices) // model, model)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Shards the first axis of every array of `batch` equally over the devices of the mesh.

    A step made for the mesh computes the same as a step on one device, up to the order of summation. With several
    processes, `batch` holds this process's rows of the global batch, `local_rows(mesh, batch_size)`.

    Raises a `ValueError` if the first axis is not a multiple of the number of this process's devices.

    >>> shard_batch(np.zeros((4, 3)), make_mesh(jax.devices()[:1])).shape
    (4, 3)
    """
    local = len(mesh.local_devices)
    sharding = NamedSharding(mesh, PartitionSpec(AXES))

    def put(path: tuple, leaf: Any) -> Any:
        if not _is_array(leaf):
            return leaf
        if leaf.ndim == 0 or leaf.shape[0] % local:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has shape {leaf.shape}; its first axis must be a multiple of the "
                f"{local} devices of the mesh."
            )
        total, each = leaf.shape[0] // local * mesh.size, leaf.shape[0] // local
        rows = local_rows(mesh, total).tolist()

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start = rows.index(index[0].start or 0)
            return leaf[start : start + each]

        return jax.make_array_from_callback((total, *leaf.shape[1:]), sharding, part)

    return jax.tree_util.tree_map_with_path(put, batch)


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " b"]:
    """The rows of the global batch that belong to this process's devices, in ascending order.

    Raises a `ValueError` if `batch_size` is not a multiple of the number of devices.

    >>> local_rows(make_mesh(jax.devices()[:1]), 4).tolist()
    [0, 1, 2, 3]
    """
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(f"batch_size must be a multiple of the {mesh.size} devices of the mesh, got {batch_size}.")
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[part] for part in parts if part is not None]))


def shard_state(state: PyTree, mesh: Mesh) -> PyTree:
    """Shards or replicates every array of `state`, for example of a `TrainState`, over the mesh.

    Each array is sharded over `model` along its longest axis that divides evenly (the first, if several are equally
    long), or replicated if none does. It is replicated over `data`. With several processes, each passes the whole
    state.

    >>> shard_state(jnp.zeros(3), make_mesh(jax.devices()[:1])).sharding.is_fully_replicated
    True
    """

    def put(leaf: Any) -> Any:
        if not _is_array(leaf):
            return leaf
        sharding = NamedSharding(mesh, state_spec(leaf.shape, mesh))
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        data = np.asarray(jr.key_data(leaf) if _is_key(leaf) else leaf)
        whole = jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])
        return jr.wrap_key_data(whole, impl=jr.key_impl(leaf)) if _is_key(leaf) else whole

    return jax.tree.map(put, state)


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


def state_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition spec that `shard_state` uses for an array of this shape."""
    size = mesh.shape["model"]
    axes = [axis for axis, length in enumerate(shape) if size > 1 and length and length % size == 0]
    if not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * longest, "model")


def gather_pieces(tree: PyTree, specs: PyTree) -> PyTree:
    """Gathers whole arrays from their shards, within `shard_map`. `specs` holds their partition specs."""

    def gather(piece: jax.Array, spec: PartitionSpec) -> jax.Array:
        return lax.all_gather(piece, "model", axis=len(spec) - 1, tiled=True) if len(spec) else piece

    return jax.tree.map(gather, tree, specs)


def sum_to_pieces(tree: PyTree, specs: PyTree) -> PyTree:
    """Sums whole arrays over all devices, within `shard_map`. Each device keeps only its shard of the sum."""
    # Across CPU processes, reduce-scatter sometimes returns wrong sums (jax 0.10.2, jax-ml/jax#40830).
    unreliable = jax.default_backend() == "cpu" and jax.process_count() > 1

    def reduce(whole: jax.Array, spec: PartitionSpec) -> jax.Array:
        if not len(spec):
            return lax.psum(whole, AXES)
        axis = len(spec) - 1
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
