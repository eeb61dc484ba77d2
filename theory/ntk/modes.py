"""How any update changes the loss, split along the eigenvectors of a tangent kernel.

The loss depends on the parameters θ through the outputs `f ∈ R^M` on a fixed set of points (M = PC,
the outputs of all points stacked), so that `∇_θ L = Jᵀ ∇_f L` with the Jacobian `J = ∂f/∂θ`. For an
orthonormal basis U of R^M, in particular for that of a kernel `K = J Jᵀ = U diag(κ) Uᵀ`, any update
δw, by whatever optimizer, changes the loss to first order by

    δφ = ⟨∇_θ L, δw⟩ = Σ_i δφ_i,      δφ_i = (u_iᵀ ∇_f L)(u_iᵀ J δw).

The k modes of largest κ make the top-k part, the rest the residual; all together are δφ for every
basis and every update, to rounding. For gradient descent, `δw = −η ∇_θ L`, they are
`δφ_i = −η κ_i (u_iᵀ ∇_f L)²` if K is the kernel at the same parameters.

This is the function-space twin of the decomposition by alignment matrices (`theory.alignment`;
Ghosh, Wu and Bietti, arXiv 2512.22768, section 4). For one linear layer `f = W x` under gradient
descent, `S = −η GᵀG` with `G = Σ_p g_p x_pᵀ`: let `q_j` be the principal directions of the inputs,
`Σ_p x_p x_pᵀ q_j = κ_j q_j`. The eigenvalue `κ_j` of K belongs to all outputs alike, and its modes
together contribute

    −η ‖G q_j‖² = q_jᵀ S q_j:

the diagonal of S in the inputs' principal basis, where the alignment decomposition has its
eigenvalues. The two agree as sets exactly if the vectors `G q_j` are orthogonal to one another:
for inputs that are white (every basis is principal: take G's), for a single input, or for targets
whose singular directions are the inputs' principal ones, learned from `W = 0`. Otherwise the
eigenvalues majorise the diagonal (Schur and Horn): the top-k parts of the alignment decomposition
hold at least as much of the change, at every k. With one output it has one component, the kernel as
many as there are inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from numpy.typing import NDArray

from mupjax.lapack import eigh
from theory.ntk.empirical import Apply, check_model, empirical_ntk

__all__ = ["UpdateModes", "check_kernel", "decompose_update", "kernel_modes", "mode_contributions"]


@dataclasses.dataclass(frozen=True)
class UpdateModes:
    """The linearized change of the loss by modes of a kernel: made by `decompose_update`.

    Attributes:
      eigenvalues: κ, shape (M,), decreasing.
      contributions: `δφ_i`, shape (M,), in the units of the loss.
    """

    eigenvalues: NDArray[Any]
    contributions: NDArray[Any]

    @property
    def top(self) -> NDArray[Any]:
        """`δφ^k`, shape (M,): entry k − 1 is the part of the k modes of largest eigenvalue."""
        return np.cumsum(self.contributions)

    @property
    def residual(self) -> NDArray[Any]:
        """`δφ^{−k} = δφ − δφ^k`, shape (M,)."""
        return self.total - self.top

    @property
    def total(self) -> float:
        """`δφ`."""
        return float(np.sum(self.contributions))


def mode_contributions(
    modes: ArrayLike, output_gradient: ArrayLike, output_change: ArrayLike
) -> jax.Array:
    """`δφ_i = (u_iᵀ ∇_f L)(u_iᵀ J δw)`; can be traced and vmapped.

    Args:
      modes: U, orthonormal columns: (PC, r), output c of point i at row i·C + c; or (P, r) if all
        outputs have one kernel and do not mix, and then mode i holds all of them.
      output_gradient: `∇_f L`, shape (P,) or (P, C).
      output_change: `J δw`, the same shape.

    Returns:
      Shape (r,).

    Raises:
      ValueError: shapes that do not fit.
    """
    U, g, change = (jnp.asarray(a) for a in (modes, output_gradient, output_change))
    if g.shape != change.shape or g.ndim == 0:
        raise ValueError(
            f"output_gradient has shape {g.shape} and output_change {change.shape}; expected one "
            "shape, (P,) or (P, C)"
        )
    if U.ndim != 2 or U.shape[0] not in (g.size, g.shape[0]):
        raise ValueError(
            f"modes has shape {U.shape}; expected ({g.size}, r) or ({g.shape[0]}, r) for outputs "
            f"of shape {g.shape}"
        )
    rows = U.shape[0]
    # "highest": accelerators would round the factors to 10 bits.
    dot = jax.lax.Precision.HIGHEST
    along_gradient = jnp.matmul(U.T, g.reshape(rows, -1), precision=dot)
    along_change = jnp.matmul(U.T, change.reshape(rows, -1), precision=dot)
    return jnp.sum(along_gradient * along_change, axis=1)


def kernel_modes(kernel: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues (M,), decreasing, and eigenvectors (M, M), as columns; can be traced."""
    K = jnp.asarray(kernel)
    values, vectors = eigh((K + K.T) / 2)
    return values[::-1], vectors[:, ::-1]


def check_kernel(kernel: ArrayLike) -> NDArray[np.floating]:
    """A given kernel as an array: square, real, finite, and symmetric to 1e-4 of its entries.

    Raises:
      ValueError: it is not.
    """
    K = np.asarray(kernel)
    square = K.ndim == 2 and K.shape[0] == K.shape[1] and K.size > 0
    if not square or np.iscomplexobj(K) or not np.isfinite(K).all():
        raise ValueError(
            f"kernel has shape {K.shape} and type {K.dtype}; expected a square matrix of finite "
            "real numbers"
        )
    asymmetry = float(np.abs(K - K.T).max())
    if asymmetry > 1e-4 * float(np.abs(K).max()):
        raise ValueError(
            f"kernel is not symmetric: entries differ by {asymmetry:.3g} from their mirror images; "
            "give (K + K.T) / 2 if that is meant"
        )
    return K


def decompose_update(
    apply: Apply,
    params: Any,
    update: Any,
    x: ArrayLike,
    loss: Callable[[jax.Array], jax.Array],
    *,
    kernel: ArrayLike | None = None,
    chunk_size: int | None = None,
) -> UpdateModes:
    """One update of any optimizer, by modes of a tangent kernel.

    Args:
      apply: the model, `f(params, x)`, outputs (P, ...).
      params: θ, a pytree of floating arrays.
      update: δw, a tree like it.
      x: the points, shape (P, ...).
      loss: `L(f)`, a function of the outputs on all points.
      kernel: that whose modes are used: by default the empirical one at `params`; or (PC, PC), such
        as that at initialisation; or (P, P), shared by all outputs, such as a network's at infinite
        width (`infinite_width_kernels`).
      chunk_size: for the empirical kernel, see `empirical_ntk`.

    Returns:
      Modes in order of decreasing eigenvalue; they sum to `⟨∇_θ L, δw⟩` to rounding.

    Raises:
      ValueError, TypeError: as `empirical_ntk`; an update that is not like the parameters.
    """
    points = x if isinstance(x, jax.Array) else np.asarray(x)
    check_model(apply, params, points)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params, update)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"update has shapes {shapes[1]}; expected those of the parameters, {shapes[0]}"
        )
    if kernel is None:
        kernel = empirical_ntk(apply, params, points, chunk_size=chunk_size)
    elif not isinstance(kernel, Tracer):
        kernel = check_kernel(kernel)
    outputs, change = jax.jvp(lambda p: apply(p, points), (params,), (update,))
    eigenvalues, modes = kernel_modes(kernel)
    contributions = mode_contributions(modes, jax.grad(loss)(outputs), change)
    return UpdateModes(np.asarray(eigenvalues), np.asarray(contributions))
