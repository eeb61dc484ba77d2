"""The largest eigenvalues of a tangent kernel that is too large to form.

ARPACK's implicitly restarted Lanczos iteration (`scipy.sparse.linalg.eigsh`) on products `K v`; how
good the pairs are is measured afterwards, `‖K u − κ u‖`, and returned with them. For a symmetric
matrix there is an eigenvalue within that distance of κ (Parlett, The Symmetric Eigenvalue Problem,
Theorem 4.5.1).
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from theory.ntk.empirical import Apply, check_model, ntk_vector_product

__all__ = ["Eigenpairs", "ntk_operator", "top_eigenpairs"]


@dataclasses.dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues and eigenvectors, the largest first.

    Attributes:
      values: κ, shape (k,).
      vectors: U, shape (PC, k), orthonormal columns.
      residuals: `‖K u_i − κ_i u_i‖`, shape (k,), in the units of κ: an eigenvalue of K lies within
        this distance of `values[i]`.
    """

    values: NDArray[Any]
    vectors: NDArray[Any]
    residuals: NDArray[Any]


def ntk_operator(
    apply: Apply, params: Any, x: ArrayLike, *, chunk_size: int | None = None
) -> LinearOperator:
    """The kernel of `empirical_ntk(apply, params, x)` as a SciPy operator, never formed.

    Args:
      apply: the model, `f(params, x)` with outputs (P, ...).
      params: pytree of floating arrays.
      x: examples, shape (P, ...).
      chunk_size: as for `ntk_vector_product`.

    Returns:
      A symmetric operator of shape (PC, PC) for `scipy.sparse.linalg` (eigsh, cg, minres), in the
      precision of the parameters. It keeps the precision setting of JAX under which it was made.

    Raises:
      ValueError, TypeError: as `ntk_vector_product`.
    """
    examples = x if isinstance(x, jax.Array) else np.asarray(x)
    outputs, dtype = check_model(apply, params, examples)
    size = len(examples) * outputs
    x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    product = functools.partial(ntk_vector_product, apply, params, examples, chunk_size=chunk_size)

    def matvec(v: NDArray[Any]) -> NDArray[Any]:
        with jax.enable_x64(x64):
            return np.asarray(product(np.asarray(v, dtype).reshape(-1)))

    # SciPy's stub knows the methods of the class and not this documented way of making one.
    return LinearOperator((size, size), matvec=matvec, rmatvec=matvec, dtype=dtype)  # type: ignore[call-arg]


def top_eigenpairs(
    operator: LinearOperator | NDArray[Any],
    count: int,
    *,
    tolerance: float = 0.0,
    max_iterations: int | None = None,
    rng_seed: int = 0,
) -> Eigenpairs:
    """The `count` largest eigenvalues of a symmetric positive semidefinite operator.

    Args:
      operator: symmetric, shape (N, N): `ntk_operator(...)`, or a matrix.
      count: how many, 1 ≤ count < N.
      tolerance: relative accuracy asked of the eigenvalues; 0 is the precision of the numbers.
      max_iterations: restarts before giving up; ARPACK's 10 N by default.
      rng_seed: of the Gaussian start vector, so that the same call gives the same vectors.

    Returns:
      Pairs in order of decreasing eigenvalue, with their residuals. In an eigenspace of more than
      one dimension the basis is arbitrary; one start vector can miss copies of an exactly repeated
      eigenvalue (a Krylov space holds one), so compare with another `rng_seed` if that may matter.

    Raises:
      ValueError: an operator that is not square, or a count out of range.
      RuntimeError: no convergence within `max_iterations`; the text says how many converged.
    """
    shape = tuple(operator.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"operator has shape {shape}; expected a square one, (N, N)")
    whole = isinstance(count, numbers.Integral) and not isinstance(count, bool)
    if not whole or not 1 <= count < shape[0]:
        raise ValueError(
            f"count={count!r}; expected a whole number from 1 to N - 1 = {shape[0] - 1} (for all "
            "pairs, form the kernel and use numpy.linalg.eigh)"
        )
    dtype = np.dtype(operator.dtype)
    start = np.random.default_rng(rng_seed).normal(size=shape[0]).astype(dtype)
    try:
        values, vectors = eigsh(
            operator,
            k=int(count),
            which="LA",
            v0=start,
            tol=tolerance,  # type: ignore[arg-type]  # the stub says int
            maxiter=max_iterations,
        )
    except ArpackError as error:
        raise RuntimeError(
            f"the {count} largest eigenpairs of an operator of size {shape[0]} did not converge: "
            f"{error}. Raise tolerance or max_iterations, or ask for fewer."
        ) from error
    order = np.argsort(values)[::-1]
    values, vectors = values[order], vectors[:, order]
    images = np.stack([np.asarray(operator @ u) for u in vectors.T], axis=1)
    residuals = np.linalg.norm(images - vectors * values[None], axis=0)
    return Eigenpairs(values, vectors, residuals)
