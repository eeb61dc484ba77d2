"""From a dataset with a decomposition to table, JSON, figures; what it refuses."""

import json

import numpy as np
import pytest
import xarray as xr

from mupjax import cli, results
from mupjax.figures.decomposition import path_figure
from mupjax.mechanism import decomposed, explain_dataset, load_decomposition
from synthetic.planted import PlantedLosses

T = np.linspace(-3.0, 3.0, 7)
WIDTHS = (16, 64)
TIMES = (0, 10)


def dataset_of(families=("holds",), noise=0.01, diverged=False, times=True):
    """What the observer writes, with planted profiles in it."""
    rng = np.random.default_rng(0)
    shape = (len(families), len(WIDTHS), T.size, 3)
    top = np.full((*shape, WIDTHS[-1]), np.nan)
    for p, family in enumerate(families):
        for w, n in enumerate(WIDTHS):
            drawn = PlantedLosses(family).noisy_profiles(T, n, seeds=3, noise=noise, rng=rng)
            top[p, w, :, :, :n] = np.swapaxes(drawn, 0, 1)
    total = np.stack([top[:, w, ..., n - 1] for w, n in enumerate(WIDTHS)], axis=1)
    status = np.zeros(shape, np.int8)
    if diverged:
        status[:, 0, -1, 1] = 1
    own = ("parametrization", "width", "learning_rate", "seed")
    values = {
        "status": (own, status),
        "decomposition_top": ((*own, "component"), top),
        "decomposition_total": (own, total),
        "decomposition_initial_loss": (own, np.full(shape, 5.0)),
        "decomposition_final_loss": (own, 5.0 + total),
        "decomposition_faithfulness": (own, np.zeros(shape)),
    }
    if times:
        values["decomposition_time_top"] = (
            (*own, "time", "component"),
            np.stack([0 * top, top], axis=-2),
        )
        values["decomposition_time_loss"] = (
            (*own, "time"),
            np.stack([np.full(shape, 5.0), 5.0 + total], axis=-1),
        )
    return xr.Dataset(
        values,
        coords={
            "parametrization": list(families),
            "width": list(WIDTHS),
            "learning_rate": 2.0**T,
            "seed": np.arange(3),
            "component": np.arange(1, WIDTHS[-1] + 1),
            "time": list(TIMES),
        },
        attrs={"format": results.FORMAT, "configuration": "{}", "created": "", "device": ""},
    )


def test_profiles_are_read_as_they_were_written():
    dataset = dataset_of()
    data = decomposed(dataset)["holds"]
    assert data.hp_name == "learning_rate"
    np.testing.assert_allclose(data.grid, T)
    top = dataset.decomposition_top.sel(parametrization="holds", width=16)
    expected = top.transpose("seed", "learning_rate", "component").values[..., :16] + 5.0
    np.testing.assert_array_equal(data.profiles[16], expected)
    assert data.profiles[64].shape == (3, T.size, 64)
    assert data.paths[16].shape == (3, T.size, 2, 16)
    assert data.truncated == ()


def test_components_not_recorded_are_one_more():
    dataset = dataset_of().sel(component=slice(1, 8))
    data = decomposed(dataset.drop_vars(["decomposition_time_top", "decomposition_time_loss"]))
    holds = data["holds"]
    assert holds.truncated == WIDTHS
    assert holds.profiles[64].shape == (3, T.size, 9)
    total = dataset.decomposition_total.sel(parametrization="holds", width=64)
    np.testing.assert_allclose(holds.profiles[64][..., -1], total.T + 5.0)


def test_components_that_make_the_whole_at_one_width_are_still_cut_off():
    dataset = dataset_of().sel(component=slice(1, 8))
    dataset = dataset.drop_vars(["decomposition_time_top", "decomposition_time_loss"])
    # As if the eight leading ones did everything at the largest width.
    total = dataset.decomposition_top.isel(component=-1, width=-1, drop=True)
    largest = dataset.width == WIDTHS[-1]
    dataset["decomposition_total"] = xr.where(
        largest, total, dataset.decomposition_total
    ).transpose(*dataset.decomposition_total.dims)
    data = decomposed(dataset)["holds"]
    assert data.truncated == WIDTHS
    assert {profile.shape[-1] for profile in data.profiles.values()} == {9}
    assert explain_dataset(dataset)["holds"].report.widths == WIDTHS


@pytest.mark.parametrize("kept", ["coordinate", "configuration"])
def test_a_sweep_of_one_parametrization_has_no_dimension_for_it(kept):
    dataset = dataset_of()
    single = dataset.squeeze("parametrization", drop=kept == "configuration")
    single.attrs["configuration"] = json.dumps({"parametrizations": [{"name": "holds"}]})
    ((name, found),) = explain_dataset(single).items()
    assert name == "holds"
    assert found.report.verdict == explain_dataset(dataset)["holds"].report.verdict


def test_a_parametrization_that_failed_does_not_hide_the_others():
    dataset = dataset_of(("holds", "flatness"))
    dead = dataset.parametrization == "flatness"
    dataset["status"] = xr.where(dead, 1, dataset.status)
    found = explain_dataset(dataset)
    assert list(found) == ["holds"]
    assert found["holds"].warnings[-1].startswith("left out: flatness: ")
    dataset["status"] = xr.ones_like(dataset.status)
    with pytest.raises(ValueError, match=r"^holds: .*; flatness: "):
        explain_dataset(dataset)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"scale must be one of log2, .*, got 'foo'"):
        explain_dataset(dataset_of(), scale="foo")  # type: ignore[arg-type]


def test_each_parametrization_has_its_own_verdict():
    found = explain_dataset(dataset_of(("holds", "flatness")))
    assert found["holds"].report.verdict == "explained"
    assert found["flatness"].report.verdict == "not explained"
    assert found["flatness"].report.explanations[0].broken == "flatness"


def test_diverged_rates_are_left_out_and_said():
    mechanism = explain_dataset(dataset_of(diverged=True))["holds"]
    assert mechanism.report.dropped == (3.0,)
    assert any("left out" in text for text in mechanism.warnings)


def test_a_trial_that_was_not_followed_is_left_out_and_said():
    dataset, lost = dataset_of(), {"width": 16, "learning_rate": 2.0 ** T[-1], "seed": 1}
    change = abs(dataset["decomposition_total"].sel(lost).item())
    most = abs(dataset["decomposition_total"].sel(width=16)).max().item()
    expected = explain_dataset(dataset.isel(learning_rate=slice(-1)))["holds"].report

    def with_error(size):
        """Off by this much of the largest change at its width; the parts are off by more."""
        found = dataset.copy(deep=True)
        found["decomposition_faithfulness"].loc[lost] = size * most / change
        if size > 1:
            found["decomposition_top"].loc[lost] *= -1e3
        return explain_dataset(found)["holds"]

    mechanism = with_error(1.01)
    assert mechanism.report.dropped == (3.0,)
    assert any("at learning_rate 8: left out" in text for text in mechanism.warnings)
    for ours, theirs in zip(mechanism.report.explanations, expected.explanations, strict=True):
        assert ours.overlap == theirs.overlap
    kept = with_error(0.99)
    assert kept.report.dropped == ()
    assert any("with care" in text for text in kept.warnings)


def test_command_writes_table_json_and_figures(tmp_path, capsys):
    run = tmp_path / "run" / "sweep.nc"
    results.save(dataset_of(), run)
    report, figures = tmp_path / "out.json", tmp_path / "figures"
    arguments = ["mechanism", str(run.parent), "--json", str(report), "--figures", str(figures)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "verdict        explained" in printed
    entry = json.loads(report.read_text())["parametrizations"]["holds"]
    (one,) = entry["against_largest"]
    assert one["width"] == 16
    assert one["verdict"] == entry["verdict"] == "explained"
    assert one["overlap"]["value"] > 0.9
    assert {path.name for path in figures.glob("*.png")} == {
        "holds_curves.png",
        "holds_path.png",
        "holds_profile.png",
    }


def test_a_run_without_the_observer_says_how_to_add_it(tmp_path, capsys):
    run = tmp_path / "sweep.nc"
    results.save(dataset_of()[["status"]].assign_attrs(dataset_of().attrs), run)
    assert cli.main(["mechanism", str(run)]) == 2
    assert "[decomposition] in CONFIG.toml" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="holds no result"):
        load_decomposition(tmp_path / "nothing")


def test_a_second_hyperparameter_has_to_be_fixed():
    one = dataset_of(times=False)
    two = xr.concat([one, one + 1], dim=xr.Variable("b2", [0.9, 0.99]))
    two["status"] = (two["status"] * 0).astype(np.int8)
    with pytest.raises(ValueError, match=r"say which hyperparameter is in question"):
        decomposed(two)
    with pytest.raises(ValueError, match=r"b2 has the values 0\.9, 0\.99: fix one"):
        decomposed(two, "learning_rate")
    with pytest.raises(ValueError, match=r"not run at 0\.5"):
        decomposed(two, "learning_rate", fix={"b2": 0.5})
    with pytest.raises(ValueError, match="cannot fix 'b1'"):
        decomposed(two, "learning_rate", fix={"b1": 0.5})
    with pytest.raises(ValueError, match="no hyperparameter 'lr'"):
        decomposed(two, "lr")
    fixed = decomposed(two, "learning_rate", fix={"b2": 0.9})["holds"]
    np.testing.assert_array_equal(fixed.profiles[16], decomposed(one)["holds"].profiles[16])


def test_nothing_on_the_way_is_said():
    mechanism = explain_dataset(dataset_of(times=False))["holds"]
    with pytest.raises(ValueError, match="give the observer times"):
        path_figure(mechanism)
