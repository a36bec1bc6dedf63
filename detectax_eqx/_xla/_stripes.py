"""Drawing of images that skips empty rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from ._plain import by_platform
from ._varying import varying_like


# Rows drawn per iteration; 16 and 64 are equally fast.
STRIPE_ROWS = 32


def draw_stripes(draw: Callable[..., Array], empty: Callable[..., Array], vertical: Array, *others: Any) -> Array:
    """Computes `draw(vertical, *others)`: `n` images `(n, h, w)` whose row `i` depends only on `vertical[:, i]`.

    - `vertical`: `(n, h, s)`. Where it is zero, the row must equal `empty(*others)`, of shape `(n, 1, w)`.
    - `others`: arrays whose first axis is the images, or `None`.

    On CPU, rows before the first and after the last nonzero one are filled with `empty` instead of being computed.
    """

    @custom_vmap
    def by_stripes(*images):
        n, height, _ = images[0].shape
        if n == 0:
            return draw(*images)
        rows = min(STRIPE_ROWS, height)
        drawn = (images[0] != 0).any(axis=2)  # (n, h)
        first = jnp.argmax(drawn, axis=1)
        count = jnp.where(drawn.any(axis=1), height - jnp.argmax(drawn[:, ::-1], axis=1) - first, 0)

        def draw_image(i, out):
            vertical, *others = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i, 1), images)

            def draw_stripe(k, out):
                start = jnp.minimum(first[i] + k * rows, height - rows)
                part = draw(lax.dynamic_slice_in_dim(vertical, start, rows, axis=1), *others)
                return lax.dynamic_update_slice(out, part, (i, start, 0))

            return lax.fori_loop(0, -(-count[i] // rows), draw_stripe, out)

        background = varying_like(empty(*images[1:]), images)
        return lax.fori_loop(0, n, draw_image, jnp.broadcast_to(background, (n, height, background.shape[2])))

    @by_stripes.def_vmap
    def _(size, batched, *images):
        """Merges the batch axis into the axis of images."""
        images = jax.tree.map(lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape)), images, tuple(batched))
        drawn = by_stripes(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), images))
        return drawn.reshape(images[0].shape[:2] + drawn.shape[1:]), True

    return by_platform(vertical, *others, cpu=by_stripes, default=draw, trick="stripes")
