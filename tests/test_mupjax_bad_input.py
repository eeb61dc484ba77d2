"""Bad input gives one clear error: it names the argument and the value, before any compilation."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import mupjax
from mupjax.config_file import read_sweep_file
from refusals import (
    B,
    D,
    accepted,
    no_program_is_compiled,  # noqa: F401
    refused,
    setting,
    two_layers,
)


def test_the_input_that_the_bad_ones_are_made_from_is_good():
    accepted()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("steps", bad) for bad in (0, -1, 2.5, "10", None, True)],
        *[("evaluations", bad) for bad in (0, -1, 1.5, None)],
        *[("seeds", bad) for bad in (0, -1, 1.5, "2", None)],
        *[("divergence_threshold", bad) for bad in (1.0, 0, -5, float("nan"), "ten", None)],
        *[("application", bad) for bad in ("fold", None)],
        *[("weight_decay_mode", bad) for bad in ("decoupled", None)],
        *[("strategy", bad) for bad in ("bucket", None)],
        *[("chunk_size", bad) for bad in (0, -1, 2.5, "big", None, True)],
        ("existing", "overwrite"),
        ("devices", []),
    ],
)
def test_a_bad_value_is_named_with_its_argument(argument, value, tmp_path):
    out = {"out": tmp_path / "run.nc"} if argument == "existing" else {}
    refused((ValueError, TypeError), argument, str(value), **{argument: value}, **out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seeds", "value"),
    [([], "[]"), ([1, 1], "[1, 1]"), ([2**31], str(2**31)), ([0, -1], "-1"), ([0.5], "0.5")],
)
def test_seeds_that_are_none_or_not_distinct(seeds, value):
    refused(ValueError, "seeds", value, seeds=seeds)


def test_padding_a_model_that_takes_no_width():
    refused(ValueError, "strategy='padded'", "`width`", "'bucketed'", strategy="padded")


def recorder(name, variable="total"):
    return mupjax.Observer(
        name, lambda p, m, s: jnp.zeros(()), lambda s, o: s, lambda s: {variable: s}
    )


def padded_model(width):
    return mupjax.Model(
        two_layers(width).init,
        lambda params, x, width=None: two_layers(4).apply(params, x),
        options=frozenset({"width"}),
    )


def test_padding_with_observers():
    refused(
        ValueError,
        "observers",
        "'bucketed'",
        model=padded_model,
        strategy="padded",
        observers=[recorder("sum")],
    )


def test_two_observers_of_one_name():
    refused(ValueError, "observers", "'sum'", observers=[recorder("sum"), recorder("sum")])


def test_an_observer_that_would_overwrite_a_result():
    refused(ValueError, "train_loss", observers=[recorder("train", "loss")])


@pytest.mark.parametrize(
    ("parametrization", "error", "fragments"),
    [
        ("mup", ValueError, ["'mup'", "muP", "SP"]),
        (["SP", "nope"], ValueError, ["'nope'"]),
        ([], ValueError, ["empty"]),
        (["SP", "SP"], ValueError, ["distinct names", "['SP', 'SP']"]),
        ([mupjax.muP, "muP"], ValueError, ["distinct names"]),
        ([mupjax.muP, 3], TypeError, ["3"]),
        (3, TypeError, ["3"]),
        (None, TypeError, ["None"]),
    ],
)
def test_bad_parametrizations(parametrization, error, fragments):
    refused(error, "parametrization", *fragments, parametrization=parametrization)


@pytest.mark.parametrize("name", ["run", "run.csv", "run.nc.gz", "run.ZARR"])
def test_an_output_path_of_unknown_format(tmp_path, name):
    refused(ValueError, name, ".zarr or .nc", out=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that takes no files")
def test_an_output_path_where_nothing_can_be_written():
    refused(OSError, "/proc/deep/run.nc", "cannot be written", out="/proc/deep/run.nc")


def test_an_output_path_that_is_no_path():
    refused(TypeError, "out", "3", out=3)


def test_error_texts_are_sentences_without_tracebacks_of_jax():
    bad = setting(sample=lambda data, key, step: (jnp.ones((B, D + 1)), jnp.zeros((B, 2))))
    text = refused(ValueError, "disagree", setting=bad)
    assert "\n" not in text
    assert not re.search(r"0x[0-9a-f]{6}|Traced<", text)
    assert len(text) < 400


def test_bad_input_is_found_before_an_earlier_result_is_touched(tmp_path):
    path = tmp_path / "run.nc.parts"
    path.mkdir()
    (path / "width-0000004.nc").write_text("the part of an interrupted sweep")
    refused(
        ValueError,
        "chunk_size",
        out=tmp_path / "run.nc",
        existing="replace",
        chunk_size=0,
    )
    refused(ValueError, "strategy", out=tmp_path / "run.nc", existing="replace", strategy="pad")
    assert (path / "width-0000004.nc").exists()


@pytest.mark.parametrize(
    ("section", "line", "fragments"),
    [
        ("sweep", 'parametrizations = "muP"', ["parametrizations must be a list", "'muP'"]),
        ("sweep", 'steps = "3"', ["steps must be whole", "'3'"]),
        ("model", 'depth = "2"', ["[model]: depth must be whole", "'2'"]),
        ("model", "norm = 1", ["[model]: norm must be true or false", "1"]),
        ("setting", "batch_size = 2.5", ["[setting]: batch_size must be whole", "2.5"]),
        ("setting", 'validation_examples = "all"', ["validation_examples must be whole", "'all'"]),
        ("schedule", 'warmup = "short"', ["[schedule]: warmup must be a number", "'short'"]),
        ("hyperparameters", 'b1 = {from = "a", to = 1}', ["'b1': from must be a number", "'a'"]),
        (
            "hyperparameters",
            "b1 = {from = 0.1, to = 0.9, per_octave = true}",
            ["'b1': per_octave must be a number", "True"],
        ),
        ("sweep", 'parametrizations = [["muP"]]', ["parametrizations must be a list", "['muP']"]),
        ("optimizer", 'name = ["adam"]', ["[optimizer]: name must be one of", "['adam']"]),
        ("depth", 'name = ["a"]\nlayers = 2\nbase_layers = 2', ["[depth]: name must", "['a']"]),
        ("parametrization", 'name = "x"', ["[[parametrization]]", "'x'"]),
        ("[parametrization]", "rows = 3", ["parametrization's rows must be a table", "3"]),
        ("[parametrization]", "rows = {adam = [1]}", ["rows of 'adam' must be a table", "[1]"]),
    ],
)
def test_a_value_of_the_wrong_kind_in_a_file(tmp_path, section, line, fragments):
    tables = {
        "model": ['name = "mlp"'],
        "setting": ['name = "digits"'],
        "schedule": ['name = "wsd"'],
        "sweep": ["widths = [8]", "steps = 3"],
        "hyperparameters": ["learning_rate = 0.1"],
    }
    key = line.split()[0]
    tables[section] = [x for x in tables.get(section, []) if not x.startswith(key)] + [line]
    path = tmp_path / "sweep.toml"
    path.write_text("".join(f"[{k}]\n" + "\n".join(v) + "\n" for k, v in tables.items()))
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as caught:
        read_sweep_file(path)
    assert fragments[1] in str(caught.value)


def test_a_grid_of_a_file_holds_both_its_ends(tmp_path):
    path = tmp_path / "sweep.toml"
    grid = "learning_rate = {from = 0.001, to = 0.01, per_octave = 0.1}"
    path.write_text(f"[sweep]\nwidths = [8]\nsteps = 3\n[hyperparameters]\n{grid}\n")
    found = read_sweep_file(path).arguments["hyperparameters"]["learning_rate"]
    assert found == pytest.approx([0.001, 0.01])


def test_a_factory_of_a_file_may_import_its_neighbours_when_it_is_called(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "sizes_beside_it.py").write_text("FACTOR = 2\n")
    (tmp_path / "factory_of_a_test.py").write_text(
        "def build(width):\n    import sizes_beside_it\n    return width * sizes_beside_it.FACTOR\n"
    )
    path = tmp_path / "sweep.toml"
    path.write_text(
        '[model]\nfactory = "factory_of_a_test:build"\n[sweep]\nwidths = [8]\nsteps = 3\n'
        "[hyperparameters]\nlearning_rate = 0.1\n"
    )
    assert read_sweep_file(path).model(3) == 6


@pytest.mark.parametrize("given", [["cpu"], 2, jax.devices()[0], [jax.devices()[0]] * 2])
def test_devices_that_are_no_different_devices(given):
    refused(ValueError, "devices must be", repr(given), devices=given)


@pytest.mark.parametrize("given", [None, 3])
def test_observers_that_are_no_list(given):
    refused(TypeError, "observers must be", str(given), observers=given)


@pytest.mark.parametrize("given", ["no", 1, None])
def test_common_random_numbers_is_yes_or_no(given):
    refused(ValueError, "common_random_numbers", repr(given), common_random_numbers=given)


@pytest.mark.parametrize(
    "schedule", [lambda t: 1.0 if t < 2 else 0.5, lambda t: jnp.ones(3), lambda t: "a"]
)
def test_a_schedule_that_gives_no_number_of_a_traced_step(schedule):
    refused(ValueError, "schedule must take the step", schedule=schedule)


@pytest.mark.parametrize(
    ("values", "fragment"),
    [([[0.1], [0.1, 0.2]], "[0.1]"), ([0.1, 0.1 + 1e-12], "duplicates"), ([[0.1]], "[0.1]")],
)
def test_values_of_a_hyperparameter_that_make_no_grid(values, fragment):
    refused(ValueError, "'learning_rate'", fragment, hyperparameters={"learning_rate": values})


def test_values_in_half_precision():
    accepted(hyperparameters={"learning_rate": jnp.array([0.1, 0.2], jnp.bfloat16)})
