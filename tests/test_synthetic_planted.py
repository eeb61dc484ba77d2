"""Planted losses: parts add up, optima are where they are said to be, errors are as stated."""

import numpy as np
import pytest

from synthetic.planted import FAMILIES, PlantedLosses

T = np.linspace(-2.0, 2.0, 21)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", [16, 100])
def test_components_add_up_to_the_closed_forms(family, width):
    planted = PlantedLosses(family)
    phi = planted.profile(T, width)
    assert phi.shape == (T.size, width)
    np.testing.assert_allclose(phi[:, planted.leading - 1], planted.top(T, width), rtol=1e-12)
    whole = planted.top(T, width) + planted.residual(T, width)
    np.testing.assert_allclose(phi[:, -1], whole, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_optimum_is_the_minimum(family):
    planted = PlantedLosses(family)
    for width in (64, 512):
        nearby = planted.optimum(width) + np.array([-1e-3, 0, 1e-3])
        loss = planted.top(nearby, width) + planted.residual(nearby, width)
        assert loss.argmin() == 1
        assert loss[0] == pytest.approx(loss[2], abs=1e-12)


def test_errors_have_the_standard_deviation_asked_for():
    planted, rng = PlantedLosses("holds"), np.random.default_rng(0)
    drawn = planted.noisy_profiles(T, 16, seeds=2000, noise=0.1, rng=rng)
    np.testing.assert_allclose(drawn[..., -1].std(axis=0), 0.1, rtol=0.08)
    error = drawn.mean(axis=0)[:, -1] - planted.profile(T, 16)[:, -1]
    np.testing.assert_allclose(error, 0, atol=5 * 0.1 / 2000**0.5)
    quiet = planted.noisy_profiles(T, 16, seeds=2, noise=0.0, rng=rng)
    np.testing.assert_array_equal(quiet[1], planted.profile(T, 16))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"family": "other"}, "family must be one of holds"),
        ({"leading": 0}, "leading must be at least 1"),
        ({"curvature": 0.0}, "curvature must be positive"),
        ({"alpha": np.nan}, "alpha must be positive"),
    ],
)
def test_bad_arguments(change, text):
    with pytest.raises(ValueError, match=text):
        PlantedLosses(**({"family": "holds"} | change))
    with pytest.raises(ValueError, match="must exceed the 4 leading"):
        PlantedLosses("holds").profile(T, 4)
