"""Bad input gives one clear error: it names the argument and the value, before any compilation."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import mupjax
import mupjax.execute
from mupjax.config_file import read_sweep_file

D, B = 3, 4


class CompilationError(BaseException):
    """No subclass of Exception: nothing may catch it and call it something else."""


@pytest.fixture(autouse=True)
def no_program_is_compiled(monkeypatch):
    def fail(*args, **kwargs):
        raise CompilationError

    monkeypatch.setattr(mupjax.execute, "build_program", fail)


def setting(loss=None, validation=None, sample=None, **more):
    batch = (jnp.ones((B, D)), jnp.zeros((B, 2)))

    def mean_square(predict, batch):
        return jnp.mean((predict(batch[0]) - batch[1]) ** 2)

    return mupjax.Setting(
        "toy",
        sample or (lambda data, key, step: batch),
        loss or mean_square,
        batch if validation is None else validation,
        **more,
    )


def two_layers(width):
    def init(key):
        return {
            "enter": {"kernel": jnp.ones((D, width))},
            "readout": {"kernel": jnp.ones((width, 2))},
        }

    def apply(params, x):
        return jnp.tanh(x @ params["enter"]["kernel"]) @ params["readout"]["kernel"]

    return mupjax.Model(init, apply)


def sgd(learning_rate):
    return optax.sgd(learning_rate)


def adam(learning_rate, b1=0.9, eps=1e-8):
    return optax.adam(learning_rate, b1=b1, eps=eps)


def adamw(learning_rate):
    return optax.adamw(learning_rate)


GOOD = {
    "model": two_layers,
    "setting": setting(),
    "optimizer": adam,
    "parametrization": "muP",
    "widths": [4, 8],
    "hyperparameters": {"learning_rate": [0.1, 0.2]},
    "steps": 3,
    "base_width": 4,
    # Not measured, to save time: true of `two_layers`.
    "init_exponents": {"*": 0.0},
}


def run(**changes):
    arguments = {k: v for k, v in (GOOD | changes).items() if v is not ...}
    first = ("model", "setting", "optimizer", "parametrization")
    return mupjax.sweep(*[arguments.pop(name) for name in first], **arguments)


def refused(error, *fragments, **changes):
    """The sweep raises `error`, whose text has every fragment; returns the text."""
    with pytest.raises(error) as caught:
        run(**changes)
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    return str(caught.value)


def accepted(**changes):
    """The sweep finds nothing wrong and would compile."""
    with pytest.raises(CompilationError):
        run(**changes)


def test_the_input_that_the_bad_ones_are_made_from_is_good():
    accepted()


# Hyperparameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ([], ["empty grid"]),
        ([0.0, 0.1], ["positive", "0.0"]),
        ([-0.1, 0.1], ["positive", "-0.1"]),
        (-0.1, ["positive", "-0.1"]),
        ([0.1, float("nan")], ["finite", "nan"]),
        ([0.1, float("inf")], ["finite", "inf"]),
        (np.nan, ["finite", "nan"]),
        ([0.2, 0.1], ["increase", "[0.2, 0.1]"]),
        ([0.1, 0.1], ["duplicates", "[0.1, 0.1]"]),
        (["0.1"], ["number", "'0.1'"]),
        ("0.1", ["number", "'0.1'"]),
        ([True], ["number", "True"]),
        ([[0.1, 0.2]], ["number", "[0.1, 0.2]"]),
        (None, ["number", "None"]),
        (0.1 + 0.1j, ["number", "0.1j"]),
        ({0.1, 0.2}, ["number"]),
        (optax.constant_schedule(0.1), ["number"]),
        ([1e-60, 0.1], ["1e-60"]),  # zero in single precision
        ([0.1, 1e60], ["1e+60"]),  # infinite in single precision
    ],
)
def test_bad_learning_rates(values, fragments):
    refused(ValueError, "'learning_rate'", *fragments, hyperparameters={"learning_rate": values})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("b1", 1.0),
        ("b1", -0.1),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("init_scale", 0.0),
        ("output_multiplier", -1.0),
        ("input_learning_rate_multiplier", 0.0),
    ],
)
def test_other_hyperparameters_out_of_range(name, value):
    refused(
        ValueError, f"'{name}'", str(value), hyperparameters={"learning_rate": 0.1, name: value}
    )


def test_an_unknown_hyperparameter_is_named_with_the_known_ones():
    refused(
        ValueError,
        "unknown hyperparameter 'beta1'",
        "b1, eps, learning_rate",
        "weight_decay",
        hyperparameters={"learning_rate": 0.1, "beta1": 0.9},
    )


def test_a_misspelt_factory_parameter_shows_up_as_an_unknown_hyperparameter():
    refused(
        ValueError,
        "'learning_rate'",
        "lerning_rate",
        optimizer=lambda lerning_rate: optax.sgd(lerning_rate),
    )


def test_a_missing_hyperparameter_is_named():
    refused(ValueError, "needs learning_rate", hyperparameters={"b1": 0.9})
    refused(ValueError, "needs learning_rate", hyperparameters={})


def test_hyperparameters_that_are_no_mapping():
    refused(TypeError, "hyperparameters", hyperparameters=[0.1, 0.2])


def test_a_hyperparameter_that_would_act_twice():
    def clipped(learning_rate, max_gradient_norm):
        clip = optax.clip_by_global_norm(max_gradient_norm)
        return optax.chain(clip, optax.sgd(learning_rate))

    refused(
        ValueError,
        "'max_gradient_norm' would act twice",
        "rename",
        optimizer=clipped,
        hyperparameters={"learning_rate": 0.1, "max_gradient_norm": [1.0, 2.0]},
    )


def test_a_hyperparameter_with_the_name_of_a_dimension():
    refused(
        ValueError,
        "'seed'",
        optimizer=lambda learning_rate, seed: optax.sgd(learning_rate),
        hyperparameters={"learning_rate": 0.1, "seed": 1.0},
    )


@pytest.mark.parametrize("name", ["loss", "status"])
def test_a_hyperparameter_with_the_name_of_a_result(name):
    def factory(learning_rate, loss=1.0, status=1.0):
        return optax.sgd(learning_rate * loss * status)

    refused(
        ValueError,
        f"'{name}'",
        optimizer=factory,
        hyperparameters={"learning_rate": 0.1, name: [1.0, 2.0]},
    )


@pytest.mark.parametrize("role", ["hidden", "vector"])
def test_a_multiplier_for_a_role_that_does_not_exist(role):
    name = f"{role}_learning_rate_multiplier"
    refused(
        ValueError, f"'{name}'", repr(role), hyperparameters={"learning_rate": 0.1, name: [1, 2]}
    )


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("module", [np, jnp])
def test_arrays_of_either_library_are_taken(module, size):
    values = module.logspace(-2, -1, 3)
    accepted(hyperparameters={"learning_rate": values if size else values[0]})


def test_other_kinds_of_numbers_are_taken():
    for values in ((np.float32(0.1), 1), range(1, 3), np.asarray(0.1), 1):
        accepted(hyperparameters={"learning_rate": values})
    accepted(widths=np.array([4, 8]), steps=np.int64(3), seeds=np.arange(3), base_width=np.int32(4))
    accepted(widths=range(4, 6), seeds=(5, 3), evaluations=np.int64(2), chunk_size=np.int64(2))


# Widths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widths", "fragments"),
    [
        ([], ["empty"]),
        ([4, 4, 8], ["duplicates", "[4, 4, 8]"]),
        ([8, 4], ["increase", "[8, 4]"]),
        ([4, 8.5], ["whole", "8.5"]),
        ([0, 4], ["at least 1", "0"]),
        ([-4, 4], ["at least 1", "-4"]),
        (["4"], ["whole", "'4'"]),
        ("48", ["whole", "'48'"]),
        ([True], ["whole", "True"]),
        (None, ["None"]),
    ],
)
def test_bad_widths(widths, fragments):
    refused(ValueError, "widths", *fragments, widths=widths)


@pytest.mark.parametrize("bad", [0, -4, 2.5, "4", True])
def test_bad_base_width(bad):
    refused(ValueError, "base_width", repr(bad), base_width=bad)


def attention(width, rngs):
    return nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)


def test_a_width_that_the_heads_do_not_divide():
    refused(
        ValueError,
        "refuses width 6",
        "4",
        model=lambda width, rngs: attention(width, rngs),
        widths=[4, 6],
    )


def test_a_base_width_that_the_model_refuses():
    refused(ValueError, "refuses width 6", model=attention, base_width=6)


def even_only(width):
    if width % 2:
        raise ValueError("width must be even")
    return two_layers(width)


def test_why_the_model_refuses_a_width_is_passed_on():
    refused(ValueError, "refuses width 5", "must be even", model=even_only, widths=[4, 5])
    refused(ValueError, "refuses width 3", "must be even", model=even_only, base_width=3)


def test_the_base_width_is_asked_for_where_it_matters():
    refused(ValueError, "base_width must be given", "muP", base_width=...)
    # A model that starts as the standard parametrization says: every factor is 1 at every width.
    standard = {"init_exponents": {"enter/*": 0.0, "readout/*": 0.5}, "base_width": ...}
    accepted(parametrization="SP", **standard)
    refused(
        ValueError, "base_width must be given", "muP", parametrization=["SP", "muP"], **standard
    )


# Model and setting -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "fragments"),
    [
        (3, ["model factory", "3"]),
        (lambda width: "net", ["str", "width 4"]),
        (lambda width: nnx.Linear(D, width, rngs=nnx.Rngs(0)), ["rngs"]),
    ],
)
def test_what_is_no_model_factory(model, fragments):
    refused(TypeError, *fragments, model=model)


def test_a_model_that_ignores_the_width():
    refused(ValueError, "ignores", model=lambda width: two_layers(4), init_exponents=...)


def test_a_model_with_state_beside_its_parameters():
    class Normed(nnx.Module):
        def __init__(self, width, rngs):
            self.enter = nnx.Linear(D, width, rngs=rngs)
            self.norm = nnx.BatchNorm(width, rngs=rngs)
            self.readout = nnx.Linear(width, 2, rngs=rngs)

        def __call__(self, x):
            return self.readout(self.norm(self.enter(x)))

    refused(
        ValueError,
        "state other than parameters",
        "norm/mean",
        model=lambda width, rngs: Normed(width, rngs),
    )


def test_training_batches_that_the_model_cannot_take():
    wrong = (jnp.ones((B, D + 1)), jnp.zeros((B, 2)))
    bad = setting(sample=lambda data, key, step: wrong)
    refused(ValueError, "'toy'", "disagree at width 4", "training batch", setting=bad)


def test_a_validation_batch_that_the_model_cannot_take():
    bad = setting(validation=(jnp.ones((B, D + 1)), jnp.zeros((B, 2))))
    refused(ValueError, "'toy'", "disagree at width 4", "validation batch", setting=bad)


def test_targets_that_would_be_broadcast_against_the_outputs():
    bad = setting(validation=(jnp.ones((B, D)), jnp.zeros((B,))))
    refused(ValueError, "'toy'", "validation batch", setting=bad)


@pytest.mark.parametrize(
    ("loss", "fragments"),
    [
        (lambda predict, batch: (predict(batch[0]) - batch[1]) ** 2, ["scalar", "(4, 2)"]),
        (lambda predict, batch: jnp.sum(predict(batch[0]) > 0), ["real", "int32"]),
        (lambda predict, batch: jnp.mean(predict(batch[0]) + 0j), ["real", "complex64"]),
        (lambda predict, batch: [predict(batch[0]), None][1], ["None"]),
    ],
)
def test_a_loss_that_is_no_real_scalar(loss, fragments):
    refused(ValueError, "'loss'", "'toy'", *fragments, setting=setting(loss))


def test_a_metric_that_is_no_real_scalar():
    bad = setting(metrics={"residual": lambda predict, batch: predict(batch[0]) - batch[1]})
    refused(ValueError, "'residual'", "scalar", setting=bad)


@pytest.mark.parametrize("name", ["train_loss", "eval_loss", "status", "diverged_step", "width"])
def test_a_metric_with_the_name_of_another_result(name):
    metric = {name: lambda predict, batch: jnp.mean(predict(batch[0]))}
    refused(ValueError, f"'{name}'", "metrics", setting=setting(metrics=metric))


class Dense(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(linen.Dense(self.width)(x))


@pytest.mark.parametrize("model", [Dense, two_layers])
def test_a_loss_that_never_calls_the_model(model):
    bad = setting(lambda predict, batch: jnp.mean(batch[1]))
    refused(ValueError, "'toy'", "never calls the model", model=model, setting=bad)


def test_a_configuration_that_cannot_be_stored_is_refused_at_once():
    with pytest.raises(TypeError, match=r"Setting.configuration of 'toy' .*ndarray"):
        setting(configuration={"mean": np.zeros(3)})


@pytest.mark.parametrize("argument", ["roles", "init_exponents"])
def test_statements_about_parameters_that_are_no_mapping(argument):
    refused(TypeError, f"{argument} must map", "['enter/kernel']", **{argument: ["enter/kernel"]})


def test_what_is_no_setting():
    refused(TypeError, "setting must be a mupjax.Setting", "3", setting=3)


def test_optimizers_that_cannot_be_run():
    for optimizer in (
        lambda learning_rate: optax.lbfgs(learning_rate),
        lambda learning_rate: optax.lookahead(optax.sgd(learning_rate), 2, 0.5),
    ):
        refused(ValueError, "the optimizer cannot be run as update(", optimizer=optimizer)


def test_an_optimizer_with_a_copy_of_the_parameters_cannot_be_scaled():
    def free(learning_rate):
        return optax.contrib.schedule_free_sgd(learning_rate)

    refused(ValueError, "a copy of them in its state", optimizer=free, optimizer_family="sgd")
    accepted(
        optimizer=free,
        optimizer_family="sgd",
        parametrization="SP",
        init_exponents={"enter/*": 0.0, "readout/*": 0.5},
    )


def test_a_setting_says_at_once_what_it_lacks():
    with pytest.raises(TypeError, match=r"Setting\.sample must be a function, got 3"):
        setting(sample=3)
    with pytest.raises(TypeError, match=r"Setting\.loss must be a function, got 0\.5"):
        setting(loss=0.5)
    with pytest.raises(ValueError, match=r"Setting\.validation holds no array"):
        setting(validation=())
    with pytest.raises(ValueError, match=r"Setting\.metrics must not contain 'loss'"):
        setting(metrics={"loss": lambda predict, batch: 0.0})


@pytest.mark.parametrize(
    ("argument", "value", "fragments"),
    [
        ("roles", {"*/bias": "vector"}, ["'*/bias'", "matches no parameter", "enter/kernel"]),
        ("roles", {"enter/*": "inptu"}, ["'inptu'", "input"]),
        ("init_exponents", {"nowhere": 0.5}, ["'nowhere'", "matches no parameter"]),
        ("init_exponents", {"*": float("nan")}, ["init_exponents['*']", "finite", "nan"]),
        ("init_exponents", {"*": "half"}, ["init_exponents['*']", "finite", "'half'"]),
    ],
)
def test_statements_about_parameters_that_do_not_fit(argument, value, fragments):
    refused(ValueError, argument, *fragments, **{argument: value})


# Optimizer and schedule --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "fragments"),
    [
        (optax.sgd(0.1), ["function of its hyperparameters", "GradientTransformation"]),
        ("adam", ["function of its hyperparameters", "str"]),
        (lambda learning_rate: learning_rate, ["GradientTransformation", "float"]),
        (lambda **kwargs: optax.adam(**kwargs), ["**kwargs"]),
        (lambda *args: optax.adam(*args), ["*args"]),
        (lambda learning_rate, /: optax.adam(learning_rate), ["positional-only"]),
    ],
)
def test_what_is_no_optimizer_factory(optimizer, fragments):
    refused(TypeError, "optimizer", *fragments, optimizer=optimizer)


def test_an_optimizer_of_unknown_kind():
    def odd(learning_rate):
        square = optax.stateless(lambda u, _: jax.tree.map(lambda g: g * jnp.abs(g), u))
        return optax.chain(square, optax.scale(-learning_rate))

    refused(ValueError, "optimizer_family", "'sgd', 'adam' or 'spectral'", optimizer=odd)


def test_a_parametrization_without_rows_for_the_optimizer():
    refused(
        ValueError, "Adaptive Transfer", "sgd", optimizer=sgd, parametrization="Adaptive Transfer"
    )


@pytest.mark.parametrize("bad", ["rmsprop", 3])
def test_an_unknown_optimizer_family(bad):
    refused(ValueError, "optimizer_family", repr(bad), optimizer_family=bad)


@pytest.mark.parametrize(
    ("schedule", "error", "fragments"),
    [
        (optax.constant_schedule(0.1), ValueError, ["0.1", "unit peak"]),
        (optax.constant_schedule(2.0), ValueError, ["2", "unit peak"]),
        (optax.linear_schedule(1.0, -1.0, 2), ValueError, ["negative"]),
        (lambda step: jnp.where(step > 1, jnp.nan, 1.0), ValueError, ["non-finite"]),
        (0.5, TypeError, ["0.5"]),
    ],
)
def test_bad_schedules(schedule, error, fragments):
    refused(error, "schedule", *fragments, schedule=schedule)


def test_decaying_twice():
    refused(
        ValueError,
        "'weight_decay'",
        "decay",
        optimizer=adamw,
        hyperparameters={"learning_rate": 0.1, "weight_decay": 0.1},
    )


def test_a_decay_mode_that_the_optimizer_does_not_follow():
    refused(ValueError, "weight_decay_mode", "'l2'", optimizer=adamw, weight_decay_mode="l2")


def test_coupled_decay_needs_a_learning_rate():
    refused(
        ValueError,
        "'coupled'",
        "'learning_rate'",
        optimizer=lambda rate: optax.sgd(rate),
        hyperparameters={"rate": 0.1, "weight_decay": 0.1},
    )


# Everything else ---------------------------------------------------------------------------------


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
