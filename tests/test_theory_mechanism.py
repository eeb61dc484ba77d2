"""The bound b_n ≤ t_n: its terms by hand, never violated, reached; readings of curves."""

import itertools

import numpy as np
import pytest

from theory.mechanism import mechanism_terms, transfer_bound, window_around
from theory.mechanism_curves import GridCurves, Parabolas, read_curves
from theory.mechanism_report import Conditions, explain_transfer
from theory.truncation import candidate_penalties, select_truncation, split_curves

GRID = np.array([-9.0, -8.0, -7.5, -6.5, -5.0])


def random_profiles(rng, grid, n, n_max, roughness):
    """Bowls that differ between widths, cut into components, with noise on every component."""
    profiles = []
    centre, bend = rng.normal(scale=0.5), rng.uniform(0.2, 2.0)
    for width in (n, n_max):
        t = grid - grid.mean() - centre - rng.normal(scale=0.3)
        parts = rng.dirichlet(np.ones(width)) * (bend * t**2 / 2 - 3)[:, None]
        parts = parts + roughness * rng.normal(size=parts.shape) / width
        profiles.append(np.cumsum(parts, axis=1))
    return profiles


def terms_by_hand(grid, phi_n, phi_max, kappa):
    def bends(f):
        slopes = [(f[i + 1] - f[i]) / (grid[i + 1] - grid[i]) for i in range(len(f) - 1)]
        return min(
            (slopes[i] - slopes[i - 1]) / ((grid[i + 1] - grid[i - 1]) / 2)
            for i in range(1, len(slopes))
        ), max(abs(s) for s in slopes)

    tops = [[phi[i][kappa[i] - 1] for i in range(len(grid))] for phi in (phi_n, phi_max)]
    rests = [
        [phi[i][-1] - phi[i][kappa[i] - 1] for i in range(len(grid))] for phi in (phi_n, phi_max)
    ]
    mu_top = [bends(f)[0] for f in tops]
    mu = [bends([row[-1] for row in phi])[0] for phi in (phi_n, phi_max)]
    lip = [bends(f)[1] for f in rests]
    gap = max(abs(a - b) for a, b in zip(*tops, strict=True))
    return gap / max(mu_top), lip[0] / mu[0] + lip[1] / mu[1], mu_top, mu


def test_terms_are_the_definitions():
    rng = np.random.default_rng(0)
    defined = 0
    for _ in range(120):
        phi_n, phi_max = random_profiles(rng, GRID, 4, 6, 0.02)
        kappa = rng.integers(1, 5, size=(7, GRID.size))
        terms = mechanism_terms(GRID, phi_n, phi_max, kappa)
        for j, row in enumerate(kappa):
            invariance, flatness, mu_top, mu = terms_by_hand(GRID, phi_n, phi_max, row)
            np.testing.assert_allclose(terms.top_curvature[j], mu_top, rtol=1e-11, atol=1e-11)
            if min(mu_top) > 0 and min(mu) > 0:
                defined += 1
                assert terms.invariance[j] == pytest.approx(invariance, rel=1e-9)
                assert terms.flatness[j] == pytest.approx(flatness, rel=1e-9)
                expected = 2 * np.sqrt(invariance) + flatness
                assert terms.objective[j] == pytest.approx(expected, rel=1e-9)
            elif min(mu_top) <= 0:
                assert terms.objective[j] == np.inf
    assert defined > 50


@pytest.mark.parametrize("reading", ["differences", "parabola"])
def test_the_bound_is_never_violated(reading):
    rng = np.random.default_rng(1)
    finite, close = 0, 0
    for _ in range(400):
        grid = np.cumsum(rng.uniform(0.1, 0.4, size=rng.integers(4, 14)))
        n = int(rng.integers(2, 7))
        phi_n, phi_max = random_profiles(rng, grid, n, n + int(rng.integers(0, 4)), 0.008)
        # Every truncation, whatever it does from one grid point to the next.
        kappa = rng.integers(1, n + 1, size=(40, grid.size))
        kappa[:n] = np.arange(1, n + 1)[:, None]
        terms = mechanism_terms(grid, phi_n, phi_max, kappa, reading=reading)
        gap = abs(terms.argmin[0] - terms.argmin[1])
        slack = 3 * np.diff(grid).max() if reading == "differences" else 1e-9
        assert (gap <= terms.objective + slack).all()
        finite += int(np.isfinite(terms.objective).sum())
        close += int((gap > 0.2 * terms.objective).sum())
    assert finite > 1000
    assert close > 20


def test_the_bound_is_reached_by_residuals_that_are_lines():
    # b(t) + s t has its minimum at −s/μ: both residuals push it, in opposite directions.
    t, mu, slope = np.linspace(-2, 2, 17), 0.7, 0.21
    bowl = mu * t**2 / 2
    phi_n, phi_max = (np.stack([bowl, bowl + sign * slope * t], axis=1) for sign in (1, -1))
    found = transfer_bound(t, phi_n, phi_max, reach=None)
    assert found.constant_kappa == 1
    assert found.bound == pytest.approx(2 * slope / mu, rel=1e-9)
    assert found.hp_gap == pytest.approx(2 * slope / mu, rel=1e-9)
    assert found.holds
    # The step of the grid, .25, rounds the minima's distance .6 to .5.
    coarse = transfer_bound(t, phi_n, phi_max, reach=None, reading="differences")
    assert coarse.bound == pytest.approx(2 * slope / mu, rel=1e-9)
    assert coarse.hp_gap == pytest.approx(0.5)


def test_minimising_j_against_all_truncations():
    rng = np.random.default_rng(2)
    improved = 0
    for _ in range(25):
        phi_n, phi_max = random_profiles(rng, GRID, 3, 5, 0.05)
        every = np.array(list(itertools.product(range(1, 4), repeat=GRID.size)))
        values = mechanism_terms(GRID, phi_n, phi_max, every).objective
        found = transfer_bound(GRID, phi_n, phi_max, reach=None, reading="differences")
        constants = values[[i for i, k in enumerate(every) if len(set(k)) == 1]]
        assert found.constant_bound == pytest.approx(constants.min(), rel=1e-12)
        assert found.bound >= values.min() * (1 - 1e-12)
        improved += found.bound < found.constant_bound
        if found.kappa is None:
            assert not np.isfinite(constants).any()
            continue
        # In every coordinate nothing is better.
        for i, k in itertools.product(range(GRID.size), range(1, 4)):
            other = found.kappa.copy()
            other[i] = k
            at = mechanism_terms(GRID, phi_n, phi_max, other).objective
            assert at >= found.bound * (1 - 1e-9)
    assert improved > 0


def test_a_start_given_is_used():
    rng = np.random.default_rng(5)
    phi_n, phi_max = random_profiles(rng, GRID, 3, 5, 0.05)
    every = np.array(list(itertools.product(range(1, 4), repeat=GRID.size)))
    values = mechanism_terms(GRID, phi_n, phi_max, every).objective
    best = every[values.argmin()]
    found = transfer_bound(GRID, phi_n, phi_max, reach=None, reading="differences", kappa=best)
    assert found.bound == pytest.approx(values.min(), rel=1e-12)


def test_no_bound_says_why():
    t = np.linspace(-2, 2, 9)
    hill = np.repeat(-(t**2)[:, None], 3, axis=1)
    found = transfer_bound(t, hill, hill)
    assert found.bound == np.inf
    assert found.kappa is None
    assert "the whole loss curve is not convex" in found.reason
    mixed = np.stack([-(t**2), t**2], axis=1)
    assert (
        "no truncation"
        in transfer_bound(
            t,
            mixed[:, [0, 0, 1]][:, :2] + 2 * np.stack([0 * t, t**2], axis=1),
            mixed[:, [0, 0, 0, 1]],
        ).reason
    )


def test_the_window_holds_both_minima_and_three_points():
    x = np.arange(10.0)
    phi_n, phi_max = ((x - centre)[:, None] ** 2 for centre in (3, 5))
    assert window_around(x, phi_n, phi_max, 2.0) == slice(1, 8)
    assert window_around(x, phi_n, phi_max, None) == slice(0, 10)
    assert window_around(x, phi_n, phi_n, 0.1) == slice(2, 5)
    corner = (x[:, None]) ** 2
    assert window_around(x, corner, corner, 0.1) == slice(0, 3)
    with pytest.raises(ValueError, match="reach must be positive"):
        window_around(x, phi_n, phi_max, 0.0)


def test_parabolas_are_those_of_polyfit():
    rng = np.random.default_rng(3)
    x = np.sort(rng.uniform(-3, 3, size=9))
    values = rng.normal(size=(5, 2, 9))
    read = Parabolas(x, values)
    dense = np.linspace(x[0], x[-1], 20001)
    for index in np.ndindex(5, 2):
        c = np.polyfit(x, values[index], 2)
        f, slope = np.polyval(c, dense), np.polyval(np.polyder(c), dense)
        assert read.curvature[index] == pytest.approx(2 * c[0], rel=1e-9)
        assert read.slope[index] == pytest.approx(np.abs(slope).max(), rel=1e-9)
        assert read.size[index] == pytest.approx(np.abs(f).max(), rel=1e-6)
        assert read.spread[index] == pytest.approx(np.ptp(f), rel=1e-6)
        assert read.argmin[index] == pytest.approx(dense[f.argmin()], abs=1e-3)
    line = Parabolas(x, 2 * x + 1)
    assert line.argmin == pytest.approx(x[0])


def test_differences_bracket_the_derivatives_and_converge_to_them():
    errors = []
    for g in (9, 17, 33, 65):
        x = np.linspace(0.2, 2.2, g)
        read = GridCurves(x, np.exp(x) - 3 * x)
        # inf f'' = e^0.2, sup |f'| = e^2.2 − 3.
        errors.append((read.curvature - np.exp(0.2), np.exp(2.2) - 3 - read.slope))
    mu, lip = np.array(errors).T
    assert (mu > 0).all()
    assert (lip > 0).all()
    np.testing.assert_allclose(np.log2(mu[:-1] / mu[1:]), 1, atol=0.15)
    np.testing.assert_allclose(np.log2(lip[:-1] / lip[1:]), 1, atol=0.15)


def test_what_noise_does():
    rng = np.random.default_rng(4)
    x, sigma = np.linspace(-2, 2, 9), 0.01
    curves = 0.25 * x**2 + sigma * rng.normal(size=(4000, 9))
    rough, smooth = GridCurves(x, curves), Parabolas(x, curves)
    second = np.diff(curves, n=2, axis=1) / 0.25
    assert second.std() == pytest.approx(np.sqrt(6) * sigma / 0.25, rel=0.03)
    assert rough.curvature.mean() < 0.5 - sigma / 0.25
    assert smooth.curvature.mean() == pytest.approx(0.5, abs=4 * smooth.curvature.std() / 4000**0.5)
    # 27 σ/(L² √g) up to the finite grid.
    exact = 2 * sigma * np.linalg.norm(np.linalg.pinv(np.vander(x, 3))[0])
    assert smooth.curvature.std() == pytest.approx(exact, rel=0.05)
    assert exact == pytest.approx(27 * sigma / (16 * 3), rel=0.25)


def test_penalties_are_scaled_to_the_grid():
    pairs = candidate_penalties([-9.0, -7.0, -5.0], count=3)
    assert len(pairs) == 9
    assert min(pairs) == (4 / 64, 4 / 64)
    assert max(pairs) == (8.0, 8.0)
    finer = candidate_penalties([-90.0, -70.0, -50.0], count=3)
    np.testing.assert_allclose(finer, 10 * np.array(pairs))


def test_split_curves():
    phi = np.arange(12.0).reshape(3, 4)
    top, rest = split_curves(phi, np.array([1, 4, 2]))
    np.testing.assert_array_equal(top, [0, 7, 9])
    np.testing.assert_array_equal(rest, [3, 0, 2])
    np.testing.assert_array_equal(split_curves(phi, 2)[0], [1, 5, 9])
    with pytest.raises(ValueError, match="from 1 to 4"):
        split_curves(phi, 5)
    with pytest.raises(ValueError, match="expected"):
        split_curves(phi[0], 1)


def bowls(widths=(8, 16), seeds=3):
    t = np.linspace(-3, 3, 7)
    rng = np.random.default_rng(0)
    shape = (t**2 - 9)[:, None] * np.ones(16)
    return t, {
        n: np.cumsum(shape[None, :, :n] / n + 1e-3 * rng.normal(size=(seeds, 7, n)), axis=-1)
        for n in widths
    }


def test_diverged_rates_are_left_out_at_all_widths_and_said():
    t, profiles = bowls()
    profiles[8][1, -1] = np.nan
    report = explain_transfer(t, profiles)
    assert report.dropped == (3.0,)
    assert report.hp_values.tolist() == t[:-1].tolist()
    assert any("left out at every width" in text for text in report.warnings)
    without = explain_transfer(t[:-1], {n: p[:, :-1] for n, p in profiles.items()})
    assert without.explanations[0].bound == report.explanations[0].bound


def test_one_seed_cannot_tell():
    t, profiles = bowls(seeds=1)
    report = explain_transfer(t, profiles)
    assert report.verdict == "cannot tell"
    assert "one seed" in report.explanations[0].reason
    assert np.isnan(report.explanations[0].bound.interval).all()
    flat = explain_transfer(t, {n: p[0] for n, p in profiles.items()})
    assert flat.explanations[0].bound.value == report.explanations[0].bound.value


def test_two_seeds_cannot_tell():
    t, profiles = bowls(seeds=2)
    report = explain_transfer(t, profiles)
    assert report.verdict == "cannot tell"
    assert "2 seeds, fewer than 3" in report.explanations[0].reason
    assert "run at least 3 seeds" in report.warnings[0]


def test_an_optimum_at_the_end_of_the_grid_cannot_tell():
    t, profiles = bowls()
    report = explain_transfer(t[3:], {n: p[:, 3:] for n, p in profiles.items()})
    assert report.verdict == "cannot tell"
    assert "end of the grid" in report.explanations[0].reason


def test_kappa_hat_is_that_of_the_mean_over_seeds():
    t, profiles = bowls()
    report = explain_transfer(t, profiles)
    mean = select_truncation(
        t,
        profiles[8].mean(0),
        profiles[16].mean(0),
        penalties=candidate_penalties(t),
        convexity_tolerance=0.25,
        argmin_tolerance=1.0,
    )
    (explanation,) = report.explanations
    assert mean.kappa is not None
    np.testing.assert_array_equal(explanation.truncation.kappa, mean.kappa)
    assert explanation.kappa_hat.value == mean.kappa[3]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"profiles": {8: np.zeros((3, 7, 8))}}, "at least 2"),
        ({"profiles": {8: np.zeros((3, 6, 8)), 16: np.zeros((3, 7, 16))}}, "expected"),
        ({"profiles": {8: np.zeros((2, 7, 8)), 16: np.zeros((3, 7, 16))}}, "same seeds"),
        ({"profiles": {8: np.full((3, 7, 8), np.nan), 16: np.zeros((3, 7, 16))}}, "needs 3"),
        ({"hp_grid": np.zeros(7)}, "strictly increasing"),
        ({"confidence": 1.0}, "confidence"),
        ({"resamples": 0}, "resamples"),
    ],
)
def test_bad_arguments(change, text):
    t, profiles = bowls()
    with pytest.raises(ValueError, match=text):
        explain_transfer(**({"hp_grid": t, "profiles": profiles} | change))


def test_bad_thresholds_and_readings():
    with pytest.raises(ValueError, match="least_share"):
        Conditions(least_share=0.0)
    with pytest.raises(ValueError, match="reading must be"):
        read_curves(GRID, GRID, "cubic")  # pyright: ignore[reportArgumentType]


# Llama with Adam on WikiText-103 (GWB, their figure of top-κ and residual curves; read off its
# vector paths): learning rates, and per width whole and top-κ̂(n) at n, the same κ̂ at 2048.
LLAMA_RATES = np.array([1, 1.4, 2, 2.8, 4, 5.7, 6.7, 8]) * 1e-3
LLAMA_2048 = [-7.0713, -7.2298, -7.3468, -7.4172, -7.4494, -7.4449, -7.4407, -7.4249]
LLAMA = {
    128: (
        [-6.4388, -6.5206, -6.5803, -6.6245, -6.6502, -6.6311, -6.5429, -6.2247],
        [-6.2916, -6.3655, -6.4113, -6.4479, -6.4546, -6.4150, -6.2516, -5.6433],
        [-6.3142, -6.3971, -6.4511, -6.4914, -6.4947, -6.4832, -6.3555, -5.8997],
    ),
    1024: (
        [-7.0058, -7.1506, -7.2560, -7.3161, -7.3434, -7.3383, -7.3346, -7.3158],
        [-6.9646, -7.1063, -7.2095, -7.2678, -7.2912, -7.2902, -7.2906, -7.2598],
        [-6.9432, -7.0890, -7.1971, -7.2644, -7.2934, -7.3008, -7.3004, -7.2742],
    ),
}


def test_published_curves_of_llama_meet_the_conditions_at_width_1024_and_not_at_128():
    x, told = np.log2(LLAMA_RATES), Conditions()
    dense = np.linspace(x[0], x[-1], 4001)

    def fitted(values):
        return np.polyval(np.polyfit(x, values, 2), dense)

    for n, (whole, top, top_max) in LLAMA.items():
        phi_n, phi_max = np.stack([top, whole], 1), np.stack([top_max, LLAMA_2048], 1)
        terms = mechanism_terms(x, phi_n, phi_max, np.ones(8, int), reading="parabola")
        gap = np.abs(fitted(np.subtract(top, top_max))).max()
        assert terms.instability == pytest.approx(gap / np.ptp(fitted(top_max)), rel=1e-4)
        uneven = max(
            np.ptp(fitted(np.subtract(a, b))) / np.ptp(fitted(b))
            for a, b in ((whole, top), (LLAMA_2048, top_max))
        )
        assert terms.unevenness == pytest.approx(uneven, rel=1e-4)
        assert abs(terms.argmin[0] - terms.argmin[1]) <= terms.objective
        met = (
            terms.top_share >= told.least_share,
            terms.instability <= told.most_instability,
            terms.unevenness <= told.most_unevenness,
        )
        assert met == ((True, False, False) if n == 128 else (True, True, True))
