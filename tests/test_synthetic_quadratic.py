"""The power-law quadratic: closed form against high precision, and the engine against both."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import mupjax
from synthetic.quadratic import ROLES, PowerLawQuadratic, coordinates
from tolerances import float_tolerance

RECORDS = json.loads((Path(__file__).parent / "fixtures" / "quadratic.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def unoptimised_programs():
    """Compiling is most of the time here, and half of that is XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def problem(record: dict) -> PowerLawQuadratic:
    return PowerLawQuadratic(record["a"], record["b"])


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"a{r['a']:g}-b{r['b']:g}-T{r['steps']}")
def test_high_precision_references(record: dict) -> None:
    q, T = problem(record), record["steps"]
    for width, name in ((math.inf, "losses"), (30, "losses_at_30")):
        got = q.loss(record["rates"], steps=T, width=width)
        np.testing.assert_allclose(got, np.array(record[name], float), rtol=1e-12, err_msg=name)
    best = q.optimum(steps=T)
    assert best.learning_rate == pytest.approx(float(record["optimal_rate"]), rel=1e-13)
    assert best.loss == pytest.approx(float(record["optimal_loss"]), rel=1e-12)
    gaps = q.gaps(record["widths"], steps=T)
    for i, (n, row) in enumerate(zip(record["widths"], record["gaps"], strict=True)):
        own = q.optimum(steps=T, width=n)
        assert own.learning_rate == pytest.approx(float(row["optimal_rate"]), rel=1e-13)
        for key, values in (
            ("a_n", gaps.loss),
            ("b_n", gaps.hyperparameter),
            ("c_n", gaps.suboptimality),
        ):
            assert values[i] == pytest.approx(float(row[key]), rel=1e-9), (n, key)


def test_the_optimum_is_one_and_its_curvature_is_the_second_difference() -> None:
    q, step = PowerLawQuadratic(1.5, 1.8), 1e-4
    for n in (20, 60, math.inf):
        best = q.optimum(steps=20, width=n)
        low, high = q.loss(
            [best.learning_rate - step, best.learning_rate + step], steps=20, width=n
        )
        assert (low + high - 2 * best.loss) / step**2 == pytest.approx(best.curvature, rel=1e-4)
        grid = np.linspace(0.01, 2.2, 200)
        assert best.loss <= q.loss(grid, steps=20, width=n).min()
    single = q.optimum(steps=20, width=1)
    assert single.learning_rate == 1.0
    assert single.loss == pytest.approx(float(q.loss(0.0, steps=20)) - 0.5, rel=1e-14)


@pytest.mark.parametrize(("a", "b", "steps"), [(1.5, 1.8, 5), (1.2, 1.3, 3), (2.0, 1.5, 20)])
def test_gaps_follow_the_derived_power_laws(a: float, b: float, steps: int) -> None:
    """Exponents and prefactors; the relative error of the leading order shrinks as n^-a."""
    q, widths = PowerLawQuadratic(a, b), [10**3, 10**4, 10**5]
    exact, leading = q.gaps(widths, steps=steps), q.leading_order(widths, steps=steps)
    for name, exponent in zip(
        ("loss", "hyperparameter", "suboptimality"), q.gap_exponents, strict=True
    ):
        values = getattr(exact, name)
        off = np.abs(values / getattr(leading, name) - 1)
        assert off[-1] < 1e-3
        assert off[-1] < off[0] / 5
        slope = np.log(values[2] / values[1]) / np.log(10)
        assert slope == pytest.approx(-exponent, abs=0.02)


def test_gaps_before_the_asymptotic_regime() -> None:
    """While all modes within reach are learnt, the loss gap is the missing modes' loss."""
    q = PowerLawQuadratic(1.1, 1.5)
    gaps = q.gaps([20], steps=10_000)
    assert gaps.loss[0] == pytest.approx(20**-0.5 / (2 * 0.5), rel=0.1)


def test_identities() -> None:
    q = PowerLawQuadratic(1.5, 1.8)
    assert q.loss(0.7, steps=0) == pytest.approx(float(q.loss(0.0, steps=9)), rel=1e-15)
    # Width is a cut of the sum: what one more mode adds is known.
    eta, T = 1.3, 7
    added = float(q.loss(eta, steps=T, width=10) - q.loss(eta, steps=T, width=11))
    assert added == pytest.approx(0.5 * 11**-1.8 * (1 - (1 - eta * 11**-1.5) ** (2 * T)), rel=1e-10)
    # Beyond the directly summed modes the expansion takes over: the two must join.
    wide = q.loss([0.5, 1.9], steps=4, width=100_000)
    np.testing.assert_allclose(
        wide - q.loss([0.5, 1.9], steps=4),
        q.gaps([100_000], steps=4).loss * np.array([0.5, 1.9]) / q.optimum(steps=4).learning_rate,
        rtol=1e-4,
    )


# The engine -------------------------------------------------------------------------------------

WIDTHS, RATES, STEPS = (2, 20), (0.25, 1.0, 1.5, 1.9, 2.3), 25


def measured(q: PowerLawQuadratic, **options):
    return mupjax.sweep(
        coordinates,
        q.setting(modes=WIDTHS[-1]),
        lambda learning_rate: optax.sgd(learning_rate),
        "SP",
        widths=WIDTHS,
        hyperparameters={"learning_rate": RATES},
        steps=STEPS,
        evaluations=5,
        roles=ROLES,
        **options,
    )


@pytest.mark.parametrize("strategy", [pytest.param("bucketed", marks=pytest.mark.slow), "padded"])
def test_the_engine_measures_the_closed_form(strategy: str) -> None:
    q = PowerLawQuadratic(1.5, 1.8)
    with jax.enable_x64(True):
        curves = measured(q, strategy=strategy).eval_loss.isel(seed=0)
    for n in WIDTHS:
        for step in curves.eval_step.values:
            np.testing.assert_allclose(
                curves.sel(width=n, eval_step=step),
                q.loss(RATES, steps=int(step), width=n),
                rtol=float_tolerance(np.float64, operations=40 * STEPS),
                err_msg=f"width {n}, step {step}",
            )


def test_the_engine_in_single_precision() -> None:
    q = PowerLawQuadratic(1.5, 1.8)
    found = measured(q, strategy="padded").loss.isel(seed=0)
    assert np.isnan(found.sel(learning_rate=RATES[-1])).all()
    for n in WIDTHS:
        np.testing.assert_allclose(
            found.sel(width=n)[:-1],
            q.loss(RATES[:-1], steps=STEPS, width=n),
            rtol=float_tolerance(np.float32, operations=40 * STEPS),
        )


# Bad input --------------------------------------------------------------------------------------


def test_a_flat_spectrum_is_summed_mode_by_mode_where_the_width_allows() -> None:
    problem, i = PowerLawQuadratic(1e-3, 1.0001), np.arange(1, 65.0)
    terms = i**-1.0001 * ((1 - 0.5 * i**-1e-3) ** 200 - 1)
    gained = problem.loss(0.5, steps=100, width=64) - problem.loss(0.0, steps=100, width=64)
    # The loss at zero, which cancels, is about 5000.
    assert gained == pytest.approx(0.5 * terms.sum(), rel=1e-10)
    assert problem.optimum(steps=100, width=64).learning_rate == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match="needs inf modes"):
        problem.optimum(steps=100)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda q: PowerLawQuadratic(0.0, 2.0), "spectrum_exponent must be a number above 0"),
        (lambda q: PowerLawQuadratic(1.0, 1.0), "source_exponent must be a number above 1"),
        (lambda q: PowerLawQuadratic(1.0, math.nan), "source_exponent must be"),
        (lambda q: q.loss(-0.1, steps=1), "learning_rate must be finite and at least 0, got -0.1"),
        (lambda q: q.loss(0.1, steps=-1), "steps must be whole and at least 0, got -1"),
        (lambda q: q.loss(0.1, steps=1, width=1.5), "width must be whole and at least 1, got 1.5"),
        (lambda q: q.optimum(steps=0), "steps must be whole and at least 1"),
        (lambda q: q.gaps([0], steps=1), "widths must be whole and at least 1"),
        (lambda q: q.setting(modes=0), "modes must be whole"),
        (lambda q: coordinates(0), "width must be whole"),
        (lambda q: PowerLawQuadratic(0.3, 2.0).optimum(steps=10**6), "fewer steps or a steeper"),
    ],
)
def test_bad_input(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(PowerLawQuadratic(1.5, 1.8))
