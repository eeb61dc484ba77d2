"""The residual CNN against scipy's correlation, and its exactness under padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import correlate

from mupjax.models import CNN, RMSNorm
from mupjax.roles import leaf_paths


def images(batch, channels=3, size=6):
    return np.random.default_rng(0).normal(size=(batch, size, size, channels)).astype(np.float32)


def moved(model):
    """Every parameter, moved off its initial value so that biases and scales count."""
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), state)
    nnx.update(model, state)
    return {path: np.asarray(leaf, np.float64) for path, leaf in leaf_paths(state).items()}


def convolved(x, p, path):
    """One image (height, width, channels) with zeros around it, channel by channel."""
    kernel = p[f"{path}/kernel"]
    out = np.zeros((*x.shape[:2], kernel.shape[-1]))
    for i in range(kernel.shape[2]):
        for o in range(kernel.shape[3]):
            out[..., o] += correlate(x[..., i], kernel[..., i, o], mode="same")
    return out + p.get(f"{path}/bias", 0.0)


def normed(x, p, path):
    return np.maximum(x / np.sqrt((x**2).mean() + 1e-6) * p[f"{path}/scale"], 0)


def twin(p, x, *, blocks, residual):
    x = convolved(x, p, "stem")
    for b in range(blocks):
        branch = x
        for i in range(2):
            branch = convolved(
                normed(branch, p, f"blocks/{b}/norms/{i}"), p, f"blocks/{b}/convs/{i}"
            )
        x = x + residual * branch
    return normed(x, p, "final_norm").mean((0, 1)) @ p["readout/kernel"] + p.get("readout/bias", 0)


@pytest.mark.parametrize("use_bias", [True, False])
def test_cnn_is_its_scipy_twin(use_bias):
    model = CNN(3, 5, 4, blocks=2, residual_multiplier=0.5, use_bias=use_bias, rngs=nnx.Rngs(0))
    p, x = moved(model), images(2)
    for image, out in zip(x, model(jnp.asarray(x)), strict=True):
        expected = twin(p, image.astype(np.float64), blocks=2, residual=0.5)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_the_norm_shares_one_mean_square_over_space():
    x = images(2)
    norm = RMSNorm(3, spatial_axes=2, rngs=nnx.Rngs(0))
    expected = x / np.sqrt((x**2).mean((1, 2, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_half_precision_zero_readout_and_what_does_not_fit():
    x = jnp.asarray(images(2))
    half = CNN(3, 8, 4, blocks=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    out = half(x)
    gap = np.abs(out - CNN(3, 8, 4, blocks=1, rngs=nnx.Rngs(0))(x)).max()
    assert out.dtype == jnp.float32
    assert 1e-6 < gap < 0.1
    np.testing.assert_array_equal(CNN(3, 8, 4, blocks=1, zero_readout=True, rngs=nnx.Rngs(0))(x), 0)
    with pytest.raises(ValueError, match="blocks must be at least 1, got 0"):
        CNN(3, 8, 4, blocks=0, rngs=nnx.Rngs(0))
    one = CNN(1, 8, 4, blocks=1, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(one(x[..., :1]), one(x[..., 0]))
    with pytest.raises(ValueError, match=r"must have shape \(B, height, width, 1\), got \(2, 6, 6"):
        one(x)


def test_zero_padding_to_a_larger_width_changes_nothing():
    small, large = (CNN(3, n, 4, blocks=1, rngs=nnx.Rngs(0)) for n in (5, 8))
    moved(small)

    def padded(a, like):
        return jnp.pad(a, [(0, m - n) for n, m in zip(a.shape, like.shape, strict=True)])

    params, shapes = (nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in (small, large))
    nnx.update(large, jax.tree.map(padded, params, shapes))
    x = jnp.asarray(images(2))
    np.testing.assert_allclose(large(x, width=jnp.asarray(5)), small(x), rtol=1e-5, atol=1e-6)
    assert np.abs(large(x) - small(x)).max() > 1e-3


@pytest.mark.parametrize(("size", "stride"), [(6, 1), (6, 2), (7, 2), (7, 3)])
def test_the_product_over_patches_is_the_convolution_of_lax(size, stride):
    model = CNN(3, 5, 4, stem_stride=stride, rngs=nnx.Rngs(0))
    plain = nnx.Conv(3, 5, (3, 3), strides=stride, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.state(model.stem, nnx.Param))
    x = jnp.asarray(images(2, 3, size))
    assert plain(x).shape == (2, -(-size // stride), -(-size // stride), 5)
    np.testing.assert_allclose(model.stem(x), plain(x), rtol=1e-5, atol=1e-6)
