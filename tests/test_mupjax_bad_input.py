"""Bad input gives one clear error: it names the argument and the value, before any compilation."""

import re
from pathlib import Path

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
    tables[section] = [x for x in tables[section] if not x.startswith(key)] + [line]
    path = tmp_path / "sweep.toml"
    path.write_text("".join(f"[{k}]\n" + "\n".join(v) + "\n" for k, v in tables.items()))
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as caught:
        read_sweep_file(path)
    assert fragments[1] in str(caught.value)


def test_a_device_that_is_no_device():
    refused((ValueError, TypeError), "devices", "'cpu'", devices=["cpu"])
