"""Learning-rate transfer, summarised: exact where there is no noise, and what is said of it."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from parabola_losses import EPS, LOG_WIDTHS, WIDTHS, X, parabolas, summarise, with_seeds
from theory import interpolate_loss, transfer_summary
from theory.drift import format_rate_interval


class TestWithoutNoise:
    @pytest.mark.parametrize("power", [-0.5, 0.0, 0.25, 0.5, 1.0])
    def test_a_power_law_is_recovered_exactly(self, power):
        summary = summarise(with_seeds(parabolas(power)))
        assert summary.drift_per_doubling == pytest.approx(-power, abs=100 * EPS)
        assert summary.drift_octaves == pytest.approx(-3 * power, abs=100 * EPS)
        assert np.log2(summary.optimal_lr) == pytest.approx(
            -4 - power * np.arange(4), abs=100 * EPS
        )
        assert summary.optimal_loss == pytest.approx([2.0] * 4, rel=EPS)
        for interval in (summary.drift_interval, summary.drift_per_doubling_interval):
            assert interval[1] - interval[0] == pytest.approx(0, abs=100 * EPS)
        if power != 0.25:  # the default tolerance itself: rounding decides
            assert summary.verdict == ("drifts" if abs(power) > 0.25 else "stays")
        assert summary.stability == 1.0
        assert summary.warnings == ()

    def test_widths_need_not_be_doublings(self):
        widths = np.array([48, 100, 391])
        curves = parabolas(0.5, log_widths=np.log2(widths))
        summary = summarise(with_seeds(curves), widths=widths)
        assert summary.drift_per_doubling == pytest.approx(-0.5, abs=100 * EPS)
        assert summary.drift_octaves == pytest.approx(-0.5 * np.log2(391 / 48), abs=100 * EPS)

    def test_the_slope_is_the_least_squares_line(self):
        rng = np.random.default_rng(1)
        optimum = -4 + rng.normal(size=4)
        curves = 2 + 0.2 * (X - optimum[:, None]) ** 2
        summary = summarise(with_seeds(curves))
        expected = np.polyfit(LOG_WIDTHS, optimum, 1)[0]
        assert summary.drift_per_doubling == pytest.approx(expected, abs=100 * EPS)

    def test_the_penalty_is_what_the_old_optimum_costs_at_the_largest_width(self):
        # 0.3 octaves off, within the bracket of the largest width's optimum: ½ · 0.4 · 0.3².
        summary = summarise(with_seeds(parabolas(0.1)))
        assert summary.transfer_penalty == pytest.approx(0.2 * 0.3**2, rel=1e3 * EPS)
        # 3 octaves off, at a grid point of the far side: ½ · 0.4 · 3².
        summary = summarise(with_seeds(parabolas(1.0)))
        assert summary.transfer_penalty == pytest.approx(0.2 * 9, rel=1e3 * EPS)
        assert summarise(with_seeds(parabolas(0.0))).transfer_penalty == pytest.approx(0, abs=EPS)

    def test_the_penalty_is_infinite_where_the_largest_width_diverged(self):
        losses = with_seeds(parabolas(1.0))
        diverged = np.zeros(losses.shape, dtype=bool)
        diverged[-1, X > -6] = True
        summary = summarise(losses, diverged=diverged)
        assert summary.transfer_penalty == math.inf
        assert any("penalty is infinite" in warning for warning in summary.warnings)
        assert "width 64's best learning rate diverges at width 512" in summary.table()

    def test_learning_rates_in_other_units_move_everything_by_the_same_octaves(self):
        losses = with_seeds(parabolas(0.5), cells=0.05)
        plain, moved = summarise(losses), summarise(losses, x=X + 3)
        assert moved.optimal_lr == pytest.approx(8 * np.array(plain.optimal_lr), rel=100 * EPS)
        assert np.array(moved.optimal_lr_interval) == pytest.approx(
            8 * np.array(plain.optimal_lr_interval), rel=1e3 * EPS
        )
        assert moved.drift_interval == pytest.approx(plain.drift_interval, abs=1e3 * EPS)
        assert moved.transfer_penalty == pytest.approx(plain.transfer_penalty, abs=1e3 * EPS)


class TestDivergence:
    def test_one_diverged_seed_takes_the_cell_out(self):
        losses = with_seeds(parabolas(0.0))
        diverged = np.zeros(losses.shape, dtype=bool)
        diverged[:, X > -3, 1] = True
        losses[diverged] = np.nan
        # Survivors of a diverged cell look good and must not be chosen.
        losses[:, X > -3, 0] = 0.0
        summary = summarise(losses, diverged=diverged)
        assert np.log2(summary.optimal_lr) == pytest.approx([-4] * 4, abs=100 * EPS)
        assert summary.optimal_loss == pytest.approx([2.0] * 4)

    def test_stability_is_the_fraction_of_trials_that_did_not_diverge(self):
        losses = with_seeds(parabolas(0.0))
        diverged = np.zeros(losses.shape, dtype=bool)
        diverged[1, 0, 0] = diverged[3, :2, :] = True
        summary = summarise(losses, diverged=diverged)
        assert summary.stability_per_width == pytest.approx((1, 1 - 1 / 52, 1, 1 - 8 / 52))
        assert summary.stability == pytest.approx(1 - 9 / 208)

    def test_a_width_where_everything_diverged_is_left_out_and_named(self):
        losses = with_seeds(parabolas(0.0))
        diverged = np.zeros(losses.shape, dtype=bool)
        diverged[3] = True
        summary = summarise(losses, diverged=diverged)
        assert summary.edge == ("", "", "", "all diverged")
        assert math.isnan(summary.optimal_lr[3])
        assert summary.optimal_loss[3] == math.inf
        assert math.isnan(summary.drift_octaves)
        assert math.isnan(summary.transfer_penalty)
        assert summary.drift_per_doubling == pytest.approx(0, abs=100 * EPS)
        assert summary.verdict == "cannot tell"
        assert "every learning rate diverged at width 512; add smaller" in summary.reason
        # The other three widths alone can still show a drift.
        moving = summarise(with_seeds(parabolas(1.0)), diverged=diverged)
        assert moving.verdict == "drifts"
        assert moving.drift_per_doubling == pytest.approx(-1, abs=100 * EPS)

    def test_nothing_but_divergence_is_a_result_too(self):
        losses = np.full((4, X.size, 3), np.nan)
        summary = summarise(losses, diverged=np.ones(losses.shape, dtype=bool))
        assert summary.verdict == "cannot tell"
        assert "fewer than two widths have an optimum" in summary.reason
        assert summary.stability == 0.0
        assert all(math.isnan(end) for end in summary.drift_per_doubling_interval)
        assert "every learning rate diverged" in summary.table()


class TestEdges:
    def test_an_optimum_at_the_end_of_the_grid_never_stays(self):
        summary = summarise(with_seeds(parabolas(0.0, at=5.0)))
        assert summary.edge == ("high",) * 4
        assert summary.at_edge == (True,) * 4
        assert summary.drift_octaves == 0.0
        assert summary.verdict == "cannot tell"
        assert "extend the grid" in summary.reason
        assert summary.drift_interval == (-math.inf, math.inf)
        # The midpoint of the last two grid points and above.
        low, high = summary.optimal_lr_interval[0]
        assert (np.log2(low), high) == (pytest.approx(1.5), math.inf)
        assert "at least" in summary.penalty_sentence()

    def test_one_optimum_at_a_diverged_neighbour_is_enough_to_withhold_stays(self):
        losses = with_seeds(parabolas(0.0))
        diverged = np.zeros(losses.shape, dtype=bool)
        diverged[2, X > -4] = True
        summary = summarise(losses, diverged=diverged)
        assert summary.edge == ("", "", "high", "")
        assert summary.verdict == "cannot tell"
        assert "at width 256 the optimum is at or near the edge" in summary.reason
        low, high = np.log2(summary.optimal_lr_interval[2])
        assert (low, high) == (pytest.approx(-4.5), pytest.approx(-3.0))

    def test_a_bound_can_show_a_drift(self):
        # The smallest width's optimum is beyond the grid's upper end: the true drift is larger.
        summary = summarise(with_seeds(parabolas(1.0, at=2.4), cells=0.01))
        assert summary.edge == ("high", "", "", "")
        assert summary.verdict == "drifts"
        low, high = summary.drift_per_doubling_interval
        assert low == -math.inf
        # Least-squares weights on the bound, 1.5, and the other optima.
        expected = np.dot([-0.3, -0.1, 0.1, 0.3], [1.5, 1.4, 0.4, -0.6])
        assert high == pytest.approx(expected, abs=0.05)
        assert "at most" in summary.reason
        assert any("only a bound" in warning for warning in summary.warnings)

    def test_the_two_ends_can_show_what_edges_in_between_hide(self):
        # Weights of both signs at the upper edge leave the fitted slope open on both sides.
        optimum = np.array([6.0, 5.0, 4.0, -6.0])
        curves = 2 + 0.2 * (X - optimum[:, None]) ** 2
        summary = summarise(with_seeds(curves))
        assert summary.drift_per_doubling_interval == (-math.inf, math.inf)
        assert summary.drift_interval[1] == pytest.approx(-6 - 1.5)
        assert summary.verdict == "drifts"
        assert "from the smallest to the largest width is at most -2.50 octaves" in summary.reason

    def test_an_interval_that_leans_on_the_grids_end_is_not_trusted_with_stays(self):
        # Two of four seeds alone would have their optimum at the grid's upper end, 2.
        shifts = np.array([-0.6, -0.2, 0.4, 1.2])
        losses = np.stack([parabolas(0.0, at=1.2 + shift) for shift in shifts], axis=-1)
        summary = summarise(losses)
        assert summary.at_edge == (False,) * 4
        low, high = summary.drift_per_doubling_interval
        assert -0.25 < low <= high < 0.25
        assert any("resampled optima often reach" in warning for warning in summary.warnings)
        assert summary.verdict == "cannot tell"
        assert "at widths 64, 128, 256, 512 the optimum is at or near the edge" in summary.reason
        # Two octaves more of grid, and there is nothing to doubt.
        x = np.arange(-10.0, 5.0)
        longer = [parabolas(0.0, at=1.2 + shift, x=x) for shift in shifts]
        assert summarise(np.stack(longer, axis=-1), x=x).verdict == "stays"


class TestVerdict:
    def test_it_follows_from_the_interval_and_the_tolerance(self):
        losses = with_seeds(parabolas(0.3), seeds=5, cells=0.03)
        low, high = summarise(losses).drift_per_doubling_interval
        assert low < -0.3 < high < 0
        assert summarise(losses, tolerance=-high * 0.99).verdict == "drifts"
        assert summarise(losses, tolerance=-low * 1.01).verdict == "stays"
        between = summarise(losses, tolerance=-(low + high) / 2)
        assert between.verdict == "cannot tell"
        assert "too close to call with more seeds" in between.reason
        nearly = summarise(losses, tolerance=-low * 0.99)
        assert nearly.verdict == "cannot tell"
        distance = -low * 0.99 + (low + high) / 2
        count = np.arange(6, 100)
        shrunk = (high - low) / 2 * stats.t.ppf(0.95, count - 1) / np.sqrt(count)
        shrunk /= stats.t.ppf(0.95, 4) / math.sqrt(5)
        wanted = count[shrunk < distance][0]
        assert f"about {wanted} seeds would tell, if the estimate -0.29 holds" in nearly.reason
        upward = summarise(with_seeds(parabolas(-0.3, at=-5), seeds=5, cells=0.03), tolerance=0.1)
        assert upward.verdict == "drifts"

    def test_one_seed_gives_no_interval_and_no_verdict(self):
        summary = summarise(with_seeds(parabolas(1.0), seeds=1))
        assert summary.drift_per_doubling == pytest.approx(-1)
        intervals = [
            *summary.optimal_lr_interval,
            *summary.optimal_loss_interval,
            summary.drift_interval,
            summary.drift_per_doubling_interval,
        ]
        assert np.isnan(intervals).all()
        assert summary.verdict == "cannot tell"
        assert "one seed does not show how much of that is chance" in summary.reason
        assert summary.warnings == ("one seed: no interval can be given; run at least 3 seeds",)
        assert "no interval" in summary.table()

    def test_two_seeds_are_warned_about(self):
        summary = summarise(with_seeds(parabolas(1.0), seeds=2))
        assert summary.warnings[0].startswith("two seeds: intervals rest on one degree of freedom")

    @pytest.mark.parametrize(("step", "said"), [(1, False), (1.05, False), (2, True)])
    def test_a_coarse_grid_is_warned_about(self, step, said):
        x = np.arange(-9.0, 1.0, step)
        curves = 2 + 0.2 * (x + 4) ** 2 + 0.01 * np.arange(4)[:, None]
        losses = np.repeat(curves[..., None], 3, axis=-1)
        summary = transfer_summary(WIDTHS, 2.0**x, losses, np.zeros(losses.shape, bool))
        warned = [f"steps of {step} octaves" in warning for warning in summary.warnings]
        assert warned == ([True] if said else [])

    def test_one_width_shows_no_drift(self):
        summary = summarise(with_seeds(parabolas()[:1]), widths=WIDTHS[:1])
        assert summary.verdict == "cannot tell"
        assert "run at least two widths" in summary.reason
        assert np.isnan([summary.drift_octaves, summary.transfer_penalty]).all()
        assert summary.optimal_lr_interval[0] == pytest.approx((2.0**-4, 2.0**-4))


class TestPresentation:
    def test_json_is_strict_and_complete(self):
        losses = with_seeds(parabolas(1.0, at=2.4), seeds=3, cells=0.01)
        diverged = np.zeros(losses.shape, dtype=bool)
        diverged[2] = True
        summary = summarise(losses, diverged=diverged)
        record = json.loads(json.dumps(summary.to_json(), allow_nan=False))
        assert set(record) == {
            "widths",
            "optimal_lr",
            "optimal_lr_interval",
            "optimal_loss",
            "optimal_loss_interval",
            "edge",
            "at_edge",
            "drift_octaves",
            "drift_interval",
            "drift_per_doubling",
            "drift_per_doubling_interval",
            "transfer_penalty",
            "stability",
            "stability_per_width",
            "verdict",
            "reason",
            "warnings",
            "confidence",
            "tolerance",
            "seeds",
        }
        assert record["widths"] == [64, 128, 256, 512]
        assert record["optimal_lr"][2] is None
        assert record["optimal_lr_interval"][0][1] is None  # open above
        assert record["at_edge"] == [True, False, True, False]
        assert record["drift_interval"][0] is None
        assert record["drift_octaves"] == summary.drift_octaves
        assert record["seeds"] == 3

    def test_the_table_is_aligned_and_says_it_all(self):
        losses = with_seeds(parabolas(1.0, at=2.4), seeds=3, cells=0.01)
        table = summarise(losses).table()
        lines = table.splitlines()
        assert lines[0].split() == [
            "width", "optimal", "lr", "90", "%", "interval", "loss", "stability",
        ]  # fmt: skip
        rows = lines[2:6]
        assert [row.split()[0] for row in rows] == ["64", "128", "256", "512"]
        assert "2^2.00" in rows[0]
        assert "above 2^1.5" in rows[0]
        assert rows[0].endswith("not bracketed (high)")
        # Right-aligned numbers end in one column.
        ends = {row.index(" 1.00") for row in rows}
        assert len(ends) == 1
        for word in ("drift ", "penalty ", "stability ", "verdict ", "warning "):
            assert any(line.startswith(word) for line in lines[6:])
        assert "verdict    drifts: the drift is at most" in table

    def test_open_intervals_are_said_in_words(self):
        assert format_rate_interval((0.25, 0.5)) == "2^-2.00 to 2^-1.00"
        assert format_rate_interval((0.0, 0.5)) == "below 2^-1.00"
        assert format_rate_interval((0.25, math.inf)) == "above 2^-2.00"
        assert format_rate_interval((0.0, math.inf)) == "unbounded"
        assert format_rate_interval((math.nan, math.nan)) == "unknown"


GOOD = {
    "widths": WIDTHS,
    "learning_rates": 2.0**X,
    "losses": np.ones((4, 13, 2)),
    "diverged": np.zeros((4, 13, 2), dtype=bool),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [64.0, 128.0, 256.0, 512.0]}, r"dtype float64, expected integers"),
        ({"widths": [64, 64, 128, 256]}, r"widths=\[64, 64, 128, 256\].*strictly increasing"),
        ({"widths": [0, 64, 128, 256]}, r"widths=\[0, 64, 128, 256\] must be positive"),
        ({"learning_rates": 2.0 ** X[::-1]}, r"learning_rates=.*strictly increasing; sort"),
        ({"learning_rates": X}, r"learning_rates=.*must be finite, positive"),
        ({"learning_rates": [0.1, 0.2]}, r"learning_rates has shape \(2,\).*H >= 3"),
        ({"losses": np.ones((4, 13))}, r"losses has shape \(4, 13\).*\(4, 13, S\)"),
        ({"losses": np.ones((13, 4, 2))}, r"losses has shape \(13, 4, 2\)"),
        ({"losses": np.ones((4, 13, 0))}, r"losses has shape \(4, 13, 0\)"),
        ({"diverged": np.zeros((4, 13, 3), dtype=bool)}, r"diverged has shape \(4, 13, 3\)"),
        ({"diverged": np.zeros((4, 13, 2), dtype=np.int8)}, r"dtype int8.*use status != 0"),
        ({"confidence": 90}, r"confidence=90 must lie between 0 and 1"),
        ({"resamples": 10}, r"resamples=10 is too few"),
        ({"tolerance": 0.0}, r"tolerance=0.0 must be a positive number of octaves"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        transfer_summary(**{**GOOD, **change})


def test_a_missing_loss_that_nothing_explains_is_refused_with_its_place():
    losses = GOOD["losses"].copy()
    losses[1, 3, 1] = np.nan
    with pytest.raises(
        ValueError,
        match=r"losses at width 128, learning rate 0.0078125, seed 1 is nan.*mark it in diverged",
    ):
        transfer_summary(**{**GOOD, "losses": losses})
    diverged = GOOD["diverged"].copy()
    diverged[1, 3, 1] = True
    assert transfer_summary(**{**GOOD, "losses": losses, "diverged": diverged}).stability < 1


def test_the_penalty_reads_the_mean_curve_between_grid_points():
    rng = np.random.default_rng(7)
    curves = 2 + 0.1 * (X - np.array([-1.3, -2.0, -3.0, -6.6])[:, None]) ** 4
    losses = with_seeds(curves, seeds=3, rng=rng, cells=0.01)
    summary = summarise(losses)
    largest = losses[-1].mean(axis=-1)
    at_old = interpolate_loss(2.0**X, largest, summary.optimal_lr[0])
    assert summary.transfer_penalty == pytest.approx(
        float(at_old) - summary.optimal_loss[-1], rel=EPS
    )
    assert largest[8] < at_old < largest[9]
