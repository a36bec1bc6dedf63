"""Deformable attention against torch's `grid_sample`, forward and backward: inside maps, at borders and outside."""

import pytest


torch = pytest.importorskip(
    "torch", reason="torch is not installed; `make parity` runs this in an environment of its own"
)

import jax
import jax.numpy as jnp
import numpy as np

from detectax_eqx import ops


CASES = 1000


def by_torch(value, locations, weights):
    """Deformable DETR's formula for one example."""
    total = torch.zeros(())
    for level, x in enumerate(value):  # (a, d, h, w)
        grid = 2 * locations[:, :, level].permute(1, 0, 2, 3) - 1  # (a, q, p, 2)
        sampled = torch.nn.functional.grid_sample(x, grid, align_corners=False)  # (a, d, q, p)
        total = total + (sampled * weights[:, :, level].permute(1, 0, 2)[:, None]).sum(-1)
    return total.permute(2, 0, 1)


@jax.jit
def value_and_gradients(value, locations, weights, cotangent):
    result, backward = jax.vjp(ops.deformable_attention, value, locations, weights)
    return result, backward(cotangent)


@pytest.mark.timeout(600)
def test_deformable_attention():
    rng, worst = np.random.default_rng(0), np.zeros(2)
    for case in range(CASES):
        sizes = ((4, 5), (2, 3), (1, 1)) if case % 2 else ((6, 6),)
        value = [rng.normal(size=(2, 3, *size)).astype(np.float32) for size in sizes]
        locations = rng.uniform(-0.3, 1.3, (7, 2, len(sizes), 4, 2)).astype(np.float32)
        if case % 3 == 0:  # corners, edges, centres and far outside
            locations[rng.random(locations.shape) < 0.2] = rng.choice([0, 1, 0.5, -1, 2])
        weights = rng.uniform(size=locations.shape[:-1]).astype(np.float32)
        cotangent = rng.normal(size=(7, 2, 3)).astype(np.float32)
        tensors = [torch.tensor(x, requires_grad=True) for x in (*value, locations, weights)]
        expected = by_torch(tensors[:-2], *tensors[-2:])
        gradients = torch.autograd.grad(expected, tensors, torch.tensor(cotangent))
        found, own = value_and_gradients([jnp.asarray(x) for x in value], locations, weights, cotangent)
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-5)
        for a, b in zip(jax.tree.leaves(own), gradients, strict=True):
            np.testing.assert_allclose(a, b.numpy(), atol=1e-5, rtol=1e-5)
            worst[1] = max(worst[1], np.abs(np.asarray(a) - b.numpy()).max())
        worst[0] = max(worst[0], np.abs(np.asarray(found) - expected.detach().numpy()).max())
    print(f"deformable attention, {CASES} cases: largest differences {worst[0]:.1e}, of gradients {worst[1]:.1e}")
