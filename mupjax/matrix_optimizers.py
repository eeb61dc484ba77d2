"""Optimizers that orthogonalise the updates of hidden matrices and leave the rest to Adam.

Which parameters are hidden matrices, and which of their axes are summed over, is decided by role
(`mupjax.roles`), never by the number of axes: an embedding and a readout have two axes and belong
to Adam, an attention kernel may have three and does not. A factory with a parameter called
``roles`` is handed them by the engine:

    lambda learning_rate, roles: muon(learning_rate, roles=roles, adam_learning_rate=0.004)

In the notation of Ghosh, Wu and Bietti (arXiv 2512.22768, appendix on optimizers) a hidden matrix W
is m × n, outputs × inputs, and both updates have spectral norm `η √(m/n)`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from mupjax.lapack import qr
from mupjax.roles import LeafRole, map_leaves

__all__ = ["dion", "muon", "scale_by_dion"]

_HIDDEN = ("hidden", "query")


class _Axes(NamedTuple):
    """How a kernel is read as a matrix, or a batch of them: axes summed over, axes produced."""

    fan_in: tuple[int, ...]
    fan_out: tuple[int, ...]


def muon(
    learning_rate: ArrayLike,
    *,
    roles: Mapping[str, LeafRole],
    adam_learning_rate: ArrayLike | None = None,
    beta: ArrayLike = 0.95,
    nesterov: bool = False,
    newton_schulz_steps: int = 5,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
) -> optax.GradientTransformation:
    """Muon on hidden matrices, Adam on all other parameters.

        M ← β M + (1 − β) G,    W ← W − η √(m/n) msgn(M),

    the matrix sign by Newton–Schulz iterations (`optax.contrib.scale_by_muon`).

    Args:
      learning_rate: η of the hidden matrices.
      roles: role and layout of every parameter, by path; the engine hands them over.
      adam_learning_rate: of the rest; by default η.
      beta: momentum.
      nesterov: look ahead by one step of momentum, as optax and Jordan's Muon do by default; the
        paper does not.
      newton_schulz_steps: iterations; with 5 the singular values lie between about 0.7 and 1.2.
      b1, b2, eps: Adam's.

    Raises:
      ValueError: no parameter is a hidden matrix, or one whose axes are not known.
    """
    axes = _hidden_axes(roles)

    def dimensions(tree: Any) -> Any:
        return map_leaves(
            lambda path, _: optax.contrib.MuonDimensionNumbers(*axes[path]),
            tree,
        )

    direction = optax.contrib.scale_by_muon(
        ns_steps=newton_schulz_steps,
        beta=beta,
        nesterov=nesterov,
        weight_dimension_numbers=dimensions,
    )
    return _partition(direction, learning_rate, adam_learning_rate, axes, b1, b2, eps)


def dion(
    learning_rate: ArrayLike,
    *,
    roles: Mapping[str, LeafRole],
    rank_fraction: float = 0.5,
    max_rank: int | None = None,
    adam_learning_rate: ArrayLike | None = None,
    momentum: ArrayLike = 0.95,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
) -> optax.GradientTransformation:
    """Dion (Ahn et al., arXiv 2504.05295) on hidden matrices, Adam on all other parameters.

    The rank is ``rank_fraction * min(m, n)``, rounded, at least 1 and at most ``max_rank``: the
    paper's two choices are ``(0.5, 128)``, bounded, and ``(0.5, None)``, proportional.

    Args:
      learning_rate: η of the hidden matrices.
      roles: role and layout of every parameter, by path; the engine hands them over.
      rank_fraction: of the smaller side, in (0, 1].
      max_rank: bound on the rank, or None.
      adam_learning_rate: of the rest; by default η.
      momentum: μ.
      b1, b2, eps: Adam's.

    Raises:
      ValueError: as `muon`; or a rank that is out of range.
    """
    axes = _hidden_axes(roles)
    direction = scale_by_dion(axes, rank_fraction, max_rank, momentum)
    return _partition(direction, learning_rate, adam_learning_rate, axes, b1, b2, eps)


class DionState(NamedTuple):
    """Momentum M, shaped like the parameters, and the right basis Q, (batch, n, r).

    Both of single precision where the parameters are of half.
    """

    momentum: Any
    basis: Any


def scale_by_dion(
    axes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    rank_fraction: float = 0.5,
    max_rank: int | None = None,
    momentum: ArrayLike = 0.95,
) -> optax.GradientTransformation:
    """The direction `P Qᵀ` of Dion's update, one step of power iteration on the momentum.

        M̃ = M + G,   P = orth(M̃ Q),   R = M̃ᵀ P,   Q ← R / ‖columns‖,   M ← M̃ − (1 − μ) P Rᵀ.

    Args:
      axes: by path, the axes summed over and the axes produced; any others are a batch of matrices.
      rank_fraction, max_rank, momentum: see `dion`.

    Raises:
      ValueError: a rank that is out of range.
    """
    if not 0 < rank_fraction <= 1:
        raise ValueError(f"rank_fraction must lie in (0, 1], got {rank_fraction!r}.")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, or None, got {max_rank!r}.")

    def basis(path: str, leaf: Any) -> jax.Array:
        batch, m, n = _matrices(leaf, axes[path]).shape
        rank = max(1, round(rank_fraction * min(m, n)))
        rank = rank if max_rank is None else min(rank, max_rank)
        # Any full-rank start will do; it differs by parameter and is the same in every trial.
        key = jax.random.key(zlib.crc32(path.encode()))
        return jax.random.normal(key, (batch, n, rank), _single(leaf.dtype))

    def init(params: Any) -> DionState:
        momentum = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, _single(leaf.dtype)), params)
        return DionState(momentum, map_leaves(basis, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, DionState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        paths = jax.tree.leaves(map_leaves(lambda path, _: path, updates))
        momenta, bases = jax.tree.leaves(state.momentum), jax.tree.leaves(state.basis)
        directions, new_momenta, new_bases = [], [], []
        for path, gradient, old, Q in zip(paths, leaves, momenta, bases, strict=True):
            M = _matrices(old + gradient, axes[path])
            # Squares of tiny or huge entries would leave the range of numbers.
            scale = jnp.max(jnp.abs(M), axis=(-2, -1), keepdims=True)
            M = M / jnp.where(scale > 0, scale, 1)
            P, _ = qr(M @ Q)
            R = jnp.swapaxes(M, -1, -2) @ P
            norms = jnp.linalg.norm(R, axis=-2, keepdims=True)
            # Where M̃ has a smaller rank than Q, the rest of R is rounding and no direction.
            size = jnp.linalg.norm(M, axis=(-2, -1), keepdims=True)
            seen = norms > max(M.shape[-2:]) * jnp.finfo(M.dtype).eps * size
            directed = jnp.where(seen, R / jnp.where(seen, norms, 1), 0)
            Q = jnp.where(seen, directed, Q)
            M = M - (1 - jnp.asarray(momentum, M.dtype)) * (P @ jnp.swapaxes(R, -1, -2))
            new_bases.append(Q)
            new_momenta.append(_restored(scale * M, gradient, axes[path]))
            step = P @ jnp.swapaxes(directed, -1, -2)
            directions.append(_restored(step, gradient, axes[path]).astype(gradient.dtype))
        restore = structure.unflatten
        return restore(directions), DionState(restore(new_momenta), restore(new_bases))

    return optax.GradientTransformation(init, update)


def _partition(
    direction: optax.GradientTransformation,
    learning_rate: ArrayLike,
    adam_learning_rate: ArrayLike | None,
    axes: Mapping[str, _Axes],
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
) -> optax.GradientTransformation:
    def shape_factor(path: str, leaf: jax.Array) -> jax.Array:
        into, out = (math.prod(leaf.shape[a] for a in own) for own in axes[path])
        return leaf * math.sqrt(out / into)

    matrices = optax.chain(
        direction,
        optax.stateless(lambda updates, _: map_leaves(shape_factor, updates)),
        optax.scale_by_learning_rate(jnp.asarray(learning_rate)),
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    rest = optax.adam(jnp.asarray(rate), b1=b1, b2=b2, eps=eps)
    return optax.partition(
        {"hidden": matrices, "rest": rest},
        lambda params: map_leaves(lambda p, _: "hidden" if p in axes else "rest", params),
    )


def _hidden_axes(roles: Mapping[str, LeafRole]) -> dict[str, _Axes]:
    found: dict[str, _Axes] = {}
    for path, leaf in roles.items():
        if leaf.role not in _HIDDEN:
            continue
        layout = leaf.layout
        if layout is None or layout.kind != "matrix":
            raise ValueError(
                f"which axes of the hidden matrix {path!r} are summed over is not known, and the "
                "update's scale depends on it: state it as mupjax.Model(..., layouts={"
                f"{path!r}: Layout('matrix', fan_in=(...), fan_out=(...))}})."
            )
        found[path] = _Axes(layout.fan_in, layout.fan_out)
    if not found:
        raise ValueError(
            "no parameter of the model is a hidden matrix (width to width), so there is nothing to "
            "orthogonalise: use optax.adam, or a model with more than one hidden layer."
        )
    return found


def _single(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _order(ndim: int, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...]:
    into, out = (tuple(a % ndim for a in own) for own in axes)
    return (*(a for a in range(ndim) if a not in (*into, *out)), *out, *into)


def _matrices(array: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """A kernel as matrices (batch, outputs, inputs)."""
    moved = array.transpose(_order(array.ndim, axes))
    into, out = (math.prod(array.shape[a] for a in own) for own in axes)
    return moved.reshape(-1, out, into)


def _restored(
    matrices: jax.Array, like: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]
) -> jax.Array:
    order = _order(like.ndim, axes)
    moved = matrices.reshape([like.shape[a] for a in order])
    return moved.transpose([order.index(a) for a in range(like.ndim)])
