"""One step on many devices: the batch is cut along its first axis, all else is on every device."""

import equinox as eqx
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


def make_mesh(num_devices: int | None = None) -> Mesh:
    """A mesh of one axis, `data`, over the first `num_devices` devices (default all).

    Raises a `ValueError` if there are fewer.

    >>> make_mesh(1).axis_names
    ('data',)
    """
    devices = jax.devices()
    num_devices = len(devices) if num_devices is None else num_devices
    if not 1 <= num_devices <= len(devices):
        raise ValueError(f"num_devices must be in 1..{len(devices)}, the devices there are, got {num_devices}.")
    return jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:num_devices])


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Lays every array of `batch` on the mesh, an equal part of its first axis on each device.

    A step on such a batch, and on a state from `replicate`, computes what it computes on one device, up to the order
    in which sums are made.

    Raises a `ValueError` if the first axis is not a multiple of the number of devices.

    >>> import numpy as np
    >>> shard_batch(np.zeros((4, 3)), make_mesh(1)).shape
    (4, 3)
    """
    size = mesh.shape["data"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if eqx.is_array(leaf) and (leaf.ndim == 0 or leaf.shape[0] % size):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has shape {leaf.shape}; its first axis must be a multiple of the "
                f"{size} devices of the mesh."
            )
    return _put(batch, NamedSharding(mesh, PartitionSpec("data")))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Lays every array of `tree`, a `TrainState` for instance, on every device of the mesh.

    >>> import jax.numpy as jnp
    >>> replicate(jnp.zeros(3), make_mesh(1)).sharding.is_fully_replicated
    True
    """
    return _put(tree, NamedSharding(mesh, PartitionSpec()))


def _put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, sharding), rest)
