"""What the README shows, run as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest

from mupjax.cli import main

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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


@pytest.mark.parametrize("command", re.findall(r"^\$ mupjax ([a-z-]+)", README, flags=re.MULTILINE))
def test_commands_of_the_readme_exist(command, capsys):
    assert main([command, "--help"]) == 0
    assert "--help" in capsys.readouterr().out
