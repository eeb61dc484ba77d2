"""What observers may add to a sweep: coordinates, arrays as long as the width, warnings, facts."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import mupjax
from mupjax import results
from mupjax.models import MLP

STEPS = 3


def setting():
    return mupjax.Setting(
        "ones",
        sample=lambda data, key, step: jnp.ones((2, 3)),
        loss=lambda predict, batch: jnp.mean(predict(batch) ** 2),
        validation=jnp.ones((2, 3)),
    )


def row_norms(name="rows", **changes):
    """The norm of each unit's incoming weights: an array as long as the width."""

    def norms(params):
        return jnp.linalg.norm(params["hidden"][0]["kernel"], axis=0)

    observer = mupjax.Observer(
        name,
        init=lambda params, model, setting: norms(params),
        update=lambda state, seen: norms(seen.updated),
        result=lambda state: {"norm": state},
        dims={"norm": ("unit",)},
        coords=lambda model: {"unit": 1 + np.arange(width_of(model))},
        configuration={"axis": 0},
    )
    return dataclasses.replace(observer, **changes)


def width_of(model):
    return model.abstract_params()["hidden"][0]["kernel"].shape[1]


def run(observers=None, widths=(4, 8), **changes):
    arguments: dict[str, Any] = {
        "widths": widths,
        "hyperparameters": {"learning_rate": [0.01, 0.02]},
        "steps": STEPS,
        "seeds": 2,
        "base_width": 4,
        "observers": [row_norms()] if observers is None else observers,
    }
    return mupjax.sweep(
        lambda width, rngs: MLP(3, width, 1, depth=1, rngs=rngs),
        setting(),
        lambda learning_rate: optax.sgd(learning_rate),
        "muP",
        **(arguments | changes),
    )


@pytest.fixture(scope="module")
def both_widths():
    return run()


def test_arrays_longer_at_larger_widths_are_padded_with_nan(both_widths):
    found = both_widths["rows_norm"]
    assert found.dims == ("width", "learning_rate", "seed", "unit")
    assert found["unit"].values.tolist() == list(range(1, 9))
    assert np.isnan(found.sel(width=4, unit=slice(5, None))).all()
    assert np.isfinite(found.sel(width=4, unit=slice(1, 4))).all()
    assert np.isfinite(found.sel(width=8)).all()
    alone = run(widths=[4])["rows_norm"]
    np.testing.assert_array_equal(alone.squeeze("width"), found.sel(width=4, unit=slice(1, 4)))
    # Nothing else is touched by the padding.
    assert both_widths["status"].dtype == np.int8
    assert np.isfinite(both_widths["train_loss"]).all()


@pytest.mark.parametrize("ending", ["nc", "zarr"])
def test_an_interrupted_sweep_resumes_to_the_same_result(both_widths, tmp_path, ending):
    out = tmp_path / f"run.{ending}"

    def breaks(model):
        if width_of(model) == 8 and results.part_path(out, 4).exists():
            raise RuntimeError("the power went out")
        return {"unit": 1 + np.arange(width_of(model))}

    with pytest.raises(RuntimeError, match="power"):
        run([row_norms(coords=breaks)], out=out)
    with pytest.raises(ValueError, match=r"another configuration \(differing: observers\)"):
        run([row_norms(configuration={"axis": 1})], out=out, existing="resume")
    resumed = run(out=out, existing="resume")
    assert len(json.loads(resumed.attrs["timing"])["programs"]) == 1
    for found in (resumed, results.load(out)):
        xr.testing.assert_identical(found["rows_norm"], both_widths["rows_norm"])


def test_observers_know_the_role_and_layout_of_every_parameter():
    seen = {}

    def init(params, model, setting):
        seen.update(model.roles)
        return jnp.zeros(())

    run([mupjax.Observer("roles", init, lambda state, _: state, lambda state: {"none": state})])
    assert {path: leaf.role for path, leaf in seen.items()} == {
        "hidden/0/kernel": "input",
        "hidden/0/bias": "vector",
        "readout/kernel": "output",
        "readout/bias": "fixed",
    }
    assert seen["readout/kernel"].layout.fan_in == (0,)
    assert seen["readout/kernel"].shapes[8] == (8, 1)


def test_what_an_observer_says_of_the_result_is_logged(caplog):
    def check(dataset):
        return [f"largest norm at width {int(dataset.width[-1])}: look"]

    with caplog.at_level(logging.WARNING, logger="mupjax"):
        run([row_norms(check=check)])
    assert caplog.messages == ["largest norm at width 8: look"]


def test_a_check_that_fails_loses_no_results(tmp_path):
    def check(dataset):
        raise RuntimeError("of no use")

    out = tmp_path / "sweep.nc"
    with pytest.raises(RuntimeError, match="of no use"):
        run([row_norms(check=check)], out=out)
    assert np.isfinite(results.load(out)["rows_norm"].sel(width=8)).all()


def test_facts_of_an_observer_are_stored(both_widths):
    stored = results.configuration_of(both_widths)["observers"]
    assert stored == [{"name": "rows", "axis": 0}]


def test_two_observers_may_share_a_dimension_but_not_disagree_on_it():
    together = run([row_norms(), row_norms("again")])
    np.testing.assert_array_equal(together["rows_norm"], together["again_norm"])
    other = row_norms("again", coords=lambda model: {"unit": np.arange(width_of(model))})
    with pytest.raises(
        ValueError, match=r"'rows' and 'again' give different coordinates of .*'unit'"
    ):
        run([row_norms(), other])


def test_coordinates_of_no_own_dimension():
    for name in ("layer", "seed", "learning_rate"):
        observer = row_norms(coords=lambda model, name=name: {name: [0, 1]})
        with pytest.raises(ValueError, match=rf"coordinates of '{name}'.* \(unit\)"):
            run([observer])


ON_TWO_DEVICES = """
import jax, sys
sys.path.insert(0, "tests")
import numpy as np
from test_mupjax_observers import run
assert len(jax.devices()) == 2
np.save(sys.argv[1], run()["rows_norm"].values)
"""


def test_two_devices_record_what_one_does(both_widths, tmp_path):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-c", ON_TWO_DEVICES, tmp_path / "norms.npy"],
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | {"XLA_FLAGS": flags},
        timeout=90,
        check=True,
    )
    np.testing.assert_allclose(
        np.load(tmp_path / "norms.npy"), both_widths["rows_norm"], rtol=1e-6, atol=0
    )
