"""The chain from convexity to fast transfer on families with known exponents."""

import math

import numpy as np
import pytest

from theory.propositions import (
    check_chain,
    flat_bottom,
    moving_dip,
    self_similar,
    shifted_parabola,
    sideways,
)

WIDTHS = 2.0 ** np.arange(4, 15)
FAMILIES = [
    shifted_parabola(1.0, 1.0),
    shifted_parabola(0.5, 0.4, curvature=3.0),
    shifted_parabola(1.0, 0.3),
    self_similar(1.0),
    self_similar(0.7, position=0.3, curvature=2.0),
    sideways(0.5),
    flat_bottom(1.0),
    moving_dip(),
]
CONVEX = [family for family in FAMILIES if family.curvature > 0]


@pytest.fixture(scope="module")
def reports():
    return {family.name: check_chain(family, WIDTHS) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_measured_exponents_are_the_stated_ones(family, reports):
    report = reports[family.name]
    for name in ("alpha", "beta", "c_rate"):
        stated, measured = getattr(family, name), getattr(report, name)
        if math.isinf(stated):
            assert math.isinf(measured)
        else:
            assert measured == pytest.approx(stated, rel=0.02, abs=0.002), name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_step_1_losses_bound_the_gaps(family, reports):
    assert reports[family.name].bounded_by_uniform_gap


@pytest.mark.parametrize("family", CONVEX, ids=lambda f: f.name)
def test_step_2_suboptimality_is_quadratic_in_the_gap(family, reports):
    assert reports[family.name].quadratic == pytest.approx([family.curvature / 2] * 2, rel=1e-5)


@pytest.mark.parametrize("family", CONVEX, ids=lambda f: f.name)
def test_step_3_uniform_convergence_bounds_the_optimum(family, reports):
    report = reports[family.name]
    bound = 2 * np.sqrt(report.uniform_gap / family.curvature)
    assert (report.hp_gap <= bound * (1 + 1e-9)).all()


def test_step_3_is_tight_where_losses_are_self_similar(reports):
    report = reports[self_similar(1.0).name]
    # b_n / sqrt(a_n) at p = 1/2: p / sqrt(p²/2 + k (3 − 2p/(1+p²))), k = p (1+p²)² / (2 (1−p²)).
    k = 0.5 * 1.25**2 / 1.5
    expected = 0.5 / math.sqrt(0.125 + k * (3 - 1 / 1.25))
    np.testing.assert_allclose(report.hp_gap_over_root, expected, rtol=1e-5)
    # ... and a constant fraction of the loss gap is lost: weak transfer, not fast.
    np.testing.assert_allclose(report.ratio, expected**2 / 2, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_step_4_names_follow_from_the_gaps(family, reports):
    report = reports[family.name]
    weak = report.hp_gap[-1] < 0.5 * report.hp_gap[0]
    fast = report.ratio[-1] < 0.5 * report.ratio[0]
    measured = "none" if not weak else "fast" if fast else "weak"
    assert measured == family.transfer
    if family.curvature > 0 and math.isfinite(family.alpha) and family.transfer != "none":
        assert fast == (family.beta > family.alpha / 2)


def test_without_uniform_convergence_of_order_a_n_the_root_does_not_bound_the_optimum(reports):
    for family in (sideways(0.5), shifted_parabola(1.0, 0.3)):
        ratio = reports[family.name].hp_gap_over_root
        assert math.isinf(ratio[-1]) or ratio[-1] > 2 * ratio[0]


def test_without_strong_convexity_beta_misjudges_transfer(reports):
    family = flat_bottom(1.0)
    assert family.beta < family.alpha / 2
    report = reports[family.name]
    assert report.ratio[-1] < 0.1 * report.ratio[0]
    low, high = report.quadratic
    assert high > 10 * low


def test_without_uniform_convergence_there_is_no_transfer(reports):
    report = reports[moving_dip().name]
    assert report.uniform_gap.min() > 0.9
    # The closed form of the optimum.
    n = report.widths
    np.testing.assert_allclose(report.hp_gap, 2 * n / (1 + 2 * n), rtol=1e-6)


def test_a_smooth_perturbation_moves_the_optimum_as_fast_as_the_loss():
    report = check_chain(shifted_parabola(0.5, 0.5), WIDTHS)
    assert report.beta > report.alpha / 2
    assert report.c_rate == pytest.approx(2 * report.alpha, rel=1e-4)


@pytest.mark.parametrize("widths", [[1, 2, 3], [4, 2, 8, 16], [[1, 2, 3, 4]], [0.5, 1, 2, 4]])
def test_widths_are_checked(widths):
    with pytest.raises(ValueError, match="at least 4 increasing"):
        check_chain(sideways(1.0), widths)


def test_position_is_checked():
    with pytest.raises(ValueError, match=r"position=0\.9"):
        self_similar(1.0, position=0.9)
