"""Intervals of learning-rate transfer: calibrated where there is noise."""

import math

import numpy as np
import pytest
from scipy import stats

from parabola_losses import EPS, LOG_WIDTHS, WIDTHS, X, parabolas, summarise, with_seeds
from theory import locate_optima


class TestIntervals:
    @pytest.mark.parametrize("seeds", [2, 3, 5, 10])
    def test_for_a_mean_they_are_students_t_interval(self, seeds):
        # Noise shared by a seed moves the smallest loss as it moves the mean: t is exact there.
        losses = with_seeds(parabolas(0.0), seeds=seeds, shared=0.3)
        half = stats.t.ppf(0.95, seeds - 1) * losses[0, 0].std(ddof=1) / math.sqrt(seeds)
        low, high = summarise(losses, resamples=20_000).optimal_loss_interval[0]
        # The standard error of a standard deviation over 20000 draws is at most 1 %: kurtosis of a
        # two-point distribution is below the normal's, of a resampled mean near it.
        assert (high - low) / 2 == pytest.approx(half, rel=0.02)
        assert (low + high) / 2 == pytest.approx(summarise(losses).optimal_loss[0])

    def test_seeds_are_resampled_jointly_so_shared_noise_leaves_the_optimum_alone(self):
        summary = summarise(with_seeds(parabolas(0.2), seeds=5, shared=10.0))
        for low, high in summary.optimal_lr_interval:
            assert math.log2(high / low) == pytest.approx(0, abs=1e5 * EPS)
        low, high = summary.optimal_loss_interval[0]
        assert high - low > 5
        low, high = summary.drift_per_doubling_interval
        assert (low, high) == pytest.approx((-0.2, -0.2), abs=1e5 * EPS)

    def test_a_jitter_common_to_all_widths_widens_the_optima_but_not_the_drift(self):
        jitter = np.random.default_rng(3).normal(size=6) * 0.2
        losses = np.stack([parabolas(0.5, at=-4 + shift) for shift in jitter], axis=-1)
        summary = summarise(losses)
        low, high = np.log2(summary.optimal_lr_interval[0])
        half = stats.t.ppf(0.95, 5) * jitter.std(ddof=1) / math.sqrt(6)
        assert (high - low) / 2 == pytest.approx(half, rel=0.05)
        low, high = summary.drift_interval
        assert (low, high) == pytest.approx((-1.5, -1.5), abs=1e4 * EPS)

    def test_one_finite_blow_up_far_from_the_optimum_does_not_widen_them(self):
        losses = with_seeds(parabolas(), rng=np.random.default_rng(5), cells=0.01)
        plain = summarise(losses)
        losses[1, 0, 2] = 1e4  # three orders above all losses, at the end of the grid
        blown = summarise(losses)
        assert blown.optimal_lr_interval == plain.optimal_lr_interval
        assert blown.optimal_loss_interval == plain.optimal_loss_interval

    def test_they_widen_with_confidence_and_repeat_with_the_seed_of_the_bootstrap(self):
        losses = with_seeds(parabolas(0.5), cells=0.1)
        wide, narrow = (summarise(losses, confidence=c).drift_interval for c in (0.99, 0.8))
        assert wide[0] < narrow[0] < narrow[1] < wide[1]
        assert summarise(losses) == summarise(losses)
        assert summarise(losses) != summarise(losses, rng_seed=1)


# Coverage. The six settings of the module docstring: kind of curve, octaves between learning rates,
# octaves of drift per doubling, and the standard deviations of the noise shared by a seed, of the
# noise of a cell, and of the position of the optimum.
SETTINGS = {
    "quiet": ("parabola", 1.0, 0.0, 0.1, 0.005, 0.0),
    "drifting": ("parabola", 1.0, -0.5, 0.1, 0.03, 0.0),
    "noisy": ("parabola", 1.0, -0.5, 0.1, 0.1, 0.0),
    "jittered": ("parabola", 0.5, -0.5, 0.1, 0.03, 0.3),
    "steep": ("steep", 1.0, -1.0, 0.1, 0.03, 0.3),
    "noise as deep as the curve": ("steep", 0.5, 0.0, 0.02, 0.1, 0.0),
}


def curve(kind, x, optimum):
    t = x - np.asarray(optimum)[..., None]
    return 2 + (0.2 * t**2 if kind == "parabola" else 0.25 * (np.exp(0.9 * t) - 0.9 * t))


def covered(setting, seeds, repetitions, rng):
    """Whether each repetition covers (optimum, drift, slope, loss), and its verdict."""
    kind, spacing, slope, shared, cells, jitter = SETTINGS[setting]
    x = np.arange(-6, 6 + 1e-9, spacing)
    nodes, weights = np.polynomial.hermite_e.hermegauss(15)
    hits, verdicts = [], []
    for _ in range(repetitions):
        optimum = rng.uniform(-0.5, 0.5) + slope * (LOG_WIDTHS - LOG_WIDTHS.mean())
        # What the estimator finds without noise; a jitter that seeds average over is no noise.
        expected = sum(
            weight * curve(kind, x, optimum + jitter * node)
            for node, weight in zip(nodes, weights / weights.sum(), strict=True)
        )
        truth = locate_optima(2.0**x, expected)
        at = truth.coordinate
        true_slope = np.polyfit(LOG_WIDTHS, at, 1)[0]
        shifts = jitter * rng.normal(size=seeds)
        losses = np.stack([curve(kind, x, optimum + shift) for shift in shifts], axis=-1)
        losses += shared * rng.normal(size=seeds) + cells * rng.normal(size=losses.shape)
        summary = summarise(losses, x=x, resamples=200, rng_seed=int(rng.integers(2**31)))
        pairs = [
            (np.log2(summary.optimal_lr_interval[0]), at[0]),
            (summary.drift_interval, at[-1] - at[0]),
            (summary.drift_per_doubling_interval, true_slope),
            (summary.optimal_loss_interval[0], truth.loss[0]),
        ]
        hits.append([low <= value <= high for (low, high), value in pairs])
        verdicts.append(summary.verdict)
    return np.array(hits), verdicts


def assert_coverage(hits):
    """Within the range that the docstring of `theory.drift` states, at 4 standard errors."""
    coverage = hits.mean(axis=0)
    error = math.sqrt(0.9 * 0.1 / len(hits))
    assert (coverage > 0.88 - 4 * error).all(), coverage
    assert (coverage < 0.98 + 4 * error).all(), coverage
    # The optimal loss is a near-linear statistic: not much above nominal.
    assert coverage[3] < 0.92 + 4 * error, coverage


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("setting", ["quiet", "steep"])
def test_intervals_cover_about_as_often_as_they_say(setting, seeds):
    rng = np.random.default_rng(seeds)
    hits, verdicts = covered(setting, seeds, 250, rng)
    assert_coverage(hits)
    wrong = "drifts" if setting == "quiet" else "stays"
    # A wrong verdict needs an interval that misses the truth by the tolerance.
    assert verdicts.count(wrong) <= 0.05 * len(verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("setting", SETTINGS)
def test_intervals_cover_about_as_often_as_they_say_in_every_setting(setting, seeds):
    hits, _ = covered(setting, seeds, 1000, np.random.default_rng(100 + seeds))
    print(f"coverage {setting}, {seeds} seeds: {hits.mean(axis=0)}")
    assert_coverage(hits)


def test_percentile_intervals_would_not_do_at_three_seeds():
    # The reason why the standard error and Student's t are used: the same resamples, by percentile.
    rng = np.random.default_rng(9)
    hits = []
    for _ in range(400):
        losses = with_seeds(parabolas(0.0, at=-4.3)[:1], seeds=3, rng=rng, cells=0.02)
        mean = losses.mean(axis=-1)
        weights = rng.multinomial(3, [1 / 3] * 3, size=400) / 3
        drawn = mean + np.einsum("khs,rs->rkh", losses - mean[..., None], weights) * math.sqrt(1.5)
        low, high = np.quantile(locate_optima(2.0**X, drawn).coordinate[:, 0], [0.05, 0.95])
        hits.append(low <= -4.3 <= high)
    assert np.mean(hits) == pytest.approx(0.70, abs=4 * math.sqrt(0.7 * 0.3 / 400))


def test_an_interval_at_the_grids_end_covers_an_optimum_beyond_it():
    rng = np.random.default_rng(11)
    hits = []
    for _ in range(300):
        # The optimum lies between the last grid point, 2, and 1.2 octaves beyond the midpoint 1.5.
        at = rng.uniform(1.5, 2.7)
        losses = with_seeds(parabolas(0.0, at=at)[:1], seeds=4, rng=rng, cells=0.05)
        low, high = summarise(losses, widths=WIDTHS[:1], resamples=200).optimal_lr_interval[0]
        hits.append(low <= 2.0**at <= high)
    assert np.mean(hits) > 0.9 - 4 * math.sqrt(0.09 / 300)
