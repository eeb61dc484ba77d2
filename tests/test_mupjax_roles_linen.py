"""Which axes of a parameter grow, in flax.linen and plain functions."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen

from layer_chains import (
    ATTENTION_ROLES,
    BASE,
    CLASSES,
    FEATURES,
    IMAGES,
    SEQUENCES,
    TOKENS,
    VECTORS,
    anatomy,
    right_or_refused,
    roles,
)
from mupjax import Model, Setting, sweep
from mupjax.adapters import as_model
from mupjax.roles import Layout
from tolerances import float_tolerance


def functions(width):
    def init(key):
        into, mixing, out = jax.random.split(key, 3)
        return {
            "into": {"kernel": jax.random.normal(into, (FEATURES, width))},
            "mixing": jax.random.normal(mixing, (width, width)) / width**0.5,
            "out": [jax.random.normal(out, (CLASSES, width)) / width**0.5],
        }

    def apply(params, x):
        hidden = jnp.tanh(x @ params["into"]["kernel"]) @ params["mixing"]
        return hidden @ params["out"][0].T

    layouts = {"out/0": Layout("matrix", fan_in=(1,), fan_out=(0,))}
    return Model(init, apply, layouts)


def test_plain_functions():
    assert roles(functions) == {"into/kernel": "input", "mixing": "hidden", "out/0": "output"}


def test_a_plain_matrix_without_layout_must_be_stated():
    def without(width):
        made = functions(width)
        return Model(made.init, made.apply)

    with pytest.raises(ValueError, match="cannot infer the role of parameter 'out/0'"):
        roles(without)
    assert roles(without, stated_roles={"out/0": "output"})["out/0"] == "output"


def test_a_readout_written_as_a_vector_is_not_taken_for_a_bias():
    # Two-layer networks are often written so: f(x) = sum_i a_i relu(<w_i, x>).
    def factory(width):
        def init(key):
            first, second = jax.random.split(key)
            return {
                "w": jax.random.normal(first, (FEATURES, width)),
                "a": jax.random.normal(second, (width,)) / width**0.5,
            }

        def apply(params, x):
            return jax.nn.relu(x @ params["w"]) @ params["a"][:, None]

        return Model(init, apply)

    right_or_refused({"a": "output"}, factory, stated_roles={"w": "input"})
    assert roles(factory, stated_roles={"w": "input", "a": "output"})["a"] == "output"


class LinenNet(linen.Module):
    width: int
    heads: int = 2

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(self.width, name="first")(x)
        x = linen.MultiHeadDotProductAttention(self.heads, name="attention")(x)
        x = linen.LayerNorm(name="norm")(x)
        x = linen.Conv(self.width, (2,), name="mix")(x)
        x = linen.DenseGeneral((2, self.width // 2), name="split")(x)
        x = linen.DenseGeneral(CLASSES, axis=(-2, -1), name="last")(x)
        return x


def test_linen_layers():
    found = anatomy(LinenNet, SEQUENCES)
    assert {path: leaf.role for path, leaf in found.leaves.items()} == {
        **ATTENTION_ROLES,
        "first/kernel": "input",
        "first/bias": "vector",
        "norm/scale": "vector",
        "norm/bias": "vector",
        "mix/kernel": "hidden",
        "mix/bias": "vector",
        "split/kernel": "hidden",
        "split/bias": "vector",
        "last/kernel": "output",
        "last/bias": "fixed",
    }
    assert found.query_growth == {"attention/query/kernel", "attention/query/bias"}
    more_heads = anatomy(lambda width: LinenNet(width, heads=width // 4), SEQUENCES)
    assert not more_heads.query_growth


def test_linen_embedding_and_depthwise_convolution():
    class Net(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.Embed(7, self.width, name="embed")(x)
            x = linen.Conv(self.width, (2,), feature_group_count=self.width, name="depthwise")(x)
            return linen.Dense(CLASSES, name="last")(x)

    found = roles(Net, TOKENS)
    assert found["embed/embedding"] == found["depthwise/kernel"] == "input"
    assert found["last/kernel"] == "output"


def test_linen_kernels_laid_out_the_other_way():
    class Net(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.ConvTranspose(self.width, (3, 3), transpose_kernel=True, name="first")(x)
            x = linen.Einsum((self.width, self.width), "bxyi,oi->bxyo", name="middle")(x)
            return linen.ConvTranspose(CLASSES, (3, 3), transpose_kernel=True, name="last")(x)

    found = roles(Net, IMAGES)
    kernels = [found[f"{layer}/kernel"] for layer in ("first", "middle", "last")]
    assert kernels == ["input", "hidden", "output"]

    class Readout(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.Dense(self.width, name="first")(x)
            return linen.Einsum((CLASSES, self.width), "bi,oi->bo", name="last")(x)

    with pytest.raises(ValueError, match="cannot infer the role of parameter 'last/kernel'"):
        roles(Readout)


class Masked(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x, flag, mask, *, double):
        assert flag is None
        hidden = linen.Dense(self.width, name="first")(x) * mask[:, None]
        return linen.Dense(CLASSES, name="last")(2 * hidden if double else hidden)


def test_a_linen_model_may_be_called_with_flags_and_with_arrays_by_name():
    def call(predict, x):
        return predict(x, None, mask=x[:, 0], double=True)

    setting = Setting(
        "masked",
        sample=VECTORS.sample,
        loss=lambda predict, x: jnp.mean(jnp.square(call(predict, x))),
        validation=jax.random.normal(jax.random.key(1), (4, FEATURES)),
    )
    model = as_model(Masked, BASE, setting)
    params = model.init(jax.random.key(0))
    assert params["first"]["kernel"].shape == (FEATURES, BASE)

    def predict(*args, **kwargs):
        return model.apply(params, *args, **kwargs)

    x = setting.validation
    first, last = params["first"]["kernel"], params["last"]["kernel"]
    assert jnp.allclose(call(predict, x), 2 * (x @ first) * x[:, :1] @ last, rtol=1e-5)
    assert model.intermediates is not None
    layers = model.intermediates(params, x, None, mask=x[:, 0], double=True)
    assert jnp.allclose(layers["last"], call(predict, x))
    assert jnp.allclose(layers["first"], x @ first, rtol=1e-5)


def test_a_linen_model_trains():
    class Net(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = jnp.tanh(linen.Dense(self.width, name="first")(x))
            x = jnp.tanh(linen.Dense(self.width, name="middle")(x))
            return linen.Dense(2, name="last")(x)

    # A target that the inputs determine, so that there is something to learn.
    def loss(predict, x):
        return jnp.mean(jnp.square(predict(x) - jnp.sin(x[:, :2])))

    held_out = jax.random.normal(jax.random.key(9), (64, FEATURES))
    dataset = sweep(
        Net,
        Setting("sines", VECTORS.sample, loss, held_out),
        lambda learning_rate: optax.adam(learning_rate),
        "muP",
        widths=[16],
        base_width=8,
        hyperparameters={"learning_rate": 0.02},
        steps=60,
        evaluations=2,
    )
    assert dataset["status"].item() == 0
    before, _, after = dataset["eval_loss"].values.ravel()
    assert after < 0.7 * before
    # What it starts from: linen's own initial values, the readout's corrected to std 1/width.
    params = as_model(Net, 16, VECTORS).init(jax.random.fold_in(jax.random.key(0), 0))
    params["last"]["kernel"] = params["last"]["kernel"] * 2**-0.5
    start = loss(lambda x: Net(16).apply({"params": params}, x), held_out)
    assert before == pytest.approx(float(start), rel=float_tolerance(jnp.float32, 16))
