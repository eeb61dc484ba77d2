"""The tables of docs/models.md against the engine."""

import fnmatch
import re
from fractions import Fraction
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import optax
import pytest

from mupjax import PRESETS, Setting, resolve_sweep
from mupjax.models import CNN, MLP, gpt2, llama
from mupjax.parametrization import Family

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "models.md").read_text(encoding="utf-8")


def table(first):
    """Rows of the table whose header begins with a cell, as lists of cells."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", PAGE, flags=re.MULTILINE)
    (block,) = [block for block in blocks if block.startswith(f"| {first} |")]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
    ]
    return head, rows


def setting(inputs):
    return Setting(
        "page", lambda data, key, step: inputs, lambda predict, x: jnp.mean(predict(x)), inputs
    )


TOKENS = setting(jnp.zeros((2, 4), jnp.int32))
MODELS = {
    "MLP": (
        lambda width, rngs: MLP(3, width, 2, depth=3, norm=True, rngs=rngs),
        setting(jnp.ones((2, 3))),
        {},
    ),
    "CNN": (lambda width, rngs: CNN(1, width, 2, rngs=rngs), setting(jnp.ones((2, 4, 4, 1))), {}),
    "Decoder": (
        lambda width, rngs: llama(5, width, layers=2, heads=2, kv_heads=1, rngs=rngs),
        TOKENS,
        {"attention": "1/sqrt(head_dim)"},
    ),
    "Decoder with biases": (
        lambda width, rngs: gpt2(
            5, width, context=4, layers=2, head_size=4, use_bias=True, norm="layer", rngs=rngs
        ),
        TOKENS,
        {},
    ),
}


def resolved(model):
    factory, data, own = MODELS[model]
    return resolve_sweep(
        factory,
        data,
        lambda learning_rate: optax.adam(learning_rate),
        "muP",
        widths=[8, 16],
        base_width=8,
        hyperparameters={"learning_rate": 0.1},
        init_exponents={"*": 0.5},  # not measured: roles do not depend on it
        **own,
    )


@pytest.mark.parametrize("model", MODELS)
def test_roles_are_those_of_the_page(model):
    _, rows = table("model | parameters")
    stated = [
        (pattern, role)
        for name, patterns, role, _ in rows
        if name == model.split()[0]
        for pattern in re.findall(r"`([^`]+)`", patterns)
    ]
    roles = resolved(model).roles
    for path, role in roles.items():
        found = [role for pattern, role in stated if fnmatch.fnmatchcase(path, pattern)]
        assert len(found) == 1, path
        # A query whose head size grows carries what the model's own scale lacks.
        carries = model == "Decoder" and path.endswith("query/kernel")
        assert role == ("query" if carries else found[0]), path
    if " " not in model:
        reached = [p for p, _ in stated if any(fnmatch.fnmatchcase(path, p) for path in roles)]
        missing = {p for p, _ in stated} - set(reached)
        only_gpt2 = ("position/embedding", "bias")
        assert all(p.endswith(only_gpt2) for p in missing), missing


COLUMNS: dict[str, tuple[Family, str]] = {
    "initial std": ("sgd", "init_std"),
    "rate, SGD": ("sgd", "learning_rate"),
    "rate, Adam": ("adam", "learning_rate"),
    "rate, Muon": ("spectral", "learning_rate"),
    "ε": ("adam", "adam_eps"),
    "L2, Adam": ("adam", "l2"),
}


def test_powers_are_those_of_the_page():
    head, rows = table("role")
    assert head[2:] == list(COLUMNS)
    assert [row[:2] for row in rows] == [
        [role, name]
        for name in ("SP", "NTP", "muP")
        for role in ("input", "hidden", "output", "vector")
    ]
    for role, name, *cells in rows:
        folded = PRESETS[name].folded()
        for column, cell in zip(head[2:], cells, strict=True):
            family, field = COLUMNS[column]
            got = getattr(folded.table(family)[role], field)
            assert float(Fraction(cell)) == -got, (role, name, column)
        for family in get_args(Family):
            row = folded.table(family)[role]
            assert row.weight_decay == -row.learning_rate
            assert row.independent_weight_decay == 0
            assert family != "sgd" or row.l2 == -row.learning_rate


def test_ties_are_those_of_the_page():
    for name, power in (("muP", 1), ("mean-field", 1), ("NTP", 0.5)):
        for family in ("sgd", "adam", "spectral"):
            assert PRESETS[name].tied_row(family)[1] == power
    for family in ("sgd", "adam", "spectral"):
        with pytest.raises(ValueError, match="so one tied matrix cannot serve both"):
            PRESETS["SP"].tied_row(family)
