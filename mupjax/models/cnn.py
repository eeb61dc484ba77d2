"""A small residual convolutional network (flax.nnx), its width the number of channels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mupjax.models.mlp import RMSNorm

__all__ = ["CNN"]


def _convolve(
    images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """A convolution as one matrix product over patches, in the place of `lax`'s.

    Under `vmap` over kernels, as in a sweep, XLA makes `lax.conv_general_dilated` a grouped
    convolution. On two cores, the gradient of 8 networks takes 2.6 times as long with it at 64
    channels, and as long at 16. The price is memory: nine times the activations.
    """
    del options  # dilations and groups, which are not used here
    height, width = kernel.shape[:2]
    pads = jax.lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)
    rows, columns = (
        (size + sum(pad) - window) // stride + 1
        for size, pad, window, stride in zip(
            images.shape[1:3], pads, kernel.shape[:2], strides, strict=True
        )
    )
    padded = jnp.pad(images, [(0, 0), *pads, (0, 0)])
    shifted = [
        padded[:, i :: strides[0], j :: strides[1]][:, :rows, :columns]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


_Conv = functools.partial(nnx.Conv, kernel_size=(3, 3), conv_general_dilated=_convolve)


class ConvBlock(nnx.Module):
    """`x + r conv(relu(norm(conv(relu(norm(x))))))`: He et al., arXiv 1603.05027, Figure 4e.

    The norm takes the place of batch normalisation: the root mean square of one example over space
    and channels, which has no state (a sweep carries parameters only) and no mixing of examples.
    """

    def __init__(
        self, width: int, *, residual_multiplier: float, use_bias: bool, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        common: dict[str, Any] = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        self.norms = nnx.List([RMSNorm(width, spatial_axes=2, rngs=rngs) for _ in range(2)])
        self.convs = nnx.List([_Conv(width, width, **common) for _ in range(2)])
        self.residual_multiplier = residual_multiplier

    def __call__(self, x: jax.Array, width: jax.Array | int | None = None) -> jax.Array:
        branch = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            branch = conv(jax.nn.relu(norm(branch, width)))
        return x + self.residual_multiplier * branch


class CNN(nnx.Module):
    """A residual CNN: images (B, height, width, channels) to outputs (B, dout).

    A 3 × 3 stem, `blocks` residual blocks of two 3 × 3 convolutions with n channels each, a norm,
    the mean over space, and a linear readout.

    Args:
      channels: of the images; images (B, height, width) are read as of one channel.
      width: n, channels of every layer.
      dout: outputs.
      blocks: number of residual blocks L, at least 1.
      stem_stride: of the stem; 2 halves height and width.
      use_bias: biases on the stem, the convolutions and the readout.
      zero_readout: start from zero readout weights.
      residual_multiplier: r, on every block's branch; 1 / blocks is CompleteP's.
      dtype: in which the convolutions compute, such as ``jnp.bfloat16``; parameters and outputs
        stay in float32.
      rngs: nnx random streams.

    Raises:
      ValueError: a size that is less than 1; when called, images that do not have the channels.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        dout: int,
        *,
        blocks: int = 2,
        stem_stride: int = 1,
        use_bias: bool = True,
        zero_readout: bool = False,
        residual_multiplier: float = 1.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = {
            "channels": channels,
            "width": width,
            "dout": dout,
            "blocks": blocks,
            "stem_stride": stem_stride,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        common: dict[str, Any] = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        self.stem = _Conv(channels, width, strides=stem_stride, **common)
        self.blocks = nnx.List(
            [
                ConvBlock(
                    width,
                    residual_multiplier=residual_multiplier,
                    use_bias=use_bias,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(blocks)
            ]
        )
        self.final_norm = RMSNorm(width, spatial_axes=2, rngs=rngs)
        start: dict[str, Any] = {"kernel_init": nnx.initializers.zeros} if zero_readout else {}
        self.readout = nnx.Linear(width, dout, use_bias=use_bias, rngs=rngs, **start)
        self.channels = channels

    def __call__(self, x: jax.Array, width: jax.Array | int | None = None) -> jax.Array:
        """Outputs of shape (B, dout); `width` is the true one when zero-padded to a larger."""
        if x.ndim == 3:
            x = x[..., None]
        if x.ndim != 4 or x.shape[-1] != self.channels:
            raise ValueError(
                f"images must have shape (B, height, width, {self.channels}), got {x.shape}: "
                "reshape them, or give the model their number of channels."
            )
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, width)
        x = jax.nn.relu(self.final_norm(x, width))
        return self.readout(jnp.mean(x, axis=(-3, -2)).astype(jnp.float32))
