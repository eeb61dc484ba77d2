"""Exponents refitted: equal to a fit of each draw, and intervals by their formulas."""

import numpy as np
import pytest
from scipy import stats

from theory import diagnose_transfer
from theory.rates import fit_power_law
from theory.rates_resampling import bootstrap_interval, jackknife_interval, refit_exponents

WIDTHS = 64 * 2 ** np.arange(6)
RATIO = WIDTHS / 64.0
NOISE = np.linspace(0.01, 0.03, 6)


def draws(limit, seed=0, count=8):
    return limit + 3 * RATIO**-0.5 + NOISE * np.random.default_rng(seed).normal(size=(count, 6))


@pytest.mark.parametrize(("limit", "lowest"), [(2.0, -np.inf), (2.0, 0.0), (-1.0, 0.0)])
def test_refits_are_fits(limit, lowest):
    exponents = np.linspace(0.02, 4.0, 399)
    found = refit_exponents(WIDTHS, draws(limit), NOISE**2, exponents, lowest)
    for values, exponent in zip(draws(limit), found, strict=True):
        fit = fit_power_law(
            WIDTHS, values, variances=NOISE**2, dof=50, lowest_limit=lowest,
            exponent_range=(0.02, 4.0),
        )  # fmt: skip
        assert exponent == pytest.approx(fit.exponents[fit.deviance.argmin()], abs=0.011)


def test_exponents_at_and_below_0_are_those_of_no_limit():
    values = np.stack([-np.log2(RATIO), -(RATIO**0.3)])
    found = refit_exponents(WIDTHS, values, NOISE**2, np.linspace(-1.0, 4.0, 501))
    assert found == pytest.approx([0.0, -0.3], abs=1e-9)


def test_bootstrap_is_stretched_percentiles():
    fit = fit_power_law(WIDTHS, draws(2.0)[0], variances=NOISE**2, dof=50)
    refits = fit.exponent + np.random.default_rng(0).normal(size=1000)
    low, high = bootstrap_interval(fit, refits, 4)
    stretch = stats.t.ppf(0.95, 4) / stats.norm.ppf(0.95)
    assert low == pytest.approx(fit.exponent + stretch * (np.quantile(refits, 0.05) - fit.exponent))
    assert high == pytest.approx(
        fit.exponent + stretch * (np.quantile(refits, 0.95) - fit.exponent)
    )
    # With many degrees of freedom the noise is known.
    assert bootstrap_interval(fit, refits, 1e9) == pytest.approx(np.quantile(refits, [0.05, 0.95]))


def test_jackknife_is_its_formula():
    values = draws(2.0)[0]
    fit = fit_power_law(WIDTHS, values)
    refits = [fit_power_law(np.delete(WIDTHS, k), np.delete(values, k)) for k in range(6)]
    left = np.array([one.exponent for one in refits])
    half = stats.t.ppf(0.95, 3) * np.sqrt(5 * left.var())
    assert jackknife_interval(fit, refits) == pytest.approx(
        (fit.exponent - half, fit.exponent + half)
    )
    assert np.isnan(jackknife_interval(fit, refits[:4])).all()


def test_diagnosis_states_both():
    rng, x = np.random.default_rng(0), np.arange(-9.0, 1.0, 0.5)
    away = x[None, :, None] - (-5 + 2 * RATIO**-0.75)[:, None, None]
    away = away - 0.02 * rng.normal(size=(6, 1, 4))
    losses = (2 + 3 * RATIO**-0.5)[:, None, None] + 0.15 * away**2
    losses = losses + 1e-3 * rng.normal(size=losses.shape)
    found = diagnose_transfer(WIDTHS, 2.0**x, losses, resamples=200)
    for name, truth in (("alpha", 0.5), ("beta", 0.75), ("c_rate", 1.5)):
        record = found.to_json()["resampled"][name]
        assert set(record) == {"bootstrap", "leave_one_width_out"}
        for low, high in record.values():
            assert low < getattr(found, name).value < high
            assert abs(truth - (low + high) / 2) < high - low < truth
    assert found.table().count("seeds resampled [") == 3
    one = diagnose_transfer(WIDTHS, 2.0**x, losses[..., :1])
    record = one.to_json()["resampled"]
    assert record["alpha"]["bootstrap"] is None
    assert record["alpha"]["leave_one_width_out"] is not None
    four = diagnose_transfer(WIDTHS[:4], 2.0**x, losses[:4], resamples=200)
    assert four.to_json()["resampled"]["alpha"]["leave_one_width_out"] is None
