"""Causal attention: JAX's, and one with the same result that XLA makes more of on a CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["causal_attention"]


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float
) -> jax.Array:
    """`softmax(scale query keyᵀ) value`, where position t sees positions up to t.

    On a CPU the weights are kept with the keys' positions before the queries' and not normalised,
    and every product, those of the gradient too, has both operands laid out as XLA's libraries are
    fastest with. Elsewhere it is `jax.nn.dot_product_attention`.

    Args:
      query: (B, T, N, D).
      key, value: (B, T, K, D), of K heads that divide the N of the queries; head n of the queries
        sees head n K / N of these, rounded down.
      scale: factor on the logits.

    Returns:
      shape and type of the query; logits and weights are float32 at least.

    Raises:
      ValueError: K does not divide N, key and value differ in heads, or there are no positions.
    """
    for name, array in (("query", query), ("key", key)):
        if not array.shape[1]:
            raise ValueError(f"{name} has shape {array.shape}: it has no positions.")
    if value.shape[2] != key.shape[2]:
        raise ValueError(f"value has {value.shape[2]} heads, key has {key.shape[2]}.")
    if not key.shape[2] or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"key has {key.shape[2]} heads, which do not divide the {query.shape[2]} of query."
        )
    if jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=True)

    kind, precise = query.dtype, jnp.promote_types(query.dtype, jnp.float32)
    query, key, value = (a.astype(precise) for a in (query, key, value))
    if query.shape[2] == key.shape[2]:
        return _keys_first(query, key, value, scale).astype(kind)
    each = query.shape[2] // key.shape[2]
    grouped = query.reshape(*key.shape[:3], each, query.shape[3])
    out = jax.vmap(_keys_first, (3, None, None, None), 3)(grouped, key, value, scale)
    return out.reshape(query.shape).astype(kind)


def _keys_first(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    q = lax.optimization_barrier((query * scale).transpose(0, 2, 3, 1))
    k, v = (lax.optimization_barrier(a.transpose(0, 2, 1, 3)) for a in (key, value))
    logits = _logits(k, q)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(-2, keepdims=True)))
    return _mean(v, weights).transpose(0, 3, 1, 2)


# Every product of the values and of the gradient, which is the transpose of the derivatives below,
# is of the form (i, c) (c, j) as it lies in memory. Barriers, which transpose to barriers, keep XLA
# from merging transposes with products or with one another.


def _turned(x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x.swapaxes(-1, -2))


def _column_sums(x: jax.Array) -> jax.Array:
    return jnp.matmul(jnp.ones((*x.shape[:-2], 1, x.shape[-2]), x.dtype), x)


@jax.custom_jvp
def _logits(k: jax.Array, q: jax.Array) -> jax.Array:
    """(..., S, D) and (..., D, T) to (..., S, T), minus infinity where S is after T."""
    logits = jnp.matmul(k, q)
    return jnp.where(jnp.triu(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)


@_logits.defjvp
def _logits_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # Not masked: these are multiplied by the weights, which are zero where the logits are masked.
    (k, q), (dk, dq) = primals, tangents
    by_q = jnp.einsum("...ds,...dt->...st", _turned(k), dq)
    by_k = jnp.einsum("...sd,...td->...st", dk, _turned(q))
    return _logits(k, q), by_q + by_k


@jax.custom_jvp
def _mean(v: jax.Array, weights: jax.Array) -> jax.Array:
    """(..., S, D) averaged with the columns of (..., S, T) as weights, to (..., D, T)."""
    return jnp.matmul(_turned(v), weights) / _column_sums(weights)


@_mean.defjvp
def _mean_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (v, weights), (dv, dweights) = primals, tangents
    mean = _mean(v, weights)
    by_weights = jnp.einsum("...sd,...st->...dt", v, dweights)
    by_values = lax.optimization_barrier(jnp.einsum("...st,...sd->...td", weights, dv))
    less = mean * dweights.sum(-2, keepdims=True)
    return mean, (by_weights + by_values.swapaxes(-1, -2) - less) / _column_sums(weights)
