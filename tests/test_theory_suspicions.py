"""Suspicions about tables: each is raised by what it is about, with its numbers, and only then."""

import math

import numpy as np
import pytest

from theory.suspicions import duplicates, suspicions

WIDTHS = [64, 128, 256, 512]
LR = 2.0 ** np.arange(-9, 0)


def table(seeds=3, noise=0.003, rng_seed=0):
    """A healthy table: parabolas in log2 with a loss that falls with width."""
    rng = np.random.default_rng(rng_seed)
    x = np.log2(LR)
    floor = 1 + 4.0 * np.array(WIDTHS)[:, None, None] ** -0.5
    losses = floor + 0.02 * (x[:, None] + 5.2) ** 2
    return losses + noise * rng.standard_normal((4, LR.size, seeds))


def said(losses, **options):
    return suspicions(WIDTHS, LR, losses, **options)


def only(losses, *parts, **options):
    found = said(losses, **options)
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0]


@pytest.mark.parametrize("rng_seed", range(5))
def test_nothing_is_said_of_a_healthy_table(rng_seed):
    assert said(table(rng_seed=rng_seed)) == ()


def test_a_few_diverged_and_missing_runs_are_healthy():
    losses = table()
    losses[:, -1] = np.nan
    observed = np.ones(losses.shape, bool)
    observed[0, 0] = False
    assert said(losses, observed=observed) == ()


def test_a_loss_that_rises_with_width():
    losses = table()
    losses[3] += 0.5
    only(losses, "rises with width", "at 256", "at 512")


def test_a_rise_within_noise_is_none():
    losses = table(noise=0.0)
    losses[3] += losses[2].min() - losses[3].min() + 0.001
    rng = np.random.default_rng(2)
    losses += 0.01 * rng.standard_normal(losses.shape)
    assert not any("rises" in sentence for sentence in said(losses))


def test_dead_but_finite_runs_at_chance():
    losses = table()
    losses[:, -2:] = np.float32(math.log(10))
    only(losses, "24 of 108 finite runs", "exactly 2.30259", "= ln 10", "dead networks")


def test_dead_runs_printed_with_four_digits():
    losses = np.round(table(), 4)
    losses[:, -1] = 2.3026
    only(losses, "12 of 108", "exactly 2.3026", "ln 10")


def test_dead_runs_at_another_value():
    losses = table()
    losses[2:, -2:] = 7.123456
    only(losses, "12 of 108", "exactly 7.12346")
    assert "ln " not in said(losses)[0]


@pytest.mark.parametrize("rng_seed", range(3))
@pytest.mark.parametrize(("size", "digits"), [(40_000, 9), (3_000, 3), (50, 3)])
def test_losses_that_come_close_by_chance_are_not_dead(size, digits, rng_seed):
    rng = np.random.default_rng(rng_seed)
    losses = np.round(2 + rng.exponential(size=(4, size // 12, 3)), digits)
    grid = np.geomspace(1e-4, 1, size // 12)
    assert not any("dead" in sentence for sentence in suspicions(WIDTHS, grid, losses))
    # Where a tenth of them are, they still show.
    losses[:, ::10] = 3.25
    assert any("exactly 3.25" in sentence for sentence in suspicions(WIDTHS, grid, losses))


def test_accuracies_taken_for_losses():
    losses = 1 - 0.3 * table()
    found = said(losses)
    assert any("maximum inside of the grid" in s and "1 minus it" in s for s in found)
    assert not any("edge of the grid" in sentence for sentence in found)
    # One curve alone, or curves that fall all along, are something else.
    losses[0] = table()[0]
    assert not any("1 minus" in sentence for sentence in said(losses))
    assert not any("1 minus" in s for s in said(np.sort(table(), axis=1)[:, ::-1]))


def test_many_runs_at_the_smallest_loss_are_not_dead():
    losses = table()
    losses[:, 2:7] = np.maximum(losses[:, 2:7], losses[:, 3:6].mean())
    assert not any("dead" in sentence for sentence in said(losses))


@pytest.mark.parametrize(
    ("shift", "side", "value"), [(5, "smallest", "0.001953"), (-5, "largest", "0.5")]
)
def test_an_optimum_at_the_grid_s_edge(shift, side, value):
    losses = table()
    slope = shift * 0.2 * (np.log2(LR)[:, None] + 5)
    losses[3] = losses[3] * 0.01 + slope + 1.2 - slope.min()
    only(losses, "edge of the grid of lr", f"512 ({side}, {value})", hp_name="lr")


def test_a_neighbour_that_diverged_is_no_edge_of_the_grid():
    losses = table()
    losses[:, 5:] = np.nan
    assert not any("edge" in sentence for sentence in said(losses))


def test_a_plateau_is_at_no_edge():
    assert not any("edge" in sentence for sentence in said(np.ones((4, LR.size, 1))))


def test_one_seed():
    only(table(seeds=1), "one seed")


def test_coarse_printing():
    found = " ".join(said(np.round(table(noise=0.001), 1)))
    assert "rounded to 0.1" in found
    assert "dip around the optimum" in found


def test_widths_whose_best_losses_agree_to_the_last_digit():
    losses = np.round(0.05 * (table() - 1), 3)
    found = " ".join(said(losses))
    assert "rounded to 0.001" in found


@pytest.mark.parametrize("size", [1e-7, 1e-12])
def test_small_losses_are_not_rounded(size):
    assert said(size * table()) == ()


@pytest.mark.parametrize("size", [1e10, 1e30, 1e300])
def test_one_loss_that_blew_up_rounds_no_other(size):
    losses = table()
    losses[0, -1] = size * np.array([1.1, 1.2, 1.3])
    assert said(losses) == ()
    losses = np.round(losses, 1)
    assert "rounded to 0.1," in " ".join(said(losses))


def test_seeds_that_are_copies():
    losses = np.repeat(table(seeds=1), 3, axis=2)
    only(losses, "all seeds have the same loss in 36 of 36")


def test_seeds_that_rounding_makes_alike_are_no_copies():
    found = " ".join(said(np.round(table(noise=0.001), 1)))
    assert "as losses are rounded to 0.1: intervals are too narrow" in found
    assert "copies" not in found


def test_widths_that_are_copies():
    losses = table()
    losses[2] = losses[1]
    only(losses, "widths 128 and 256 hold the same losses")


def test_mostly_diverged():
    losses = table()
    losses[3, 6:] = np.nan
    losses[3, :2] = np.inf
    only(losses, "diverged at width 512 (56 %)")


def test_widths_at_which_nothing_trains():
    losses = np.round(table(), 3)
    losses[2:] = np.inf
    assert any("width 256 (100 %), 512 (100 %)" in sentence for sentence in said(losses))
    assert any("100 %" in sentence for sentence in said(np.full(losses.shape, np.nan)))


def test_grids_of_their_own():
    grids = np.stack([LR * 2**k for k in range(4)])
    assert suspicions(WIDTHS, grids, table()) == ()


def test_duplicates_between_parametrizations():
    one, other = table(), table(rng_seed=1)
    found = duplicates({"sp": one, "mup": one.copy(), "ntp": other})
    assert found["ntp"] == []
    assert "'sp' and 'mup'" in found["sp"][0]
    assert found["sp"] == found["mup"]
    # Agreeing at the base width is as it should be.
    other[0] = one[0]
    assert duplicates({"sp": one, "mup": other}) == {"sp": [], "mup": []}


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="losses has shape"):
        suspicions(WIDTHS, LR, np.zeros((3, 9, 1)))
    with pytest.raises(ValueError, match="hp_values has shape"):
        suspicions(WIDTHS, LR[:-1], table())


def test_many_losses_close_to_one_another_are_not_one_value():
    """Neighbours agree to five digits, the first and the last do not."""
    losses = table()
    losses[:, -1] = 101.06 * (1 + 1.5e-5 * np.arange(12).reshape(4, 3))
    assert said(losses) == ()


def test_large_losses_with_all_their_digits_are_not_rounded():
    assert said(table() + 1e9) == ()
