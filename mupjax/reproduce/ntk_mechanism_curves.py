"""The closed-form half of ``ntk-mechanism``: problems, initial weights, loss curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from mupjax.adapters import Model
from synthetic.linearized import (
    linearize,
    random_features,
    random_features_kernel,
    two_layer_kernel,
    two_layer_relu,
)
from theory.mechanism import mechanism_terms, transfer_bound
from theory.ntk import (
    LinearizedEnsemble,
    LinearizedTraining,
    infinite_width_kernels,
    linearized_ensemble,
    linearized_training,
)
from theory.truncation import candidate_penalties, select_truncation

__all__ = ["FAMILIES", "PROBLEMS", "Curves", "Family", "Size", "closed_form", "points"]

FloatArray = NDArray[np.float64]

DRAWS = 400
# Learning rates in octaves from the infinite width's best one. The loss rises steeply above it.
OCTAVES = np.arange(-48, 5) / 16
# Of every second one: the search for κ̂(n) is quadratic in them.
_COARSE = slice(None, None, 2)
# Learning rates between the best ones of a width and of infinite width, for the bound.
_BETWEEN = 49
# Where top-κ curves are compared, in octaves: lowest and highest.
REGIONS = {"below": (-3.0, -0.5), "at": (0.0, 0.0)}
# A truncation sets the optimum if it moves the minimum by no more than this many octaves.
SET_WITHIN = 0.25
_PARTS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Size:
    """How much a scale computes.

    Attributes:
      points: P.
      input_dim: d of the Gaussian problems.
      steps: T.
      widths: increasing.
      initialisations: S at every width.
      fit_from: smallest width in the fits of rates: about T², see the notes.
      trained_widths, trained_seeds: what the engine trains to confirm.
    """

    points: int
    input_dim: int
    steps: int
    widths: tuple[int, ...]
    initialisations: int
    fit_from: int
    trained_widths: tuple[int, ...]
    trained_seeds: int


@dataclasses.dataclass(frozen=True)
class Family:
    """A model that is linear in what it trains.

    Attributes:
      initial: `initial(input_dim)(width)`, the model whose initial weights make the kernel.
      trained: the same as it is trained.
      kernel: `kernel(params, x)`, (P, P).
      limit: the kernel at infinite width.
    """

    initial: Callable[[int], Callable[[int], Model]]
    trained: Callable[[int], Callable[[int], Model]]
    kernel: Callable[[Any, jax.Array], jax.Array]
    limit: Callable[[FloatArray], FloatArray]


FAMILIES: dict[str, Family] = {
    "random features": Family(
        random_features,
        random_features,
        random_features_kernel,
        lambda x: infinite_width_kernels(x, depth=1, activation="erf").nngp,
    ),
    "two-layer NTK": Family(
        two_layer_relu,
        lambda d: linearize(two_layer_relu(d), centred=True),
        two_layer_kernel,
        lambda x: infinite_width_kernels(x, depth=1).ntk,
    ),
}

_INPUTS = {
    "power law": "power law",
    "digits": "digits",
    "isotropic": "isotropic",
    "noise": "power law",
    "hidden mode": "power law",
}
PROBLEMS = tuple(_INPUTS)
"""Gaussian inputs whose variances fall as 1/j; handwritten digits, odd against even; Gaussian
inputs of equal variances; the first inputs with random labels, averaged over all of them; and with
the part of the labels taken out that the top mode at infinite width would learn."""


def points(problem: str, size: Size) -> tuple[FloatArray, FloatArray]:
    """Inputs (P, d) with mean squared norm 4, targets (P,) of variance 1, or (P, P) for noise.

    With the squared loss, the mean over all targets of independent entries of variance 1 is the
    loss of the P targets that are the columns of the identity, taken together.
    """
    rng = np.random.default_rng(0)
    P, d = size.points, size.input_dim
    if problem == "digits":
        pixels, labels = (np.asarray(a, np.float64) for a in load_digits(return_X_y=True))
        rows = rng.permutation(len(pixels))[:P]
        x, y = pixels[rows] - pixels.mean(axis=0), 1.0 - 2.0 * (labels[rows] % 2)
    else:
        variance = np.ones(d) if problem == "isotropic" else 1 / np.arange(1.0, d + 1)
        x = rng.normal(size=(P, d)) * np.sqrt(variance)
        x *= 2 / np.sqrt(variance.sum())
        linear, square = rng.normal(size=(2, d)) / 2
        y = x @ linear + (x @ square) ** 2 / 2
    x = 2 * x / np.sqrt(np.mean(np.sum(x**2, axis=1)))
    return x, np.eye(P) if problem == "noise" else (y - y.mean()) / y.std()


@dataclasses.dataclass(frozen=True)
class Curves:
    """Infinite width and the ensembles of every width of one family on one problem."""

    limit: LinearizedTraining
    ensembles: dict[int, LinearizedEnsemble]


def closed_form(size: Size) -> tuple[xr.Dataset, dict[tuple[str, str], Curves]]:
    """Curves, gaps, truncations and bounds of every family, problem and width."""
    found, rows = {}, []
    for name, family in FAMILIES.items():
        kernels = {
            inputs: _kernels(family, points(inputs, size)[0], size)
            for inputs in set(_INPUTS.values())
        }
        own = []
        for problem, inputs in _INPUTS.items():
            curves = _curves(problem, points(problem, size)[1], *kernels[inputs])
            found[name, problem] = curves
            own.append(_measure(curves, size).expand_dims(problem=[problem]))
        rows.append(_joined(own, "problem").expand_dims(family=[name]))
    dataset = _joined(rows, "family")
    dataset["octaves"].attrs["long_name"] = "log2 of the learning rate over the best at n = ∞"
    return dataset, found


def _joined(parts: list[xr.Dataset], dimension: str) -> xr.Dataset:
    return cast(xr.Dataset, xr.concat(parts, dimension))


def initial_weights(model: Model, seed: jax.Array) -> Any:
    """The initial weights of the sweep engine's trial of a seed."""
    return model.init(jax.random.fold_in(jax.random.key(seed), 0))


def _kernels(
    family: Family, x: FloatArray, size: Size
) -> tuple[FloatArray, dict[int, list[FloatArray]]]:
    """At infinite width, (P, P), and of every initialisation of every width."""
    finite = {}
    for width in size.widths:
        model = family.initial(x.shape[1])(width)
        with jax.enable_x64(True):
            points = jnp.asarray(x)

            @jax.jit
            def kernel(seed: Any, model: Model = model, points: jax.Array = points) -> jax.Array:
                return family.kernel(initial_weights(model, seed), points)

            finite[width] = [np.asarray(kernel(seed)) for seed in range(size.initialisations)]
    return family.limit(x), finite


def _curves(
    problem: str, y: FloatArray, limit: FloatArray, finite: dict[int, list[FloatArray]]
) -> Curves:
    if problem == "hidden mode":
        top = np.linalg.eigh(limit)[1][:, -1]
        y = y - top * (top @ y)
    ensembles = {
        width: linearized_ensemble([linearized_training(K, -y) for K in kernels])
        for width, kernels in finite.items()
    }
    return Curves(linearized_training(limit, -y), ensembles)


def _measure(curves: Curves, size: Size) -> xr.Dataset:
    limit, T = curves.limit, size.steps
    best = limit.optimum(T)
    rates = best.learning_rate * 2.0**OCTAVES
    top_limit = linearized_ensemble([limit]).top(rates, T)
    kappa = _fewest_that_set_the_optimum(limit, T)
    parts = np.array([k for k in _PARTS if k < size.points] + [size.points])
    per_width = [
        _measure_width(ensemble, limit, top_limit, rates, kappa, parts, T)
        for ensemble in curves.ensembles.values()
    ]
    dataset = _joined(per_width, "width").assign_coords(width=list(curves.ensembles))
    scale = np.sum(limit.mode_energies) / (2 * limit.points)
    return dataset.assign(
        limit_best_rate=((), best.learning_rate),
        limit_best_loss=((), best.loss),
        limit_top=(("octaves", "parts"), top_limit[:, parts - 1]),
        limit_top_kappa=("octaves", top_limit[:, kappa - 1]),
        kappa=((), kappa),
        initial_loss=((), scale),
        edge=((), best.learning_rate * limit.eigenvalues[0] / limit.points),
        limit_eigenvalues=("mode", limit.eigenvalues),
        limit_energies=("mode", limit.mode_energies),
    ).assign_coords(octaves=OCTAVES, coarse_octaves=OCTAVES[_COARSE], parts=parts)


def _measure_width(
    ensemble: LinearizedEnsemble,
    limit: LinearizedTraining,
    top_limit: FloatArray,
    rates: FloatArray,
    kappa: int,
    parts: NDArray[np.int64],
    T: int,
) -> xr.Dataset:
    gaps = ensemble.gaps(limit, T, draws=DRAWS)
    tops = np.cumsum(ensemble.member_changes(rates, T), axis=-1)
    top = tops.mean(axis=0)
    truncation = select_truncation(
        OCTAVES[_COARSE],
        top[_COARSE],
        top_limit[_COARSE],
        penalties=candidate_penalties(OCTAVES),
        convexity_tolerance=0.1,
        argmin_tolerance=SET_WITHIN,
    )
    weights = ensemble.resampling_weights(DRAWS)
    shares = [
        _share(tops, top_limit, weights, kappa, (low <= OCTAVES) & (high >= OCTAVES))
        for low, high in REGIONS.values()
    ]
    nothing = np.full(OCTAVES[_COARSE].size, np.nan)
    return xr.Dataset(
        {
            "loss_gap": ((), gaps.loss_gap),
            "hp_gap": ((), gaps.hp_gap),
            "suboptimality": ((), gaps.suboptimality),
            "gap_draws": (("draw", "gap"), gaps.draws),
            "total": ("octaves", top[:, -1]),
            "top": (("octaves", "parts"), top[:, parts - 1]),
            "top_kappa": ("octaves", top[:, kappa - 1]),
            "share_draws": (("region", "draw"), np.stack(shares)),
            "kappa_hat": (
                "coarse_octaves",
                nothing if truncation.kappa is None else truncation.kappa.astype(float),
            ),
        }
        | _bound(ensemble, gaps.optimum.learning_rate, limit, parts, T),
        coords={"gap": ["loss_gap", "hp_gap", "suboptimality"], "region": list(REGIONS)},
    )


def _share(
    tops: FloatArray,
    top_limit: FloatArray,
    weights: FloatArray,
    kappa: int,
    inside: NDArray[np.bool_],
) -> FloatArray:
    """Mean |difference of the top-κ curves to infinite width| over that of the whole ones."""
    part, whole = (
        np.abs(weights @ (tops[:, inside, k] - top_limit[None, inside, k])).mean(axis=1)
        for k in (kappa - 1, -1)
    )
    return part / whole


def _bound(
    ensemble: LinearizedEnsemble,
    rate: float,
    limit: LinearizedTraining,
    parts: NDArray[np.int64],
    T: int,
) -> dict[str, Any]:
    """t_n in the learning rate itself, on the interval between the two optima.

    There every top-k curve is convex, as each mode's loss is, so that every truncation has a bound;
    any interval that holds both optima will do, and the shortest has the smallest suprema. Lengths
    are relative to the limit's best learning rate.
    """
    best = limit.optimum(T).learning_rate
    low, high = sorted((rate / best, 1.0))
    grid = np.linspace(low, max(high, low + 1e-6), _BETWEEN)
    top = ensemble.top(best * grid, T)
    top_limit = linearized_ensemble([limit]).top(best * grid, T)
    found = transfer_bound(grid, top, top_limit, reach=None, reading="differences")
    constant = np.repeat(parts[:, None], grid.size, axis=1)
    tried = mechanism_terms(grid, top, top_limit, constant)
    terms, nothing = found.terms, (np.nan, np.nan)
    invariance, flatness = (terms.invariance, terms.flatness) if terms is not None else nothing
    return {
        "relative_hp_gap": ((), high - low),
        "bound": ((), found.bound),
        "bound_slack": ((), found.slack),
        "bound_kappa": ((), np.nan if found.kappa is None else float(np.median(found.kappa))),
        "bound_parts": ("parts", tried.objective),
        "invariance": ((), float(invariance)),
        "flatness": ((), float(flatness)),
    }


def _fewest_that_set_the_optimum(limit: LinearizedTraining, T: int) -> int:
    """The least k from which on top-k curves have their minimum near the whole one's, n = ∞."""
    fine = np.linspace(-3, 1, 801)
    rates = limit.optimum(T).learning_rate * 2.0**fine
    top = linearized_ensemble([limit]).top(rates, T)
    far = np.abs(fine[top.argmin(axis=0)]) > SET_WITHIN
    return int(np.flatnonzero(far)[-1]) + 2 if far.any() else 1
