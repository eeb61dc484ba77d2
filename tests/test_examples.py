"""What the README and the page on models of one's own show, run as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest

from mupjax.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OWN_MODELS = (ROOT / "docs/own_models.md").read_text(encoding="utf-8")


def blocks(language, page=README):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    return [text for kind, text in fenced if kind == language]


def commands(page=README):
    return re.findall(r"^\$ mupjax (.*)$", page, flags=re.MULTILINE)


def test_python_example_runs(capsys):
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) <= 16
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    results = names["results"]
    assert results["loss"].dims == ("parametrization", "width", "learning_rate", "b2", "seed")
    assert np.isfinite(results["loss"].values).all()
    # At the base width the parametrizations are the same training.
    at_base = results["loss"].sel(width=32)
    np.testing.assert_array_equal(
        at_base.sel(parametrization="SP"), at_base.sel(parametrization="muP")
    )
    assert "learning_rate" in capsys.readouterr().out


def test_sweep_file_runs_at_a_tiny_scale(tmp_path, capsys):
    (text,) = blocks("toml")
    for name, value in (
        ("widths", "[16, 32]"),
        ("base_width", "16"),
        ("steps", "5"),
        ("seeds", "2"),
    ):
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        assert count == 1
    config = tmp_path / "tiny.toml"
    config.write_text(text)
    assert main(["sweep", str(config), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "muP" in out
    assert "verdict" in out
    written = {p.name for p in (tmp_path / "run").iterdir()}
    assert written == {
        "sweep.nc",
        "summary.json",
        "learning_rate.png",
        "learning_rate.svg",
        "index.html",
    }


@pytest.mark.parametrize("command", [command.split()[0] for command in commands()])
def test_commands_of_the_readme_exist(command, capsys):
    assert main([command, "--help"]) == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.slow  # compiles six programs of a network with attention
@pytest.mark.timeout(600)
def test_the_page_on_own_models_runs_at_a_tiny_scale(tmp_path, monkeypatch, capsys):
    page = OWN_MODELS
    for full, tiny, times in (
        ("widths=[32, 128]", "widths=[32, 64]", 1),
        ("widths=[16, 32, 64]", "widths=[16, 64]", 1),
        ("steps=60", "steps=6", 1),
    ):
        assert page.count(full) == times
        page = page.replace(full, tiny)
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks("python", page):
        exec(compile(code, "own_models.md", "exec"), names)
    out = capsys.readouterr().out
    # What the page shows of the roles does not depend on the scale.
    table = next(text for text in blocks("", page) if "attention/query/kernel  query" in text)
    assert out.count(table.strip()) == 2
    assert set(names["checked"].layer.values) > {"attention/query", "last", "output"}
    assert (tmp_path / "reader.nc").exists()
    assert len(commands(page)) == 2
    for command in commands(page):
        assert main(command.split()) == 0
    assert "muP: top-κ part against learning_rate" in capsys.readouterr().out
