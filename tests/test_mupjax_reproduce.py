"""`mupjax reproduce`: folders refused, resumed or replaced; every target at its tiny scale."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from mupjax import results
from mupjax.commands.reproduce import reproduce as command
from mupjax.reproduce import ball_indicator, multi_index
from mupjax.reproduce.language_models_training import EXPERIMENTS
from mupjax.reproduce.registry import find_target, format_targets, targets
from mupjax.reproduce.runner import format_findings, reproduce
from mupjax.reproduce.target import Claim, Finding, Outcome, Scale, Target
from mupjax.reproduce.two_layer_sweeps import Sizes, count_minima, half_octaves, sizes_at

CLAIM = Claim("slope", "the slope is -1", "a paper, Theorem 1", "-1 <for all> n")


def fake_outcome(figures=("panels",)):
    finding = Finding(
        "-1.01 [-1.03, -0.99]", "reproduced", "holds -1", {"slope": np.float64(-1.01)}
    )
    return Outcome(
        {"slope": finding},
        xr.Dataset({"gap": ("width", [1.0, 0.5])}, attrs={"configuration": '{"steps": 3}'}),
        {name: Figure() for name in figures},
        notes=("A choice.",),
        summary={"infinite": np.inf, "list": np.arange(2)},
    )


class Recorder:
    """A target that notes how it was called, and what is found."""

    def __init__(self):
        self.calls = []
        self.outcome = fake_outcome()

    def run(self, scale, folder, progress, **options):
        self.calls.append((scale, sorted(p.name for p in folder.iterdir()), options))
        (folder / "sweep.nc").write_text("kept")
        return self.outcome

    @property
    def target(self):
        durations: dict[Scale, str] = {"tiny": "now", "laptop": "1 minute"}
        return Target("fake-target", "A title", (CLAIM,), durations, self.run, frozenset({"seeds"}))


def test_a_run_writes_everything_and_says_what_was_found(tmp_path):
    recorder = Recorder()
    run = reproduce(recorder.target, tmp_path / "run", scale="tiny", seeds=2, max_width=None)
    assert recorder.calls == [("tiny", [], {"seeds": 2})]
    names = {"dataset.nc", "summary.json", "index.html", "panels.png", "panels.svg"}
    assert {path.name for path in run.files} == names
    assert {p.name for p in (tmp_path / "run").iterdir()} == {*names, "sweeps", "run.json"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["claims"]["slope"]["values"] == {"slope": -1.01}
    assert summary["claims"]["slope"]["verdict"] == "reproduced"
    assert summary["summary"] == {"infinite": None, "list": [0, 1]}
    page = (tmp_path / "run" / "index.html").read_text()
    for text in ("-1 &lt;for all&gt; n", "A choice.", "steps", "[−1.03, −0.99]"):
        assert text.replace("-1 ", "−1 ") in page, text
    table = format_findings(recorder.target, recorder.outcome)
    for text in (CLAIM.statement, CLAIM.source, CLAIM.published, "-1.01 [", "REPRODUCED: holds"):
        assert text in table
    with xr.open_dataset(tmp_path / "run" / "dataset.nc", engine="h5netcdf") as written:
        assert written.attrs["scale"] == "tiny"


def test_an_earlier_run_is_resumed_replaced_or_refused(tmp_path):
    recorder, folder = Recorder(), tmp_path / "run"
    reproduce(recorder.target, folder, scale="tiny")
    recorder.outcome = fake_outcome(figures=("renamed",))
    reproduce(recorder.target, folder, scale="tiny")
    assert recorder.calls[-1][1] == ["sweep.nc"]
    assert not (folder / "panels.png").exists()
    assert (folder / "renamed.png").exists()
    with pytest.raises(FileExistsError, match=r"scale tiny.*--replace"):
        reproduce(recorder.target, folder, scale="laptop")
    (folder / "notes.txt").write_text("mine")
    reproduce(recorder.target, folder, scale="laptop", replace=True)
    assert recorder.calls[-1][:2] == ("laptop", [])
    assert (folder / "notes.txt").read_text() == "mine"
    other = dataclasses.replace(recorder.target, name="other")
    with pytest.raises(FileExistsError, match="a run of fake-target"):
        reproduce(other, folder, scale="laptop", replace=True)


def test_foreign_folders_are_left_alone(tmp_path):
    recorder = Recorder()
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="--out"):
            reproduce(recorder.target, folder, scale="tiny", replace=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert recorder.calls == []


def test_what_a_target_lacks_is_refused_before_it_runs(tmp_path):
    recorder = Recorder()
    with pytest.raises(ValueError, match=r"no scale 'paper': choose from tiny, laptop"):
        reproduce(recorder.target, tmp_path / "run", scale="paper")
    with pytest.raises(ValueError, match=r"option 'max_width' \(takes: seeds\)"):
        reproduce(recorder.target, tmp_path / "run", scale="tiny", max_width=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "option"), [(t.name, o) for t in targets().values() for o in sorted(t.options)]
)
def test_a_refused_option_claims_no_folder_and_removes_no_earlier_run(name, option, tmp_path):
    target = find_target(name)
    zero: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=option):
        reproduce(target, tmp_path / "new", scale="tiny", **zero)
    assert not (tmp_path / "new").exists()
    recorder = Recorder()
    earlier = dataclasses.replace(recorder.target, name=name)
    reproduce(earlier, tmp_path / "run", scale="tiny")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=option):
        reproduce(target, tmp_path / "run", scale="tiny", replace=True, **zero)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_on_the_way_to_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file: choose another folder"):
        reproduce(Recorder().target, tmp_path / "file" / "run", scale="tiny")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["..", "../mine", "/mine"])
def test_a_summary_that_was_tampered_with_removes_nothing_outside(name, tmp_path):
    recorder = Recorder()
    folder = tmp_path / "beside" / "run"
    reproduce(recorder.target, folder, scale="tiny")
    (tmp_path / "beside" / "mine").write_text("kept")
    summary = folder / "summary.json"
    summary.write_text(json.dumps({"files": [name]}))
    reproduce(recorder.target, folder, scale="tiny", replace=True)
    assert (tmp_path / "beside" / "mine").read_text() == "kept"


def test_a_failure_leaves_the_earlier_results_whole(tmp_path, monkeypatch):
    recorder, folder = Recorder(), tmp_path / "run"
    reproduce(recorder.target, folder, scale="tiny")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    recorder.outcome = dataclasses.replace(fake_outcome(), summary={"bad": object()})
    with pytest.raises(TypeError, match="JSON"):
        reproduce(recorder.target, folder, scale="tiny")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"sweeps"}
    recorder.outcome = fake_outcome(figures=())
    with pytest.raises(RuntimeError, match="drew no figure"):
        reproduce(recorder.target, folder, scale="tiny")
    recorder.outcome = dataclasses.replace(fake_outcome(), findings={})
    with pytest.raises(RuntimeError, match=r"claims \['slope'\] but found \[\]"):
        reproduce(recorder.target, folder, scale="tiny")


def test_names_and_claims_are_listed(capsys):
    command(list=True)
    listed = capsys.readouterr().out
    assert listed.strip() == format_targets()
    unwrapped = " ".join(listed.split())
    for name, target in targets().items():
        assert name in listed
        assert {"tiny", "laptop"} <= set(target.duration)
        assert len({claim.key for claim in target.claims}) == len(target.claims) > 0
        assert all(claim.statement in unwrapped for claim in target.claims)
    some = next(iter(targets()))
    with pytest.raises(ValueError, match=f"did you mean '{some}'"):
        find_target(some + "s")
    with pytest.raises(ValueError, match="--list"):
        command()


# Of these, tiny scales of the same machinery are long in compiling.
LONG = {"adaptive-transfer", "mlp-sgd", "multi-index", "ntk-mechanism", *EXPERIMENTS}


@pytest.mark.parametrize(
    "name",
    [
        # Compiling takes minutes where other tests keep the cores busy.
        pytest.param(n, marks=[pytest.mark.slow, pytest.mark.timeout(900)] if n in LONG else ())
        for n in targets()
    ],
)
def test_every_target_runs_at_its_tiny_scale(name, tmp_path, capsys):
    folder = tmp_path / name
    command(name, scale="tiny", out=folder, quiet=True)
    target, printed = targets()[name], capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    for claim in target.claims:
        finding = summary["claims"][claim.key]
        assert finding["verdict"].upper() in printed
        # A handful of steps proves nothing either way; what is computed exactly may be settled.
        assert finding["measured"]
        assert "nan" not in finding["measured"].lower()
    assert {"dataset.nc", "index.html"} <= {p.name for p in folder.iterdir()}
    assert len(results.check_path(folder / "dataset.nc").read_bytes()) > 1000


# The findings of the two-layer targets, on losses made by the published fits instead of training.
RATES = half_octaves(-9, -5)
SEEDS = 3


def curves(log_optima, optimal_losses, curvature=0.02, noise=2e-4):
    """Parabolas over log2 of the learning rate, shape (W, H, S), with a little noise."""
    x = np.log2(RATES)[None, :] - np.asarray(log_optima)[:, None]
    mean = np.asarray(optimal_losses)[:, None] + curvature * x**2
    rng = np.random.default_rng(0)
    return mean[..., None] + noise * rng.standard_normal((*mean.shape, SEEDS))


def sweep_of(losses, widths, dims=("width", "learning_rate", "seed"), **coords):
    return xr.Dataset(
        {"loss": (dims, losses), "status": (dims, np.zeros(losses.shape, np.int8))},
        coords={
            "width": list(widths),
            "learning_rate": list(RATES),
            "seed": range(SEEDS),
            **coords,
        },
    )


def verdicts(outcome):
    return {key: finding.verdict for key, finding in outcome.findings.items()}


def published_sizes(widths, steps=2**14):
    return Sizes(tuple(widths), RATES, steps, SEEDS)


PAPER_WIDTHS = ball_indicator.SIZES["paper"].widths


def test_the_published_widths():
    assert PAPER_WIDTHS[:6] == tuple(ball_indicator.PUBLISHED_OPTIMA)
    assert PAPER_WIDTHS[6:] == (1448, 2048, 2896, 4096, 5793, 8192, 11585, 16384)


def test_the_published_fits_reproduce_the_published_claims():
    n = np.array(PAPER_WIDTHS, float)
    found = sweep_of(curves(-6.78 - 7.80 * n**-0.388, 0.108 + 6.37 * n**-0.742), PAPER_WIDTHS)
    outcome = ball_indicator.analyse(found, published_sizes(PAPER_WIDTHS))
    assert set(verdicts(outcome).values()) == {"reproduced"}
    assert outcome.findings["loss"].values["exponent"] == pytest.approx(0.742, abs=0.02)
    assert outcome.findings["optimum"].values["exponent"] == pytest.approx(0.388, abs=0.05)
    short = ball_indicator.analyse(found, published_sizes(PAPER_WIDTHS, steps=16))
    assert set(verdicts(short).values()) == {"cannot tell at this scale"}


def test_other_networks_do_not():
    """An optimum that falls, fast, and a loss with another exponent: nothing is reproduced."""
    n = np.array(PAPER_WIDTHS, float)
    losses = curves(-7.5 + 200 * n**-1.2, 0.05 + 0.9 * n**-0.3)
    outcome = ball_indicator.analyse(sweep_of(losses, PAPER_WIDTHS), published_sizes(PAPER_WIDTHS))
    assert set(verdicts(outcome).values()) == {"not reproduced"}


def test_few_widths_settle_what_they_can():
    """Four widths show the rise, and their optima; exponents they cannot tell from others."""
    widths = PAPER_WIDTHS[:4]
    n = np.array(widths, float)
    losses = curves(-6.78 - 7.80 * n**-0.388, 0.108 + 6.37 * n**-0.742)
    found = verdicts(ball_indicator.analyse(sweep_of(losses, widths), published_sizes(widths)))
    settled = {key for key, verdict in found.items() if verdict == "reproduced"}
    assert {"rises", "per-width"} <= settled
    assert found["weak"] == found["optimum"] == "cannot tell at this scale"


def test_an_optimum_at_the_edge_of_the_grid_settles_nothing_about_optima():
    widths = PAPER_WIDTHS[:4]
    losses = curves([-10.0] * 4, [0.24, 0.21, 0.19, 0.17])
    found = verdicts(ball_indicator.analyse(sweep_of(losses, widths), published_sizes(widths)))
    for key in ("rises", "optimum", "weak", "per-width"):
        assert found[key] == "cannot tell at this scale"


def test_minima_are_counted():
    x = np.linspace(-3, 3, 13)
    noise = 1e-3 * np.random.default_rng(0).standard_normal((13, 4))

    def count(mean):
        return count_minima(np.asarray(mean)[:, None] + noise)

    assert count(1 + x**2) == 1
    assert count(1 + 0 * x) == 1
    assert count(3 + x) == count(7 - x) == 1
    assert count(1 + (x**2 - 4) ** 2) == 2
    assert count(1 + np.where(np.abs(x) < 0.1, 0.01, 0) + 0.1 * x**4) == 1
    assert count(2 - np.cos(2 * np.pi * x / 3)) == 3
    # Where all seeds diverge there is a wall.
    assert count(np.where(np.abs(x) < 1.2, np.inf, 1 + 0 * x)) == 2
    assert count(np.full(13, np.inf)) == 0
    # A ridge as high as the noise is none.
    loud = 20 * noise + np.where(x[:, None] == -1, 0.97, 1.0)
    assert count_minima(loud + 0.1 * x[:, None] ** 2) == 1


def two_variants(one_rate, own_rate, widths):
    """A sweep over the readout's rate, in the order of its values: 1/50 first."""
    losses = np.stack([own_rate, one_rate], axis=2)
    return sweep_of(
        losses,
        widths,
        ("width", "learning_rate", "output_learning_rate_multiplier", "seed"),
        output_learning_rate_multiplier=[1 / 50, 1.0],
    )


def test_a_jump_two_minima_and_a_better_loss_are_found():
    widths = (2048, 4096, 8192)
    # Two valleys; at 8192 the right one becomes the lower.
    two = np.stack([curves([-8.0], [0.1], 0.1)[0]] * 3)
    for k, right in enumerate((0.13, 0.11, 0.09)):
        two[k] = np.minimum(two[k], curves([-6.0], [right], 0.1)[0])
    better = curves([-7.0, -7.0, -7.0], [0.08, 0.07, 0.06])
    found = two_variants(two, better, widths)
    outcome = multi_index.analyse(found, published_sizes(widths))
    assert set(verdicts(outcome).values()) == {"reproduced"}
    assert outcome.dataset["minima"].values.tolist() == [[2, 2, 2], [1, 1, 1]]
    swapped = multi_index.analyse(two_variants(better, two, widths), published_sizes(widths))
    assert set(verdicts(swapped).values()) == {"not reproduced"}
    narrow = multi_index.analyse(
        two_variants(better[:2], better[:2], widths[:2]), published_sizes(widths[:2])
    )
    assert verdicts(narrow) == {
        "jump": "cannot tell at this scale",
        "unimodal": "cannot tell at this scale",
        "better": "cannot tell at this scale",
    }


def test_sizes_follow_the_options():
    sizes: dict[Scale, Sizes]
    sizes = {"paper": Sizes((8, 16, 32), RATES, 4, 3), "laptop": Sizes((8, 16), RATES, 4, 2)}
    assert sizes_at(sizes, "laptop", None, None, 8) == sizes["laptop"]
    # On a CPU the published size ends where the target says; this suite runs on one.
    bounded = sizes_at(sizes, "paper", 5, None, 16)
    assert (bounded.widths, bounded.left_out, bounded.seeds) == ((8, 16), (32,), 5)
    assert sizes_at(sizes, "paper", None, 64, 16).widths == (8, 16, 32)
    with pytest.raises(ValueError, match="max_width 8 leaves 1 of the widths 8, 16"):
        sizes_at(sizes, "laptop", None, 8, 8)
    with pytest.raises(ValueError, match="seeds"):
        sizes_at(sizes, "laptop", 0, None, 8)
