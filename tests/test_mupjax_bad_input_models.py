"""Bad widths, models and settings give one clear error, before any compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import mupjax
from refusals import (
    B,
    D,
    accepted,
    no_program_is_compiled,  # noqa: F401
    refused,
    setting,
    two_layers,
)

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
        (nnx.Linear(D, 4, rngs=nnx.Rngs(0)), ["model factory must be a function", "a Linear"]),
        (linen.Dense(4), ["model factory must be a function", "a Dense"]),
        (lambda width, rngs: None, ["NoneType", "width 4"]),
    ],
)
def test_what_is_no_model_factory(model, fragments):
    refused(TypeError, *fragments, model=model)


def test_complex_parameters():
    def net(width):
        def init(key):
            return {"enter": jnp.ones((D, width), jnp.complex64), "leave": jnp.ones((width, 2))}

        return mupjax.Model(init, lambda p, x: jnp.imag(x @ p["enter"]) @ p["leave"])

    refused(ValueError, "'enter'", "complex64", "two real parameters", model=net)


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


class Keeping(nnx.Module):
    """Two layers beside an array, or around one of Flax's layers that keeps its own."""

    def __init__(self, width, kept, rngs):
        self.enter, self.leave = nnx.Linear(D, width, rngs=rngs), nnx.Linear(width, 1, rngs=rngs)
        self.kept = kept(width, rngs)

    def __call__(self, x):
        return self.leave(self.enter(x))


def weight_norm(width, rngs):
    return nnx.WeightNorm(nnx.Linear(width, width, rngs=rngs), rngs=rngs)


@pytest.mark.parametrize(
    ("kept", "fragments"),
    [
        (lambda width, rngs: jnp.eye(D), ["'kept'"]),
        (lambda width, rngs: nnx.List([rngs.params.normal((D,))]), ["'kept/0'"]),
        (lambda width, rngs: nnx.data({"a": {"b": rngs.params.normal((D,))}}), ["'kept/a/b'"]),
        (lambda width, rngs: nnx.data({"a": (jnp.eye(D),)}), ["'kept/a/0'"]),
        (lambda width, rngs: nnx.data([jnp.eye(D)]), ["'kept/0'"]),
        pytest.param(
            weight_norm,
            ["'kept/scales/kernel'", "use_scale=False"],
            marks=pytest.mark.skipif(
                "scales" in nnx.state(weight_norm(2, nnx.Rngs(0)), nnx.Param),
                reason="its scales are parameters in newer Flax",
            ),
        ),
    ],
)
def test_a_model_that_keeps_an_array(kept, fragments):
    refused(
        ValueError,
        "no parameter",
        *fragments,
        model=lambda width, rngs: Keeping(width, kept, rngs),
    )


def test_a_model_that_keeps_shapes_or_what_holds_itself_is_accepted():
    around: dict = {"shape": jnp.eye(D).shape, "as": jax.ShapeDtypeStruct((D,), jnp.float32)}
    around["itself"] = around
    accepted(model=lambda width, rngs: Keeping(width, lambda *_: around, rngs))
    accepted(model=lambda width, rngs: Keeping(width, lambda *_: around["as"], rngs))


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


def test_a_setting_says_at_once_what_it_lacks():
    with pytest.raises(TypeError, match=r"Setting\.sample must be a function, got 3"):
        setting(sample=3)
    with pytest.raises(TypeError, match=r"Setting\.loss must be a function, got 0\.5"):
        setting(loss=0.5)
    with pytest.raises(ValueError, match=r"Setting\.validation holds no array"):
        setting(validation=())
    for metrics in (None, [max], {"a": 3}, {1: max}):
        with pytest.raises(TypeError, match=r"Setting\.metrics must map names to functions"):
            setting(metrics=metrics)
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
