"""What `reproduce rf-ridge` concludes from numbers: manufactured ones, whose verdict is known."""

import numpy as np
import pytest
import xarray as xr

from mupjax.reproduce import rf_ridge
from synthetic.random_features import optimal_ridge


def deviations(power, relative_error):
    d = np.array([6, 12, 24, 48])
    deviation = -0.3 * d**power
    return xr.Dataset(
        {
            "deviation": ("dimension", deviation),
            "deviation_error": ("dimension", np.abs(deviation) * relative_error),
            "spread": ("dimension", d**-0.5),
        },
        coords={"dimension": d},
    )


@pytest.mark.parametrize(
    ("power", "relative_error", "scale", "verdict"),
    [
        (-1.0, 0.1, "laptop", "reproduced"),
        (-0.1, 0.1, "laptop", "not reproduced"),
        (-1.0, 1.0, "laptop", "cannot tell at this scale"),
        (-1.0, 0.1, "tiny", "cannot tell at this scale"),
    ],
)
def test_the_rate_in_d_is_judged_by_its_interval(power, relative_error, scale, verdict):
    finding = rf_ridge._rate_finding(deviations(power, relative_error), scale)
    assert finding.verdict == verdict
    assert finding.values["rate"] == pytest.approx(-power, abs=1e-6)
    low, high = finding.values["interval"]
    assert low < -power < high
    assert finding.values["spread"] == pytest.approx(-0.5)


def test_slopes_are_judged_by_the_theorem_s():
    psi2 = np.geomspace(1, 1e6, 25)
    gaps = {"loss_gap": 1 / psi2, "ridge_gap": psi2**-0.5, "suboptimality": psi2**-2.0}
    dataset = xr.Dataset(
        {key: ("psi2", values) for key, values in gaps.items()}, coords={"psi2": psi2}
    )
    findings = rf_ridge._slope_findings(dataset)
    verdicts = {key: finding.verdict for key, finding in findings.items()}
    assert verdicts == {
        "loss_gap": "reproduced",
        "ridge_gap": "not reproduced",
        "suboptimality": "reproduced",
    }
    assert findings["ridge_gap"].values["slope"] == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("shift", "error", "verdict"),
    [
        (0.01, 0.01, "reproduced"),
        (0.2, 0.01, "not reproduced"),
        (0.0, 0.1, "cannot tell at this scale"),
        (np.nan, np.nan, "cannot tell at this scale"),
    ],
)
def test_the_simulated_optimum_is_judged_by_its_interval(shift, error, verdict):
    psi2 = np.array([4.0, 16.0])
    theory = optimal_ridge(psi1=4.0, psi2=psi2, noise_std=0.25).ridge
    dataset = xr.Dataset(
        {
            "simulated_best_ridge": ("simulated_psi2", theory + np.array([0.0, shift])),
            "simulated_best_ridge_error": ("simulated_psi2", np.full(2, error)),
        },
        coords={"simulated_psi2": psi2},
        attrs={"dots_dimension": 100},
    )
    finding = rf_ridge._optimum_finding(dataset, "laptop")
    assert finding.verdict == verdict
    assert finding.values["theory"] == theory.tolist()
