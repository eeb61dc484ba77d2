"""`mupjax plan`: the theorem's numbers, plans from diagnoses, and refusals."""

import json
import os
import subprocess
import sys

import pytest

from mupjax import cli
from mupjax.diagnose import read_rates

BASE = ["--alpha", "0.5", "--beta", "0.5", "--num-hps", "2", "--cost-exponent", "2", "--flops"]


def run(tmp_path, *arguments):
    out = tmp_path / "plan.json"
    assert cli.main(["plan", *map(str, arguments), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def failure(arguments, capsys):
    assert cli.main(["plan", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def diagnosis(path, **changes):
    def estimate(value):
        return {"value": value, "interval": None}

    entry = {
        "widths": [64, 256, 1024],
        "alpha": estimate(0.5),
        "beta": estimate(0.5),
        "loss_prefactor": estimate(4.0),
        # D = 2 by c_n = D (n^-β − N^-β)² at n = 64, N = 1024.
        "transfer_penalty": estimate(2 * (1 / 8 - 1 / 32) ** 2),
        "probability_fast": 0.99,
        "verdict": "fast",
    }
    path.write_text(json.dumps({"parametrizations": {"muP": entry | changes}}))
    return path


def test_the_theorem_s_numbers(tmp_path, capsys):
    plan = run(tmp_path, *BASE, "1e20")
    # 2α/(hα+2r), min(2β/(hβ+r), α/r) by hand.
    assert plan["direct_exponent"] == pytest.approx(1 / 5)
    assert plan["transfer_exponent"] == pytest.approx(1 / 4)
    assert plan["useful"] is True
    assert isinstance(plan["proxy_width"], int)
    assert isinstance(plan["target_width"], int)
    assert 1 < plan["proxy_width"] < plan["target_width"]
    spent = plan["grid_points_per_hp"] ** 2 * plan["proxy_width"] ** 2 + plan["target_width"] ** 2
    assert 0.99e20 < spent <= 1e20 * (1 + 1e-9)
    assert plan["excess_loss_transfer"] < plan["excess_loss_direct"]
    assert plan["break_even_flops"] < 1e20
    printed = capsys.readouterr().out
    assert "beta > alpha/2, so transfer is useful" in printed
    assert f"{plan['proxy_width']}" in printed


def test_slow_transfer_is_not_useful(tmp_path, capsys):
    plan = run(tmp_path, *BASE[:2], "--beta", "0.2", *BASE[4:], "1e20")
    assert plan["useful"] is False
    assert plan["transfer_exponent"] < plan["direct_exponent"]
    assert "is not useful" in capsys.readouterr().out


def test_a_given_target_is_kept(tmp_path, capsys):
    plan = run(tmp_path, *BASE, "1e8", "--target-width", "4096")
    assert plan["target_width"] == 4096
    assert plan["break_even_flops"] is None
    assert plan["direct"]["target_width"] == 4096
    capsys.readouterr()


def test_units_of_flops(tmp_path, capsys):
    """Budget and cost in other units: the same plan."""
    one = run(tmp_path, *BASE, "1e8")
    other = run(tmp_path, *BASE, "1e17", "--cost-constant", "1e9")
    assert one["proxy_width"] == other["proxy_width"]
    assert one["target_width"] == other["target_width"]
    assert other["break_even_flops"] == pytest.approx(1e9 * one["break_even_flops"])
    capsys.readouterr()


def test_rates_from_a_diagnosis(tmp_path, capsys):
    path = diagnosis(tmp_path / "d.json")
    rest = ["--num-hps", "1", "--flops", "1e8"]
    plan = run(tmp_path, "--from", path, *rest)
    problem = plan["problem"]
    assert (problem["alpha"], problem["beta"], problem["loss_prefactor"]) == (0.5, 0.5, 4.0)
    assert problem["transfer_prefactor"] == pytest.approx(2.0)
    assert any("extrapolated" in warning for warning in plan["warnings"])
    assert any("grid_prefactor" in warning for warning in plan["warnings"])
    given = run(tmp_path, "--from", path, "--alpha", "0.7", "--transfer-prefactor", "1", *rest)
    assert (given["problem"]["alpha"], given["problem"]["transfer_prefactor"]) == (0.7, 1.0)
    # Another exponent keeps the loss gap that was measured at the largest width, 1024.
    assert given["problem"]["loss_prefactor"] * 1024**-0.7 == pytest.approx(4.0 * 1024**-0.5)
    assert any("cost_constant is 1" in warning for warning in plan["warnings"])
    paid = run(tmp_path, "--from", path, "--cost-constant", "2", *rest)
    assert not any("cost_constant" in warning for warning in paid["warnings"])
    capsys.readouterr()


def test_the_bowl_of_a_diagnosis_prices_the_grid(tmp_path, capsys):
    measured = {"curvature": [0.2, 0.6, None], "search_range": 4.0}
    path = diagnosis(tmp_path / "d.json", **measured)
    rest = ["--flops", "1e8", "--num-hps"]
    one, two = (run(tmp_path, "--from", path, *rest, h) for h in (1, 2))
    # h μ R² / 24 with the curvature of the widest network that has one.
    assert one["problem"]["grid_prefactor"] == pytest.approx(0.6 * 16 / 24)
    assert two["problem"]["grid_prefactor"] == pytest.approx(2 * 0.6 * 16 / 24)
    assert not any("grid_prefactor" in warning for warning in one["warnings"])
    assert any("taken for all 2" in warning for warning in two["warnings"])
    given = run(tmp_path, "--from", path, "--grid-prefactor", "5", *rest, 2)
    assert given["problem"]["grid_prefactor"] == 5
    assert not any("grid_prefactor" in warning for warning in given["warnings"])
    capsys.readouterr()


def test_an_open_verdict_is_passed_on(tmp_path, capsys):
    path = diagnosis(tmp_path / "d.json", verdict="cannot tell")
    plan = run(tmp_path, "--from", path, "--num-hps", "1", "--flops", "1e8")
    assert any("cannot tell" in warning for warning in plan["warnings"])
    path = diagnosis(tmp_path / "d.json", verdict="weak")
    plan = run(tmp_path, "--from", path, "--num-hps", "1", "--flops", "1e8")
    assert any("says 'weak'" in warning for warning in plan["warnings"])
    capsys.readouterr()


def test_what_a_diagnosis_lacks_is_asked_for(tmp_path, capsys):
    path = diagnosis(tmp_path / "d.json", beta={"value": None, "interval": None})
    rest = ["--num-hps", "1", "--flops", "1e8"]
    assert "--beta" in failure(["--from", path, *rest], capsys)
    moves_on = {"beta": {"value": -0.1, "interval": None}, "verdict": "no transfer"}
    path = diagnosis(tmp_path / "d.json", **moves_on)
    assert "says 'no transfer'" in failure(["--from", path, *rest], capsys)
    before = path.read_bytes()
    assert "is the file that is read" in failure(["--from", path, *rest, "--json", path], capsys)
    assert path.read_bytes() == before
    path = diagnosis(tmp_path / "d.json", transfer_penalty={"value": 0.0, "interval": None})
    assert "--transfer-prefactor" in failure(["--from", path, *rest], capsys)
    assert "has no 'sp'" in failure(["--from", path, "--param", "sp", *rest], capsys)
    (tmp_path / "x.json").write_text("[1]")
    assert "was not written by" in failure(["--from", tmp_path / "x.json", *rest], capsys)
    assert "no file" in failure(["--from", tmp_path / "none.json", *rest], capsys)


def test_several_parametrizations_have_to_be_chosen_from(tmp_path):
    path = diagnosis(tmp_path / "d.json")
    record = json.loads(path.read_text())
    record["parametrizations"]["sp"] = record["parametrizations"]["muP"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="several: muP, sp"):
        read_rates(path)
    assert read_rates(path, "sp").widths == (64, 256, 1024)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--num-hps", "1", "--flops", "1e9"], "--alpha is needed"),
        ([*BASE[:2], "--num-hps", "1", "--flops", "1e9"], "--beta is needed"),
        ([*BASE, "-5"], "flops=-5"),
        ([*BASE, "0.5"], "does not pay one run at width 1"),
        ([*BASE, "1e6", "--target-width", "5000"], "does not pay one run at width 5000"),
        ([*BASE, "1e6", "--cost-constant", "0"], "cost_constant=0"),
        ([*BASE, "1e6", "--param", "sp"], "--param chooses"),
        (["--alpha", "-1", *BASE[2:], "1e6"], "alpha=-1"),
        (["--alpha", "nan", *BASE[2:], "1e6"], "alpha=nan"),
        ([*BASE[:4], "--num-hps", "0", *BASE[6:], "1e6"], "num_hps=0"),
        ([*BASE[:4], "--num-hps", "9" * 26, *BASE[6:], "1e6"], "from 1 to 1000"),
    ],
)
def test_silly_input_is_one_line(tmp_path, capsys, arguments, named):
    out = tmp_path / "plan.json"
    text = failure([*arguments, "--json", out], capsys)
    assert named in text
    assert text.count("\n") == 1
    assert not out.exists()


def test_a_reader_may_stop_reading(tmp_path):
    """As in `mupjax plan ... | head`: no traceback, and the file is there."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    out = tmp_path / "plan.json"
    done = subprocess.run(
        [sys.executable, "-u", "-m", "mupjax", "plan", *BASE, "1e9", "--json", str(out)],
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(out.read_text())["useful"] is True
