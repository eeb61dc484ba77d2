"""Decompositions that cannot hang: on CPUs one matrix after another, whatever is vectorised.

XLA spreads a *batched* decomposition (QR, eigenvalues, singular values) over its pool of threads,
and waits for the parts inside that pool. If two of them run at the same time, because they do not
depend on one another or because two devices of one process are at work (`mupjax.use_all_cores`),
each may wait for threads that the other holds, for ever (jaxlib 0.10; two devices on two cores: 4
hangs in 4 runs of 400 steps with a batch of 10). Making one depend on the other helps on one
device, not on two. A decomposition of a single matrix waits for nobody, so here `vmap` becomes a
loop on CPUs; elsewhere it stays a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mupjax.turns import in_turn

__all__ = ["eigh", "eigvalsh", "one_at_a_time", "qr", "qr_r"]


def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays whose `vmap` is a loop on CPUs.

    Args:
      function: of one matrix each, without leading axes.
    """
    single = in_turn(function)

    def over_leading_axes(*arrays: jax.Array) -> Any:
        mapped = single
        for _ in range(arrays[0].ndim - 2):
            mapped = jax.vmap(mapped)
        return mapped(*arrays)

    return jax.jit(over_leading_axes)


eigvalsh = one_at_a_time(jnp.linalg.eigvalsh)
"""Eigenvalues (..., n) of symmetric matrices (..., n, n), ascending."""

eigh = one_at_a_time(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
"""Eigenvalues, ascending, and eigenvectors, as columns, of symmetric matrices (..., n, n)."""

qr = one_at_a_time(lambda matrix: tuple(jnp.linalg.qr(matrix, mode="reduced")))
"""The reduced factors Q and R of matrices (..., m, n)."""

qr_r = one_at_a_time(lambda matrix: jnp.linalg.qr(matrix, mode="r"))
"""The factor R alone."""
