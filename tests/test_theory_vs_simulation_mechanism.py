"""The report on losses of which everything is known: the right condition is named, noise or not."""

import numpy as np
import pytest

from synthetic.planted import FAMILIES, PlantedLosses
from theory.mechanism import mechanism_terms, transfer_bound
from theory.mechanism_report import explain_transfer

T = np.linspace(-3.0, 3.0, 9)
WIDTHS = (64, 512)


@pytest.mark.parametrize("family", FAMILIES)
def test_terms_at_the_planted_truncation_are_the_closed_form(family):
    planted = PlantedLosses(family)
    n, N = WIDTHS
    t = np.linspace(-2.0, 2.0, 17)
    phi_n, phi_max = (planted.profile(t, width) for width in WIDTHS)
    terms = mechanism_terms(t, phi_n, phi_max, np.full(t.size, planted.leading), reading="parabola")
    mu, (small, large) = planted.curvature, (n**-planted.alpha, N**-planted.alpha)
    bowl = -mu if family == "convexity" else mu
    np.testing.assert_allclose(terms.top_curvature, [bowl, bowl], rtol=1e-9)
    np.testing.assert_allclose(terms.curvature, [mu, mu], rtol=1e-9)
    lip = [0.0, 0.0]
    if family == "convexity":
        lip = [4 * mu, 4 * mu]
    if family == "flatness":
        lip = [planted.slope * abs(2 * s - 1) for s in (small, large)]
    np.testing.assert_allclose(terms.residual_slope, lip, rtol=1e-9, atol=1e-12)
    gap = 0.0
    if family == "invariance":
        a, b = planted.shift * small, planted.shift * large
        gap = mu / 2 * max(abs((x - a) ** 2 - (x - b) ** 2) for x in (-2, 2))
    assert terms.disagreement == pytest.approx(gap, rel=1e-9, abs=1e-12)
    if family != "convexity":
        expected = 2 * np.sqrt(gap / mu) + sum(lip) / mu
        # The root of a rounding error is 1e-8.
        assert terms.objective == pytest.approx(expected, rel=1e-9, abs=1e-6)
    np.testing.assert_allclose(
        terms.argmin, [planted.optimum(width) for width in WIDTHS], atol=1e-9
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_holds_and_is_small_only_where_the_mechanism_does(family):
    planted = PlantedLosses(family)
    phi_n, phi_max = (planted.profile(T, width) for width in WIDTHS)
    found = transfer_bound(T, phi_n, phi_max)
    assert found.holds
    gap = abs(planted.optimum(WIDTHS[0]) - planted.optimum(WIDTHS[1]))
    assert found.hp_gap == pytest.approx(gap, abs=1e-9)
    if family == "holds":
        assert found.bound < 1e-6
    elif family == "convexity":
        assert found.bound == np.inf
    else:
        assert found.bound > 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_right_condition_is_named(family, noise):
    planted, rng = PlantedLosses(family), np.random.default_rng(7)
    profiles = {n: planted.noisy_profiles(T, n, seeds=3, noise=noise, rng=rng) for n in WIDTHS}
    report = explain_transfer(T, profiles)
    (explanation,) = report.explanations
    assert report.verdict == ("explained" if family == "holds" else "not explained")
    assert explanation.broken == (None if family == "holds" else family)
    if noise == 0.0:
        holds = family == "holds"
        assert explanation.probability == pytest.approx(float(holds))
        assert (explanation.bound.value < 0.01) == holds
        if holds:
            assert explanation.overlap.value == pytest.approx(1, abs=1e-9)
            assert explanation.flatness_ratio.value == pytest.approx(0, abs=1e-9)
            assert explanation.displacement.value == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_errors_are_rare_on_noisy_curves():
    # Noise up to a tenth of the bowl's height over the window (1), in four families.
    wrong, undecided, total = 0, 0, 0
    for family in FAMILIES:
        planted = PlantedLosses(family)
        for noise in (0.02, 0.05, 0.1):
            for repeat in range(10):
                rng = np.random.default_rng(repeat)
                profiles = {
                    n: planted.noisy_profiles(T, n, seeds=3, noise=noise, rng=rng)
                    for n in (32, 256)
                }
                report = explain_transfer(T, profiles)
                right = "explained" if family == "holds" else "not explained"
                (explanation,) = report.explanations
                total += 1
                undecided += report.verdict == "cannot tell"
                wrong += report.verdict not in (right, "cannot tell") or (
                    report.verdict == "not explained" and explanation.broken != family
                )
    assert total == 120
    assert wrong <= 1
    assert undecided <= 6
