"""The largest alignment eigenvalues of a wide layer, without ever forming its matrix.

For a hidden layer of n units the exact spectrum costs a dense n × n problem. The few eigenvalues of
largest magnitude take a few dozen products `S x = ½ (Gᵀ (Δ x) + Δᵀ (G x))`: the implicitly
restarted Lanczos method of ARPACK (Lehoucq, Sorensen and Yang, 1998), which finds both ends of the
spectrum at once. It runs on the host, called back from the compiled loop.
"""

from __future__ import annotations

import functools
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

__all__ = ["TopEigenvalues", "top_alignment_eigenvalues"]

# Relative to the largest eigenvalue: what single precision leaves of a product of 4096 terms.
_TOLERANCE = 1e-5


class TopEigenvalues(NamedTuple):
    """Eigenvalues (..., k) by decreasing magnitude, and residual norms `‖S u − λ u‖` (..., k).

    Within each residual of its λ lies a true eigenvalue (S is symmetric). A value that did not
    converge, and its residual, are nan.
    """

    eigenvalues: jax.Array
    residuals: jax.Array


def top_alignment_eigenvalues(gradient: ArrayLike, update: ArrayLike, count: int) -> TopEigenvalues:
    """The `count` eigenvalues of largest magnitude of `½ (Gᵀ Δ + Δᵀ G)`, by Lanczos iterations.

    Args:
      gradient: G, shape (..., m, n), real floating.
      update: Δ, the same shape.
      count: k, 1 ≤ k < n.

    Raises:
      ValueError: shapes that differ or have fewer than two axes, or a count out of range.
      TypeError: other types.
    """
    g, delta = jnp.asarray(gradient), jnp.asarray(update)
    if g.shape != delta.shape or g.ndim < 2:
        raise ValueError(
            f"gradient has shape {g.shape} and update {delta.shape}: expected one shape "
            "(..., m, n)."
        )
    if g.dtype not in (np.float32, np.float64) or delta.dtype != g.dtype:
        raise TypeError(
            "gradient and update must both be float32 or both float64, got "
            f"{g.dtype} and {delta.dtype}."
        )
    if isinstance(count, bool) or not isinstance(count, numbers.Integral):
        raise TypeError(f"count must be a whole number, got {count!r}.")
    if not 1 <= count < g.shape[-1]:
        raise ValueError(
            f"count must lie between 1 and {g.shape[-1] - 1}, one less than the columns, got "
            f"{count}: for all of them use theory.alignment.alignment_eigenvalues."
        )

    def single(g: jax.Array, delta: jax.Array) -> TopEigenvalues:
        shape = jax.ShapeDtypeStruct((count,), g.dtype)
        found = jax.pure_callback(
            functools.partial(_arpack, count=int(count)),
            (shape, shape),
            g,
            delta,
            vmap_method="sequential",
        )
        return TopEigenvalues(*found)

    for _ in range(g.ndim - 2):
        single = jax.vmap(single)
    return single(g, delta)


def _arpack(gradient: Any, update: Any, *, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and residuals of one pair of matrices, on the host."""
    # Over their norms, so that products of tiny arrays do not underflow.
    (g, g_norm), (delta, delta_norm) = _normalised(gradient), _normalised(update)
    dtype, n = g.dtype, g.shape[1]
    scale = g_norm * delta_norm
    if not np.isfinite(scale):
        return np.full(count, np.nan, dtype), np.full(count, np.nan, dtype)
    if scale == 0:
        return np.zeros(count, dtype), np.zeros(count, dtype)

    def product(x: np.ndarray) -> np.ndarray:
        return (g.T @ (delta @ x) + delta.T @ (g @ x)) / 2

    # scipy chooses the class from its arguments, which its stubs do not know.
    make: Any = LinearOperator
    operator = make((n, n), matvec=product, matmat=product, dtype=dtype)
    start = np.random.default_rng(0).normal(size=n).astype(dtype)
    if not product(start).any():  # S = 0, though neither factor is
        return np.zeros(count, dtype), np.zeros(count, dtype)
    solve: Any = eigsh
    try:
        values, vectors = solve(operator, count, which="LM", v0=start, tol=_TOLERANCE)
    except ArpackNoConvergence as error:
        values, vectors = error.eigenvalues, error.eigenvectors
    residuals = np.linalg.norm(product(vectors) - vectors * values[None, :], axis=0)
    order = np.argsort(-np.abs(values), kind="stable")
    missing = np.full(count - len(order), np.nan)
    found = [np.concatenate([a[order], missing]) * scale for a in (values, residuals)]
    return found[0].astype(dtype), found[1].astype(dtype)


def _normalised(array: Any) -> tuple[np.ndarray, float]:
    array = np.asarray(array)
    # Through the largest entry, whose square may underflow.
    largest = float(np.max(np.abs(array)))
    if not 0 < largest < np.inf:
        return array, largest
    array = array / array.dtype.type(largest)
    norm = np.linalg.norm(array)
    return array / norm, largest * float(norm)
