"""Parametrizations as values: they cannot be changed, and are told apart, stored and checked."""

import copy
import dataclasses
import json
import math
import pickle
from typing import Any

import pytest

from exponent_tables import COLUMNS, ROLES, changed
from mupjax import PRESETS, Exponents, Parametrization, adaptive_transfer, muP


def test_a_parametrization_cannot_be_changed():
    frozen: Any = muP
    presets: Any = PRESETS
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.name = "mine"
    with pytest.raises(TypeError):
        frozen.rows["sgd"] = {}
    with pytest.raises(TypeError):
        frozen.rows["sgd"]["input"] = Exponents()
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.rows["sgd"]["input"].init_std = 2.0
    with pytest.raises(TypeError):
        presets["mine"] = muP


def test_a_parametrization_does_not_follow_the_dictionary_it_was_made_from():
    table = {role: Exponents() for role in ROLES}
    rows: Any = {"adam": table}
    made = Parametrization("mine", rows)
    before = made.fingerprint()
    table["input"] = Exponents(1.0)
    rows["sgd"] = table
    assert made.fingerprint() == before
    assert list(made.rows) == ["adam"]


def test_the_fingerprint_knows_every_exponent():
    for parametrization in PRESETS.values():
        seen = {parametrization.fingerprint()}
        count = 1
        for family in parametrization.rows:
            for role in ROLES:
                for column in COLUMNS:
                    other = changed(parametrization, family, role, column)
                    assert hash(other) != hash(parametrization)
                    seen.add(other.fingerprint())
                    count += 1
        seen.add(dataclasses.replace(parametrization, attention=0.75).fingerprint())
        assert len(seen) == count + 1


def test_the_fingerprint_does_not_know_the_name_nor_the_order_of_families():
    renamed = dataclasses.replace(muP, name="mine")
    assert renamed.fingerprint() == muP.fingerprint()
    assert renamed != muP
    backwards = {family: muP.rows[family] for family in reversed(list(muP.rows))}
    reordered = dataclasses.replace(muP, rows=backwards)
    assert reordered == muP
    assert reordered.fingerprint() == muP.fingerprint()
    assert len(muP.fingerprint()) == 16
    int(muP.fingerprint(), 16)


def test_whole_and_floating_exponents_have_one_fingerprint():
    rows: Any = {"adam": {role: Exponents(learning_rate=1) for role in ROLES}}
    floats: Any = {"adam": {role: Exponents(learning_rate=1.0) for role in ROLES}}
    assert Parametrization("p", rows).fingerprint() == Parametrization("p", floats).fingerprint()


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ({"attention": 1}, {"attention": 1.0}),
        ({"init_std": -0.0}, {"init_std": 0.0}),
    ],
    ids=["whole-number", "negative-zero"],
)
def test_equal_parametrizations_have_equal_hashes(one, same):
    def make(attention=0.5, **row):
        rows: Any = {"adam": {role: Exponents(**row) for role in ROLES}}
        return Parametrization("p", rows, attention=attention)

    assert make(**one) == make(**same)
    assert hash(make(**one)) == hash(make(**same))
    assert make(**one).fingerprint() == make(**same).fingerprint()


@pytest.mark.parametrize("parametrization", PRESETS.values(), ids=lambda p: p.name)
def test_the_record_survives_json(parametrization):
    record = json.loads(json.dumps(parametrization.to_dict()))
    back = Parametrization.from_dict(record)
    assert back == parametrization
    assert hash(back) == hash(parametrization)
    assert back.fingerprint() == parametrization.fingerprint()
    assert str(back) == str(parametrization)


def test_a_record_may_leave_out_zeros_and_the_attention_scale():
    rows = {role: {} for role in ROLES} | {"hidden": {"learning_rate": 1}}
    read = Parametrization.from_dict({"rows": {"adam": rows}})
    assert read.name == "custom"
    assert read.attention == 0.5
    assert read.table("adam")["hidden"] == Exponents(learning_rate=1)
    assert read.table("adam")["input"] == Exponents()


def test_a_parametrization_can_be_copied():
    for twin in (copy.deepcopy(muP), pickle.loads(pickle.dumps(muP))):
        assert twin == muP
        assert hash(twin) == hash(muP)


@pytest.mark.parametrize("parametrization", PRESETS.values(), ids=lambda p: p.name)
def test_printing_shows_an_aligned_table_of_powers(parametrization):
    title, head, *body = str(parametrization).split("\n")
    assert parametrization.name in title
    assert "m = width / base_width" in title
    assert f"head_dim^{parametrization.attention:g}" in title
    assert head.split() == ["family", "role", *COLUMNS]
    assert {len(line) for line in body} == {len(head)}
    cells = [line.split() for line in body]
    assert [(family, role) for family, role, *_ in cells] == [
        (family, role) for family in parametrization.rows for role in ROLES
    ]
    for family, role, *numbers in cells:
        row = parametrization.table(family)[role]
        shown = [float(number) for number in numbers]
        assert shown == pytest.approx([-x for x in dataclasses.astuple(row)])
        assert "-0" not in numbers


# --- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, 1j])
def test_an_exponent_must_be_a_finite_number(value):
    with pytest.raises(ValueError, match=r"Exponents.learning_rate must be a finite number"):
        Exponents(learning_rate=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None])
def test_the_attention_exponent_must_be_a_finite_number(value):
    with pytest.raises(ValueError, match="attention"):
        Parametrization("p", muP.rows, attention=value)


def test_rows_are_checked():
    full = {role: Exponents() for role in ROLES}
    unknown: Any = {"adamw": full}
    with pytest.raises(ValueError, match="'p' has no rows"):
        Parametrization("p", {})
    with pytest.raises(ValueError, match="unknown optimizer family 'adamw'; choose from sgd, adam"):
        Parametrization("p", unknown)
    missing = {role: Exponents() for role in ROLES[:3]}
    with pytest.raises(ValueError, match="rows are needed for input, hidden, output, vector, got"):
        Parametrization("p", {"adam": missing})
    with pytest.raises(ValueError, match="rows are needed for"):
        Parametrization("p", {"adam": {**full, "query": Exponents()}})


def test_a_family_without_rows_is_an_error_that_names_those_with():
    with pytest.raises(ValueError, match="no exponents for sgd-like optimizers, only for adam"):
        adaptive_transfer.table("sgd")
    with pytest.raises(ValueError, match="no exponents for sgd-like optimizers"):
        adaptive_transfer.row("tied", "sgd")


def test_there_are_three_tables():
    wrong: Any = 5
    with pytest.raises(ValueError, match="table must be 3, 8 or 9"):
        muP.form(wrong)


def test_theta_names_table_roles_only():
    theta: Any = {"readout": 0.5}
    with pytest.raises(ValueError, match=r"theta names unknown roles \['readout'\]"):
        muP.shifted(theta)


@pytest.mark.parametrize(("head", "base", "name"), [(0, 4, "head_dim"), (4, -1, "base_head_dim")])
def test_head_sizes_are_positive(head, base, name):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        muP.attention_scale(head, base)


def test_records_are_checked():
    record = muP.to_dict()
    with pytest.raises(ValueError, match="has the keys name, attention and rows"):
        Parametrization.from_dict({**record, "atention": 1.0})
    with pytest.raises(ValueError, match="has the keys name, attention and rows"):
        Parametrization.from_dict({"name": "p"})
    record["rows"]["adam"]["input"]["lr"] = 1.0
    with pytest.raises(ValueError, match=r"role 'input': unknown exponents \['lr'\]"):
        Parametrization.from_dict(record)
