"""Asymptotics of random-features ridge regression, against a high-precision twin and closed forms.

The twin (tests/fixtures/make_random_features_fixture.py) solves the two coupled equations as they
are printed, with 60 digits, and shares nothing with the package.
"""

import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy import optimize

from synthetic.random_features import (
    asymptotic_risk,
    first_order_constants,
    infinite_width,
    optimal_ridge,
    transfer_gaps,
)

TWIN = json.loads((Path(__file__).parent / "fixtures" / "random_features.json").read_text())
# What is promised; what is met is 1e-15.
PROMISED = 1e-9
FIGURE_2: Any = {"psi1": 4.0, "noise_std": 0.25}


def numbers(rows):
    return np.array([[float(value) for value in row] for row in rows]).T


def test_risk_equals_the_high_precision_twin_over_the_whole_range():
    def pair(row):
        return (row[3], row[4])

    rows = sorted(TWIN["risk"], key=pair)
    assert len(rows) > 140
    for (student, teacher), group in groupby(rows, key=pair):
        ridge, psi1, psi2, noise, expected = numbers([row[:3] + row[5:] for row in group])
        risk = asymptotic_risk(
            ridge, psi1=psi1, psi2=psi2, noise_std=noise, student=student, teacher=teacher
        )
        np.testing.assert_allclose(risk, expected, rtol=PROMISED, atol=0)
        # The digits that the promise leaves room for are there as well.
        assert np.abs(risk / expected - 1).max() < 1e-12


def test_optimum_equals_the_high_precision_twin():
    for (psi1, student, teacher, noise), group in groupby(
        TWIN["optimum"], key=lambda row: (row[0], *row[2:5])
    ):
        psi2, ridge, risk = numbers([[row[1], *row[5:]] for row in group])
        best = optimal_ridge(
            psi1=float(psi1), psi2=psi2, noise_std=float(noise), student=student, teacher=teacher
        )
        assert not best.at_boundary.any()
        assert best.reason == ""
        np.testing.assert_allclose(best.ridge, ridge, rtol=PROMISED, atol=0)
        np.testing.assert_allclose(best.risk, risk, rtol=PROMISED, atol=0)


@pytest.mark.parametrize("method", ["closed form", "implicit"])
def test_first_order_constants_equal_numerical_limits(method):
    for psi1, student, teacher, noise, C_eta, C_lambda in TWIN["constants"]:
        constants = first_order_constants(
            psi1=float(psi1),
            noise_std=float(noise),
            student=student,
            teacher=teacher,
            method=method,
        )
        np.testing.assert_allclose(constants, [float(C_eta), float(C_lambda)], rtol=1e-12, atol=0)


def test_the_two_routes_to_the_constants_agree_where_the_ridge_slope_is_negative_too():
    signs = set()
    for psi1, noise, student in [(50.0, 0.2, "linear"), (0.3, 2.0, "sin"), (4.0, 0.6, "sign")]:
        at: Any = {"psi1": psi1, "noise_std": noise, "student": student}
        closed = first_order_constants(**at)
        implicit = first_order_constants(**at, method="implicit")
        np.testing.assert_allclose(closed, implicit, rtol=1e-11, atol=0)
        signs.add(np.sign(closed.C_lambda))
        assert closed.C_eta > 0
    assert signs == {-1.0, 1.0}


def test_erratum_the_printed_constants_are_not_those_of_the_equations():
    # Evaluated by hand from the printed formulas at the setting of Figure 2.
    printed = np.array([0.0694, -0.0318])
    C_eta, C_lambda = first_order_constants(**FIGURE_2)
    assert C_eta == pytest.approx(0.028618, abs=5e-7)
    assert C_lambda == pytest.approx(0.204562, abs=5e-7)
    narrow = optimal_ridge(psi2=1e4, **FIGURE_2)
    limit = optimal_ridge(psi2=math.inf, **FIGURE_2)
    measured = np.array([narrow.risk - limit.risk, narrow.ridge - limit.ridge]) / 4e-4
    np.testing.assert_allclose([C_eta, C_lambda], measured, rtol=2e-3)
    assert (np.abs(printed - measured) > 0.03).all()
    assert limit.ridge < narrow.ridge < optimal_ridge(psi2=256.0, **FIGURE_2).ridge


def test_dropping_the_product_term_is_not_the_whole_of_the_erratum():
    # u + v = 0 in place of u + v + η u v = 0, the second equation as printed, nothing of ours used.
    a, b = (float(x) for x in TWIN["moments"][0][1:])
    B, A = (float(x) for x in TWIN["moments"][1][1:])
    A += 1 / 16

    def parts(ridge, eta):
        def second(m1):
            u = ridge * m1 - 1
            m2 = -(u + b * m1) / a
            return a * m1 * m2 * (1 + eta * u) - (m1 - m2) / 4

        top = 1 / (ridge + b)
        m1: Any = optimize.brentq(second, 1 / (1 + ridge), top, xtol=1e-15)
        return np.array([m1, -(ridge * m1 - 1 + b * m1) / a])

    def risk(ridge, eta):
        h = 1e-4
        nodes = [parts(ridge + k * h, eta) for k in (-2, -1, 1, 2)]
        slope = np.array([1, -8, 8, -1]) @ nodes / (12 * h)
        return -(A * slope[0] + B * slope[1]) / parts(ridge, eta)[0] ** 2

    best, eta = a * A / B - b, 1e-3
    assert risk(best, 0.0) == pytest.approx(0.42108805, abs=1e-8)
    C_eta = (risk(best, eta) - risk(best, 0.0)) / eta
    assert C_eta == pytest.approx(0.034717, rel=1e-3)
    assert 2 * C_eta == pytest.approx(0.0694, rel=2e-3)
    found: Any = optimize.minimize_scalar(
        lambda ridge: risk(ridge, eta), bracket=(0.3, best, 0.4), tol=1e-9
    )
    # C_λ = 0, and not −0.0318.
    assert abs(found.x - best) / eta < 0.01


def test_infinite_width_closed_form_is_the_limit_of_the_equations_and_their_minimum():
    for psi1 in (0.1, 1.0, 4.0, 100.0):
        limit = infinite_width(psi1=psi1, noise_std=0.25)
        best = optimal_ridge(psi1=psi1, psi2=math.inf, noise_std=0.25)
        assert best.ridge == pytest.approx(limit.ridge, rel=1e-12)
        assert best.risk == pytest.approx(limit.risk, rel=1e-14)
        # λ(t) and R(t) of the closed form, at ridges away from the best one.
        t = limit.t * np.array([0.5, 0.9, 1.1, 2.0]) + 1
        ridge = limit.linear2 * psi1 / (t - 1) - limit.linear2 / t - limit.nonlinear2
        ridge, t = ridge[ridge > 0], t[ridge > 0]
        risk = psi1 * (limit.A * t**2 + limit.B) / limit.S(t)
        got = asymptotic_risk(ridge, psi1=psi1, psi2=math.inf, noise_std=0.25)
        np.testing.assert_allclose(got, risk, rtol=1e-13)
        np.testing.assert_allclose(limit.excess(t), risk - limit.risk, rtol=1e-9, atol=1e-15)
        # A width of 1e15 is infinite to a double.
        wide = asymptotic_risk(ridge, psi1=psi1, psi2=1e15, noise_std=0.25)
        np.testing.assert_allclose(wide, got, rtol=1e-12)


def test_a_linear_student_of_infinite_width_is_ridge_regression():
    # Marchenko and Pastur: with σ linear and n → ∞ the model is linear ridge regression, whose
    # effective dimension has a closed form (Dobriban and Wager, arXiv 1507.03003).
    psi1, ridge, noise = 3.0, np.array([1e-3, 0.1, 1.0, 30.0]), 0.5
    aspect = 1 / psi1
    scaled = ridge / psi1  # of (1/N) XᵀX + λ' I
    m = (aspect - 1 - scaled + np.sqrt((1 - aspect + scaled) ** 2 + 4 * aspect * scaled)) / (
        2 * aspect * scaled
    )

    # R = σ² + E‖bias‖² + variance, from m(−λ') and its derivative (here by complex step).
    def stieltjes(z):
        return (aspect - 1 - z + np.sqrt((1 - aspect + z) ** 2 + 4 * aspect * z)) / (2 * aspect * z)

    slope = np.imag(stieltjes(scaled + 1e-30j)) / 1e-30
    bias = scaled**2 * (-slope)
    variance = noise**2 * aspect * (m + scaled * slope)
    got = asymptotic_risk(
        ridge, psi1=psi1, psi2=math.inf, noise_std=noise, student="linear", teacher="linear"
    )
    np.testing.assert_allclose(got, noise**2 + bias + variance, rtol=1e-12)


def test_shapes_broadcast_and_results_are_double():
    ridge, psi2 = np.array([1e-3, 0.3, 10.0])[:, None], np.array([0.5, 4.0, 64.0, math.inf])
    table = asymptotic_risk(ridge, psi2=psi2, **FIGURE_2)
    assert table.shape == (3, 4)
    assert table.dtype == np.float64
    assert table[1, 2] == pytest.approx(
        asymptotic_risk(0.3, psi1=4, psi2=64, noise_std=0.25), rel=1e-15
    )
    assert len(set(table.ravel())) == 12
    best = optimal_ridge(psi1=[[1.0], [4.0]], psi2=psi2, noise_std=0.25)
    assert best.ridge.shape == best.risk.shape == best.at_boundary.shape == (2, 4)


@pytest.mark.parametrize("ridge", [1e100, 1e160, 1e300])
def test_a_huge_ridge_learns_nothing(ridge):
    psi2 = [3.0, 4.0, np.nextafter(4.0, 5.0), 1e6, np.inf]
    risk = asymptotic_risk(ridge, psi1=4.0, psi2=psi2, noise_std=0.25)
    np.testing.assert_allclose(risk, 1.0625, rtol=1e-14)


def test_more_of_the_double_descent_peak_as_the_ridge_vanishes():
    # At n = N the ridgeless risk is infinite, and diverges as λ^(−1/2).
    ridge = np.array([1e-8, 1e-6, 1e-4])
    risk = asymptotic_risk(ridge, psi2=4.0, **FIGURE_2)
    slopes = np.diff(np.log(risk)) / np.diff(np.log(ridge))
    np.testing.assert_allclose(slopes[0], -0.5, atol=0.01)
    away = asymptotic_risk(1e-6, psi2=np.array([2.0, 4.0, 8.0]), **FIGURE_2)
    assert away[1] > 10 * max(away[0], away[2])


def test_gradients_are_those_of_the_implicit_function():
    def risk(ridge, psi1, psi2, noise):
        return asymptotic_risk(ridge, psi1=psi1, psi2=psi2, noise_std=noise)

    gradient_of = jax.jit(jax.grad(risk, argnums=(0, 1, 2, 3)))
    second_of = jax.jit(jax.grad(jax.grad(risk)))
    # ψ1 = ψ2, where the smaller factor changes sides, is a point like any other.
    for point in [(0.3, 4.0, 16.0, 0.25), (1e-3, 2.0, 2.0, 0.5), (5.0, 8.0, 0.5, 1.0)]:
        with jax.enable_x64(True):
            gradient = np.array(gradient_of(*point))
            second = float(second_of(*point))
        for i, value in enumerate(point):
            h = 1e-3 * value
            arguments: list[Any] = list(point)
            arguments[i] = value + h * np.arange(-3, 4)
            # Sixth-order central differences.
            nodes = risk(*arguments)
            numeric = nodes @ np.array([-1, 9, -45, 0, 45, -9, 1]) / (60 * h)
            assert gradient[i] == pytest.approx(numeric, rel=1e-9, abs=1e-10)
            if i == 0:
                numeric2 = nodes @ np.array([2, -27, 270, -490, 270, -27, 2]) / (180 * h**2)
                assert second == pytest.approx(numeric2, rel=1e-6)


def test_traced_in_single_precision_the_result_is_the_double_one_rounded():
    def risk(ridge):
        return asymptotic_risk(ridge, psi1=4.0, psi2=4.0, noise_std=0.25)

    with jax.enable_x64(True):
        exact, slope = (float(x) for x in jax.value_and_grad(risk)(1e-5))
    single, single_slope = jax.jit(jax.value_and_grad(risk))(np.float32(1e-5))
    assert single.dtype == np.float32
    assert float(single) == pytest.approx(exact, rel=3e-7)
    assert float(single_slope) == pytest.approx(slope, rel=3e-7)


def test_gaps_have_the_theorem_s_slopes_and_prefactors():
    psi2 = 10.0 ** np.arange(2, 7)
    gaps = transfer_gaps(psi2, **FIGURE_2)
    C_eta, C_lambda = first_order_constants(**FIGURE_2)

    def last_slope(values):
        return np.diff(np.log10(values))[-1]

    for values, power in (
        (gaps.loss_gap, -1),
        (gaps.ridge_gap, -1),
        (gaps.suboptimality, -2),
    ):
        assert last_slope(values) == pytest.approx(power, abs=1e-4)
    eta = 4 / psi2[-1]
    assert gaps.loss_gap[-1] == pytest.approx(C_eta * eta, rel=2e-5)
    assert gaps.ridge_gap[-1] == pytest.approx(C_lambda * eta, rel=2e-5)
    # c = ½ R''(λ*) b² to leading order.
    with jax.enable_x64(True):
        curvature = jax.grad(jax.grad(lambda r: asymptotic_risk(r, psi2=math.inf, **FIGURE_2)))(
            gaps.limit_ridge
        )
    expected = 0.5 * float(curvature) * gaps.ridge_gap[-1] ** 2
    assert gaps.suboptimality[-1] == pytest.approx(expected, rel=1e-5)
    # Where subtraction still has digits, it agrees.
    subtracted = asymptotic_risk(gaps.ridge, psi2=math.inf, **FIGURE_2) - gaps.limit_risk
    np.testing.assert_allclose(gaps.suboptimality[:2], subtracted[:2], rtol=1e-7)
    np.testing.assert_allclose(gaps.loss_gap, gaps.risk - gaps.limit_risk, rtol=1e-8, atol=1e-15)


def test_the_risk_falls_then_rises_in_the_ridge_and_the_search_finds_where():
    rng = np.random.default_rng(0)
    psi1, psi2 = 10 ** rng.uniform(-1, 2, 200), 10 ** rng.uniform(-1.3, 6, 200)
    noise = 10 ** rng.uniform(-2, 1, 200)
    grid = np.logspace(-8, 6, 141)
    risk = asymptotic_risk(grid[:, None], psi1=psi1, psi2=psi2, noise_std=noise)
    change = np.diff(risk, axis=0) / risk[1:]
    sign = np.sign(np.where(np.abs(change) < 1e-13, 0.0, change))
    for column in sign.T:
        steps = column[column != 0]
        assert (np.diff(steps) >= 0).all(), "rises before it falls"
    best = optimal_ridge(psi1=psi1, psi2=psi2, noise_std=noise)
    assert (best.risk <= risk.min(axis=0) * (1 + 1e-14)).all()
    # scipy's bounded search finds no other.
    for i in range(5):
        at = {"psi1": psi1[i], "psi2": psi2[i], "noise_std": noise[i]}
        found: Any = optimize.minimize_scalar(
            lambda x, at=at: float(asymptotic_risk(math.exp(x), **at)),
            bounds=(-18.0, 14.0),
            method="bounded",
            options={"xatol": 1e-7},
        )
        assert best.risk[i] <= found.fun * (1 + 1e-12)


def test_an_optimum_that_would_be_negative_is_flagged():
    best = optimal_ridge(psi1=4.0, psi2=[4.0, math.inf], noise_std=0.0, teacher="linear")
    np.testing.assert_array_equal(best.at_boundary, [False, True])
    assert best.ridge[1] == 0
    assert best.ridge[0] > 0
    assert "would be negative" in best.reason
    limit = asymptotic_risk(1e-10, psi1=4.0, psi2=math.inf, noise_std=0.0, teacher="linear")
    assert best.risk[1] == pytest.approx(limit, rel=1e-7)
    assert best.risk[1] < asymptotic_risk(
        1e-3, psi1=4.0, psi2=math.inf, noise_std=0.0, teacher="linear"
    )
    quiet: Any = {"psi1": 4.0, "noise_std": 0.01, "student": "sign", "teacher": "tanh"}
    assert infinite_width(**quiet).ridge < 0
    for refused in (first_order_constants, lambda **at: transfer_gaps([10.0], **at)):
        with pytest.raises(ValueError, match=r"λ\*\(∞\).*not positive"):
            refused(**quiet)


def test_nothing_to_learn_means_an_infinite_ridge():
    best = optimal_ridge(psi1=4.0, psi2=[1.0, 9.0], noise_std=0.5, teacher="abs")
    assert (best.ridge == math.inf).all()
    assert best.at_boundary.all()
    assert "no linear part" in best.reason
    np.testing.assert_allclose(best.risk, 1.25, rtol=1e-14)
    risk = asymptotic_risk([1.0, 1e3, 1e6], psi1=4.0, psi2=9.0, noise_std=0.5, teacher="abs")
    assert (np.diff(risk) < 0).all()
    assert risk[-1] == pytest.approx(1.25, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ridge": 0.0}, ValueError, r"ridge is 0.0; expected a number above 0"),
        ({"ridge": [0.1, -1.0]}, ValueError, r"ridge is -1.0"),
        ({"ridge": math.nan}, ValueError, r"ridge is nan"),
        ({"ridge": math.inf}, ValueError, r"ridge is inf.*finite"),
        ({"ridge": "big"}, TypeError, r"ridge is 'big'; expected real numbers"),
        ({"ridge": 1j}, TypeError, r"ridge is 1j"),
        ({"psi1": math.inf}, ValueError, r"psi1 is inf"),
        ({"psi2": -3}, ValueError, r"psi2 is -3.0.*math.inf is allowed"),
        ({"noise_std": -0.1}, ValueError, r"noise_std is -0.1; expected a number at least 0"),
        ({"student": "relu"}, ValueError, r"student 'relu' is not odd \(26.7 %.*odd part"),
        ({"student": "abs"}, ValueError, r"student 'abs' is even \(100 %"),
        ({"student": "tahn"}, ValueError, r"student is 'tahn'.*'tanh'"),
        ({"teacher": 3}, TypeError, r"teacher is 3 of type int"),
        (
            {"ridge": [1.0, 2.0], "psi2": [1.0, 2.0, 3.0]},
            ValueError,
            r"do not broadcast: ridge \(2,\).*psi2 \(3,\)",
        ),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"ridge": 0.1, "psi1": 4.0, "psi2": 4.0, "noise_std": 0.25, **change}
    with pytest.raises(error, match=message):
        asymptotic_risk(**arguments)


def test_bad_input_to_the_others_is_named():
    with pytest.raises(ValueError, match="method is 'guess'"):
        first_order_constants(**FIGURE_2, method="guess")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"psi1 has shape \(2,\)"):
        infinite_width(psi1=[1.0, 2.0], noise_std=0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="traced"):
        jax.grad(lambda p: optimal_ridge(psi1=p, psi2=4.0, noise_std=0.1).ridge)(1.0)
    with pytest.raises(ValueError, match="noise_std is 0 and the teacher is linear"):
        infinite_width(psi1=1.0, noise_std=0.0, teacher="linear")
