"""`mupjax reproduce`: folders refused, resumed or replaced; every target at its tiny scale."""

import dataclasses
import json

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from mupjax import results
from mupjax.commands.reproduce import reproduce as command
from mupjax.reproduce.registry import find_target, format_targets, targets
from mupjax.reproduce.runner import format_findings, reproduce
from mupjax.reproduce.target import Claim, Finding, Outcome, Target

CLAIM = Claim("slope", "the slope is -1", "a paper, Theorem 1", "-1 <for all> n")


def outcome(figures=("panels",)):
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
        self.outcome = outcome()

    def run(self, scale, folder, progress, **options):
        self.calls.append((scale, sorted(p.name for p in folder.iterdir()), options))
        (folder / "sweep.nc").write_text("kept")
        return self.outcome

    @property
    def target(self):
        durations = {"tiny": "now", "laptop": "1 minute"}
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
    recorder.outcome = outcome(figures=("renamed",))
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


def test_a_failure_leaves_the_earlier_results_whole(tmp_path, monkeypatch):
    recorder, folder = Recorder(), tmp_path / "run"
    reproduce(recorder.target, folder, scale="tiny")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    recorder.outcome = dataclasses.replace(outcome(), summary={"bad": object()})
    with pytest.raises(TypeError, match="JSON"):
        reproduce(recorder.target, folder, scale="tiny")
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"sweeps"}
    recorder.outcome = outcome(figures=())
    with pytest.raises(RuntimeError, match="drew no figure"):
        reproduce(recorder.target, folder, scale="tiny")
    recorder.outcome = dataclasses.replace(outcome(), findings={})
    with pytest.raises(RuntimeError, match=r"claims \['slope'\] but found \[\]"):
        reproduce(recorder.target, folder, scale="tiny")


def test_names_and_claims_are_listed(capsys):
    command(list=True)
    listed = capsys.readouterr().out
    assert listed.strip() == format_targets()
    for name, target in targets().items():
        assert name in listed
        assert {"tiny", "laptop"} <= set(target.duration)
        assert len({claim.key for claim in target.claims}) == len(target.claims) > 0
        assert all(claim.statement in listed for claim in target.claims)
    some = next(iter(targets()))
    with pytest.raises(ValueError, match=f"did you mean '{some}'"):
        find_target(some + "s")
    with pytest.raises(ValueError, match="--list"):
        command()


@pytest.mark.parametrize("name", targets())
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
