"""`mupjax diagnose`: known families through the command line, its JSON, figures and refusals."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from mupjax import cli
from mupjax.diagnose import diagnose_tables, json_of, read_rates
from mupjax.table import Columns, arrange_sweeps, read_records

WIDTHS = [64, 128, 256, 512, 1024, 2048]
KEYS = [
    "widths", "optimal_hp", "optimal_loss", "alpha", "beta", "c_rate", "curvature_exponent",
    "transfer_penalty", "loss_floor", "loss_prefactor", "verdict", "probability_fast", "warnings",
]  # fmt: skip


def family(beta, alpha=0.6, drift=8.0, seeds=4, noise=3e-4, rng_seed=0, step=0.5):
    """phi_n = 2 + 3 n^-α + 0.05 (x − x*(n))², x = log2 lr, x*(n) = −6 + drift n^-β."""
    rng = np.random.default_rng(rng_seed)
    rows = []
    for n in WIDTHS:
        for x in np.arange(-10, 0, step):
            loss = 2 + 3 * n**-alpha + 0.05 * (x + 6 - drift * n**-beta) ** 2
            for seed in range(seeds):
                value = loss + noise * rng.standard_normal()
                rows.append({"width": n, "lr": 2.0**x, "seed": seed, "loss": value})
    return pd.DataFrame(rows)


def run(tmp_path, data, *options):
    table, out = tmp_path / "t.csv", tmp_path / "out.json"
    data.to_csv(table, index=False)
    assert cli.main(["diagnose", str(table), "--hp", "lr", "--json", str(out), *options]) == 0
    return json.loads(out.read_text())["parametrizations"]


def failure(arguments, capsys):
    assert cli.main(["diagnose", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(("beta", "verdict"), [(0.8, "fast"), (0.2, "weak")])
def test_known_rates_come_out(tmp_path, capsys, beta, verdict):
    entry = run(tmp_path, family(beta))["all"]
    assert set(KEYS) <= set(entry)
    assert entry["widths"] == WIDTHS
    # Whether intervals cover is for the tests of theory; here, that the right numbers arrive.
    for name, truth, near in (("alpha", 0.6, 0.05), ("beta", beta, 0.2), ("loss_floor", 2.0, 0.05)):
        low, high = entry[name]["interval"]
        assert low <= entry[name]["value"] <= high, name
        assert entry[name]["value"] == pytest.approx(truth, abs=near), name
    optima = np.log2(entry["optimal_hp"]["value"])
    np.testing.assert_allclose(optima, -6 + 8 * np.array(WIDTHS, float) ** -beta, atol=0.02)
    moved = 8 * (64.0**-beta - 2048.0**-beta)
    assert entry["transfer_penalty"]["value"] == pytest.approx(0.05 * moved**2, rel=0.1)
    # Never the wrong one of the two; an abstention would be honest.
    assert entry["verdict"] in (verdict, "cannot tell")
    printed = capsys.readouterr().out
    assert f"verdict  {entry['verdict']}" in printed
    assert "all: loss against lr" in printed


def test_the_bowl_is_recorded(tmp_path, capsys):
    """Second derivative .1 per octave², on a grid of 9.5 octaves."""
    entry = run(tmp_path, family(0.6, noise=0.0))["all"]
    np.testing.assert_allclose(entry["curvature"], 0.1, rtol=1e-6)
    assert (entry["search_range"], entry["scale"]) == (pytest.approx(9.5), "log2")
    rates = read_rates(tmp_path / "out.json")
    # Of a grid over r octaves: μ/2 times the mean square distance r²/12, for each hyperparameter.
    assert rates.grid_prefactor(3) == pytest.approx(3 * 0.05 * 9.5**2 / 12)
    capsys.readouterr()


def test_optima_read_in_two_ways_are_warned_of(tmp_path, capsys):
    """Curves with a bowl of five points beside some of three."""
    fine, coarse = family(0.6, step=0.5), family(0.6, step=3.0)
    both = pd.concat([fine.assign(param="fine"), coarse.assign(param="coarse")])
    entries = run(tmp_path, both)
    assert [entries[name]["optimum"] for name in ("fine", "coarse")] == ["quartic", "parabola"]
    for entry in entries.values():
        assert any("--optimum parabola" in warning for warning in entry["warnings"])
    alike = run(tmp_path, both, "--optimum", "parabola")
    for entry in alike.values():
        assert not any("--optimum parabola" in warning for warning in entry["warnings"])
    capsys.readouterr()


def test_json_is_strict_and_forecasts_on_request(tmp_path, capsys):
    data = family(0.6, seeds=1)
    data.loc[data["lr"] > 0.4, "loss"] = math.inf
    entry = run(tmp_path, data, "--target-width", "4096")["all"]
    forecast = entry["forecast"]
    assert forecast["width"] == 4096
    low, high = forecast["optimal_hp_interval"]
    assert low < forecast["optimal_hp"] < high
    assert forecast["optimal_hp"] == pytest.approx(2 ** (-6 + 8 * 4096**-0.6), rel=0.05)
    assert {"optimal_hp", "optimal_loss", "transfer_penalty"} <= set(forecast)
    assert "NaN" not in (tmp_path / "out.json").read_text()
    assert "Infinity" not in (tmp_path / "out.json").read_text()
    assert any("one seed" in warning for warning in entry["warnings"])
    assert entry["verdict"] == "cannot tell"
    capsys.readouterr()


def test_parametrizations_are_entries_and_copies_are_suspicious(tmp_path, capsys):
    data = family(0.6, seeds=2)
    both = pd.concat([data.assign(param="sp"), data.assign(param="mup")])
    entries = run(tmp_path, both)
    assert list(entries) == ["sp", "mup"]
    assert any("copy of the other" in warning for warning in entries["mup"]["warnings"])
    capsys.readouterr()


def test_a_parametrization_that_never_trains_is_an_answer(tmp_path, capsys):
    data = family(0.6, seeds=2, step=1)
    both = pd.concat([data.assign(param="muP"), data.assign(param="SP", loss=math.nan)])
    entries = run(tmp_path, both, "--figures", str(tmp_path / "pictures"))
    assert entries["SP"]["verdict"] == "cannot tell"
    assert entries["SP"]["optimal_hp"]["value"] == [None] * len(WIDTHS)
    assert entries["muP"]["alpha"]["value"] == pytest.approx(0.6, abs=0.05)
    assert (tmp_path / "pictures" / "SP.png").exists()
    capsys.readouterr()


def test_dead_runs_and_stopped_runs_reach_the_warnings(tmp_path, capsys):
    data = family(0.6)
    data.loc[data["lr"] > 0.2, "loss"] = math.log(50)
    steps = pd.concat([data.assign(step=1, loss=5.0), data.assign(step=2)])
    stopped = (steps["width"] == 64) & (steps["lr"] < 0.001) & (steps["step"] == 2)
    entry = run(tmp_path, steps[~stopped | (steps["seed"] > 0)])["all"]
    said = " ".join(entry["warnings"])
    assert "ln 50" in said
    assert "1 run(s) end early" in said
    capsys.readouterr()


def test_linear_and_momentum_scales(tmp_path, capsys):
    """Ridge penalties in their own units; momenta by their horizon."""
    rows = [
        {"width": n, "lr": hp, "seed": s, "loss": 1 + 1 / n + (x - 3) ** 2 + 1e-4 * s}
        for n in WIDTHS
        for x in range(8)
        for s in (0, 1)
        for hp in (1 - 2.0**-x,)
    ]
    entry = run(tmp_path, pd.DataFrame(rows), "--scale", "momentum")["all"]
    np.testing.assert_allclose(entry["optimal_hp"]["value"], 1 - 2.0**-3)
    linear = pd.DataFrame(rows)
    linear["lr"] = -np.log2(1 - linear["lr"])
    entry = run(tmp_path, linear, "--scale", "linear")["all"]
    np.testing.assert_allclose(entry["optimal_hp"]["value"], 3)
    capsys.readouterr()


def test_lowest_losses_of_a_published_figure_give_about_its_fit():
    """GWB, Llama with Adam, printed `3.137 + 13.16 n^-0.524`, which is of smoothed curves.

    The losses are the lowest ones drawn for each width (least squares by scipy: 3.139, 0.526), put
    at the bottom of parabolas: this tests the way from a table to a fit.
    """
    best = {128: 4.17957, 256: 3.86184, 512: 3.64087, 1024: 3.48763, 2048: 3.38135}
    rows = [
        {"width": n, "lr": 2.0**x, "loss": loss + 0.05 * (x + 8) ** 2}
        for n, loss in best.items()
        for x in range(-10, -5)
    ]
    data = pd.DataFrame(rows).astype(object)
    from mupjax.table.records import Records

    records = Records(
        "t", {name: data[name].to_numpy() for name in data}, tuple(f"row {i}" for i in data.index)
    )
    entry = json_of(diagnose_tables(arrange_sweeps(records, Columns("lr"))))["parametrizations"]
    assert entry["all"]["alpha"]["value"] == pytest.approx(0.524, abs=0.003)
    assert entry["all"]["loss_floor"]["value"] == pytest.approx(3.137, abs=0.004)


def test_figures_are_written_one_a_parametrization(tmp_path, capsys):
    data = family(0.6)
    data.loc[data["lr"] > 0.4, "loss"] = math.nan
    dead = data.assign(
        param="../odd name", loss=np.where(data["width"] == 64, np.nan, data["loss"])
    )
    both = pd.concat([data.assign(param="muP"), dead])
    folder = tmp_path / "pictures"
    run(tmp_path, both, "--figures", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == [
        "muP.png", "muP.svg", "odd_name.png", "odd_name.svg",
    ]  # fmt: skip
    assert "wrote" in capsys.readouterr().out


def test_names_are_drawn_as_they_are(tmp_path, capsys):
    """Neither mathematics (which need not parse) nor letters that the font lacks do harm."""
    names = {"lr": "\u5b66$\\frac$", "loss": "$\\l$", "seed": "seed"}
    data = family(0.6, seeds=1).assign(param="_$x^$").rename(columns=names)
    data.to_csv(tmp_path / "t.csv", index=False)
    words = ["--hp", names["lr"], "--loss", names["loss"], "--figures", str(tmp_path / "pictures")]
    assert cli.main(["diagnose", str(tmp_path / "t.csv"), *words]) == 0
    assert capsys.readouterr().err == ""
    (drawing,) = (tmp_path / "pictures").glob("*.svg")
    text = drawing.read_text(encoding="utf-8")
    for label in (names["lr"], f"Final {names['loss']}", "_$x^$: "):
        assert f"<!-- {label}" in text


def test_long_names_are_cut(tmp_path, capsys):
    """File names have at most 255 bytes; names that are cut alike stay apart."""
    data = family(0.6, seeds=1, step=1)
    both = pd.concat([data.assign(param="μ" * 300 + end) for end in "ab"])
    folder = tmp_path / "pictures"
    run(tmp_path, both, "--figures", str(folder))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["μ" * 100 + end for end in (".png", ".svg", "_.png", "_.svg")]
    out = tmp_path / ("x" * 300)
    assert "cannot be written" in failure(
        [tmp_path / "t.csv", "--hp", "lr", "--figures", out], capsys
    )


@pytest.mark.parametrize("broken", ["diagnosis_figure", "write_json"])
def test_nothing_is_written_unless_all_can_be(tmp_path, monkeypatch, capsys, broken):
    def refuse(*_, **__):
        raise OSError("no more")

    family(0.6, seeds=1, step=1).to_csv(tmp_path / "t.csv", index=False)
    where = {"diagnosis_figure": "mupjax.figures.diagnosis", "write_json": "mupjax.commands.output"}
    monkeypatch.setattr(f"{where[broken]}.{broken}", refuse)
    ends = ["--json", tmp_path / "o.json", "--figures", tmp_path / "pictures"]
    words = ["diagnose", tmp_path / "t.csv", "--hp", "lr", *ends]
    assert cli.main([str(word) for word in words]) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    capsys.readouterr()


def test_files_that_stand_in_one_another_s_way(tmp_path, capsys):
    family(0.6, seeds=1, step=1).to_csv(tmp_path / "t.csv", index=False)
    words = [tmp_path / "t.csv", "--hp", "lr"]
    for figures in ("out", "out/figures"):
        ends = ["--json", tmp_path / "out", "--figures", tmp_path / figures]
        assert "cannot be both a file (--json) and a folder" in failure([*words, *ends], capsys)
    table = (tmp_path / "t.csv").read_bytes()
    ends = ["--json", tmp_path / "t.csv"]
    assert "is the file that is read" in failure([*words, *ends], capsys)
    assert (tmp_path / "t.csv").read_bytes() == table
    (tmp_path / "f" / "all.png").mkdir(parents=True)
    ends = ["--json", tmp_path / "o.json", "--figures", tmp_path / "f"]
    assert "is a folder, and a file of that name is due" in failure([*words, *ends], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "t.csv"]
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["all.png"]


def test_a_fact_is_warned_of_once(tmp_path, capsys):
    data = family(0.6, seeds=1)
    kept = (data["lr"] > 2.0**-5) | (data["width"] != 2048)
    warnings = run(tmp_path, data[kept])["all"]["warnings"]
    assert sum("one seed" in text for text in warnings) == 1
    assert sum("2048 (" in text or "bracketed" in text for text in warnings) == 1
    # An optimum beside a run that diverged is not at the edge of the grid: only one says so.
    data.loc[(data["lr"] > 2.0**-5.9) & (data["width"] == 1024), "loss"] = math.nan
    warnings = run(tmp_path, data)["all"]["warnings"]
    assert any("width 1024: the optimum is not bracketed (high)" in text for text in warnings)
    capsys.readouterr()


@pytest.mark.slow  # it trains; tests/test_mupjax_table.py reads a dataset of the same form
def test_own_sweep_through_the_command_line(tmp_path, capsys):
    """The dataset that `mupjax sweep` writes needs no mapping but the hyperparameter."""
    import optax

    import mupjax
    from mupjax.data import digits
    from mupjax.models import MLP

    mupjax.sweep(
        lambda width, rngs: MLP(64, width, 10, depth=1, rngs=rngs),
        digits(32, 100),
        lambda learning_rate: optax.sgd(learning_rate),
        ["SP", "muP"],
        widths=[8, 16],
        base_width=8,
        steps=3,
        seeds=2,
        hyperparameters={"learning_rate": [0.01, 0.1, 1.0]},
        out=tmp_path / "sweep.nc",
        progress=False,
    )
    dataset = mupjax.load(tmp_path / "sweep.nc")
    tables = arrange_sweeps(read_records(tmp_path / "sweep.nc"), Columns("learning_rate"))
    for name in ("SP", "muP"):
        stored = dataset["loss"].where(dataset["status"] == 0, np.inf).sel(parametrization=name)
        ordered = stored.transpose("width", "learning_rate", "seed").values
        np.testing.assert_array_equal(tables[name].losses, ordered)
    arguments = ["diagnose", str(tmp_path / "sweep.nc"), "--hp", "learning_rate"]
    assert cli.main(arguments) == 0
    assert "cannot tell" in capsys.readouterr().out
    assert "'learning_rate'" in failure([*arguments[1:3], "lr"], capsys)


def test_refusals_are_one_line_and_write_nothing(tmp_path, capsys):
    table = tmp_path / "t.csv"
    family(0.6).to_csv(table, index=False)
    out, pictures = tmp_path / "o.json", tmp_path / "pictures"
    ends = ["--json", out, "--figures", pictures]
    assert "no column 'eta'" in failure([table, "--hp", "eta", *ends], capsys)
    assert "no table at" in failure([tmp_path / "x.csv", "--hp", "lr", *ends], capsys)
    assert "COLUMN=VALUE" in failure([table, "--hp", "lr", "--fix", "width", *ends], capsys)
    assert "two values" in failure(
        [table, "--hp", "lr", "--fix", "seed=0", "--fix", "seed=1", *ends], capsys
    )
    assert "confidence" in failure([table, "--hp", "lr", "--confidence", "2", *ends], capsys)
    assert "target" in failure([table, "--hp", "lr", "--target-width", "-1", *ends], capsys)
    assert "is a folder" in failure([table, "--hp", "lr", "--json", tmp_path], capsys)
    assert "is a file" in failure([table, "--hp", "lr", "--figures", table], capsys)
    assert sorted(tmp_path.iterdir()) == [table]


def test_one_seed_by_fix_is_one_seed(tmp_path, capsys):
    entry = run(tmp_path, family(0.6), "--fix", "seed=2")["all"]
    assert entry["seeds"] == 1
    capsys.readouterr()
