"""How far two top-k profiles are apart."""

import numpy as np
import pytest

from theory.profiles import profile_difference


def exponential(n: int, rate: float, total: float) -> np.ndarray:
    k = np.arange(1, n + 1)
    return -total * (1 - np.exp(-rate * k)) / (1 - np.exp(-rate * n))


def test_the_largest_difference_is_found():
    reference = exponential(64, 0.1, 2.0)
    profile = reference.copy()
    profile[2:5] += [0.3, -0.5, 0.2]
    found = profile_difference(profile, reference)
    assert (found.largest, found.component) == (pytest.approx(0.25), 4)
    assert np.isnan(found.interval).all()


def test_profiles_that_meet_at_the_end_are_apart_all_the_same():
    """Widths that reach the same loss by other components."""
    few, many = exponential(128, 1 / 10, 1.0), exponential(2048, 1 / 30, 1.0)
    assert abs(few[-1] - many[127]) < 0.02
    found = profile_difference(few, many)
    k = np.arange(1, 129)
    exact = np.abs(np.exp(-k / 10) - np.exp(-k / 30))
    assert found.component == exact.argmax() + 1
    assert found.largest == pytest.approx(exact.max(), abs=1e-4)


def test_one_profile_is_no_difference():
    reference = exponential(32, 0.1, 2.0)
    assert profile_difference(reference[:16], reference).largest == 0


def test_the_interval_covers_under_noise():
    """The mean over five seeds, of which one common number moves the whole profile."""
    reference = exponential(100, 0.1, 10.0)
    profile = reference + 0.8 * np.linspace(0, 1, 100)
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        shift = rng.normal(scale=0.05, size=(5, 1))
        found = profile_difference(profile + shift, np.tile(reference, (5, 1)), resamples=200)
        held += found.interval[0] <= 0.08 <= found.interval[1]
    # Percentiles over five seeds cover less than they say (.78 for a mean, by simulation).
    assert 65 <= held <= 95


@pytest.mark.parametrize(
    ("profile", "reference", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 3)), r"shapes \(2, 3\) and \(3, 3\)"),
        (np.array([1.0, np.nan]), np.ones(2), "must be finite"),
        (np.ones(2), np.zeros(2), "whole change of loss is 0"),
    ],
)
def test_bad_input(profile, reference, message):
    with pytest.raises(ValueError, match=message):
        profile_difference(profile, reference)
