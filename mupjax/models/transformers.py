"""Decoder-only transformers (flax.nnx): Llama's and GPT-2's blocks, for sweeps over width.

Pre-norm blocks with either the number of heads or the head size fixed, as the user says. No layer
knows of any parametrization: the scale of the attention logits is an argument, roles are inferred
from shapes (a query projection whose head size grows carries what its table asks for; see
`mupjax.resolve`), and depth enters by `residual_multiplier` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mupjax.config import check_count
from mupjax.models.attention import causal_attention
from mupjax.models.gates import swiglu
from mupjax.models.products import dot_general

__all__ = ["Attention", "Decoder", "apply_rope", "gpt2", "llama"]

AttentionScale = Literal["1/sqrt(head_dim)", "1/head_dim"]
Positions = Literal["rope", "learned"]
FeedForward = Literal["swiglu", "gelu"]

_LINEAR = {"dot_general": dot_general}


def apply_rope(x: jax.Array, *, theta: float = 10000.0) -> jax.Array:
    """Rotary position embedding (Su et al., arXiv 2104.09864), first half against second half.

    Coordinates i and i + D/2 of the head at position t are turned by the angle `t θ^(-2i/D)`, as in
    Llama: the product of a query and a key depends on the distance of their positions alone.

    Args:
      x: queries or keys, shape (B, T, heads, D) with D even.
      theta: θ, a number: the turns are constants of the program.

    Raises:
      ValueError: D is odd.
    """
    positions, size = x.shape[1], x.shape[-1]
    if size % 2:
        raise ValueError(
            f"rotary positions turn pairs of coordinates, and the head size is {size}: choose a "
            "width and a number of heads that make it even."
        )
    cos, sin = _turns(positions, size, float(theta), x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@functools.lru_cache(maxsize=16)
def _turns(positions: int, size: int, theta: float, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    # Constants, which JAX stores once: inside branches and loops XLA would compute them again for
    # every entry of the queries.
    angle = np.arange(positions)[:, None] * theta ** (-np.arange(size // 2) * 2 / size)
    cos, sin = (f(angle).astype(dtype)[None, :, None] for f in (np.cos, np.sin))
    for table in (cos, sin):
        table.flags.writeable = False
    return cos, sin


class Attention(nnx.Module):
    """Causal self-attention, with fewer heads for keys and values if asked (grouped queries).

    Args:
      width: n, features in and out.
      heads: number of heads of the queries.
      head_size: D, size of each.
      kv_heads: number of heads of keys and values, a divisor of `heads`.
      scale: factor on the logits.
      rope_theta: θ of rotary positions, or None for none.
      use_bias: biases on all four projections.
      zero_query: start from a zero query projection (attention is uniform at first).
      dtype: in which it computes; parameters stay in float32.
      rngs: nnx random streams.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_size: int,
        *,
        kv_heads: int | None = None,
        scale: AttentionScale = "1/sqrt(head_dim)",
        rope_theta: float | None = None,
        use_bias: bool = False,
        zero_query: bool = False,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"kv_heads is {kv_heads}, which does not divide the {heads} heads of the queries."
            )
        common: dict[str, Any] = {**_LINEAR, "use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        start: dict[str, Any] = {"kernel_init": nnx.initializers.zeros} if zero_query else {}
        self.query = nnx.LinearGeneral(width, (heads, head_size), **common, **start)
        self.key = nnx.LinearGeneral(width, (kv_heads, head_size), **common)
        self.value = nnx.LinearGeneral(width, (kv_heads, head_size), **common)
        self.out = nnx.LinearGeneral((heads, head_size), width, axis=(-2, -1), **common)
        self.rope_theta = rope_theta
        self.scale = head_size ** (-1.0 if scale == "1/head_dim" else -0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, T, n) to (B, T, n); position t sees positions up to t."""
        query, key, value = (_by_rows(layer, x) for layer in (self.query, self.key, self.value))
        if self.rope_theta is not None:
            query, key = (apply_rope(a, theta=self.rope_theta) for a in (query, key))
        seen = causal_attention(query, key, value, scale=self.scale)
        return _by_rows(self.out, seen, axes=2)


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202), without biases."""

    def __init__(self, width: int, hidden: int, *, dtype: Any = None, rngs: nnx.Rngs) -> None:
        common: dict[str, Any] = {**_LINEAR, "use_bias": False, "dtype": dtype, "rngs": rngs}
        self.gate = nnx.Linear(width, hidden, **common)
        self.up = nnx.Linear(width, hidden, **common)
        self.down = nnx.Linear(hidden, width, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(swiglu(self.gate(x), self.up(x)))


class GeluMLP(nnx.Module):
    """`down(gelu(up(x)))`."""

    def __init__(
        self, width: int, hidden: int, *, use_bias: bool, dtype: Any = None, rngs: nnx.Rngs
    ) -> None:
        common: dict[str, Any] = {**_LINEAR, "use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        self.up = nnx.Linear(width, hidden, **common)
        self.down = nnx.Linear(hidden, width, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    """`x + r attention(norm(x))`, then `x + r feed_forward(norm(x))`."""

    def __init__(
        self,
        attention: Attention,
        feed_forward: nnx.Module,
        norms: tuple[nnx.Module, nnx.Module],
        residual_multiplier: float,
    ) -> None:
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_norm, self.feed_forward_norm = norms
        self.residual_multiplier = residual_multiplier

    def __call__(self, x: jax.Array) -> jax.Array:
        r = self.residual_multiplier
        x = x + r * self.attention(self.attention_norm(x))  # type: ignore[operator]
        return x + r * _by_rows(self.feed_forward, self.feed_forward_norm(x))  # type: ignore[operator]


class Decoder(nnx.Module):
    """A decoder-only transformer: tokens (B, T) to logits (B, T, vocabulary).

    Args:
      vocabulary: number of tokens V.
      width: n, the residual stream's features.
      layers: number of blocks.
      heads: number of heads, the head size n / heads growing with width; or
      head_size: the head size, the number of heads n / head_size growing. Exactly one of the two.
      kv_heads: heads of keys and values where `heads` is given.
      queries_per_kv: query heads for each head of keys and values where `head_size` is given.
      feed_forward: ``"swiglu"`` or ``"gelu"``.
      hidden_ratio: units of the feed-forward layer, in units of n.
      positions: ``"rope"``, or ``"learned"`` (then `context` is the longest sequence).
      context: number of learned positions.
      rope_theta: θ.
      norm: ``"rms"`` or ``"layer"``.
      use_bias: biases in attention and feed-forward layers.
      tied: the embedding is also the readout; state its role to the sweep,
        ``roles={"embed/embedding": "tied"}``.
      attention_scale: on the logits; say the same to the sweep (``attention=...``) where the head
        size grows.
      zero_readout, zero_query: start these at zero (Yang et al., arXiv 2203.03466, appendix D.2).
      residual_multiplier: r, on both branches of every block; 1 / layers is CompleteP's.
      dtype: in which it computes, such as ``jnp.bfloat16``; parameters and logits stay in float32.
      rngs: nnx random streams.

    Raises:
      ValueError: neither or both of heads and head_size, or one that does not divide the width; an
        unknown name.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        layers: int = 4,
        heads: int | None = None,
        head_size: int | None = None,
        kv_heads: int | None = None,
        queries_per_kv: int | None = None,
        feed_forward: FeedForward = "swiglu",
        hidden_ratio: float = 4.0,
        positions: Positions = "rope",
        context: int | None = None,
        rope_theta: float = 10000.0,
        norm: Literal["rms", "layer"] = "rms",
        use_bias: bool = False,
        tied: bool = False,
        attention_scale: AttentionScale = "1/sqrt(head_dim)",
        zero_readout: bool = False,
        zero_query: bool = False,
        residual_multiplier: float = 1.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        for name, value, choice in (
            ("feed_forward", feed_forward, get_args(FeedForward)),
            ("positions", positions, get_args(Positions)),
            ("attention_scale", attention_scale, get_args(AttentionScale)),
            ("norm", norm, ("rms", "layer")),
        ):
            if value not in choice:
                raise ValueError(f"{name} must be one of {', '.join(choice)}, got {value!r}.")
        if (positions == "learned") != (context is not None):
            raise ValueError(
                "context is the number of learned positions: give it with positions='learned', and "
                f"only then (got positions={positions!r}, context={context!r})."
            )
        if tied and zero_readout:
            raise ValueError("zero_readout would start the tied embedding at zero: choose one.")
        for name, count in (
            ("vocabulary", vocabulary),
            ("width", width),
            ("layers", layers),
            ("context", context),
            ("queries_per_kv", queries_per_kv),
        ):
            if count is not None:
                check_count(name, count)
        heads, head_size = _heads(width, heads, head_size)
        if queries_per_kv is not None:
            if kv_heads is not None or heads % queries_per_kv:
                raise ValueError(
                    f"queries_per_kv={queries_per_kv} must divide the {heads} heads, and kv_heads "
                    "must be left out."
                )
            kv_heads = heads // queries_per_kv
        hidden = _whole("hidden_ratio * width", hidden_ratio * width)

        def make_norm() -> nnx.Module:
            kind: Callable[..., nnx.Module] = nnx.RMSNorm if norm == "rms" else nnx.LayerNorm
            return kind(width, dtype=dtype, rngs=rngs)

        def make_feed_forward() -> nnx.Module:
            if feed_forward == "swiglu":
                return SwiGLU(width, hidden, dtype=dtype, rngs=rngs)
            return GeluMLP(width, hidden, use_bias=use_bias, dtype=dtype, rngs=rngs)

        def make_attention() -> Attention:
            return Attention(
                width,
                heads,
                head_size,
                kv_heads=kv_heads,
                scale=attention_scale,
                rope_theta=rope_theta if positions == "rope" else None,
                use_bias=use_bias,
                zero_query=zero_query,
                dtype=dtype,
                rngs=rngs,
            )

        self.embed = nnx.Embed(vocabulary, width, dtype=dtype, rngs=rngs)
        self.position = (
            nnx.Embed(context, width, dtype=dtype, rngs=rngs) if context is not None else None
        )
        self.blocks = nnx.List(
            [
                Block(
                    make_attention(),
                    make_feed_forward(),
                    (make_norm(), make_norm()),
                    residual_multiplier,
                )
                for _ in range(layers)
            ]
        )
        self.final_norm = make_norm()
        last: dict[str, Any] = {**_LINEAR, "use_bias": False, "dtype": dtype, "rngs": rngs}
        if zero_readout:
            last["kernel_init"] = nnx.initializers.zeros
        self.readout = None if tied else nnx.Linear(width, vocabulary, **last)

    def __call__(self, tokens: jax.Array, readout_multiplier: jax.Array | float = 1.0) -> jax.Array:
        """Logits (B, T, V) of the next token at every position of `tokens` (B, T), float32."""
        x = self.embed(tokens)
        if self.position is not None:
            if tokens.shape[-1] > self.position.num_embeddings:
                raise ValueError(
                    f"the sequence has {tokens.shape[-1]} tokens, and the model learns "
                    f"{self.position.num_embeddings} positions: raise context."
                )
            x = x + self.position(jnp.arange(tokens.shape[-1]))[None]
        for block in self.blocks:
            x = block(x)
        x = self.final_norm(x)  # type: ignore[operator]
        logits = _by_rows(self.embed.attend if self.readout is None else self.readout, x)
        return logits.astype(jnp.float32) * readout_multiplier


def _by_rows(layer: Any, x: jax.Array, axes: int = 1) -> jax.Array:
    """What a layer makes of the last axes of an array, whose leading ones it sees as one.

    With two leading axes XLA's CPU compiler transposes activations for the kernels' gradients
    instead of reading them by columns: at width 128 a training step takes 1.6 times as long.
    """
    leading = x.shape[: x.ndim - axes]
    y = layer(x.reshape(-1, *x.shape[x.ndim - axes :]))
    return y.reshape(*leading, *y.shape[1:])


def llama(vocabulary: int, width: int, *, rngs: nnx.Rngs, **options: Any) -> Decoder:
    """Llama's block: RMSNorm, SwiGLU, rotary positions, no biases. By default 8 heads."""
    if "head_size" not in options:
        options = {"heads": 8, **options}
    return Decoder(vocabulary, width, rngs=rngs, **options)


def gpt2(vocabulary: int, width: int, *, context: int, rngs: nnx.Rngs, **options: Any) -> Decoder:
    """GPT-2's block: GeLU and learned positions; by default with 8 heads and, as GWB, RMSNorm."""
    if "head_size" not in options:
        options = {"heads": 8, **options}
    defaults = {"feed_forward": "gelu", "positions": "learned", "context": context}
    return Decoder(vocabulary, width, rngs=rngs, **{**defaults, **options})


def _heads(width: int, heads: int | None, head_size: int | None) -> tuple[int, int]:
    if (heads is None) == (head_size is None):
        raise ValueError(
            "give heads (their size grows with width) or head_size (their number grows), and not "
            f"both: got heads={heads!r}, head_size={head_size!r}."
        )
    name, given = ("heads", heads) if heads is not None else ("head_size", head_size)
    assert given is not None
    if given < 1 or width % given:
        multiple = max(1, round(width / max(given, 1))) * max(given, 1)
        raise ValueError(
            f"{name}={given} does not divide the width {width}: the nearest width that fits is "
            f"{multiple}."
        )
    return (given, width // given) if heads is not None else (width // given, given)


def _whole(name: str, value: float) -> int:
    if value < 1 or value != round(value):
        raise ValueError(f"{name} must be a whole number, got {value!r}: choose another ratio.")
    return round(value)
