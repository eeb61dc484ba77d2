"""Minima by quartics: exact on quartics, of fourth order, and refused where there is no bowl."""

from typing import Any

import numpy as np
import pytest
from scipy import optimize

from theory.curves import locate_optima
from theory.curves_quartic import quartic_minima
from theory.losses import loss_table
from theory.readings import read_optima

X = np.array([-6.0, -5.1, -4.3, -3.5, -2.4, -1.6, -0.9])
WIDTHS = 64 * 2 ** np.arange(6)
UNIT = 2.0 ** np.arange(-9.0, 2.0)


def minima(x, curves):
    grid = 2.0**x
    return quartic_minima(grid, curves, locate_optima(grid, curves), "log2")


def lopsided(x, optimum, k=0.6):
    away = x - np.asarray(optimum)[:, None]
    return 2 + 0.3 * (np.expm1(k * away) - k * away) / k**2


def test_is_exact_on_quartics_of_any_spacing():
    centres = np.array([-4.0, -3.7, -3.1])
    t = X - centres[:, None]
    curves = 1 + t**2 + 0.1 * t**3 + 0.05 * t**4
    for got, expected in zip(
        minima(X, curves), (centres, np.ones(3), np.full(3, 2.0)), strict=True
    ):
        assert got == pytest.approx(expected, rel=1e-9)


def test_each_curve_has_the_minimum_that_a_solver_finds():
    rng = np.random.default_rng(0)
    x = np.arange(-4.0, 5.0)
    curves = lopsided(x, rng.uniform(-1.2, 1.2, size=20)) + 1e-3 * rng.normal(size=(20, 9))
    position, height, curvature = minima(x, curves)
    for k, best in enumerate(curves.argmin(axis=1)):
        near = slice(best - 2, best + 3)
        law = np.poly1d(np.polyfit(x[near], curves[k, near], 4))
        found: Any = optimize.minimize_scalar(
            law, bounds=(x[best] - 1, x[best] + 1), method="bounded", options={"xatol": 1e-10}
        )
        assert position[k] == pytest.approx(found.x, abs=1e-6)
        assert height[k] == pytest.approx(found.fun, rel=1e-9)
        assert curvature[k] == pytest.approx(law.deriv(2)(found.x), rel=1e-5)


def test_the_error_is_of_fourth_order_in_the_spacing():
    """The parabola's is of second order; offsets within a cell are the same for each spacing."""
    steps, cells = np.array([0.8, 0.4, 0.2, 0.1]), np.linspace(-0.4, 0.4, 9)
    errors = []
    for h in steps:
        x = h * np.arange(-6.0, 7.0)
        curves = lopsided(x, h * cells)
        plain = locate_optima(2.0**x, curves).coordinate
        both = [np.abs(found - h * cells).max() for found in (minima(x, curves)[0], plain)]
        errors.append(both)
    slopes = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slopes == pytest.approx([4, 2], abs=0.1)


@pytest.mark.parametrize(
    ("where", "value"), [(2, np.inf), (2, 1e6), (-2, np.inf), (2, 0.0), (-2, 1e90)]
)
def test_refuses_what_is_no_bowl(where, value):
    x = np.arange(-4.0, 5.0)
    curves = lopsided(x, [0.1, 0.1])
    curves[1, curves[1].argmin() + where] = curves[1].min() if value == 0 else value
    position, *_ = minima(x, curves)
    assert np.isfinite(position).tolist() == [True, False]


def test_one_interpolation_serves_all_widths():
    optimum = -4 + 2 * (WIDTHS / 64.0) ** -0.75
    curves = lopsided(np.log2(UNIT), optimum)
    whole = read_optima(loss_table(WIDTHS, UNIT, curves))
    assert whole.rule == "quartic"
    assert whole.coordinate == pytest.approx(optimum, abs=0.01)
    parabola = read_optima(loss_table(WIDTHS, UNIT, curves), optimum="parabola")
    assert np.abs(parabola.coordinate - optimum).max() > 0.05
    assert whole.resolution < 0.5 * parabola.resolution
    # A wall two points beside one optimum.
    curves[3, curves[3].argmin() + 2] = np.inf
    walled = read_optima(loss_table(WIDTHS, UNIT, curves))
    assert walled.rule == "parabola"
    assert walled.coordinate == pytest.approx(parabola.coordinate)
    assert walled.resolution == pytest.approx(parabola.resolution, rel=0.5)
