"""Where two top-k profiles part."""

import numpy as np
import pytest

from theory.profiles import parting_component


def exponential(n: int, rate: float, total: float) -> np.ndarray:
    k = np.arange(1, n + 1)
    return -total * (1 - np.exp(-rate * k)) / (1 - np.exp(-rate * n))


def test_profiles_that_part_at_a_known_component():
    k = np.arange(1, 201)
    reference = -np.log1p(k)
    whole = abs(reference[-1])
    # Beyond k = 40 the difference grows by half a thousandth of the whole change per component.
    profile = reference + whole * 5e-4 * np.maximum(k - 40, 0)
    found = parting_component(profile[:128], reference, tolerance=0.0101)
    assert found.component == 60
    assert found.largest_difference == pytest.approx(0.01)
    assert not found.censored
    assert np.isnan(found.interval).all()


def test_early_differences_count_in_the_largest_only():
    reference = exponential(64, 0.1, 2.0)
    profile = reference.copy()
    profile[:3] += 0.5
    found = parting_component(profile, reference)
    assert (found.component, found.censored) == (64, True)
    assert found.largest_difference == pytest.approx(0.25)


def test_apart_everywhere():
    reference = exponential(32, 0.1, 2.0)
    found = parting_component(reference - 1, reference)
    assert found.component == 0
    assert np.isnan(found.largest_difference)


def test_the_interval_covers_under_noise():
    """The mean over many draws of three seeds parts where the noiseless profiles do."""
    k = np.arange(1, 101)
    reference = -np.sqrt(k)
    profile = reference + 10 * 2e-3 * np.maximum(k - 30, 0)
    exact = parting_component(profile, reference, tolerance=0.05).component
    assert exact == 55
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        shift = rng.normal(scale=0.05, size=(5, 1))
        low, high = parting_component(
            profile + shift, np.tile(reference, (5, 1)), tolerance=0.05, resamples=200
        ).interval
        held += low <= exact <= high
    # Percentiles over five seeds cover less than they say (.78 for a mean, by simulation).
    assert 65 <= held <= 95


@pytest.mark.parametrize(
    ("profile", "reference", "options", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 3)), {}, r"shapes \(2, 3\) and \(3, 3\)"),
        (np.array([1.0, np.nan]), np.ones(2), {}, "must be finite"),
        (np.ones(2), np.ones(2), {"tolerance": 0}, "tolerance must be positive, got 0"),
        (np.ones(2), np.zeros(2), {}, "whole change of loss is 0"),
    ],
)
def test_bad_input(profile, reference, options, message):
    with pytest.raises(ValueError, match=message):
        parting_component(profile, reference, **options)
