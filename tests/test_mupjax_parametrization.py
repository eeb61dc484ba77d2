"""The tables of exponents, against the published ones written out here, and their symmetry."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from exponent_tables import COLUMNS, FAMILIES, ROLES, changed
from mupjax import NTP, PRESETS, SP, Exponents, Parametrization, adaptive_transfer, mean_field, muP

CASES = [(p, family) for p in PRESETS.values() for family in p.rows]
CASE_IDS = [f"{p.name}-{family}" for p, family in CASES]

# Tensor Programs V (arXiv 2203.03466), Tables 3, 8 and 9, as powers of the width: the fan-in of an
# input weight and the fan-out of an output weight do not grow, and a bias has fan-in one.
# Columns: initial variance, multiplier, SGD learning rate, Adam learning rate.
TABLES = {
    3: {
        "input": (0, 0, 1, 0),
        "hidden": (-1, 0, 0, -1),
        "output": (-2, 0, -1, -1),
        "vector": (0, 0, 1, 0),
    },
    8: {
        "input": (0, 0, 1, 0),
        "hidden": (-1, 0, 0, -1),
        "output": (0, -1, 1, 0),
        "vector": (0, 0, 1, 0),
    },
    9: {
        "input": (-1, 0.5, 0, -0.5),
        "hidden": (-1, 0, 0, -1),
        "output": (-1, -0.5, 0, -0.5),
        "vector": (-1, 0.5, 0, -0.5),
    },
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("table", [3, 8, 9])
def test_mup_is_the_published_table(table, role):
    variance, multiplier, sgd, adam = TABLES[table][role]
    for family, rate in zip(FAMILIES[:2], (sgd, adam), strict=True):
        row = muP.form(table).table(family)[role]
        assert -2 * row.init_std == variance
        assert -row.multiplier == multiplier
        assert -row.learning_rate == rate


@pytest.mark.parametrize("family", FAMILIES)
def test_standard_parametrization_is_table_3_with_a_fan_in_readout_and_one_rate(family):
    initial_variance = {"input": 0, "hidden": -1, "output": -1, "vector": 0}
    for role, row in SP.table(family).items():
        assert -2 * row.init_std == initial_variance[role]
        assert row == Exponents(init_std=row.init_std)


# a, b for input, hidden, output and the common SGD rate c: Tensor Programs IV (arXiv 2011.14522),
# Table 1, with biases like input weights.
CLASSICAL = {
    "NTP": (NTP, (0, 0.5, 0.5), (0, 0, 0), 0),
    "mean-field": (mean_field, (0, 0.5, 1), (0, 0, 0), -1),
    "muP": (muP.form(9), (-0.5, 0, 0.5), (0.5, 0.5, 0.5), 0),
}


@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_rows_have_one_sgd_rate(name):
    parametrization, a, b, c = CLASSICAL[name]
    table = parametrization.table("sgd")
    assert tuple(table[role].multiplier for role in ROLES) == (*a, a[0])
    assert tuple(table[role].init_std for role in ROLES) == (*b, b[0])
    assert {row.learning_rate for row in table.values()} == {c}


# Everett et al. (arXiv 2407.05872): a, b, Adam's c at full alignment, and the size of the gradients
# at initialisation (n to this power), which Adam's epsilon must follow.
EVERETT = {
    "standard": ((0, 0, 0), (0, 0.5, 0.5), (0, 1, 1), (-0.5, -0.5, 0)),
    "NTK": ((0, 0.5, 0.5), (0, 0, 0), (0, 0.5, 0.5), (-0.5, -1, -0.5)),
    "muP": ((-0.5, 0, 0.5), (0.5, 0.5, 0.5), (0.5, 1, 0.5), (-0.5, -1, -0.5)),
    "mean field": ((0, 0.5, 1), (0, 0, 0), (0, 0.5, 0), (-1, -1.5, -1)),
}


@pytest.mark.parametrize(
    ("name", "parametrization"), [("muP", muP.form(9)), ("mean field", mean_field)]
)
def test_adam_rows_and_epsilon_against_everett_et_al(name, parametrization):
    a, b, c, gradient = EVERETT[name]
    table = parametrization.table("adam")
    assert tuple(table[role].multiplier for role in ROLES[:3]) == a
    assert tuple(table[role].init_std for role in ROLES[:3]) == b
    assert tuple(table[role].learning_rate for role in ROLES[:3]) == c
    assert tuple(-table[role].adam_eps for role in ROLES[:3]) == gradient


def test_ntp_epsilon_follows_the_gradients_of_the_ntk_row():
    table = NTP.table("adam")
    assert tuple(-table[role].adam_eps for role in ROLES[:3]) == EVERETT["NTK"][3]
    # Rates at which hidden features move as width**-1/2 and the output by order one: half a power
    # below the full-alignment rates in the input and hidden layer, those rates in the readout.
    full = EVERETT["NTK"][2]
    rates = tuple(table[role].learning_rate for role in ROLES[:3])
    assert rates == (full[0] + 0.5, full[1] + 0.5, full[2])


@pytest.mark.parametrize("pair", [("standard", "NTK"), ("muP", "mean field")])
def test_everett_et_als_equivalent_rows_are_equivalent(pair):
    rows = []
    for name in pair:
        a, b, c, gradient = EVERETT[name]
        rows.append(
            [
                Exponents(a[i], b[i], c[i], weight_decay=-c[i], adam_eps=-gradient[i])
                for i in range(3)
            ]
        )
    for first, second in zip(*rows, strict=True):
        moved = first.shifted(second.multiplier - first.multiplier, "adam")
        assert dataclasses.replace(moved, l2=second.l2) == second


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_field_is_mup_in_other_coordinates(family):
    assert mean_field.is_equivalent(muP, family)
    assert mean_field.form(8).is_equivalent(muP.form(9), family)
    assert not SP.is_equivalent(muP, family)
    assert not NTP.is_equivalent(muP, family)
    assert not NTP.is_equivalent(SP, family)


def test_adaptive_transfer_scales_all_matrices_alike():
    table = adaptive_transfer.table("adam")
    for role in ("input", "hidden", "output"):
        row = table[role]
        assert (row.learning_rate, row.init_std, row.weight_decay) == (0.8, 0.5, 0.3)
    assert table["vector"] == Exponents()


def thetas(count=8):
    rng = np.random.default_rng(0)
    drawn = [dict(zip(ROLES, rng.normal(size=4).tolist(), strict=True)) for _ in range(count)]
    return [{"hidden": 0.5}, {"output": -1.0}, {"vector": 1 / 3}, dict.fromkeys(ROLES, 0.7), *drawn]


@pytest.mark.parametrize(("parametrization", "family"), CASES, ids=CASE_IDS)
def test_shifted_coordinates_are_equivalent(parametrization, family):
    for theta in thetas():
        moved = parametrization.shifted(theta)
        assert moved.is_equivalent(parametrization, family)
        assert parametrization.is_equivalent(moved, family)
        back = moved.shifted({role: -shift for role, shift in theta.items()})
        for role in ROLES:
            assert dataclasses.astuple(back.table(family)[role]) == pytest.approx(
                dataclasses.astuple(parametrization.table(family)[role]), abs=1e-12
            )


@pytest.mark.parametrize(("parametrization", "family"), CASES, ids=CASE_IDS)
def test_one_changed_exponent_ends_the_equivalence(parametrization, family):
    for role in ROLES:
        for column in COLUMNS:
            other = changed(parametrization, family, role, column)
            assert not other.is_equivalent(parametrization, family), (role, column)
    steeper = dataclasses.replace(parametrization, attention=parametrization.attention + 0.5)
    assert not steeper.is_equivalent(parametrization, family)


@pytest.mark.parametrize(("family", "k"), [("sgd", 2), ("adam", 1), ("spectral", 1)])
def test_what_a_shift_does_to_each_exponent(family, k):
    row = Exponents(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    theta = 0.25
    moved = row.shifted(theta, family)
    assert moved.multiplier == pytest.approx(row.multiplier + theta)
    assert moved.init_std == pytest.approx(row.init_std - theta)
    assert moved.learning_rate == pytest.approx(row.learning_rate - k * theta)
    # Gradients shrink by m**-theta and weights grow by m**theta, so L2's ratio moves by 2 theta.
    assert moved.l2 == pytest.approx(row.l2 + 2 * theta)
    assert moved.adam_eps == pytest.approx(row.adam_eps + (0 if family == "sgd" else theta))
    assert moved.independent_weight_decay == row.independent_weight_decay
    # lr * wd, the shrink per step of coupled decay, is the same.
    assert moved.learning_rate + moved.weight_decay == pytest.approx(
        row.learning_rate + row.weight_decay
    )


@pytest.mark.parametrize(("parametrization", "family"), CASES, ids=CASE_IDS)
def test_folding_removes_multipliers_and_is_idempotent(parametrization, family):
    folded = parametrization.folded()
    assert all(row.multiplier == 0 for row in folded.table(family).values())
    assert folded.folded() == folded
    assert folded.is_equivalent(parametrization, family)
    assert folded.form(3) == folded
    for theta in thetas(3):
        again = parametrization.shifted(theta).folded().table(family)
        for role in ROLES:
            assert dataclasses.astuple(again[role]) == pytest.approx(
                dataclasses.astuple(folded.table(family)[role]), abs=1e-12
            )


@pytest.mark.parametrize(("parametrization", "family"), CASES, ids=CASE_IDS)
@pytest.mark.parametrize("table", [3, 8, 9])
def test_every_form_of_every_preset_is_the_same_training(parametrization, family, table):
    form = parametrization.form(table)
    assert form.is_equivalent(parametrization, family)
    rows = form.table(family)
    if table == 3:
        assert {row.multiplier for row in rows.values()} == {0}
    if table == 8:
        assert rows["output"].init_std == 0
    if table == 9:
        assert {row.init_std for row in rows.values()} == {0.5}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parametrization", [SP, NTP, mean_field, muP], ids=lambda p: p.name)
def test_coupled_decay_shrinks_alike_at_every_width(parametrization, family):
    for row in parametrization.table(family).values():
        assert row.learning_rate + row.weight_decay == 0
        assert row.independent_weight_decay == 0


@pytest.mark.parametrize("table", [8, 9])
def test_forms_follow_each_familys_own_initial_std(table):
    rows: Any = {"sgd": SP.table("sgd"), "adam": muP.table("adam")}
    mixed = Parametrization("mixed", rows).form(table)
    assert mixed.table("sgd") == SP.form(table).table("sgd")
    assert mixed.table("adam") == muP.form(table).table("adam")


# --- Attention ----------------------------------------------------------------------------------


def test_attention_logits_are_divided_by_the_head_size_under_mup():
    base = 16
    for head in (8, 16, 32, 256):
        assert muP.attention_scale(head, base) == pytest.approx(math.sqrt(base) / head)
        assert mean_field.attention_scale(head, base) == muP.attention_scale(head, base)
        for parametrization in (SP, NTP, adaptive_transfer):
            scale = parametrization.attention_scale(head, base)
            assert scale == pytest.approx(1 / math.sqrt(head))
    scales = {p.attention_scale(base, base) for p in PRESETS.values()}
    assert scales == {0.25}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_query_projection_carries_what_the_model_does_not_apply(family):
    # The model divides by sqrt(head_dim) itself; muP divides by head_dim.
    hidden, vector = muP.table(family)["hidden"], muP.table(family)["vector"]
    assert muP.row("query", family) == dataclasses.replace(hidden, multiplier=0.5)
    assert muP.row("query_vector", family) == dataclasses.replace(vector, multiplier=0.5)
    assert SP.row("query", family) == SP.table(family)["hidden"]
    assert SP.row("query_vector", family) == SP.table(family)["vector"]


@pytest.mark.parametrize("parametrization", PRESETS.values(), ids=lambda p: p.name)
def test_a_fixed_parameter_never_scales(parametrization):
    for family in parametrization.rows:
        assert parametrization.row("fixed", family) == Exponents()
        for role in ROLES:
            assert parametrization.row(role, family) == parametrization.table(family)[role]


# --- One matrix as embedding and readout --------------------------------------------------------

# Input and output agree in initial scale and rate up to a multiplier on the readout.
TIES: dict[Any, dict[str, float]] = {
    "sgd": {"muP": 1.0, "mean-field": 1.0, "NTP": 0.5},
    "adam": {"muP": 1.0, "mean-field": 1.0, "NTP": 0.5, "Adaptive Transfer": 0.0},
}


@pytest.mark.parametrize(("family", "name"), [(f, name) for f in TIES for name in TIES[f]])
def test_these_presets_allow_a_tied_matrix(family, name):
    parametrization = PRESETS[name]
    row, exponent = parametrization.tied_row(family)
    assert exponent == TIES[family][name]
    assert parametrization.row("tied", family) == row
    entry = parametrization.table(family)["input"].folded(family)
    readout = parametrization.table(family)["output"].folded(family)
    as_readout = dataclasses.replace(row, multiplier=row.multiplier + exponent).folded(family)
    assert row.folded(family) == entry
    for column in ("init_std", "learning_rate", "weight_decay"):
        assert getattr(as_readout, column) == pytest.approx(getattr(readout, column))


def test_a_tied_matrix_is_refused_where_its_two_ends_differ():
    for family, able in TIES.items():
        with pytest.raises(ValueError, match="one tied matrix cannot serve both") as refusal:
            SP.tied_row(family)
        text = str(refusal.value)
        assert "'SP'" in text
        assert "untie" in text
        assert family in text
        named = text.split("use one of ")[1].rstrip(".").split(", ")
        assert set(named) == set(able)


def test_a_tied_matrix_needs_only_the_decay_of_its_own_mode():
    assert NTP.tied_row("adam", "coupled")[1] == 0.5
    with pytest.raises(ValueError, match=r"weight decay \(adam, l2\)") as refusal:
        NTP.tied_row("adam", "l2")
    assert str(refusal.value).endswith("or use one of mean-field, muP, Adaptive Transfer.")


def test_every_form_allows_a_tied_matrix_if_one_does():
    for table in (3, 8, 9):
        for family in ("sgd", "adam"):
            row, exponent = muP.form(table).tied_row(family)
            assert exponent == 1.0
            assert row.folded(family) == muP.table(family)["input"]
