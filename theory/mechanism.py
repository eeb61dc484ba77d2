"""Why an optimum may stay put as networks widen: the bound `b_n ≤ t_n` of the top-κ part.

A truncation κ splits the loss `φ_n = φ_n^κ + φ_n^{−κ}` (`theory.truncation`). After Ghosh, Wu and
Bietti (arXiv 2512.22768, section 4), with `μ(f) = inf f''` and `Lip(f) = sup |f'|` on an interval,

    ε_inv(κ)  = sup |φ_n^κ − φ_∞^κ| / max(μ(φ_n^κ), μ(φ_∞^κ)),
    ε_flat(κ) = Lip(φ_n^{−κ})/μ(φ_n) + Lip(φ_∞^{−κ})/μ(φ_∞),
    J(κ) = 2 √ε_inv + ε_flat,   t_n = min J(κ) over κ with μ(φ_n^κ), μ(φ_∞^κ) > 0.

**Why `b_n ≤ t_n`**, on any interval that holds ν*(n) and ν*(∞). Let x minimise `φ_n^κ` and y
`φ_∞^κ` on it. (i) Where `f = φ_n^κ` is μ-convex, `μ/2 |x − y|² ≤ f(y) − f(x) ≤ 2 sup|f − φ_∞^κ|`,
likewise with n and ∞ exchanged, so `|x − y| ≤ 2 √ε_inv`. (ii) First-order conditions on the
interval give `(φ_n'(x) − φ_n'(ν*)) (x − ν*) ≤ (φ_n^{−κ})'(x) (x − ν*)`, and the left side is at
least `μ(φ_n) |x − ν*|²`: so `|x − ν*(n)| ≤ Lip(φ_n^{−κ})/μ(φ_n)`, likewise at ∞. The three
distances add up. Minima may lie at the interval's ends; κ may depend on ν as long as the split
curves meet the conditions.

**On a grid** the largest width stands for ∞ and the same steps, with divided differences for
derivatives (`GridCurves`), cost up to one grid step h each: the grid's minima obey
`b_n ≤ t_n + 3h` for every κ, whatever it does from one grid point to the next. Fitted parabolas
(`Parabolas`) obey `b_n ≤ t_n` as they are. On noisy curves differences give a t_n that is much too
large, or none; parabolas one that is about right.

J is minimised over constant κ by trying all, then over κ(ν) by coordinate descent from the best of
these (and from a κ given): an upper end of the true minimum, hence a bound in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.mechanism_curves import GridCurves, Parabolas, Reading, read_curves
from theory.truncation import check_curves, check_kappa, split_curves

__all__ = ["Terms", "TransferBound", "mechanism_terms", "transfer_bound", "window_around"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Terms:
    """J(κ) and what it is made of, for κ of shape (..., g); units of the loss and of `hp_grid`.

    Attributes:
      objective: J, in units of `hp_grid`, shape (...); `inf` where a curvature is not positive.
      invariance, flatness: ε_inv and ε_flat, shape (...); `inf` where they are not defined.
      top_curvature: `μ(φ^κ)` at n and at the largest width, (..., 2).
      curvature: `μ(φ)` at both, (2,).
      residual_slope: `Lip(φ^{−κ})` at both, (..., 2).
      disagreement: `sup |φ_n^κ − φ_max^κ|`, shape (...).
      instability: the disagreement over the height of the bowl, `sup − inf` of `φ_max^κ`.
      unevenness: `sup − inf` of the residual over that of the top-κ curve, the larger of both
        widths: 0 for a flat residual.
      top_share: `μ(φ^κ)/μ(φ)`, the smaller of both widths: the share of the bowl that the top-κ
        part makes; −inf where the whole curve is not convex.
      top_argmin: minima of the top-κ curves at both widths, (..., 2).
      argmin: minima of the whole curves, (2,).
    """

    objective: FloatArray
    invariance: FloatArray
    flatness: FloatArray
    top_curvature: FloatArray
    curvature: FloatArray
    residual_slope: FloatArray
    disagreement: FloatArray
    instability: FloatArray
    unevenness: FloatArray
    top_share: FloatArray
    top_argmin: FloatArray
    argmin: FloatArray


@dataclass(frozen=True)
class TransferBound:
    """`t_n` at the truncation that makes it smallest.

    Attributes:
      bound: t_n in units of `hp_grid`; `inf` where no κ meets the conditions.
      kappa: the minimiser, g integers from 1 to n, or None. Outside of the window it holds the
        value of the window's nearer end.
      constant_kappa, constant_bound: the best constant κ and its J.
      terms: at `kappa`, or None.
      hp_gap: b_n, the distance between the whole curves' minima, read in the same way.
      slack: what the grid may add to the bound: three steps, or 0 for parabolas.
      window: first and last hyperparameter used.
      reason: one sentence.
    """

    bound: float
    kappa: IntArray | None
    constant_kappa: int | None
    constant_bound: float
    terms: Terms | None
    hp_gap: float
    slack: float
    window: tuple[float, float]
    reason: str

    @property
    def holds(self) -> bool:
        """`b_n ≤ t_n`, up to the slack."""
        return self.hp_gap <= self.bound + self.slack


def mechanism_terms(
    hp_grid: ArrayLike,
    phi_n: ArrayLike,
    phi_max: ArrayLike,
    kappa: ArrayLike,
    *,
    reading: Reading = "differences",
) -> Terms:
    """The terms of J on the whole grid (cut it with `window_around` first).

    Args:
      hp_grid: shape (g,), g ≥ 3, increasing, on the scale on which it is compared (log2).
      phi_n: shape (g, n), column k − 1 holding `φ_n^k`.
      phi_max: shape (g, n_max), n_max ≥ n.
      kappa: integers from 1 to n, shape (..., g).
      reading: how μ, Lip and sup are read off the grid, see `theory.mechanism_curves`.

    Raises:
      ValueError: arguments not as described, or not finite.
    """
    x, ours, largest = check_curves(hp_grid, phi_n, phi_max)
    chosen = check_kappa(kappa, x.size, ours.shape[1])
    (top_n, rest_n), (top_max, rest_max) = (split_curves(phi, chosen) for phi in (ours, largest))

    def read(values: FloatArray) -> GridCurves | Parabolas:
        return read_curves(x, values, reading)

    tops, rests = [read(top_n), read(top_max)], [read(rest_n), read(rest_max)]
    wholes = [read(ours[:, -1]), read(largest[:, -1])]
    gap = read(top_n - top_max).size
    mu_top, mu = (np.stack([c.curvature for c in curves], axis=-1) for curves in (tops, wholes))
    lip = np.stack([c.slope for c in rests], axis=-1)
    convex = mu_top > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        steepest = mu_top.max(axis=-1)
        invariance = np.where(steepest > 0, gap / np.where(steepest > 0, steepest, 1), np.inf)
        flatness = np.where((mu > 0).all(), (lip / np.where(mu > 0, mu, 1)).sum(-1), np.inf)
        bowls = np.stack([c.spread for c in tops], axis=-1)
        uneven = np.stack([c.spread for c in rests], axis=-1)
        # 0/0: a part that is not there agrees and is flat.
        instability = np.where(gap > 0, gap / bowls[..., 1], 0.0)
        unevenness = np.where(uneven > 0, uneven / bowls, 0.0).max(axis=-1)
        share = np.where((mu > 0).all(), (mu_top / np.where(mu > 0, mu, 1)).min(-1), -np.inf)
    defined = convex.all(axis=-1)
    return Terms(
        objective=np.where(defined, 2 * np.sqrt(invariance) + flatness, np.inf),
        invariance=invariance,
        flatness=flatness,
        top_curvature=mu_top,
        curvature=mu,
        residual_slope=lip,
        disagreement=gap,
        instability=instability,
        unevenness=unevenness,
        top_share=share,
        top_argmin=np.stack([c.argmin for c in tops], axis=-1),
        argmin=np.stack([c.argmin for c in wholes], axis=-1),
    )


def window_around(
    hp_grid: ArrayLike, phi_n: ArrayLike, phi_max: ArrayLike, reach: float | None
) -> slice:
    """The grid points no farther than `reach` from the whole curves' minima or between these.

    Losses against the logarithm of a learning rate are convex near their minimum only, and the
    bound needs no more than an interval that holds both minima. The window has at least 3 points:
    where it would have fewer, the nearest ones are added.

    Args:
      hp_grid, phi_n, phi_max: as for `mechanism_terms`.
      reach: in units of `hp_grid`; None for the whole grid.

    Raises:
      ValueError: arguments not as described.
    """
    x, ours, largest = check_curves(hp_grid, phi_n, phi_max)
    if reach is None:
        return slice(0, x.size)
    if not (np.isfinite(reach) and reach > 0):
        raise ValueError(f"reach must be positive and finite, or None, got {reach!r}.")
    best = sorted(float(x[phi[:, -1].argmin()]) for phi in (ours, largest))
    distance = np.maximum(np.maximum(best[0] - x, x - best[1]), 0.0)
    needed = max(reach * (1 + 1e-9), float(np.sort(distance)[2]))
    inside = np.flatnonzero(distance <= needed)
    return slice(int(inside[0]), int(inside[-1]) + 1)


def transfer_bound(
    hp_grid: ArrayLike,
    phi_n: ArrayLike,
    phi_max: ArrayLike,
    *,
    reach: float | None = 2.0,
    reading: Reading = "parabola",
    kappa: ArrayLike | None = None,
) -> TransferBound:
    """`t_n` by minimising J over truncations, beside b_n.

    Args:
      hp_grid, phi_n, phi_max: as for `mechanism_terms`.
      reach: of the window around the minima, in units of `hp_grid`; None for the whole grid.
      reading: `"differences"` for exact curves, `"parabola"` for measured ones.
      kappa: a further truncation to start from, shape (g,), such as κ̂(n).

    Raises:
      ValueError: arguments not as described, or not finite.
    """
    x, ours, largest = check_curves(hp_grid, phi_n, phi_max)
    n = ours.shape[1]
    window = window_around(x, ours, largest, reach)
    xs, f, g = x[window], ours[window], largest[window]

    def terms(chosen: IntArray) -> Terms:
        return mechanism_terms(xs, f, g, chosen, reading=reading)

    constants = np.repeat(np.arange(1, n + 1)[:, None], xs.size, axis=1)
    tried = terms(constants)
    best = int(np.argmin(tried.objective))
    starts = [constants[best]]
    if kappa is not None:
        starts.append(check_kappa(kappa, x.size, n)[window])
    found = min((_descend(terms, start, n) for start in starts), key=lambda pair: pair[1])
    finite = bool(np.isfinite(found[1]))
    # Terms of the whole curves are there whatever κ is.
    minima = tried.argmin
    steps = float(np.diff(xs).max())
    padded = np.pad(found[0], (window.start, x.size - window.stop), mode="edge")
    if finite:
        reason = "J at its smallest over truncations with convex top-κ curves"
    elif not (tried.curvature > 0).all():
        reason = "the whole loss curve is not convex there: narrow the window (reach)"
    else:
        reason = "no truncation has convex top-κ curves at both widths"
    return TransferBound(
        bound=float(found[1]),
        kappa=padded if finite else None,
        constant_kappa=best + 1 if np.isfinite(tried.objective[best]) else None,
        constant_bound=float(tried.objective[best]),
        terms=terms(found[0]) if finite else None,
        hp_gap=float(abs(minima[0] - minima[1])),
        slack=3 * steps if reading == "differences" else 0.0,
        window=(float(xs[0]), float(xs[-1])),
        reason=reason,
    )


def _descend(terms: Callable[[IntArray], Terms], start: IntArray, n: int) -> tuple[IntArray, float]:
    """Coordinate descent of J from a start."""
    kappa = start.copy()
    value = float(terms(kappa).objective)
    changed = np.isfinite(value)
    while changed:
        changed = False
        for i in range(kappa.size):
            candidates = np.repeat(kappa[None], n, axis=0)
            candidates[:, i] = np.arange(1, n + 1)
            values = terms(candidates).objective
            best = int(np.argmin(values))
            # A move must gain more than rounding, or ties could be walked in circles.
            if values[best] < value * (1 - 1e-12):
                kappa, value, changed = candidates[best], float(values[best]), True
    return kappa, value
