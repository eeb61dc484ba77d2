"""Multilayer perceptrons, and a norm that is exact under zero-padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["MLP", "RMSNorm"]


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, exact under zero-padding to a larger width.

    ``y = scale * x / sqrt(sum(x**2) / width + epsilon)``, where ``width`` is the true one: padded
    coordinates are not counted (nor are they zero after an activation such as the sigmoid).

    Args:
      num_features: n, the size of the last axis.
      epsilon: keeps zero at zero.
      spatial_axes: number of axes before the last one that share one mean square: 2 for images
        (B, height, width, n), normalised as wholes.
      rngs: not used.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        spatial_axes: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        del rngs
        self.scale = nnx.Param(jnp.ones((num_features,)))
        self.epsilon = epsilon
        self.spatial_axes = spatial_axes

    def __call__(self, x: jax.Array, width: jax.Array | int | None = None) -> jax.Array:
        """Normalises ``x`` of shape (..., features)."""
        n = x.shape[-1] if width is None else width
        if width is not None:
            x = jnp.where(jnp.arange(x.shape[-1]) < width, x, 0)
        axes = tuple(range(-1 - self.spatial_axes, 0))
        positions = math.prod(x.shape[axis] for axis in axes[:-1])
        mean_square = jnp.sum(jnp.square(x), axis=axes, keepdims=True) / (n * positions)
        scale = jnp.expand_dims(self.scale[...], tuple(range(x.ndim - 1)))
        return x * jax.lax.rsqrt(mean_square + self.epsilon) * scale


class MLP(nnx.Module):
    """Multilayer perceptron: ``depth`` hidden layers of ``width`` units and a linear readout.

    Args:
      din: input features d; inputs have shape (B, d).
      width: units n of every hidden layer.
      dout: outputs; the result has shape (B, dout).
      depth: number of hidden layers, at least 1.
      activation: elementwise, as a function.
      use_bias: biases on every layer, readout included.
      norm: an :class:`RMSNorm` after every hidden activation.
      zero_readout: start from zero readout weights.
      rngs: nnx random streams.
    """

    def __init__(
        self,
        din: int,
        width: int,
        dout: int,
        *,
        depth: int = 1,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        use_bias: bool = True,
        norm: bool = False,
        zero_readout: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if min(din, width, dout, depth) < 1:
            raise ValueError(
                "din, width, dout and depth must be at least 1, "
                f"got {din}, {width}, {dout} and {depth}."
            )
        sizes = [din, *[width] * depth]
        self.hidden = nnx.List(
            [nnx.Linear(a, b, use_bias=use_bias, rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )
        self.norms = nnx.List([RMSNorm(width, rngs=rngs) for _ in range(depth if norm else 0)])
        init: dict[str, Any] = {"kernel_init": nnx.initializers.zeros} if zero_readout else {}
        self.readout = nnx.Linear(width, dout, use_bias=use_bias, rngs=rngs, **init)
        self.activation = activation

    def __call__(self, x: jax.Array, width: jax.Array | int | None = None) -> jax.Array:
        """Outputs of shape (B, dout); ``width`` is the true one when zero-padded to a larger."""
        for i, layer in enumerate(self.hidden):
            x = self.activation(layer(x))
            if self.norms:
                x = self.norms[i](x, width)
        return self.readout(x)
