"""The command line: exit codes, one-line errors, nothing overwritten by accident."""

import json

import numpy as np
import pytest

import mupjax
from mupjax import cli
from mupjax.quickstart import Quickstart, run_quickstart
from mupjax.verdict import learning_rate_view, summarize, write_analysis

CONFIG = """
[model]
name = "mlp"
[sweep]
parametrizations = ["SP", "muP"]
widths = [8, 16]
base_width = 8
steps = 4
seeds = 2
[hyperparameters]
learning_rate = [0.001, 0.004, 0.016]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "quickstart"
    options = Quickstart(
        widths=(8, 16), learning_rates=(2**-9, 2**-7, 2**-5), base_width=8, seeds=2, steps=6
    )
    dataset = run_quickstart(options, folder, progress=False)
    summaries = summarize(dataset)
    write_analysis(folder, dataset, summaries, title="tiny")
    return folder, dataset, summaries


def failure(arguments, capsys):
    """Standard error of a call that must end with 2, in one line and without a traceback."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1
    return captured.err


def test_summary_has_the_promised_keys(run):
    folder, dataset, _ = run
    record = json.loads((folder / "summary.json").read_text())
    assert set(record) == {"SP", "muP"}
    for entry in record.values():
        assert entry["widths"] == [8, 16]
        assert len(entry["optimal_lr"]) == len(entry["optimal_loss"]) == 2
        assert len(entry["drift_interval"]) == 2
        low, high = np.log2(entry["optimal_lr"])
        assert entry["drift_octaves"] == pytest.approx(high - low)
        assert entry["stability"] == float((dataset.status == 0).mean())
    # Both are the same training at the base width.
    assert record["SP"]["optimal_lr"][0] == record["muP"]["optimal_lr"][0]


def test_show_prints_the_verdict_again(run, capsys):
    folder, _, summaries = run
    for target in (folder, folder / "sweep.nc"):
        assert cli.main(["show", str(target)]) == 0
        out = capsys.readouterr().out
        assert all(summary.table() in out for summary in summaries.values())
    assert cli.main(["show", str(folder), "--configuration"]) == 0
    assert '"base_width": 8' in capsys.readouterr().out


def test_quickstart_leaves_foreign_folders_alone(tmp_path, capsys):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert str(tmp_path) in failure(["quickstart", "--out", str(tmp_path)], capsys)
    assert "is a file" in failure(["quickstart", "--out", str(notes)], capsys)
    assert notes.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [notes]


def test_quickstart_says_what_it_replaces(run, capsys, monkeypatch):
    folder, dataset, _ = run
    monkeypatch.setattr("mupjax.quickstart.run_quickstart", lambda *_: dataset)
    assert cli.main(["quickstart", "--out", str(folder), "--quiet"]) == 0
    assert f"replacing the earlier run in {folder}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"mlp"', '"cnn"', "cnn"),
        ("widths = [8, 16]", "widths = [16, 8]", "widths must increase"),
        ("base_width = 8", "", "base_width must be given"),
        ("steps = 4", "stepz = 4", "stepz"),
        ("steps = 4", "", "'steps'"),
        ('"SP", "muP"', '"SP", "mup"', "'mup'"),
        ("learning_rate = [0.001, 0.004, 0.016]", "learning_rate = []", "empty"),
        ("learning_rate = [0.001, 0.004, 0.016]", "learning_rate = [0.0, 1.0]", "positive"),
        ("learning_rate = [0.001, 0.004, 0.016]", "learning_rat = [0.1]", "learning_rat"),
        ("[hyperparameters]", "[hyperparameter]", "hyperparameter"),
        ("[model]", "[model]\nfactory = 'nowhere:f'", "nowhere"),
        ("[sweep]", "[sweep", "TOML"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, capsys, old, new, named):
    assert old in CONFIG
    text = CONFIG.replace(old, new)
    if "factory" in new:
        text = text.replace('name = "mlp"', "")
    config = tmp_path / "bad.toml"
    config.write_text(text)
    assert named in failure(["sweep", str(config), "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_missing_files_are_one_line(tmp_path, capsys):
    assert "no file" in failure(["sweep", str(tmp_path / "none.toml")], capsys)
    assert "no result" in failure(["show", str(tmp_path)], capsys)


def test_unknown_arguments_end_with_2(capsys):
    assert cli.main(["quickstart", "--nonsense"]) == 2
    assert cli.main([]) == 2
    capsys.readouterr()


def test_a_fault_ends_with_1_and_a_traceback(tmp_path, capsys, monkeypatch):
    def broken(*_args, **_kwargs):
        return np.zeros(3).reshape(2, 2)

    monkeypatch.setattr(mupjax, "sweep", broken)
    config = tmp_path / "good.toml"
    config.write_text(CONFIG)
    assert cli.main(["sweep", str(config), "--out", str(tmp_path / "run")]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_sweep_file_with_own_factories(tmp_path, capsys):
    (tmp_path / "my_parts.py").write_text(
        "import optax\n"
        "from mupjax.models import MLP\n"
        "def make_model(width, rngs): return MLP(64, width, 10, rngs=rngs)\n"
        "def make_optimizer(learning_rate): return optax.sgd(learning_rate, momentum=0.9)\n"
    )
    text = CONFIG.replace('name = "mlp"', 'factory = "my_parts:make_model"')
    text += '[optimizer]\nfactory = "my_parts:make_optimizer"\n[[parametrization]]\nname = "mine"\n'
    for role in ("input", "hidden", "output", "vector"):
        text += f"[parametrization.rows.sgd.{role}]\nlearning_rate = 1.0\n"
    config = tmp_path / "own.toml"
    config.write_text(text)
    out = tmp_path / "run"
    assert cli.main(["sweep", str(config), "--out", str(out), "--quiet"]) == 0
    dataset = mupjax.load(out / "sweep.nc")
    assert list(dataset.parametrization.values) == ["SP", "muP", "mine"]
    # A second run needs to be told what to do with the first.
    assert "--replace" in failure(["sweep", str(config), "--out", str(out)], capsys)
    assert cli.main(["sweep", str(config), "--out", str(out), "--replace", "--quiet"]) == 0


def test_further_hyperparameters_are_profiled_out():
    """Of each (width, learning rate), the best combination of the others that did not diverge."""
    import xarray as xr

    rng = np.random.default_rng(0)
    loss = rng.uniform(1, 2, (2, 3, 4, 5))
    status = np.zeros(loss.shape, np.int8)
    status[0, 0, 1, 3] = 1
    dims = ("width", "learning_rate", "b2", "seed")
    dataset = xr.Dataset(
        {"loss": (dims, loss), "status": (dims, status)},
        coords={"width": [8, 16], "learning_rate": [0.1, 0.2, 0.4], "b2": [0.5, 0.6, 0.7, 0.8]},
        attrs={"configuration": json.dumps({"parametrizations": [{"name": "SP"}]})},
    )
    view = learning_rate_view(dataset)
    assert view.loss.dims == ("parametrization", "width", "learning_rate", "seed")
    for w in range(2):
        for k in range(3):
            usable = [b for b in range(4) if not status[w, k, b].any()]
            best = min(usable, key=lambda b: loss[w, k, b].mean())
            np.testing.assert_array_equal(view.loss.values[0, w, k], loss[w, k, best])
