"""`map_chunks`: computing only the first rows, one chunk at a time."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from detectax_eqx._xla import map_chunks


@pytest.mark.parametrize("count", [0, 1, 4, 5, 11])
def test_rows_of_chunks_that_are_computed(getkey, count):
    x, y = jr.normal(getkey(), (11, 3)), jr.normal(getkey(), (11,))
    out = map_chunks(lambda x, y: x * y[:, None], (x, y), jnp.array(count), chunk_size=4)
    computed = min(11, -(-count // 4) * 4)
    np.testing.assert_allclose(out[:computed], (x * y[:, None])[:computed])
    assert (out[computed:] == 0).all()


@pytest.mark.parametrize("count", [3, 6, 10])
@pytest.mark.parametrize("kept", [0, 1, 2, 9])
def test_gradients_reach_what_the_function_closes_over(getkey, count, kept):
    x, weight = jr.normal(getkey(), (10, 3)), jr.normal(getkey(), (3, 2))

    def total(x, weight, chunked):
        if chunked:
            y = map_chunks(lambda x: jnp.tanh(x @ weight), [x], jnp.array(count), chunk_size=3, kept=kept)
        else:
            y = jnp.tanh(x @ weight)
        return jnp.sin(y[:count]).sum()

    for a, b in zip(*(jax.grad(total, argnums=(0, 1))(x, weight, chunked) for chunked in (True, False)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_batch_shares_its_condition(getkey):
    """Under vmap the condition stays a scalar: chunks that no example needs are not computed."""
    x, counts = jr.normal(getkey(), (2, 8, 3)), jnp.array([1, 3])

    def run(x, count):
        return map_chunks(jnp.sin, [x], count, chunk_size=2)

    out = jax.jit(jax.vmap(run))(x, counts)
    np.testing.assert_allclose(out[:, :4], jnp.sin(x[:, :4]), atol=1e-6)
    assert (out[:, 4:] == 0).all()
    assert "cond" in str(jax.make_jaxpr(jax.vmap(run))(x, counts))


def test_only_kept_chunks_are_remembered(getkey):
    """Only the first `kept` chunks save residuals; the backward pass recomputes those of the others from their rows."""
    x, weight = jr.normal(getkey(), (40, 3)), jr.normal(getkey(), (3, 64))

    def remembered(kept):
        def run(weight):
            return map_chunks(lambda x: jnp.tanh(x @ weight)[:, 0], [x], jnp.array(40), chunk_size=4, kept=kept)

        return sum(leaf.size for leaf in jax.tree.leaves(jax.vjp(run, weight)[1]))

    assert remembered(1) < remembered(10) / 4


def test_no_rows():
    out = map_chunks(lambda x: x[:, :1], [jnp.zeros((0, 3))], jnp.array(0), chunk_size=2)
    assert out.shape == (0, 1)
