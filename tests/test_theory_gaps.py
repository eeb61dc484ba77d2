"""Tables of losses, midpoints, readings and gaps: exact on parabolas, equal to brute force."""

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from theory import locate_midpoints, locate_optima, transfer_gaps
from theory.losses import loss_table, resampled_deviations
from theory.readings import _spline_minimum, read_optima
from tolerances import float_tolerance, standard_error_band

WIDTHS = np.array([64, 128, 256, 512, 1024, 2048])
RATIO = WIDTHS / WIDTHS[0]
X = np.arange(-9.0, 1.0, 0.5)
EPS = float_tolerance(np.float64, operations=64)


def parabolas(alpha=0.5, beta=0.75, curvature=0.3, x=X):
    """Mean curves (W, H) with known gaps: floor 2, amplitude 3, optimum 2^(−4 + 2 ratio^−β)."""
    optimum = -4 + 2 * RATIO**-beta
    loss = 2 + 3 * RATIO**-alpha
    return loss[:, None] + 0.5 * curvature * (x - optimum[:, None]) ** 2


class TestGaps:
    def test_against_the_limit(self):
        gaps = transfer_gaps(WIDTHS, 2.0**X, parabolas())
        assert (gaps.infinity, gaps.hp_infinity) == ("limit", "limit")
        assert gaps.loss_gap == pytest.approx(3 * RATIO**-0.5, rel=1e-4)
        assert gaps.hp_gap == pytest.approx(2 * RATIO**-0.75, rel=1e-4)
        assert gaps.suboptimality == pytest.approx(0.15 * (2 * RATIO**-0.75) ** 2, rel=2e-4)

    def test_against_the_largest_width(self):
        gaps = transfer_gaps(WIDTHS, 2.0**X, parabolas(), infinity="largest")
        assert (gaps.infinity, gaps.hp_infinity) == ("largest", "largest")
        moved = 2 * (RATIO**-0.75 - RATIO[-1] ** -0.75)
        assert gaps.loss_gap == pytest.approx(3 * (RATIO**-0.5 - RATIO[-1] ** -0.5), abs=EPS)
        assert gaps.hp_gap == pytest.approx(moved, abs=10 * EPS)
        assert gaps.suboptimality == pytest.approx(0.15 * moved**2, abs=10 * EPS)

    def test_the_largest_width_is_taken_where_no_limit_shows(self):
        curves = 2 + 0.15 * (X + 4 + 0.4 * np.log2(RATIO)[:, None]) ** 2
        gaps = transfer_gaps(WIDTHS, 2.0**X, curves)
        assert (gaps.infinity, gaps.hp_infinity) == ("largest", "largest")
        assert gaps.hp_gap == pytest.approx(0.4 * (5 - np.arange(6)), abs=10 * EPS)

    def test_a_limit_that_is_asked_for_and_not_there_is_nan(self):
        curves = 2 + 3 * RATIO[:, None] ** -0.5
        curves = curves + 0.15 * (X + 4 + 0.4 * np.log2(RATIO)[:, None]) ** 2
        gaps = transfer_gaps(WIDTHS, 2.0**X, curves, infinity="limit")
        assert (gaps.infinity, gaps.hp_infinity) == ("limit", "limit")
        assert gaps.loss_gap == pytest.approx(3 * RATIO**-0.5, rel=1e-4)
        assert np.isnan(gaps.hp_gap).all()
        assert np.isnan(gaps.suboptimality).all()

    def test_a_limit_is_not_used_where_the_optimum_may_go_on_for_ever(self):
        """A drift with scatter: the best exponent is above 0, its interval is not."""
        optimum = np.array([-2.0, -2.35, -2.6, -2.9, -3.15, -3.4]) - 0.06 * np.array(
            [1, -1, 1, 1, -1, -1]
        )
        table = loss_table(WIDTHS, 2.0**X, 2 + 0.15 * (X - optimum[:, None]) ** 2)
        fit = read_optima(table).fit_optimum()
        assert fit.exponent > 0 > fit.exponent_interval[0]
        assert np.isfinite(fit.limit)
        gaps = transfer_gaps(WIDTHS, 2.0**X, 2 + 0.15 * (X - optimum[:, None]) ** 2)
        assert gaps.hp_infinity == "largest"
        assert gaps.hp_gap == pytest.approx(np.abs(optimum - optimum[-1]), abs=10 * EPS)

    def test_an_optimum_that_is_only_a_bound_has_no_gap(self):
        curves = parabolas()
        curves[0, X > -3.0] = np.inf
        gaps = transfer_gaps(WIDTHS, 2.0**X, curves, infinity="largest")
        assert np.isnan([gaps.hp_gap[0], gaps.suboptimality[0]]).all()
        assert np.isfinite([gaps.hp_gap[1:], gaps.suboptimality[1:]]).all()
        curves = parabolas()
        curves[-1, X > -5.0] = np.inf
        gaps = transfer_gaps(WIDTHS, 2.0**X, curves, infinity="largest")
        assert np.isnan([gaps.hp_gap, gaps.suboptimality]).all()
        assert np.isfinite(gaps.loss_gap).all()
        gaps = transfer_gaps(WIDTHS, 2.0**X, curves)
        assert gaps.hp_infinity == "limit"
        assert gaps.hp_gap[:-1] == pytest.approx(2 * RATIO[:-1] ** -0.75, rel=1e-4)
        assert np.isnan([gaps.hp_gap[-1], *gaps.suboptimality]).all()

    def test_nothing_trained(self):
        gaps = transfer_gaps(WIDTHS, 2.0**X, np.full((6, X.size), np.nan))
        assert np.isnan([gaps.loss_gap, gaps.hp_gap, gaps.suboptimality]).all()

    def test_an_optimum_where_the_largest_width_diverges_costs_everything(self):
        curves = parabolas()
        curves[-1, X > -3.5] = np.inf
        gaps = transfer_gaps(WIDTHS, 2.0**X, curves, infinity="largest")
        assert np.isinf(gaps.suboptimality[0])
        assert np.isfinite(gaps.suboptimality[-3:]).all()

    def test_grids_may_differ_and_cells_may_be_missing(self):
        whole = transfer_gaps(WIDTHS, 2.0**X, parabolas())
        grids = X + np.linspace(0, 0.4, 6)[:, None]
        curves = np.stack([parabolas(x=grid)[k] for k, grid in enumerate(grids)])
        moved = transfer_gaps(WIDTHS, 2.0**grids, curves)
        seen = np.ones(curves.shape, dtype=bool)
        seen[::2, ::3] = False
        holes = transfer_gaps(WIDTHS, 2.0**X, np.where(seen, parabolas(), np.nan), observed=seen)
        for other in (moved, holes):
            assert other.hp_gap == pytest.approx(whole.hp_gap, rel=1e-4)
            assert other.loss_gap == pytest.approx(whole.loss_gap, rel=1e-4)

    @pytest.mark.parametrize("scale", ["linear", "momentum"])
    def test_other_scales(self, scale):
        x = np.arange(1.0, 11.0, 0.5)
        curves = parabolas(x=x - 9.5)
        hp = x if scale == "linear" else 1 - 2.0**-x
        gaps = transfer_gaps(WIDTHS, hp, curves, scale=scale)
        assert gaps.hp_gap == pytest.approx(2 * RATIO**-0.75, rel=1e-4)


class TestMidpoints:
    @pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.5])
    @pytest.mark.parametrize("seed", range(4))
    def test_equal_a_fine_scan(self, tolerance, seed):
        rng = np.random.default_rng(seed)
        curve = 0.2 * (X + 4 + 0.3 * rng.normal()) ** 2 + 0.05 * rng.normal(size=X.size)
        found = locate_midpoints(2.0**X, curve, tolerance=tolerance)
        fine = np.linspace(X[0], X[-1], 400_001)
        smooth = PchipInterpolator(X, curve)
        level = curve.min() + tolerance * np.ptp(curve)
        start = np.searchsorted(fine, X[curve.argmin()])
        bad = np.flatnonzero(smooth(fine) > level)
        low, high = fine[bad[bad < start][-1]], fine[bad[bad > start][0]]
        assert found.coordinate == pytest.approx((low + high) / 2, abs=1e-4)
        assert found.loss == pytest.approx(smooth((low + high) / 2), abs=1e-5)
        assert not found.at_edge

    def test_is_the_argmin_on_a_symmetric_curve(self):
        curve = 0.2 * (X + 4) ** 2
        assert locate_midpoints(2.0**X, curve).hp == pytest.approx(2.0**-4, rel=1e-12)

    def test_leaves_the_steep_side(self):
        curve = np.where(X < -4, 0.1 * (X + 4) ** 2, 3 * (X + 4) ** 2)
        found, argmin = (f(2.0**X, curve) for f in (locate_midpoints, locate_optima))
        assert found.coordinate < argmin.coordinate - 0.2

    def test_many_curves_at_once(self):
        curves = parabolas() + 0.01 * np.random.default_rng(0).normal(size=(3, 6, X.size))
        curves[1, 2, -5:] = np.nan
        together = locate_midpoints(2.0**X, curves, tolerance=0.03)
        for index in np.ndindex(3, 6):
            alone = locate_midpoints(2.0**X, curves[index], tolerance=0.03)
            assert together.coordinate[index] == alone.coordinate
            assert together.loss[index] == alone.loss

    def test_edges(self):
        rising = 0.1 * (X + 9) ** 2
        found = locate_midpoints(2.0**X, rising)
        assert (bool(found.low_edge), bool(found.high_edge)) == (True, False)
        assert found.coordinate_low == -np.inf
        alone = np.full(X.size, np.nan)
        alone[4] = 1.0
        found = locate_midpoints(2.0**X, alone)
        assert found.edge() == "both"
        assert found.hp == pytest.approx(2.0 ** X[4])
        assert (found.coordinate_low, found.coordinate_high) == pytest.approx(
            (X[4] - 0.25, X[4] + 0.25)
        )
        dead = locate_midpoints(2.0**X, np.full(X.size, np.nan))
        assert dead.edge() == "all diverged"
        assert np.isnan(dead.hp)
        assert np.isinf(dead.loss)

    @pytest.mark.parametrize("tolerance", [0, 1, -0.1, 5, np.nan])
    def test_tolerance_is_a_fraction(self, tolerance):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            locate_midpoints(2.0**X, X**2, tolerance=tolerance)


class TestLosses:
    def test_a_diverged_seed_makes_the_cell_unusable(self):
        losses = np.repeat(parabolas()[..., None], 3, axis=-1)
        losses[2, 5, 1] = np.nan
        table = loss_table(WIDTHS, 2.0**X, losses)
        assert np.isinf(table.curves[2][5])
        assert np.isfinite(np.delete(table.curves[2], 5)).all()

    def test_a_seed_that_was_not_run_does_not(self):
        losses = np.repeat(parabolas()[..., None], 3, axis=-1) + np.array([0.0, 0.1, 0.5])
        seen = np.ones(losses.shape, dtype=bool)
        losses[2, 5, 1], seen[2, 5, 1] = np.nan, False
        seen[3, 2] = False
        table = loss_table(WIDTHS, 2.0**X, losses, observed=seen)
        assert table.curves[2][5] == pytest.approx(parabolas()[2, 5] + 0.25)
        assert table.grids[3] == pytest.approx(np.delete(2.0**X, 2))
        assert table.replicates.tolist() == [3] * 6

    def test_resampled_means_have_the_variance_of_a_mean(self):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(4, 5))
        weights = rng.multinomial(5, np.full(5, 0.2), size=20_000)
        moved = resampled_deviations(values, weights)
        error = moved**2 - values.var(axis=1, ddof=1) / 5
        assert (np.abs(error.mean(axis=0)) < standard_error_band(error)).all()
        assert (np.abs(moved.mean(axis=0)) < standard_error_band(moved)).all()

    def test_a_seed_that_blew_up_leads_no_draw_below_all_losses(self):
        rng = np.random.default_rng(0)
        losses = parabolas()[..., None] + 1e-3 * rng.normal(size=(6, X.size, 3))
        plain = loss_table(WIDTHS, 2.0**X, losses).draws(200, 0)
        losses[:, -3:, 2] = 1e5
        blown = loss_table(WIDTHS, 2.0**X, losses)
        for k, (before, after) in enumerate(zip(plain, blown.draws(200, 0), strict=True)):
            assert after[:, :-3] == pytest.approx(before[:, :-3], abs=1e-12)
            assert (after[:, -3:] > losses[k, -3:].min(axis=-1) - 0.01).all()
        assert not read_optima(blown).near_edge.any()

    def test_resampling_equals_a_loop_with_missing_seeds(self):
        rng = np.random.default_rng(0)
        values, seen = rng.normal(size=(3, 4)), np.ones((3, 4), dtype=bool)
        seen[0, 1] = seen[2, 0] = seen[2, 1] = seen[2, 2] = False
        weights = rng.multinomial(4, np.full(4, 0.25), size=50)
        moved = resampled_deviations(values, weights, seen)
        for r, c in np.ndindex(50, 3):
            held, kept = weights[r, seen[c]], values[c, seen[c]]
            count = kept.size
            if held.sum() == 0 or count == 1:
                assert moved[r, c] == pytest.approx(0, abs=EPS)
                continue
            expected = (held @ kept / held.sum() - kept.mean()) * np.sqrt(count / (count - 1))
            assert moved[r, c] == pytest.approx(expected, abs=EPS)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"widths": WIDTHS[::-1]}, "strictly increasing"),
            ({"widths": WIDTHS + 0.5}, "whole numbers"),
            ({"losses": np.zeros((6, X.size, 2, 1))}, r"expected \(width, hyperparameter, seed\)"),
            ({"losses": np.zeros((5, X.size))}, "losses has shape"),
            ({"hp_values": 2.0 ** X[:-1]}, "hp_values has shape"),
            ({"hp_values": -(2.0**X)}, "at width 64: .*above 0"),
            ({"hp_values": 2.0 ** X[::-1]}, "at width 64: .*sort"),
            ({"observed": np.ones((6, X.size))}, "expected bool"),
            ({"observed": np.arange(X.size) < 2 + 0 * X[None] * WIDTHS[:, None]}, "needs 3"),
            ({"scale": "log10"}, "scale='log10' is not known"),
        ],
    )
    def test_bad_input(self, change, match):
        arguments = {"widths": WIDTHS, "hp_values": 2.0**X, "losses": parabolas()} | change
        with pytest.raises(ValueError, match=match):
            loss_table(
                arguments.pop("widths"),
                arguments.pop("hp_values"),
                arguments.pop("losses"),
                **arguments,
            )


class TestReadings:
    def test_one_seed_has_no_draws(self):
        readings = read_optima(loss_table(WIDTHS, 2.0**X, parabolas()))
        assert readings.drawn_coordinate is None
        assert readings.dof_per_width == 0

    def test_the_root_is_the_distance_on_a_parabola(self):
        readings = read_optima(loss_table(WIDTHS, 2.0**X, parabolas()))
        away = np.array([-1.0, -0.3, 0.0, 0.4])
        root = readings.s(readings.coordinate[-1] + away)
        assert root == pytest.approx(np.sqrt(0.15) * away, abs=EPS)
        assert np.isposinf(readings.s(np.array([3.0])))
        assert np.isneginf(readings.s(np.array([-12.0])))

    def test_a_lopsided_curve_on_a_coarse_grid_has_a_coarser_resolution(self):
        losses = np.repeat(parabolas()[..., None], 3, axis=-1)
        exact = read_optima(loss_table(WIDTHS, 2.0**X, losses))
        assert exact.resolution == pytest.approx(0.0015)
        assert exact.loss_resolution == pytest.approx(0, abs=1e-9)
        x = np.arange(-9.0, 1.0)
        away = x - (-4 + 2 * RATIO**-0.75)[:, None]
        lopsided = 2 + np.repeat((np.exp(0.8 * away) - 0.8 * away)[..., None], 3, axis=-1)
        coarse = read_optima(loss_table(WIDTHS, 2.0**x, lopsided), optimum="parabola")
        assert coarse.resolution > 0.011
        assert coarse.loss_resolution > 1e-4

    @pytest.mark.parametrize("far", [2, 3, 4])
    @pytest.mark.parametrize("height", [4.0, 10.0, 1e5, 1e90])
    def test_runs_that_blew_up_do_not_ripple(self, far, height):
        away = X - (-4 + 2 * RATIO**-0.75)[:, None]
        curves = 2 + 0.3 * (np.expm1(0.3 * away) - 0.3 * away) / 0.09
        plain = read_optima(loss_table(WIDTHS, 2.0**X, curves), optimum="parabola")
        for k, best in enumerate(curves.argmin(axis=1)):
            curves[k, best + far :] = height
        blown = read_optima(loss_table(WIDTHS, 2.0**X, curves), optimum="parabola")
        assert blown.coordinate == pytest.approx(plain.coordinate, abs=EPS)
        assert blown.resolution <= 1.2 * plain.resolution
        assert blown.loss_resolution <= 1.2 * plain.loss_resolution

    def test_the_spline_is_exact_on_cubics_of_any_spacing(self):
        x = np.array([-6.0, -4.9, -4.2, -3.5, -2.4, -1.0])
        curve = 1 + (x + 4) ** 2 + 0.1 * (x + 4) ** 3
        assert _spline_minimum(2.0**x, curve, "log2") == pytest.approx((-4, 1), abs=EPS)
        curve[4:] = 1e6
        assert _spline_minimum(2.0**x, curve, "log2") == pytest.approx((-4, 1), abs=EPS)
        curve[:2] = np.inf
        assert np.isnan(_spline_minimum(2.0**x, curve, "log2")).all()

    def test_a_wall_beside_the_optimum_does_not_lower_the_loss(self):
        curve = np.array([0.06, 0.051, 0.05, 5.0, 5.0])
        _, loss = _spline_minimum(np.exp2(np.arange(5.0)), curve, "log2")
        assert 0.04 < loss <= 0.05

    def test_a_draw_that_leaves_the_grid_is_noticed(self):
        rng = np.random.default_rng(0)
        moved = parabolas(beta=0.01)[..., None] + 0.3 * rng.normal(size=(6, X.size, 3))
        moved[3] += 4 * (np.arange(X.size) < 12)[:, None]
        readings = read_optima(loss_table(WIDTHS, 2.0**X, moved))
        assert readings.near_edge.dtype == np.bool_

    def test_the_rule_is_known(self):
        with pytest.raises(ValueError, match="optimum='argmin' is not known"):
            read_optima(loss_table(WIDTHS, 2.0**X, parabolas()), optimum="argmin")  # pyright: ignore[reportArgumentType]

    def test_infinity_is_known(self):
        with pytest.raises(ValueError, match="infinity='big' is not known"):
            transfer_gaps(WIDTHS, 2.0**X, parabolas(), infinity="big")  # pyright: ignore[reportArgumentType]
