"""The trained half of ``ntk-mechanism``: the closed form confirmed, sums over modes, two bases."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr

import mupjax
from mupjax.reproduce.ntk_mechanism_curves import FAMILIES, Curves, Size, points
from synthetic.linearized import fixed_points, two_layer_relu
from theory.alignment import alignment_eigenvalues
from theory.decomposition import decomposition_observer
from theory.ntk import decompose_update, mode_contributions, ntk_observer
from theory.trajectory import Averaging

__all__ = ["confirm_by_training", "linear_layer", "two_bases"]

_EVERY_STEP = Averaging(0.0, 0.0, first_stride=1, last_stride=1, warmup_steps=0)
_AVERAGED = Averaging(0.5, 0.9, first_stride=1, last_stride=4, warmup_steps=20)
_ROLES = ("input", "hidden", "output", "vector")
# The models carry their own scaling: every factor of the parametrization is 1.
_AS_BUILT = mupjax.Parametrization(
    "as built",
    {family: {role: mupjax.Exponents() for role in _ROLES} for family in ("sgd", "adam")},
)
_SHARES = np.array([0.1, 0.3, 0.6, 0.9, 1.0])


def confirm_by_training(size: Size, curves: dict[tuple[str, str], Curves]) -> xr.Dataset:
    """The engine's training of the linear models on power-law data, in float64, beside the formula.

    Differences are relative to the largest change of any mode at that learning rate.
    """
    x, y = points("power law", size)
    rows = []
    for name, family in FAMILIES.items():
        own = curves[name, "power law"]
        rates = _SHARES * own.limit.optimum(size.steps).learning_rate
        with jax.enable_x64(True):
            trained = mupjax.sweep(
                family.trained(x.shape[1]),
                fixed_points(x, y),
                lambda learning_rate: optax.sgd(learning_rate),
                _AS_BUILT,
                widths=size.trained_widths,
                hyperparameters={"learning_rate": rates.tolist()},
                steps=size.steps,
                seeds=size.trained_seeds,
                evaluations=1,
                divergence_threshold=1e30,
                observers=[ntk_observer(_EVERY_STEP)],
                strategy="bucketed",
                progress=False,
            )
        differences = []
        for width in size.trained_widths:
            members = own.ensembles[width].members[: size.trained_seeds]
            expected = np.stack(
                [
                    m.mode_losses(rates, size.steps) - m.mode_energies / (2 * m.points)
                    for m in members
                ],
                axis=1,
            )
            found = trained["ntk_modes"].sel(width=width).squeeze(drop=True)
            found = found.transpose("learning_rate", "seed", "mode").values
            scale = np.abs(expected).max(axis=-1, keepdims=True)
            differences.append(np.max(np.abs(found - expected) / scale, axis=(1, 2)))
        rows.append(
            xr.DataArray(
                np.stack(differences),
                dims=("trained_width", "trained_rate"),
                coords={"trained_width": list(size.trained_widths), "trained_rate": _SHARES},
            ).expand_dims(family=[name])
        )
    return xr.Dataset({"training_difference": xr.concat(rows, "family")})


def two_bases(size: Size) -> xr.Dataset:
    """A two-layer net, not linearized, under three optimizers: φ^k by modes and by alignment.

    Both observers follow the same averaged trajectory. `sum_error` is how far the modes' sum is
    from the change summed over parameters, relative to the sum of the modes' absolute values.
    """
    x, y = points("power law", size)
    half = size.points // 2
    width = size.trained_widths[0]
    optimizers: dict[str, tuple[Any, float]] = {
        "gradient descent": (lambda learning_rate: optax.sgd(learning_rate), 0.2),
        "momentum": (lambda learning_rate: optax.sgd(learning_rate, momentum=0.9), 0.05),
        "Adam": (lambda learning_rate: optax.adam(learning_rate), 0.02),
    }
    found = []
    for name, (optimizer, rate) in optimizers.items():
        with jax.enable_x64(True):
            trained = mupjax.sweep(
                two_layer_relu(x.shape[1]),
                fixed_points(x[:half], y[:half], validation=(x[half:], y[half:])),
                optimizer,
                _AS_BUILT,
                widths=(width,),
                hyperparameters={"learning_rate": rate},
                steps=60,
                seeds=size.trained_seeds,
                evaluations=1,
                observers=[
                    ntk_observer(_AVERAGED, kernel="trajectory"),
                    decomposition_observer(_AVERAGED),
                ],
                progress=False,
            ).squeeze(drop=True)
        modes = trained["ntk_modes"].transpose("seed", "mode").values
        alignment = trained["decomposition_top"].transpose("seed", "component").values
        total = trained["decomposition_total"].values
        found.append(
            xr.Dataset(
                {
                    "sum_error": np.max(
                        np.abs(modes.sum(axis=1) - total) / np.abs(modes).sum(axis=1)
                    ),
                    "mode_share": ("k", np.mean(np.cumsum(modes, 1) / total[:, None], axis=0)),
                    "alignment_share": (
                        "component",
                        np.mean(alignment / total[:, None], axis=0),
                    ),
                },
                coords={"k": 1 + np.arange(half), "component": 1 + np.arange(width)},
            ).expand_dims(optimizer=[name])
        )
    return cast(xr.Dataset, xr.concat(found, "optimizer"))


def linear_layer(draws: int = 100) -> dict[str, float]:
    """One linear layer, 4 inputs, 3 outputs, 8 points, one step of gradient descent.

    Returns:
      largest relative difference between the sorted modes and the alignment eigenvalues with white
      inputs (in the gradient's own basis), and the mean share of the change that the first
      component holds with Gaussian inputs of variances 1, 1/2, 1/3, 1/4: by alignment and by modes.
    """
    rng = np.random.default_rng(0)
    white, shares = 0.0, []
    with jax.enable_x64(True):
        for _ in range(draws):
            g = rng.normal(size=(8, 3))
            x = np.linalg.qr(rng.normal(size=(8, 4)))[0]
            G = g.T @ x
            # All of white inputs' span is one eigenspace of the kernel: a basis is at choice.
            _, singular, q = np.linalg.svd(G)
            modes = np.asarray(mode_contributions(x @ q.T[:, :3], g, x @ -G.T))
            spectrum = np.asarray(alignment_eigenvalues(G, -G))[:3]
            white = max(white, float(np.max(np.abs(modes - spectrum)) / singular[0] ** 2))
            x = rng.normal(size=(8, 4)) / np.sqrt(1 + np.arange(4.0))
            G = g.T @ x
            found = decompose_update(
                lambda W, x: x @ W.T,
                np.zeros((3, 4)),
                -G,
                x,
                lambda f, g=g: jnp.sum(g * f),
                kernel=x @ x.T,
            )
            spectrum = np.asarray(alignment_eigenvalues(G, -G))
            shares.append((spectrum[0] / found.total, found.contributions[0] / found.total))
    by_alignment, by_modes = np.mean(shares, axis=0)
    return {"white": white, "alignment": float(by_alignment), "modes": float(by_modes)}
