"""Where a loss curve has its minimum: exact on parabolas, honest at edges, refused on bad grids."""

import numpy as np
import pytest
from scipy.interpolate import PchipInterpolator

from theory import interpolate_loss, locate_optima, locate_optimum
from tolerances import float_tolerance

EPS = float_tolerance(np.float64, operations=16)
NAN, INF = np.nan, np.inf


def uneven_grid(rng, size):
    return np.cumsum(rng.uniform(0.3, 1.7, size)) - 9.0


@pytest.mark.parametrize("seed", range(20))
def test_a_parabola_in_log2_is_recovered_exactly_on_an_uneven_grid(seed):
    rng = np.random.default_rng(seed)
    x = uneven_grid(rng, 9)
    vertex, floor, curvature = rng.uniform(x[1], x[-2]), rng.normal(), rng.uniform(0.1, 3)
    losses = floor + 0.5 * curvature * (x - vertex) ** 2
    optimum = locate_optimum(2**x, losses)
    # The differences of losses near the minimum lose digits against the largest loss.
    scale = np.abs(losses).max() / curvature
    assert np.log2(optimum.hp) == pytest.approx(vertex, abs=EPS * 10 * (1 + scale))
    assert optimum.loss == pytest.approx(floor, abs=EPS * np.abs(losses).max())
    assert optimum.curvature == pytest.approx(curvature, rel=EPS * 10 * (1 + scale))
    assert not optimum.at_edge
    assert not optimum.flat
    assert optimum.bounds == (optimum.hp, optimum.hp)
    assert optimum.grid_index == np.argmin(losses)


def test_the_vertex_of_three_points_is_the_textbook_one():
    # f = 3 − 2x + x² through x = 0, 1/2, 2: vertex 1, value 2, second derivative 2.
    optimum = locate_optimum(2.0 ** np.array([0.0, 0.5, 2.0]), [3.0, 2.25, 3.0])
    assert (optimum.hp, optimum.loss, optimum.curvature) == pytest.approx((2.0, 2.0, 2.0), rel=EPS)


def test_scaling_the_hyperparameter_and_the_loss_by_powers_of_two_scales_the_answer_exactly():
    rng = np.random.default_rng(1)
    hp = 2.0 ** np.arange(-8, 0)
    losses = rng.normal(size=(50, 8))
    plain = locate_optima(hp, losses)
    moved = locate_optima(hp * 32, losses)
    np.testing.assert_allclose(moved.coordinate, plain.coordinate + 5, rtol=0, atol=EPS)
    np.testing.assert_array_equal(moved.loss, plain.loss)
    np.testing.assert_array_equal(moved.hp[plain.at_edge], plain.hp[plain.at_edge] * 32)
    scaled = locate_optima(hp, losses * 2.0**-900)
    np.testing.assert_array_equal(scaled.coordinate, plain.coordinate)
    np.testing.assert_array_equal(scaled.loss, plain.loss * 2.0**-900)


def test_mirroring_the_grid_mirrors_the_optimum():
    rng = np.random.default_rng(2)
    x = uneven_grid(rng, 7)
    losses = rng.normal(size=(200, 7))
    plain, mirrored = locate_optima(2**x, losses), locate_optima(2 ** -x[::-1], losses[:, ::-1])
    np.testing.assert_allclose(mirrored.coordinate, -plain.coordinate, rtol=0, atol=1e3 * EPS)
    np.testing.assert_array_equal(mirrored.low_edge, plain.high_edge)
    np.testing.assert_allclose(mirrored.loss, plain.loss, rtol=0, atol=1e3 * EPS)


def test_the_optimum_stays_within_half_a_cell_of_the_argmin_and_below_its_loss():
    rng = np.random.default_rng(3)
    x = uneven_grid(rng, 8)
    losses = rng.normal(size=(5000, 8)) * np.exp(3 * rng.normal(size=(5000, 1)))
    optima = locate_optima(2**x, losses)
    inside = np.flatnonzero(~optima.at_edge)
    i = optima.grid_index[inside]
    assert (optima.coordinate[inside] >= (x[i - 1] + x[i]) / 2 - EPS * 10).all()
    assert (optima.coordinate[inside] <= (x[i] + x[i + 1]) / 2 + EPS * 10).all()
    assert (optima.loss <= losses.min(axis=1)).all()
    assert inside.size > 1000


def test_the_location_is_continuous_while_the_argmin_moves_to_the_neighbour():
    hp = 2.0 ** np.arange(5)

    def at(gap):
        return np.log2(locate_optimum(hp, [4.0, 2.0, 1.0 + gap, 1.0, 3.0]).hp)

    assert locate_optimum(hp, [4.0, 2.0, 1.0, 1.0, 3.0]).hp == pytest.approx(2**2.5, rel=EPS)
    assert at(1e-9) == pytest.approx(at(-1e-9), abs=1e-8)


def test_the_error_is_of_second_order_in_the_grid_spacing():
    # φ = eˣ − x: minimum at 0, φ''' / φ'' = 1. The offset of the grid is worst-cased.
    spacings = 2.0 ** -np.arange(1, 6)
    errors = []
    for h in spacings:
        worst = 0.0
        for offset in np.linspace(-0.5, 0.5, 41):
            x = h * (np.arange(-4, 5) + offset)
            worst = max(worst, abs(locate_optimum(x, np.exp(x) - x, scale="linear").hp))
        errors.append(worst)
    slopes = np.diff(np.log2(errors)) / np.diff(np.log2(spacings))
    np.testing.assert_allclose(slopes, 2.0, atol=0.1)


@pytest.mark.parametrize(
    ("losses", "edge", "index", "bounds"),
    [
        ([1, 2, 3, 4, 5], "low", 0, (0.0, 2**0.5)),
        ([5, 4, 3, 2, 1], "high", 4, (2**3.5, INF)),
        ([5, 1, NAN, 2, 5], "high", 1, (2**0.5, 4.0)),
        ([5, NAN, 1, 2, 5], "low", 2, (2.0, 2**2.5)),
        ([5, INF, 1, -INF, 5], "both", 2, (2.0, 8.0)),
        ([1, NAN, 2, 3, 4], "both", 0, (0.0, 2.0)),
        ([NAN, NAN, 3, NAN, NAN], "both", 2, (2.0, 8.0)),
        ([5, 4, 3, 2, NAN], "high", 3, (2**2.5, 16.0)),
        ([NAN, 3, 2, 3, NAN], "", 2, (4.0, 4.0)),
    ],
)
def test_an_optimum_without_usable_neighbours_is_the_flagged_grid_point(
    losses, edge, index, bounds
):
    hp = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    optimum = locate_optimum(hp, losses)
    assert (optimum.edge, optimum.grid_index, optimum.hp) == (edge, index, hp[index])
    assert optimum.loss == losses[index]
    assert optimum.at_edge == (edge != "")
    assert np.isnan(optimum.curvature) == optimum.at_edge
    assert optimum.bounds == pytest.approx(bounds, rel=EPS)


def test_a_grid_point_comes_back_as_it_was_given():
    hp = np.array([1e-4, 3e-4, 1e-3])
    assert locate_optimum(hp, [1.0, 2.0, 3.0]).hp == 1e-4
    assert locate_optimum(hp, [3.0, 2.0, 1.0]).hp == 1e-3


def test_nothing_finite_is_flagged_and_has_no_optimum():
    optimum = locate_optimum([1, 2, 4], [NAN, INF, -INF])
    assert np.isnan(optimum.hp)
    assert (optimum.loss, optimum.grid_index, optimum.edge) == (INF, -1, "all diverged")
    assert optimum.at_edge
    assert optimum.bounds == (0.0, INF)


@pytest.mark.parametrize(
    ("losses", "x", "edge", "curvature", "bounds"),
    [
        ([1, 1, 1, 1, 1], 2.0, "both", NAN, (-INF, INF)),
        ([3, 1, 1, 1, 3], 2.0, "", 0.0, (1.0, 3.0)),
        ([3, 1, 1, 3, 9], 1.5, "", 2.0, (1.5, 1.5)),
        ([1, 1, 1, 3, 9], 1.0, "low", NAN, (-INF, 2.5)),
        ([9, 3, 1, 1, NAN], 2.5, "high", NAN, (1.5, 4.0)),
    ],
)
def test_ties_take_the_middle_of_the_plateau(losses, x, edge, curvature, bounds):
    optimum = locate_optimum(2.0 ** np.arange(5), losses)
    assert optimum.flat
    assert (np.log2(optimum.hp), optimum.edge) == (x, edge)
    assert optimum.curvature == pytest.approx(curvature, nan_ok=True)
    assert np.log2(np.maximum(optimum.bounds, 1e-300)) == pytest.approx(
        np.maximum(bounds, np.log2(1e-300))
    )


def test_a_steep_side_does_not_push_the_loss_below_what_convexity_allows():
    hp = 2.0 ** np.arange(4)
    optimum = locate_optimum(hp, [0.06, 0.051, 0.05, 5.0])
    # The line through the first two points, at the vertex: 0.051 − 0.009 (x* − 1).
    assert optimum.loss == pytest.approx(0.051 - 0.009 * (np.log2(optimum.hp) - 1), rel=EPS)
    assert optimum.loss == pytest.approx(0.0465, abs=1e-4)
    mirrored = locate_optimum(hp, [5.0, 0.05, 0.051, 0.06])
    assert mirrored.loss == pytest.approx(optimum.loss, rel=EPS)
    # A concave shoulder must not lift it above the grid's own minimum.
    assert locate_optimum(hp, [0.01, 0.3, 0.05, 0.4]).loss == 0.01
    assert locate_optimum(2.0 ** np.arange(5), [0.1, 0.3, 0.05, 0.3, 0.1]).loss == 0.05


def test_many_curves_at_once_are_the_loop_over_single_ones():
    rng = np.random.default_rng(4)
    hp = 2 ** uneven_grid(rng, 6)
    losses = rng.integers(0, 4, size=(7, 40, 6)).astype(float)  # ties are common
    losses[rng.random(losses.shape) < 0.5] = NAN
    optima = locate_optima(hp, losses)
    seen = set()
    for index in np.ndindex(7, 40):
        one = locate_optimum(hp, losses[index])
        seen.add(one.edge)
        assert optima.edge(index) == one.edge
        for name in ("hp", "loss", "grid_index", "curvature", "flat"):
            np.testing.assert_array_equal(getattr(optima, name)[index], getattr(one, name))
    assert seen == {"", "low", "high", "both", "all diverged"}


def test_momenta_are_compared_in_log2_of_the_memory_and_penalties_as_they_are():
    beta = 1 - 2.0 ** -np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    optimum = locate_optimum(beta, (-np.log2(1 - beta) - 3.3) ** 2, scale="momentum")
    assert -np.log2(1 - optimum.hp) == pytest.approx(3.3, rel=1e3 * EPS)
    assert locate_optimum(beta, [1, 2, 3, 4, 5], scale="momentum").bounds[0] == 0.0
    ridge = np.array([-1.0, 0.0, 0.5, 2.0])
    optimum = locate_optimum(ridge, (ridge - 0.3) ** 2, scale="linear")
    assert optimum.hp == pytest.approx(0.3, rel=10 * EPS)


class TestInterpolateLoss:
    def test_it_passes_through_every_usable_grid_point_and_is_infinite_beside_the_others(self):
        hp = 2.0 ** np.arange(7)
        losses = np.array([4.0, 2.0, 3.0, NAN, 5.0, NAN, 7.0])
        at_grid = interpolate_loss(hp, np.tile(losses, (7, 1)), hp)
        np.testing.assert_array_equal(at_grid, np.where(np.isnan(losses), INF, losses))
        between = interpolate_loss(hp, np.tile(losses, (4, 1)), [6.0, 12.0, 24.0, 48.0])
        np.testing.assert_array_equal(between, INF)
        assert np.isnan(interpolate_loss(hp, losses, NAN))

    def test_it_is_the_parabola_between_the_neighbours_of_the_argmin(self):
        x = np.array([-3.0, -2.0, -0.5, 0.5, 2.0])
        losses = 1 + 0.7 * (x + 0.3) ** 2
        q = np.linspace(-2, 0.5, 31)
        got = interpolate_loss(2**x, np.tile(losses, (31, 1)), 2**q)
        np.testing.assert_allclose(got, 1 + 0.7 * (q + 0.3) ** 2, rtol=10 * EPS)

    def test_elsewhere_it_is_scipys_monotone_interpolant(self):
        x = np.arange(8.0)
        losses = np.array([9.0, 5.0, 4.5, 1.0, 0.5, 2.0, 2.1, 8.0])
        q = np.array([0.2, 1.5, 2.9, 5.5, 6.01, 7.0])
        got = interpolate_loss(2**x, np.tile(losses, (6, 1)), 2**q)
        np.testing.assert_allclose(got, PchipInterpolator(x, losses)(q), rtol=10 * EPS)

    def test_it_is_nowhere_below_the_optimum_and_meets_it_there(self):
        rng = np.random.default_rng(5)
        x = uneven_grid(rng, 7)
        losses = rng.normal(size=(4000, 7))
        losses[rng.random(losses.shape) < 0.15] = INF
        optima = locate_optima(2**x, losses)
        anywhere = interpolate_loss(2**x, losses, rng.uniform(2 ** x[0], 2 ** x[-1], 4000))
        assert (anywhere >= optima.loss).all()
        alive = optima.grid_index >= 0
        here = interpolate_loss(2**x, losses[alive], optima.hp[alive])
        single = ~optima.flat[alive]
        np.testing.assert_allclose(here[single], optima.loss[alive][single], atol=100 * EPS)

    def test_it_never_extrapolates(self):
        with pytest.raises(ValueError, match=r"hp=5 lies outside the grid \[1, 4\].*extend"):
            interpolate_loss([1, 2, 4], [1.0, 2.0, 3.0], 5.0)

    def test_one_query_for_each_curve(self):
        with pytest.raises(ValueError, match=r"hp has shape \(\), expected \(2,\)"):
            interpolate_loss([1, 2, 4], np.ones((2, 3)), 2.0)


@pytest.mark.parametrize(
    ("hp", "scale", "message"),
    [
        ([1.0, 2.0], "log2", r"hp_values has shape \(2,\).*H >= 3.*add hyperparameter values"),
        ([[1.0, 2.0, 3.0]], "log2", r"hp_values has shape \(1, 3\)"),
        ([0.0, 1.0, 2.0], "log2", r"hp_values\[0\]=0 cannot be used.*above 0"),
        ([1.0, -2.0, 3.0], "log2", r"hp_values\[1\]=-2 cannot be used"),
        ([1.0, 2.0, NAN], "linear", r"hp_values\[2\]=nan cannot be used; give finite"),
        ([1.0, 2.0, INF], "log2", r"hp_values\[2\]=inf cannot be used"),
        ([1.0, 3.0, 2.0], "log2", r"hp_values\[2\]=2 does not exceed hp_values\[1\]=3; sort"),
        ([1.0, 1.0, 2.0], "log2", r"hp_values\[1\]=1 does not exceed.*duplicates"),
        ([0.5, 0.9, 1.0], "momentum", r"hp_values\[2\]=1 cannot be used.*\[0, 1\)"),
        ([1.0, 2.0, 3.0], "ln", r"scale='ln' is not known; use 'log2'"),
    ],
)
def test_a_grid_that_cannot_be_used_is_refused_by_name_and_value(hp, scale, message):
    with pytest.raises(ValueError, match=message):
        locate_optimum(hp, [3.0, 2.0, 3.0], scale=scale)
    with pytest.raises(ValueError, match=message):
        interpolate_loss(hp, [3.0, 2.0, 3.0], 1.0, scale=scale)


def test_losses_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"losses has shape \(4,\), expected \(..., 3\)"):
        locate_optimum([1, 2, 4], [1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match=r"one curve of shape \(H,\); use locate_optima"):
        locate_optimum([1, 2, 4], np.ones((2, 3)))


# Decay on the left, a wall on the right: the parabola through the middle three is far below zero.
WALL = np.array([1.0, 0.6, 0.30, 0.02, 0.018, 0.33, 1.6])


def test_positive_losses_have_a_positive_minimum():
    optimum = locate_optimum(2.0 ** np.arange(7), WALL)
    a, b, c = np.polyfit([3, 4, 5], np.log(WALL[3:6]), 2)
    vertex, lowest = -b / (2 * a), np.exp(c - b**2 / (4 * a))
    assert np.log2(optimum.hp) == pytest.approx(vertex, rel=1e-12)
    assert optimum.loss == pytest.approx(lowest, rel=1e-12)
    assert optimum.curvature == pytest.approx(2 * a * lowest, rel=1e-12)
    # The same curve around another level is an ordinary parabola.
    assert locate_optimum(2.0 ** np.arange(7), WALL - 0.017).loss < 0.001


def test_a_parabola_in_logarithms_passes_through_its_points():
    grid = 2.0 ** np.arange(7)
    at = np.linspace(2.5, 5.5, 61)
    curves = np.tile(WALL, (at.size, 1))
    losses = interpolate_loss(grid, curves, 2.0**at)
    near = np.array([3 - 1e-9, 3, 3 + 1e-9, 5 - 1e-9, 5, 5 + 1e-9])
    values = interpolate_loss(grid, np.tile(WALL, (6, 1)), 2.0**near)
    assert values == pytest.approx([0.02] * 3 + [0.33] * 3, rel=1e-6)
    assert np.all(losses >= locate_optimum(grid, WALL).loss)


def test_a_minimum_at_zero_stays_a_parabola():
    x = np.arange(5.0)
    optimum = locate_optimum(2.0**x, (x - 2.4) ** 2)
    assert optimum.loss == pytest.approx(0.0, abs=1e-15)
    assert optimum.loss >= 0
    assert np.log2(optimum.hp) == pytest.approx(2.4)
