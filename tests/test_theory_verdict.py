"""Diagnoses: exact on planted sweeps, covered with noise, and silent where data are thin."""

import json
import math

import numpy as np
import pytest

from theory import TransferDiagnosis, diagnose_transfer, interpolate_loss
from theory.losses import loss_table
from theory.rates import fit_power_law
from theory.readings import read_optima
from theory.verdict import rate_advantage

X = np.arange(-9.0, 1.0, 0.5)
KEYS = (
    *("widths", "optimal_hp", "optimal_loss", "alpha", "beta", "c_rate", "curvature_exponent"),
    *("transfer_penalty", "loss_floor", "loss_prefactor", "verdict", "probability_fast"),
    "warnings",
)


def plant(
    alpha=0.5,
    beta=0.75,
    *,
    widths=6,
    seeds=3,
    shift=2.0,
    drift=0.0,
    gamma=0.0,
    noise=1e-6,
    moved=0.0,
    seed=0,
    x=X,
):
    """`2 + 3 r^−α + ½ 0.3 r^γ (x − x*)²`, `x* = −5 + shift r^−β − drift log2 r`, r = n/64."""
    rng = np.random.default_rng(seed)
    n = 64 * 2 ** np.arange(widths)
    r = n / 64
    optimum = -5 + shift * r**-beta - drift * np.log2(r)
    away = x[None, :, None] - optimum[:, None, None] - moved * rng.normal(size=(widths, 1, seeds))
    losses = (2 + 3 * r**-alpha)[:, None, None] + 0.15 * (r**gamma)[:, None, None] * away**2
    losses = losses + noise * (rng.normal(size=losses.shape) + rng.normal(size=(1, 1, seeds)))
    return n, 2.0**x, losses


def diagnose(*, options=None, **planted) -> TransferDiagnosis:
    return diagnose_transfer(*plant(**planted), resamples=200, **(options or {}))


class TestNumbers:
    def test_exponents_are_those_planted(self):
        found = diagnose(alpha=0.6, beta=0.5)
        assert found.alpha.value == pytest.approx(0.6, rel=1e-3)
        assert found.beta.value == pytest.approx(0.5, rel=1e-3)
        assert found.c_rate.value == pytest.approx(1.0, rel=1e-3)
        assert found.advantage.value == pytest.approx(0.4, rel=1e-3)
        assert found.curvature_exponent.value == pytest.approx(0.0, abs=1e-3)
        assert found.kappa.value == pytest.approx(-0.4, abs=2e-3)
        assert found.loss_floor.value == pytest.approx(2.0, rel=1e-3)
        assert found.loss_prefactor.value == pytest.approx(3 * 64**0.6, rel=1e-3)
        assert found.optimal_loss[0].value == pytest.approx(5.0, rel=1e-5)
        assert np.log2([e.value for e in found.optimal_hp]) == pytest.approx(
            -5 + 2 * (2.0 ** np.arange(6)) ** -0.5, abs=1e-4
        )
        for estimate in (found.alpha, found.beta, found.c_rate, found.advantage, found.kappa):
            low, high = estimate.interval
            assert low <= estimate.value <= high

    def test_a_curvature_that_grows_counts_in_kappa_alone(self):
        found = diagnose(alpha=1.0, beta=0.6, gamma=0.5)
        assert found.curvature_exponent.value == pytest.approx(0.5, abs=1e-3)
        assert found.kappa.value == pytest.approx(1.0 - 1.2 + 0.5, abs=5e-3)
        assert (found.verdict, found.verdict_kappa) == ("fast", "not fast")
        assert diagnose(alpha=1.0, beta=0.6).verdict_kappa == "fast"

    @pytest.mark.parametrize("infinity", ["auto", "largest"])
    def test_exponents_do_not_depend_on_what_stands_for_infinity(self, infinity):
        found = diagnose(options={"infinity": infinity})
        assert found.alpha.value == pytest.approx(0.5, rel=1e-3)
        assert found.gaps.infinity == ("largest" if infinity == "largest" else "limit")
        assert found.to_json()["infinity"] == found.gaps.infinity

    def test_the_penalty_is_read_off_the_largest_width(self):
        n, hp, losses = plant(beta=0.5)
        found = diagnose_transfer(n, hp, losses)
        curve = losses[-1].mean(axis=-1)
        there = interpolate_loss(hp, curve, np.asarray(found.optimal_hp[0].value))
        expected = float(there) - found.optimal_loss[-1].value
        assert found.transfer_penalty.value == pytest.approx(expected, rel=0.02)
        exact = 0.15 * (2 - 2 * 32**-0.5) ** 2
        assert found.transfer_penalty.value == pytest.approx(exact, rel=1e-3)

    def test_the_penalty_is_unknown_where_an_optimum_is_only_a_bound(self):
        n, hp, losses = plant(alpha=1.0, beta=0.3)
        first, last = (np.argmin(losses[k].mean(axis=-1)) for k in (0, -1))
        whole = diagnose_transfer(n, hp, losses, resamples=200)
        assert whole.transfer_penalty.value > 0
        # Beyond the smallest width's optimum, beyond the largest's, and beyond both.
        places = np.arange(X.size)
        for kept in (places < first, places > last, places < last, places > first):
            found = diagnose_transfer(n, hp[kept], losses[:, kept], resamples=200)
            assert found.edges[0] or found.edges[-1]
            assert math.isnan(found.transfer_penalty.value)
            assert found.to_json()["transfer_penalty"] == {"value": None, "interval": None}

    def test_what_was_asked_for_and_is_not_there_is_said(self):
        n, hp, losses = plant(shift=0.0, drift=0.4, widths=5)
        found = diagnose_transfer(n, hp, losses, infinity="limit", target_width=256)
        assert any("no hyperparameter gap against the limit" in w for w in found.warnings)
        assert not any("no loss gap against the limit" in w for w in found.warnings)
        assert any("target width 256 is in the table" in w for w in found.warnings)
        assert "unknown" in found.table()
        found = diagnose_transfer(n, hp, losses, target_width=257)
        assert not any("against the limit" in w or "in the table" in w for w in found.warnings)

    def test_no_usable_width_is_said_to_be_none(self):
        n, hp, losses = plant()
        found = diagnose_transfer(n, hp[X > -3.0], losses[:, X > -3.0], resamples=200)
        assert all(found.edges)
        assert any("bracketed at 0 of 6 widths" in warning for warning in found.warnings)
        assert not any("1 width" in warning for warning in found.warnings)

    def test_midpoints_differ_from_argmins_on_lopsided_curves(self):
        n, hp, _ = plant()
        away = X + 4 - 2 * ((n / 64) ** -0.75)[:, None]
        curves = 2 + 3 * ((n / 64) ** -0.5)[:, None] + np.where(away > 0, 0.6, 0.1) * away**2
        argmin = diagnose_transfer(n, hp, curves[..., None])
        midpoint = diagnose_transfer(
            n, hp, curves[..., None], optimum="midpoint", midpoint_tolerance=0.05
        )
        assert midpoint.optimum == "midpoint"
        for a, m in zip(argmin.optimal_hp, midpoint.optimal_hp, strict=True):
            assert m.value < a.value


class TestVerdict:
    @pytest.mark.parametrize(
        ("planted", "verdict"),
        [
            ({"alpha": 0.5, "beta": 0.75}, "fast"),
            ({"alpha": 1.0, "beta": 0.75}, "fast"),
            ({"alpha": 1.0, "beta": 0.3}, "weak"),
            ({"alpha": 0.5, "shift": 0.0, "drift": 0.6, "widths": 5}, "no transfer"),
            ({"alpha": 0.5, "shift": 0.0, "moved": 0.02}, "fast"),
        ],
    )
    def test_on_clear_data(self, planted, verdict):
        found = diagnose(noise=1e-4, **planted)
        assert found.verdict == verdict
        assert (found.probability_fast > 0.95) == (verdict == "fast")
        assert (found.probability_fast < 0.05) == (verdict != "fast")

    def test_on_the_border_is_weak_if_sharp_and_open_if_not(self):
        sharp = diagnose(alpha=0.8, beta=0.4, noise=1e-5, widths=8)
        assert sharp.verdict == "weak"
        assert 0.04 < sharp.probability_fast < 0.96
        assert "as good as constant" in sharp.reason
        noisy = diagnose(alpha=0.8, beta=0.4, noise=1e-3, moved=0.1)
        assert noisy.verdict == "cannot tell"
        assert "would tell" in noisy.reason or "too close" in noisy.reason

    def test_an_optimum_that_stays_is_fast_by_size_only_if_known_well(self):
        sure = diagnose(shift=0.0, moved=0.02)
        assert "by size" in sure.reason
        assert math.isnan(sure.beta.value)
        unsure = diagnose(shift=0.0, moved=1.0, x=np.arange(-12.0, 4.0, 0.5))
        assert unsure.verdict == "cannot tell"
        assert unsure.probability_fast < 0.95

    @pytest.mark.parametrize(
        ("planted", "says"),
        [
            ({"seeds": 1}, "one seed"),
            ({"widths": 3}, "3 widths"),
            ({"widths": 1}, "1 width cannot"),
            ({"x": np.arange(-9.0, -3.9, 0.5)}, "does not bracket the optimum at width 64"),
            ({"alpha": 0.0}, "loss gap has no rate"),
            ({"alpha": -0.3}, "rises with width"),
        ],
    )
    def test_abstains_and_says_why(self, planted, says):
        found = diagnose(**planted)
        assert found.verdict == "cannot tell"
        assert says in found.reason

    def test_one_width_that_carries_the_answer_is_named(self):
        planted = {"alpha": 1.0, "beta": 0.45, "widths": 7, "noise": 1e-4, "moved": 0.02}
        n, hp, losses = plant(**planted)
        assert diagnose_transfer(n, hp, losses, resamples=200).verdict == "weak"
        # The smallest width's optimum, half an octave too far out, makes the rest look fast.
        losses[0] = plant(**planted, x=X - 0.5)[2][0]
        found = diagnose_transfer(n, hp, losses, resamples=200)
        assert found.probability_fast > 0.95
        assert found.verdict == "cannot tell"
        assert "without width 64 its sign turns" in found.reason

    def test_diverged_cells_are_data_and_missing_ones_are_not(self):
        n, hp, losses = plant(noise=1e-5)
        seen = np.ones(losses.shape, dtype=bool)
        seen[:, -2:] = False
        missing = diagnose_transfer(n, hp, np.where(seen, losses, np.nan), observed=seen)
        dead = diagnose_transfer(n, hp, np.where(seen, losses, np.inf))
        assert missing.alpha.value == pytest.approx(dead.alpha.value, rel=1e-6)
        n, hp, losses = plant(noise=1e-5)
        losses[2, 10:, 0] = np.nan
        seen = np.isfinite(losses)
        assert diagnose_transfer(n, hp, losses).edges[2] == "high"
        assert diagnose_transfer(n, hp, losses, observed=seen).edges[2] == ""

    @pytest.mark.parametrize("single", [[2], [5], [0, 1, 3]])
    def test_widths_with_one_seed_borrow_the_noise_of_others(self, single):
        n, hp, losses = plant(noise=1e-3, moved=0.02, seeds=5)
        seen = np.ones(losses.shape, dtype=bool)
        seen[single, :, 1:] = False
        found = diagnose_transfer(n, hp, losses, observed=seen)
        assert found.verdict == "fast"
        assert found.beta.interval[0] < 0.75 < found.beta.interval[1]
        where = ", ".join(str(n[k]) for k in single)
        assert any(f"one seed in most cells of width {where}:" in w for w in found.warnings)
        assert not any("one seed per cell" in warning for warning in found.warnings)
        # One seed scatters sqrt(5) times as much as the mean over five.
        spans = np.array([np.ptp(e.interval) for e in found.optimal_loss])
        others = np.delete(spans, single)
        assert spans[single] == pytest.approx(math.sqrt(5) * others.mean(), rel=0.5)
        assert (spans[single] > others.max()).all()

    def test_one_width_with_several_seeds_is_enough_for_a_noise(self):
        n, hp, losses = plant(noise=1e-3, moved=0.02, seeds=5)
        seen = np.zeros(losses.shape, dtype=bool)
        seen[..., 0] = seen[3] = True
        found = diagnose_transfer(n, hp, losses, observed=seen)
        assert np.isfinite([e.interval for e in (*found.optimal_hp, *found.optimal_loss)]).all()
        seen[3, 1:, 1:] = False
        found = diagnose_transfer(n, hp, losses, observed=seen)
        assert found.verdict == "cannot tell"
        assert any("one seed in most cells:" in warning for warning in found.warnings)

    @pytest.mark.parametrize("size", [1e101, 1e200, 1e300, -1e300])
    def test_losses_whose_squares_overflow_are_diverged(self, size):
        n, hp, losses = plant(noise=1e-3, moved=0.02)
        huge, dead = losses.copy(), losses.copy()
        huge[:, -3:], dead[:, -3:] = size, np.inf
        found = [diagnose_transfer(n, hp, table, resamples=200) for table in (huge, dead)]
        assert found[0].to_json() == found[1].to_json()
        assert found[0].verdict == "fast"

    @pytest.mark.parametrize("truth", [0.3, -0.2])
    def test_the_advantage_is_the_joint_profile(self, truth):
        n = 64 * 2 ** np.arange(7)
        rng = np.random.default_rng(0)
        alpha, noise = 0.6, 0.02
        loss = fit_power_law(
            n, 2 + 40 * n**-alpha + noise * rng.normal(size=7),
            variances=np.full(7, noise**2), dof=1e6,
        )  # fmt: skip
        optimum = fit_power_law(
            n, -4 + 8.0 * n ** (-(alpha + truth) / 2) + noise * rng.normal(size=7),
            variances=np.full(7, noise**2), dof=1e6, exponent_range=(-1, 4),
        )  # fmt: skip
        advantage, _ = rate_advantage(loss, optimum)
        assert advantage.value == pytest.approx(2 * optimum.exponent - loss.exponent, abs=1e-6)
        # Where both profiles are nearly parabolas, variances add.
        half_loss = np.ptp(loss.exponent_interval) / 2
        half_optimum = np.ptp(optimum.exponent_interval) / 2
        expected = math.hypot(half_loss, 2 * half_optimum)
        assert np.ptp(advantage.interval) / 2 == pytest.approx(expected, rel=0.05)


class TestRecord:
    def test_json_holds_what_is_relied_on(self):
        found = diagnose(noise=1e-3, options={"target_width": 8192})
        record = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert set(KEYS) <= set(record)
        assert record["widths"] == [64, 128, 256, 512, 1024, 2048]
        for name in ("optimal_hp", "optimal_loss"):
            assert len(record[name]["value"]) == len(record[name]["interval"]) == 6
            for value, (low, high) in zip(*record[name].values(), strict=True):
                assert low < value < high
        for name in ("alpha", "beta", "c_rate", "curvature_exponent", "transfer_penalty"):
            assert set(record[name]) == {"value", "interval"}
            low, high = record[name]["interval"]
            assert low <= record[name]["value"] <= high
        forecast = record["forecast"]
        assert forecast["width"] == 8192
        assert len(forecast["transfer_penalty"]) == 6
        low, high = forecast["optimal_hp_interval"]
        assert low < forecast["optimal_hp"] < high

    @pytest.mark.parametrize("planted", [{"seeds": 1}, {"widths": 1}, {"shift": 0.0}])
    def test_what_is_unknown_is_null(self, planted):
        found = diagnose(options={"target_width": 8192}, **planted)
        record = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert set(KEYS) <= set(record)
        assert record["beta"]["value"] is None or planted == {"seeds": 1}
        assert found.table()

    def test_table_names_numbers_and_verdict(self):
        text = diagnose(noise=1e-3, options={"target_width": 8192}).table()
        for part in ("2048", "alpha", "forecast for width 8192", "verdict  fast", "limit"):
            assert part in text

    def test_is_reproducible(self):
        first, second = diagnose(noise=0.01), diagnose(noise=0.01)
        assert first.to_json() == second.to_json()

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"confidence": 90}, "confidence=90 must lie between"),
            ({"resamples": 10}, "resamples=10 is too few"),
            ({"infinity": "huge"}, "infinity='huge' is not known"),
            ({"optimum": "argmin"}, "optimum='argmin' is not known"),
            ({"scale": "log"}, "scale='log' is not known"),
            ({"optimum": "midpoint", "midpoint_tolerance": 5}, "midpoint_tolerance|tolerance=5"),
            ({"target_width": -1}, "target_width=-1"),
        ],
    )
    def test_bad_options(self, options, match):
        with pytest.raises(ValueError, match=match):
            diagnose_transfer(*plant(), **options)


def repeated(repetitions, **planted):
    return [diagnose(noise=3e-3, moved=0.03, seed=seed, **planted) for seed in range(repetitions)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "right"),
    [
        ({"alpha": 0.5, "beta": 0.6}, "fast"),
        ({"alpha": 1.0, "beta": 0.5}, "weak"),
        ({"alpha": 1.0, "beta": 0.25}, "weak"),
        ({"alpha": 0.5, "shift": 0.0, "drift": 0.4}, "no transfer"),
    ],
)
def test_intervals_cover_and_verdicts_are_right_or_open(planted, right):
    check_calibration(repeated(150, **planted), planted, right)


def test_intervals_cover_in_a_small_study():
    planted = {"alpha": 0.75, "beta": 0.5}
    check_calibration(repeated(60, **planted), planted, "fast")


def test_intervals_cover_where_widths_have_unequal_seeds():
    found = []
    for seed in range(60):
        n, hp, losses = plant(0.75, 0.5, noise=3e-3, moved=0.03, seed=seed, seeds=5)
        seen = np.ones(losses.shape, dtype=bool)
        seen[[1, 5], :, 1:] = False
        found.append(diagnose_transfer(n, hp, losses, observed=seen, resamples=200))
    check_calibration(found, {"alpha": 0.75, "beta": 0.5}, "fast")


def test_intervals_cover_where_cells_near_the_optimum_have_one_seed():
    """As where a grid was refined by single runs: they show no noise, their neighbours do."""
    optima = losses_held = count = 0
    for seed in range(40):
        n, hp, losses = plant(0.5, 0.5, noise=0.02, seed=seed)
        seen = np.ones(losses.shape, dtype=bool)
        seen[:, np.abs(X + 4.0) <= 1.5, 1:] = False
        found = diagnose_transfer(n, hp, losses, observed=seen, resamples=200)
        for k, r in enumerate(n / 64):
            low, high = found.optimal_hp[k].interval
            optima += low <= 2.0 ** (-5 + 2 * r**-0.5) <= high
            low, high = found.optimal_loss[k].interval
            losses_held += low <= 2 + 3 * r**-0.5 <= high
            count += 1
    # Widths of one table share their noise in part: forty tables count, not all widths.
    room = 4 * math.sqrt(0.9 * 0.1 / 40)
    assert optima / count > 0.85 - room
    assert losses_held / count > 0.85 - room


def test_seeds_that_are_copies_count_as_one():
    n, hp, losses = plant(0.5, 0.75, seeds=1, noise=1e-3)
    one = diagnose_transfer(n, hp, losses)
    copied = diagnose_transfer(n, hp, np.repeat(losses, 3, axis=2))
    assert one.verdict == "cannot tell"
    assert copied.to_json() == one.to_json()


def check_calibration(found, planted, right):
    count = len(found)
    truth = {"alpha": planted["alpha"], "loss_floor": 2.0}
    if "beta" in planted:
        truth |= {
            "beta": planted["beta"],
            "c_rate": 2 * planted["beta"],
            "advantage": 2 * planted["beta"] - planted["alpha"],
        }
    for name, value in truth.items():
        intervals = [getattr(one, name).interval for one in found]
        known = [ends for ends in intervals if not math.isnan(ends[0])]
        assert len(known) > 0.9 * count, name
        covered = np.mean([low <= value <= high for low, high in known])
        # 85 to 95 % is what is claimed, with four binomial standard errors on either side.
        room = 4 * math.sqrt(0.9 * 0.1 / len(known))
        assert 0.85 - room < covered < 0.95 + room, name
    wrong = sum(one.verdict not in (right, "cannot tell") for one in found)
    assert wrong / count <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / count)
    assert sum(one.verdict == right for one in found) > 0


def test_noise_is_no_evidence_against_fast_transfer():
    """An optimum that never moves, in much noise: whether c_n is small cannot be seen either."""
    undecided = 0
    for seed in range(12):
        n, hp, losses = plant(1.0, shift=0.0, noise=0.02, seeds=4, seed=seed)
        found = diagnose_transfer(n, hp, losses, resamples=200)
        if not math.isnan(found.beta.value):
            continue
        undecided += 1
        readings = read_optima(loss_table(n, hp, losses), resamples=200)
        _, chance = rate_advantage(readings.fit_loss(), readings.fit_optimum())
        assert found.probability_fast >= chance or math.isnan(chance)
    assert undecided >= 6
