"""Spectra of alignment matrices: how an update of a layer changes the loss, by directions.

For a layer with gradient `G` and update `Δ`, both (m, n), the linearized change of the loss is
`⟨G, Δ⟩ = tr S` with the alignment matrix (Ghosh, Wu and Bietti, arXiv 2512.22768, section 4)

    S = ½ (Gᵀ Δ + Δᵀ G),   n × n, symmetric, of rank at most min(n, 2m).

Its eigenvalues `λ_1, λ_2, …`, by decreasing magnitude, split the change: the first k add up to the
top-k part, all of them to `⟨G, Δ⟩`. If `Δ = −η G`, they are `−η σ_i(G)²`. Rotations of either space
leave them alone. For the row version, `½ (G Δᵀ + Δ Gᵀ)`, transpose both arguments.

With `A = [G; Δ]` (2m × n) and `J` swapping the halves, `S = ½ Aᵀ J A`. Where `2m < n`, `Aᵀ = Q R`
leaves `S = Q (½ R J Rᵀ) Qᵀ`, a problem of size 2m. The QR decomposition keeps all digits of the
single precision in which networks train; the Gram matrix `A Aᵀ` would lose half of them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mupjax.lapack import eigh, eigvalsh, qr, qr_r

__all__ = ["AlignmentSpectrum", "alignment_eigenvalues", "alignment_spectrum"]

# On an accelerator the default rounds to ten bits or fewer: on an H200 to 4e-5 of the largest
# eigenvalue, with this to 2e-6.
_product = functools.partial(jnp.matmul, precision="highest")


class AlignmentSpectrum(NamedTuple):
    """Eigenvalues (..., r) by decreasing magnitude and orthonormal eigenvectors (..., n, r)."""

    eigenvalues: jax.Array
    eigenvectors: jax.Array


def alignment_eigenvalues(gradient: ArrayLike, update: ArrayLike) -> jax.Array:
    """The possibly non-zero eigenvalues of `½ (Gᵀ Δ + Δᵀ G)`, by decreasing magnitude.

    Args:
      gradient: G, shape (..., m, n).
      update: Δ, the same shape.

    Returns:
      shape (..., min(n, 2m)), in the arguments' precision: absolute errors are a small multiple of
      its epsilon times `‖G‖ ‖Δ‖`. Exactly zero where G or Δ is.

    Raises:
      ValueError: the shapes differ, have fewer than two axes, or hold nothing.
      TypeError: the arguments are of other types than float32 and float64.
    """
    return _eigenvalues(*_checked(gradient, update))


def alignment_spectrum(gradient: ArrayLike, update: ArrayLike) -> AlignmentSpectrum:
    """`alignment_eigenvalues` with the eigenvectors `u_j`, as columns.

    Args:
      gradient: G, shape (..., m, n).
      update: Δ, the same shape.

    Raises:
      ValueError, TypeError: as `alignment_eigenvalues`.
    """
    return _spectrum(*_checked(gradient, update))


@jax.jit
def _eigenvalues(gradient: jax.Array, update: jax.Array) -> jax.Array:
    small, scale, _ = _reduced(gradient, update, vectors=False)
    return scale[..., None] * _by_magnitude(eigvalsh(small))


@jax.jit
def _spectrum(gradient: jax.Array, update: jax.Array) -> AlignmentSpectrum:
    small, scale, basis = _reduced(gradient, update, vectors=True)
    values, vectors = eigh(small)
    order = jnp.argsort(-jnp.abs(values), axis=-1, stable=True)
    values = jnp.take_along_axis(values, order, axis=-1)
    vectors = jnp.take_along_axis(vectors, order[..., None, :], axis=-1)
    if basis is not None:
        vectors = _product(basis, vectors)
    return AlignmentSpectrum(scale[..., None] * values, vectors)


def _checked(gradient: ArrayLike, update: ArrayLike) -> tuple[jax.Array, jax.Array]:
    g, delta = jnp.asarray(gradient), jnp.asarray(update)
    if g.shape != delta.shape or g.ndim < 2:
        raise ValueError(
            f"gradient has shape {g.shape} and update {delta.shape}: expected one shape "
            "(..., m, n); vectors have no spectrum, they contribute whole."
        )
    if not g.size:
        raise ValueError(f"gradient and update are empty, of shape {g.shape}.")
    for array in (g, delta):
        if array.dtype not in (np.float32, np.float64):
            raise TypeError(
                "gradient and update must be float32 or float64, got "
                f"{g.dtype} and {delta.dtype}: convert them first."
            )
    return g, delta


def _reduced(
    g: jax.Array, delta: jax.Array, *, vectors: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A symmetric matrix with the eigenvalues of S / scale; its basis, where it is not R^n."""
    g, g_scale = _normalised(g)
    delta, delta_scale = _normalised(delta)
    scale = g_scale * delta_scale
    m, n = g.shape[-2:]
    if 2 * m >= n:
        product = _product(jnp.swapaxes(g, -1, -2), delta)
        return (product + jnp.swapaxes(product, -1, -2)) / 2, scale, None
    stacked = jnp.swapaxes(jnp.concatenate([g, delta], axis=-2), -1, -2)
    if vectors:
        basis, r = qr(stacked)
    else:
        basis, r = None, qr_r(stacked)
    product = _product(r[..., :m], jnp.swapaxes(r[..., m:], -1, -2))
    return (product + jnp.swapaxes(product, -1, -2)) / 2, scale, basis


def _normalised(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An array over its mean magnitude, and that: products of tiny arrays would underflow."""
    # The sum of magnitudes as a product: on CPUs XLA's own reductions take up to six times as long.
    total = jnp.einsum("...mn,...mn->...", array, jnp.sign(array), precision="highest")
    mean = total / (array.shape[-2] * array.shape[-1])
    return array / jnp.where(mean > 0, mean, 1)[..., None, None], mean


def _by_magnitude(values: jax.Array) -> jax.Array:
    order = jnp.argsort(-jnp.abs(values), axis=-1, stable=True)
    return jnp.take_along_axis(values, order, axis=-1)
