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


LOST = {"width": 16, "learning_rate": 2.0 ** T[-1], "seed": 1}


def not_followed(dataset, size, at=LOST):
    """Off by `size` times as much as the loss falls in the best run of this width."""
    found = dataset.copy(deep=True)
    change = dataset["decomposition_final_loss"] - dataset["decomposition_initial_loss"]
    error = size * -change.sel(width=at["width"]).min().item()
    found["decomposition_total"].loc[at] = change.sel(at).item() - error
    found["decomposition_faithfulness"].loc[at] = error / abs(change.sel(at).item())
    if size > 1:
        found["decomposition_top"].loc[at] *= -1e3
    return found


def test_a_run_that_was_not_followed_is_left_out_and_said():
    dataset = dataset_of()
    expected = explain_dataset(dataset.isel(learning_rate=slice(-1)))["holds"].report
    mechanism = explain_dataset(not_followed(dataset, 1.01))["holds"]
    assert mechanism.report.dropped == (3.0,)
    assert any("1 of 21 runs are left out, at learning_rate 8" in w for w in mechanism.warnings)
    for ours, theirs in zip(mechanism.report.explanations, expected.explanations, strict=True):
        assert ours.overlap == theirs.overlap
    kept = explain_dataset(not_followed(dataset, 0.99))["holds"]
    assert kept.report.dropped == ()
    assert any("at learning_rate 8: look at its curve with care" in w for w in kept.warnings)


def test_a_run_whose_loss_rose_does_not_hide_others_that_were_not_followed():
    dataset = not_followed(dataset_of(), 2.0)
    risen = {"width": 16, "learning_rate": 2.0 ** T[0], "seed": 0}
    dataset["decomposition_final_loss"].loc[risen] = 50.0
    dataset["decomposition_total"].loc[risen] = 45.0
    assert explain_dataset(dataset)["holds"].report.dropped == (3.0,)
    dataset["decomposition_final_loss"].loc[risen] = np.inf
    assert explain_dataset(dataset)["holds"].report.dropped == (-3.0, 3.0)


def test_what_is_left_out_does_not_hide_a_doubt():
    doubtful = {"width": 16, "learning_rate": 2.0 ** T[2], "seed": 0}
    dataset = not_followed(not_followed(dataset_of(), 0.5, doubtful), 9.0)
    warnings = explain_dataset(dataset)["holds"].warnings
    assert any("left out, at learning_rate 8" in w for w in warnings)
    assert any("at learning_rate 0.5: look at its curve with care" in w for w in warnings)


def test_where_nothing_was_followed_the_refusal_says_so():
    dataset = dataset_of()
    for rate in dataset["learning_rate"].values:
        dataset = not_followed(dataset, 3.0, LOST | {"learning_rate": rate})
    with pytest.raises(ValueError, match=r"7 of 21 runs are left out.*stride"):
        explain_dataset(dataset)


def test_the_path_is_shown_where_all_widths_have_one():
    # The largest width's optimum would be the middle one.
    dataset = not_followed(dataset_of(), 2.0, LOST | {"learning_rate": 2.0 ** T[3]})
    figure = path_figure(explain_dataset(dataset)["holds"])
    assert all(np.isfinite(line.get_ydata()).all() for line in figure.axes[1].lines)


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
