"""Forecasts: equal to dense Bayesian linear regression, and sensible where the answer is known."""

import math

import numpy as np
import pytest
from scipy import stats

from theory.forecast import forecast_at
from theory.forecast_choice import choose
from theory.forecast_models import Prediction, Prior, predict, predict_loss
from theory.losses import loss_table
from theory.readings import read_optima

WIDTHS = np.array([64, 128, 256, 512, 1024])
RATIO = WIDTHS / WIDTHS[0]
X = np.arange(-9.0, 1.0, 0.5)


def sweep(optimum, loss, seeds=4, noise=1e-3, seed=0, curvature=0.3):
    rng = np.random.default_rng(seed)
    curves = loss[:, None] + 0.5 * curvature * (X - np.asarray(optimum)[:, None]) ** 2
    return curves[..., None] + noise * rng.normal(size=(*curves.shape, seeds))


def forecast(losses, target=4096, confidence=0.9):
    return forecast_at(read_optima(loss_table(WIDTHS, 2.0**X, losses)), target, confidence)


class TestPredict:
    @pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize(("spread", "scatter"), [(0.0, 0.1), (2.0, 0.0), (0.5, 0.3)])
    def test_one_model_is_gaussian_conditioning(self, exponent, spread, scatter):
        rng = np.random.default_rng(0)
        y, v = rng.normal(size=5), rng.uniform(0.01, 0.1, size=5)
        got = predict(WIDTHS, y, 4096, variances=v, prior=Prior((exponent,), (spread,), (scatter,)))
        n = np.append(WIDTHS, 4096.0)
        shape = np.log(n) if exponent == 0 else n**-exponent
        shape = (shape - shape[0]) / (shape[4] - shape[0])
        vague = 1e6
        cov = vague + spread**2 * np.outer(shape, shape) + np.diag([*v, 0]) + scatter**2 * np.eye(6)
        cov += 1e-8 * np.diag([1, 1, 1, 1, 1, 0])
        gain = np.linalg.solve(cov[:5, :5], cov[:5, 5])
        assert got.median == pytest.approx(gain @ y, abs=1e-4)
        expected = cov[5, 5] - gain @ cov[:5, 5]
        assert got.deviations[0] ** 2 == pytest.approx(expected, rel=1e-4, abs=1e-4)

    def test_models_are_weighed_by_evidence(self):
        rng = np.random.default_rng(1)
        y, v = rng.normal(size=5), np.full(5, 0.02)
        prior = Prior((0.0, 1.0), (0.1, 1.0), (0.1, 0.4))
        got = predict(WIDTHS, y, 4096, variances=v, prior=prior)
        evidence = []
        for exponent in prior.exponents:
            for spread in prior.spreads:
                for scatter in prior.scatters:
                    n = WIDTHS.astype(float)
                    shape = np.log(n) if exponent == 0 else n**-exponent
                    shape = (shape - shape[0]) / (shape[-1] - shape[0])
                    cov = 1e6 + spread**2 * np.outer(shape, shape)
                    cov = cov + np.diag(v + scatter**2)
                    evidence.append(stats.multivariate_normal(np.zeros(5), cov).logpdf(y))
        weights = np.exp(np.array(evidence) - max(evidence))
        assert got.weights == pytest.approx(weights / weights.sum(), rel=1e-3)

    def test_is_equivariant(self):
        y, v = np.array([0.3, 0.1, 0.4, 0.0, 0.2]), np.full(5, 1e-3)
        plain = predict(WIDTHS, y, 4096, variances=v)
        other = predict(3 * WIDTHS, 5 + 2 * y, 3 * 4096, variances=4 * v, unit=2.0)
        assert other.median == pytest.approx(5 + 2 * plain.median)
        assert other.interval(0.9) == pytest.approx(5 + 2 * np.array(plain.interval(0.9)))

    def test_interval_holds_its_share_of_the_mixture(self):
        mixture = Prediction(np.array([0.3, 0.7]), np.array([0.0, 3.0]), np.array([1.0, 0.1]))
        low, high = mixture.interval(0.8)
        cdf = 0.3 * stats.norm.cdf([low, high]) + 0.7 * stats.norm.cdf([low, high], 3, 0.1)
        assert cdf == pytest.approx([0.1, 0.9], abs=1e-8)
        middle = mixture.median
        assert 0.3 * stats.norm.cdf(middle) + 0.7 * stats.norm.cdf(middle, 3, 0.1) == (
            pytest.approx(0.5, abs=1e-8)
        )

    def test_the_value_lies_inside_the_interval_of_a_lopsided_mixture(self):
        mixture = Prediction(np.array([0.95, 0.05]), np.array([0.0, 1e3]), np.array([0.1, 1.0]))
        for confidence in (0.1, 0.5, 0.85):
            low, high = mixture.interval(confidence)
            assert low < mixture.median < high < 50 * 0.95

    @pytest.mark.parametrize("unit", [1e-30, 1e30])
    def test_quantiles_do_not_depend_on_the_unit(self, unit):
        weights, means, spread = np.array([0.3, 0.7]), np.array([0.0, 3.0]), np.array([1.0, 0.1])
        plain, scaled = (Prediction(weights, u * means, u * spread) for u in (1.0, unit))
        assert np.array(scaled.interval(0.8)) / unit == pytest.approx(plain.interval(0.8))

    @pytest.mark.parametrize(
        ("optimum", "expected", "within"),
        [
            (-4 - 0.5 * np.log2(RATIO), -4 - 0.5 * 6, 0.15),
            (np.full(5, -4.0), -4.0, 0.02),
            (-5 + 2 * RATIO**-0.5, -5 + 2 * 64**-0.5, 0.15),
        ],
    )
    def test_knows_a_line_a_constant_and_a_limit(self, optimum, expected, within):
        got = predict(WIDTHS, optimum, 4096, variances=np.full(5, 0.02**2))
        assert got.median == pytest.approx(expected, abs=within)
        low, high = got.interval(0.9)
        assert low < expected < high
        assert high - low < 8 * within

    def test_nearer_targets_are_surer(self):
        optimum = -4 - 0.3 * np.log2(RATIO) + 0.1 * np.array([1, -1, 0, 1, -1])
        spans = []
        for target in (2048, 8192, 2**17):
            low, high = predict(WIDTHS, optimum, target, variances=np.full(5, 1e-3)).interval(0.9)
            spans.append(high - low)
        assert spans == sorted(spans)

    def test_one_width_is_refused(self):
        with pytest.raises(ValueError, match="at least two widths"):
            predict([64], [1.0], 128, variances=[0.1])


class TestForecast:
    def test_penalties_are_those_of_a_parabola(self):
        losses = sweep(-5 + 2 * RATIO**-0.5, 2 + 3 * RATIO**-0.5, noise=1e-6)
        found = forecast(losses)
        away = -5 + 2 * RATIO**-0.5 - math.log2(found.optimal_hp)
        assert found.transfer_penalty == pytest.approx(0.15 * away**2, rel=1e-3, abs=1e-6)
        assert found.optimal_loss == pytest.approx(2 + 3 / 8, abs=0.02)
        for penalty, (low, high) in zip(
            found.transfer_penalty, found.transfer_penalty_interval, strict=True
        ):
            assert low <= penalty <= high

    def test_widths_beyond_the_target_have_no_penalty(self):
        losses = sweep(np.full(5, -4.0), 2 + 3 * RATIO**-0.5)
        penalties = forecast(losses, target=300).transfer_penalty
        assert np.isfinite(penalties[:3]).all()
        assert np.isnan(penalties[3:]).all()

    @pytest.mark.parametrize("seed", range(3))
    def test_a_loss_that_cannot_be_negative_is_not_forecast_below_0(self, seed):
        rng = np.random.default_rng(seed)
        losses = sweep(np.full(5, -4.0), 0.3 * RATIO**-1.0 * np.exp(0.3 * rng.normal(size=5)))
        losses = losses - losses.min()
        found = forecast(losses, target=2**20)
        assert 0 <= found.optimal_loss_interval[0] <= found.optimal_loss
        assert found.optimal_loss_interval[1] > 0
        below = forecast(losses - 1, target=2**20)
        assert below.optimal_loss_interval[0] < -1

    def test_a_width_of_the_table_is_said_to_be_one(self):
        losses = sweep(np.full(5, -4.0), 2 + 3 * RATIO**-0.5)
        assert forecast(losses, target=512).to_json()["in_table"] is True
        assert "width 512 (in the table): optimum" in forecast(losses, 512).table(WIDTHS.tolist())
        assert forecast(losses, target=513).to_json()["in_table"] is False
        assert "in the table" not in forecast(losses, 513).table(WIDTHS.tolist())

    def test_json_is_strict(self):
        losses = sweep(np.full(5, -4.0), 2 + 3 * RATIO**-0.5)
        record = forecast(losses, target=300).to_json()
        assert list(record)[:3] == ["width", "in_table", "optimal_hp"]
        assert record["transfer_penalty"][-1] is None
        assert record["transfer_penalty_interval"][-1] is None
        assert record["optimal_hp"] == pytest.approx(2.0**-4, rel=0.05)

    def test_nothing_where_no_optimum_is_bracketed(self):
        falling = np.repeat((2 - 0.1 * X + 0 * RATIO[:, None])[..., None], 3, axis=-1)
        found = forecast(falling)
        assert math.isnan(found.optimal_hp)
        assert found.to_json()["optimal_hp_interval"] is None
        assert "none" in found.table(WIDTHS.tolist())

    @pytest.mark.parametrize("target", [0, -5, 100.5, True])
    def test_target_is_a_width(self, target):
        with pytest.raises(ValueError, match="positive whole number"):
            forecast(sweep(np.full(5, -4.0), 2 + 3 * RATIO**-0.5), target=target)

    def test_intervals_cover(self):
        """Planted optima from the families of the prior: stays, line, limit."""
        families = (lambda r: 0 * r, lambda r: -0.3 * np.log2(r), lambda r: 2 * r**-0.5)
        rng, hits = np.random.default_rng(0), []
        for k in range(150):
            path = families[k % 3]
            y = path(RATIO) + 0.05 * rng.normal(size=5)
            low, high = predict(WIDTHS, y, 4096, variances=np.full(5, 0.05**2)).interval(0.9)
            hits.append(low <= path(64.0) <= high)
        # A prior that also allows for scatter and jumps is wider than these paths need.
        assert 0.9 - 4 * np.sqrt(0.09 / 150) < np.mean(hits)


class TestModels:
    def test_a_wandering_alone_forecasts_the_last_value(self):
        y = np.array([0.3, -0.2, 0.4, 0.1, 0.7])
        prior = Prior((1.0,), (0.0,), (0.0,), (0.5,))
        got = predict(WIDTHS, y, 4096, variances=np.zeros(5), prior=prior)
        assert got.median == pytest.approx(0.7, abs=1e-6)
        # Two doublings beyond the last width.
        assert got.deviations[0] == pytest.approx(0.5 * math.sqrt(2), rel=1e-4)

    def test_a_wandering_is_gaussian_conditioning(self):
        rng = np.random.default_rng(2)
        y, v = rng.normal(size=5), rng.uniform(0.01, 0.1, size=5)
        got = predict(WIDTHS, y, 300, variances=v, prior=Prior((0.0,), (0.7,), (0.0,), (0.4,)))
        t = np.log2(np.append(WIDTHS, 300) / 64)
        cov = 1e6 + 0.49 * np.outer(t / 4, t / 4) + 0.16 * np.minimum.outer(t, t)
        cov = cov + np.diag([*v, 0])
        gain = np.linalg.solve(cov[:5, :5], cov[:5, 5])
        assert got.median == pytest.approx(gain @ y, abs=1e-4)
        assert got.deviations[0] ** 2 == pytest.approx(cov[5, 5] - gain @ cov[:5, 5], rel=1e-3)

    @pytest.mark.parametrize(("floor", "logs"), [(2.0, False), (0.0, True)])
    def test_the_data_tell_a_loss_from_its_logarithm(self, floor, logs):
        n = 64 * 2 ** np.arange(7)
        y = floor + 3 * (n / 64) ** (-1.0 if floor else -0.3)
        got = predict_loss(n, y, 16384, variances=np.full(7, 1e-10))
        share = got.weights[np.asarray(got.logarithms)].sum()
        assert share > 0.9 if logs else share < 0.1
        exact = floor + 3 * 256 ** (-1.0 if floor else -0.3)
        assert got.median == pytest.approx(exact, rel=0.01)
        low, high = got.interval(0.9)
        assert low < exact < high

    def test_quantiles_of_log_normal_components(self):
        mixture = Prediction(np.ones(1), np.array([0.5]), np.array([0.7]), np.array([True]))
        low, high = mixture.interval(0.9)
        expected = stats.lognorm.ppf([0.05, 0.95], 0.7, scale=math.exp(0.5))
        assert (low, high) == pytest.approx(expected, rel=1e-9)

    def test_losses_of_single_runs_are_less_sure(self):
        y = 2 + 3 * RATIO**-0.5
        spans = []
        for variance in (1e-12, 0.0):
            low, high = predict_loss(WIDTHS, y, 4096, variances=np.full(5, variance)).interval(0.9)
            spans.append(high - low)
        assert spans[1] > 2 * spans[0]


class TestChoice:
    def fixed(self, value):
        """A predictor that always says the same."""
        one = np.ones(1)
        return lambda n, y, v, at: Prediction(one, np.array([value]), 0.1 * one)

    def pick(self, y, value, target=4096, **options):
        return choose(
            WIDTHS[: y.size], y, np.zeros(y.size), target,
            predictor=self.fixed(value), confidence=0.9, **options,
        )  # fmt: skip

    def test_takes_the_naive_forecast_that_does_better_on_the_table(self):
        line = self.pick(-4.0 - 0.3 * np.log2(RATIO), value=0.0)
        assert line.method == "line"
        assert line.value == pytest.approx(-4 - 0.3 * 6)
        low, high = line.interval
        half = 0.1 * stats.norm.ppf(0.95)
        assert (low, high) == pytest.approx((line.value - half, line.value + half))
        assert line.errors["line"] == pytest.approx(0, abs=1e-9)
        assert line.errors["last"] == pytest.approx(0.3)
        assert "naive forecast errs less" in line.reason
        last = self.pick(np.array([0.0, 1.0, 0.8, 0.85, 0.8]), value=0.0)
        assert (last.method, last.value) == ("last", 0.8)

    def test_keeps_the_average_unless_it_is_much_worse(self):
        y = np.full(5, 1.0)
        assert self.pick(y, value=1.0).method == "average"
        near = self.pick(np.array([1.0, 1.2, 1.0, 1.2, 1.0]), value=1.1)
        assert near.method == "average"
        assert "no naive forecast" in near.reason

    def test_does_not_choose_by_one_test(self):
        found = self.pick(-4.0 - 0.3 * np.log2(RATIO[:3]), value=0.0)
        assert (found.method, found.tests) == ("average", 0)
        assert "too few widths" in found.reason

    def test_does_not_extrapolate_inside_the_table(self):
        assert self.pick(-4.0 - 0.3 * np.log2(RATIO), value=0.0, target=500).method == "average"

    def test_the_line_of_a_loss_is_straight_in_log_log(self):
        found = self.pick(5 * RATIO**-0.4, value=1.0, logarithmic=True)
        assert found.method == "line"
        assert found.value == pytest.approx(5 * 64**-0.4)

    def test_is_said(self):
        losses = sweep(-4 - 0.3 * np.log2(RATIO), 2 + 3 * RATIO**-0.5, noise=1e-6)
        found = forecast(losses)
        record = found.to_json()
        assert record["method"] in ("average", "line")
        assert record["loss_method"] == "average"
        assert "largest widths forecast from smaller ones" in record["reason"]
        assert "for the optimum, the average over models for the loss" in found.table(
            WIDTHS.tolist()
        )


def bisected(prediction, level):
    """A mixture's quantile by bisection in the logarithm: all components are log-normal."""
    low, high = -800.0, 800.0
    for _ in range(200):
        middle = (low + high) / 2
        z = (middle - prediction.means) / prediction.deviations
        below = float(prediction.weights @ stats.norm.cdf(z)) < level
        low, high = (middle, high) if below else (low, middle)
    return math.exp(low)


@pytest.mark.parametrize("level", [0.05, 0.5, 0.95])
def test_quantiles_of_components_hundreds_of_orders_apart(level):
    """A component of little weight may reach to 1e290; the likely ones are near 4.5."""
    mixture = Prediction(
        weights=np.array([0.5, 0.49, 0.01]),
        means=np.log([4.5, 4.6, 5.0]),
        deviations=np.array([0.01, 0.02, 400.0]),
        logarithms=True,
    )
    found = {0.05: mixture.interval(0.9)[0], 0.5: mixture.median, 0.95: mixture.interval(0.9)[1]}
    assert found[level] == pytest.approx(bisected(mixture, level), rel=1e-9)


def test_a_law_is_forecast_backwards():
    """Far below the table some models say anything; the likely ones are right."""
    widths = np.array([64, 128, 256, 512, 1024])
    prediction = predict_loss(
        widths, 2 + 5 * widths**-0.5, 4.0, variances=np.full(widths.size, 1e-7)
    )
    assert prediction.median == pytest.approx(4.5, abs=0.01)
    low, high = prediction.interval(0.9)
    assert 4.4 < low < 4.5 < high < 4.6


def test_penalties_lie_in_their_intervals():
    """Also where the optimum's interval is lopsided, as with few widths and a wall."""
    rng = np.random.default_rng(0)
    for seed in range(20):
        start, slope = rng.normal(0, 1), rng.normal(0, 3)
        optimum = start + slope * WIDTHS**-0.5
        found = forecast(sweep(optimum, 2 + WIDTHS**-0.5, noise=0.05, seeds=2, seed=seed))
        for penalty, (low, high) in zip(
            found.transfer_penalty, found.transfer_penalty_interval, strict=True
        ):
            assert math.isnan(penalty) or low <= penalty <= high
        low, high = found.optimal_loss_interval
        assert math.isnan(found.optimal_loss) or low <= found.optimal_loss <= high


@pytest.mark.parametrize("target", [0, 1.5, True, 10**20])
def test_a_target_that_is_no_width(target):
    with pytest.raises(ValueError, match="must be a positive whole number, at most"):
        forecast(sweep(0 * WIDTHS - 5.0, 2 + WIDTHS**-0.5), target=target)


def test_a_penalty_beyond_the_curves_reach_is_said_to_be_unknown():
    """Optima that move far: the largest width has no loss where the smallest has its optimum."""
    optimum = np.array([-1.0, -2.75, -4.5, -6.25, -8.0])
    found = forecast(sweep(optimum, 1 + RATIO**-0.5), target=2048)
    said = [line for line in found.table(WIDTHS.tolist()).splitlines() if "optimum there" in line]
    known = [not math.isnan(penalty) for penalty in found.transfer_penalty]
    assert len(said) == len(WIDTHS)
    assert [" in loss [" in line for line in said] == known
    assert 0 < sum(known) < len(known)
    assert all(("unknown (" in line) != know for line, know in zip(said, known, strict=True))
