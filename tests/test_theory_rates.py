"""Power laws with a limit: exact without noise, equal to scipy's fits, covered with noise."""

import numpy as np
import pytest
from scipy import optimize, stats

from theory.rates import fit_power_law, fit_slope, moderated_variances

WIDTHS = np.array([64, 128, 256, 512, 1024, 2048])

# The ball indicator's optima of Ghosh, Wu and Bietti (arXiv 2512.22768), read off their figure.
BALL_WIDTHS = np.array(
    [181, 256, 362, 512, 724, 1024, 1448, 2048, 2896, 4096, 5793, 8192, 11585, 16384]
)
BALL_LOSSES = np.array(
    [
        0.24085,
        0.21340,
        0.18885,
        0.17157,
        0.15569,
        0.14424,
        0.13525,
        0.12933,
        0.12463,
        0.12101,
        0.11775,
        0.11622,
        0.11471,
        0.11372,
    ]
)
BALL_RATES = 1e-3 * np.array(
    [
        4.543,
        4.808,
        5.189,
        5.491,
        5.813,
        6.273,
        6.770,
        7.165,
        7.165,
        7.444,
        7.584,
        7.583,
        7.731,
        8.033,
    ]
)


def power_law(n, limit, prefactor, exponent):
    return limit + prefactor * np.asarray(n, dtype=float) ** -exponent


def noisy(seed, noise=0.01, exponent=0.5, widths=WIDTHS):
    rng = np.random.default_rng(seed)
    return power_law(widths, 2.0, 4.0, exponent) + noise * rng.normal(size=widths.size)


class TestFit:
    @pytest.mark.parametrize("exponent", [0.1, 0.25, 0.524, 1.0, 2.0, 3.7])
    @pytest.mark.parametrize("prefactor", [-3.0, 5.0])
    def test_is_exact_without_noise(self, exponent, prefactor):
        fit = fit_power_law(WIDTHS, power_law(WIDTHS, 3.0, prefactor, exponent))
        assert not fit.degenerate
        assert fit.exponent == pytest.approx(exponent, rel=1e-5)
        assert fit.limit == pytest.approx(3.0, rel=1e-5)
        assert fit.prefactor == pytest.approx(prefactor, rel=1e-4)
        assert fit(WIDTHS) == pytest.approx(power_law(WIDTHS, 3.0, prefactor, exponent), rel=1e-7)
        low, high = fit.exponent_interval
        assert low <= fit.exponent <= high
        assert high - low < 1e-4

    def test_gives_the_published_fits(self):
        loss = fit_power_law(BALL_WIDTHS, BALL_LOSSES, lowest_limit=0.0, falling=True)
        assert round(loss.exponent, 3) == 0.742
        assert round(loss.prefactor, 2) == 6.37
        assert round(loss.limit, 3) == 0.108
        rate = fit_power_law(BALL_WIDTHS, np.log2(BALL_RATES), exponent_range=(-1.0, 4.0))
        # Printed: −7.80 n^−0.388 − 6.78, which rounding of the bitmap's coordinates explains.
        assert rate.exponent == pytest.approx(0.388, abs=0.001)
        assert rate.prefactor == pytest.approx(-7.80, abs=0.01)
        assert round(rate.limit, 2) == -6.78

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_a_weighted_nonlinear_fit(self, seed):
        values, deviations = noisy(seed), np.linspace(0.005, 0.02, WIDTHS.size)
        fit = fit_power_law(WIDTHS, values, variances=deviations**2, dof=100)
        expected, _ = optimize.curve_fit(
            power_law, WIDTHS, values, p0=(2, 4, 0.5), sigma=deviations, xtol=1e-13, ftol=1e-13
        )
        got = (fit.limit, fit.prefactor, fit.exponent)
        assert got == pytest.approx(expected, rel=1e-4)
        residuals = values - power_law(WIDTHS, *expected)
        assert fit.misfit == pytest.approx(((residuals / deviations) ** 2).sum() / 3, rel=1e-4)

    def test_the_profile_is_the_fit_at_each_exponent(self):
        values = noisy(0)
        fit = fit_power_law(WIDTHS, values)

        def rss(exponent):
            design = np.stack([np.ones(WIDTHS.size), WIDTHS**-exponent], axis=1)
            return np.linalg.lstsq(design, values, rcond=None)[1][0]

        noise = rss(fit.exponent) / 3
        for index in range(0, fit.exponents.size, 60):
            expected = (rss(fit.exponents[index]) - rss(fit.exponent)) / noise
            assert fit.deviance[index] == pytest.approx(expected, rel=1e-6, abs=1e-6)
        threshold = stats.t.ppf(0.95, 3) ** 2
        for end in fit.exponent_interval:
            assert (rss(end) - rss(fit.exponent)) / noise == pytest.approx(threshold, rel=0.05)

    def test_the_limits_interval_is_its_profile(self):
        values, variance = noisy(3), 1e-4
        fit = fit_power_law(WIDTHS, values, variances=np.full(6, variance), dof=1e9)

        def profile(limit):
            def rss(p):
                return ((values - power_law(WIDTHS, limit, np.exp(p[0]), p[1])) ** 2).sum()

            return optimize.minimize(
                rss, (np.log(4.0), 0.5), method="Nelder-Mead",
                options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000},
            ).fun  # fmt: skip

        for end in fit.limit_interval:
            rise = (profile(end) - profile(fit.limit)) / variance
            assert rise == pytest.approx(stats.norm.ppf(0.95) ** 2, rel=0.03)

    def test_a_shift_of_all_values_widens_the_limit_alone(self):
        options = {"variances": np.full(6, 1e-4), "dof": 50}
        alone = fit_power_law(WIDTHS, noisy(1), **options)
        shifted = fit_power_law(WIDTHS, noisy(1), shared_variance=0.5**2, shared_dof=2, **options)
        assert shifted.exponent_interval == alone.exponent_interval
        half = stats.t.ppf(0.95, 2) * 0.5
        for ours, theirs in zip(shifted.limit_interval, alone.limit_interval, strict=True):
            assert abs(ours - alone.limit) == pytest.approx(np.hypot(half, theirs - alone.limit))

    def test_the_limit_respects_its_bound(self):
        values = power_law(WIDTHS, -0.5, 4.0, 0.2) + 1e-3 * np.array([1, -1, 0, 1, -1, 0])
        assert fit_power_law(WIDTHS, values).limit < -0.3
        fit = fit_power_law(WIDTHS, values, lowest_limit=0.0, variances=np.ones(6) * 1e-2, dof=9)
        expected = optimize.least_squares(
            lambda p: power_law(WIDTHS, *p) - values, (0.1, 4, 0.3),
            bounds=([0, 0, 0.02], [9, 99, 4]), xtol=1e-14, ftol=1e-14,
        ).x  # fmt: skip
        assert fit.limit == 0.0
        assert (fit.prefactor, fit.exponent) == pytest.approx(expected[1:], rel=1e-4)

    @pytest.mark.parametrize("slope", [0.0, 0.3])
    def test_a_quantity_without_a_limit_has_none(self, slope):
        values = -4 - (np.log2(WIDTHS) if slope == 0 else WIDTHS**slope)
        fit = fit_power_law(WIDTHS, values, exponent_range=(-1, 4))
        assert fit.exponent == pytest.approx(-slope, abs=1e-5)
        assert np.isnan(fit.limit)
        assert np.isnan(fit.prefactor)

    @pytest.mark.parametrize("known", [False, True])
    def test_intervals_cover(self, known):
        trials, hits = 200, 0
        for seed in range(trials):
            options = {"variances": np.full(6, 0.01**2), "dof": 1e6} if known else {}
            low, high = fit_power_law(WIDTHS, noisy(seed), **options).exponent_interval
            hits += low <= 0.5 <= high
        # Four standard errors of a share of .9, and .01 for the curvature of the problem.
        assert abs(hits / trials - 0.9) < 4 * np.sqrt(0.09 / trials) + 0.01


class TestRefuses:
    @pytest.mark.parametrize(
        ("values", "options", "reason"),
        [
            (np.full(6, 2.0), {}, "no change with width"),
            (2 + 0.01 * np.array([1, -1, 1, -1, 1, -1]), {}, "no change with width"),
            (power_law(WIDTHS, 3, -2, 0.5), {"falling": True}, "rises with width"),
            (2 - 0.3 * np.log2(WIDTHS) ** 1.2, {}, "smallest considered"),
            (power_law(WIDTHS, 2, 1e9, 5.0), {}, "largest considered"),
        ],
    )
    def test_and_says_why(self, values, options, reason):
        fit = fit_power_law(WIDTHS, values, **options)
        assert fit.degenerate
        assert reason in fit.reason
        assert np.isnan([fit.exponent, fit.limit, fit.prefactor, *fit.exponent_interval]).all()

    def test_three_widths(self):
        fit = fit_power_law(WIDTHS[:3], power_law(WIDTHS[:3], 2, 3, 0.5))
        assert "need 4 widths or more, there are 3" in fit.reason

    def test_an_exponent_that_nothing_bounds(self):
        options = {"variances": np.full(6, 0.03**2), "dof": 20}
        values = power_law(WIDTHS, 2, 4, 0.5)
        assert not fit_power_law(WIDTHS, values, **options).degenerate
        fit = fit_power_law(WIDTHS, values, **options, exponent_range=(0.4, 0.6))
        assert "all exponents" in fit.reason

    def test_a_misfit_is_said(self):
        values = power_law(WIDTHS, 2, 4, 0.5) + 0.05 * np.array([1, -1, 1, -1, 1, -1])
        fit = fit_power_law(WIDTHS, values, variances=np.full(6, 0.005**2), dof=20)
        assert fit.misfits
        assert fit.dof == 3
        quiet = fit_power_law(WIDTHS, noisy(0), variances=np.full(6, 0.01**2), dof=20)
        assert not quiet.misfits
        assert quiet.dof == 23

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (([64, 32], [1.0, 2.0]), "strictly increasing"),
            (([64.5, 128], [1.0, 2.0]), "whole numbers"),
            (([64, 128], [1.0, np.nan]), "must be finite"),
            (([64, 128], [1.0]), "one for each of the 2 widths"),
        ],
    )
    def test_bad_input(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            fit_power_law(*arguments)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"variances": [1.0]}, "one per width"),
            ({"variances": np.ones(6)}, "dof=0.0 must be positive"),
            ({"exponent_range": (2, 1)}, "low < high"),
            ({"confidence": 90}, "between 0 and 1"),
        ],
    )
    def test_bad_options(self, options, match):
        with pytest.raises(ValueError, match=match):
            fit_power_law(WIDTHS, noisy(0), **options)


def test_slope_is_that_of_linear_regression():
    values = 3 * WIDTHS**0.7 * np.exp(0.1 * np.random.default_rng(0).normal(size=6))
    slope, (low, high) = fit_slope(WIDTHS, values)
    expected, _, _, _, error = stats.linregress(np.log(WIDTHS), np.log(values))
    half = stats.t.ppf(0.95, 4) * error
    assert slope == pytest.approx(expected, rel=1e-10)
    assert (low, high) == pytest.approx((slope - half, slope + half), rel=1e-10)
    assert np.isnan(fit_slope(WIDTHS[:2], values[:2])[0])


def test_variances_are_shrunk_to_their_mean():
    assert moderated_variances([1.0, 3.0], 4) == pytest.approx([1.5, 2.5])
    assert moderated_variances([2.0, 2.0], 1) == pytest.approx([2.0, 2.0])
