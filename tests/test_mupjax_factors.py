"""Factors that a model applies by itself: on its layers, on attention, and which are none."""

import ast
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

from mupjax import SP, Model, muP, resolve_sweep
from mupjax.matrix_optimizers import muon
from mupjax.models import CNN, MLP, gpt2, llama
from mupjax.program import uses_of
from toy_models import (
    BASE,
    CLASSES,
    FEATURES,
    SEQUENCES,
    TOKENS,
    VECTORS,
    VOCABULARY,
    WIDE,
    WORDS,
    resolved,
    setting_for,
)


def net(hidden):
    """An input layer, whatever `hidden` makes of (h, W), and a readout."""

    def make(width):
        shapes = {"first": (FEATURES, width), "w": (width, width), "last": (width, CLASSES)}

        def init(key):
            return {name: {"kernel": jax.random.normal(key, s)} for name, s in shapes.items()}

        def apply(params, x):
            h = jax.nn.relu(x @ params["first"]["kernel"])
            return jax.nn.relu(hidden(h, params["w"]["kernel"])) @ params["last"]["kernel"]

        return Model(init, apply)

    return make


HALF = jnp.bfloat16


def scanned(h, w):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w) / len(w) ** 0.5, None), h, None, length=2)[0]


def after_a_scan(h, w):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, None, length=2)[0]


def rms(h):
    return h * jax.lax.rsqrt(jnp.mean(h**2, axis=-1, keepdims=True) + 1e-6)


def rms_by_einsum(h):
    square = jnp.einsum("bd,bd->b", h, h)[:, None]
    return h * jax.lax.rsqrt(square / h.shape[-1] + 1e-6)


def unit(h):
    return h / jnp.linalg.norm(h, axis=-1, keepdims=True)


class NTKForm(nnx.Module):
    def __init__(self, width, *, rngs):
        one = nnx.initializers.normal(1.0)
        self.first = nnx.Linear(FEATURES, width, kernel_init=one, rngs=rngs)
        self.second = nnx.Linear(width, width, use_bias=False, kernel_init=one, rngs=rngs)
        self.last = nnx.Linear(width, CLASSES, use_bias=False, kernel_init=one, rngs=rngs)

    def __call__(self, x):
        h = jax.nn.gelu(self.first(x))
        for layer in (self.second, self.last):
            h = layer(h) / jnp.sqrt(h.shape[-1])
        return h


class RootOfEmbedding(linen.Module):
    """As in the first Transformer, T5 and Gemma."""

    width: int

    @linen.compact
    def __call__(self, tokens):
        h = linen.Embed(VOCABULARY, self.width)(tokens) * self.width**0.5
        return linen.Dense(CLASSES)(linen.LayerNorm()(linen.Dense(self.width)(h)))


@pytest.mark.parametrize(
    ("factory", "setting", "says"),
    [
        (
            NTKForm,
            VECTORS,
            r"'(last|second)/kernel', or .* 0\.5 times as large at width 32 as at width 8: as "
            r"width\*\*-0\.5,",
        ),
        (
            RootOfEmbedding,
            WORDS,
            r"'Embed_0/embedding', or .* 2 times as large at width 32 as at width 8: as "
            r"width\*\*0\.5,",
        ),
    ],
)
def test_a_factor_on_a_flax_layer_is_refused(factory, setting, says):
    with pytest.raises(ValueError, match=says):
        resolved(factory, setting)


def test_where_no_table_scales_anything_the_model_trains_as_it_is():
    def resolve(parametrization):
        return resolve_sweep(
            NTKForm,
            VECTORS,
            lambda learning_rate: optax.sgd(learning_rate),
            parametrization,
            widths=[WIDE],
            base_width=BASE,
            hyperparameters={"learning_rate": 0.1},
            init_exponents={"first/*": 0.0, "second/*": 0.5, "last/kernel": 0.5},
        )

    assert not resolve(SP).scales()
    with pytest.raises(ValueError, match="constants of its own"):
        resolve(muP)


@pytest.mark.parametrize(
    ("hidden", "power"),
    [
        (lambda h, w: h @ w / len(w) ** 0.5, "-0.5"),
        (lambda h, w: h @ (w * (1 / len(w))), "-1"),
        (lambda h, w: 2 * h @ w * jnp.float32(len(w)) ** -0.5 / 3, "-0.5"),
        (lambda h, w: jnp.reciprocal(jnp.sqrt(jnp.full((), len(w)))) * (h @ w), "-0.5"),
        (lambda h, w: jax.nn.gelu(h @ w / len(w)), "-1"),
        (lambda h, w: h + jax.jit(jnp.matmul)(h, w) * jnp.sqrt(len(w)), "0.5"),
        (lambda h, w: jax.checkpoint(lambda h: (h @ w).T / len(w))(h).T, "-1"),
        (lambda h, w: jax.nn.silu(h) * ((h @ w) / len(w)), "-1"),
        (lambda h, w: rms(h) @ w / len(w), "-1"),
        (lambda h, w: (h.astype(HALF) @ w.astype(HALF)) / len(w) ** 0.5, "-0.5"),
        (scanned, "-0.5"),
        (lambda h, w: after_a_scan(h, w) / len(w), "-1"),
    ],
)
def test_a_factor_is_found_on_its_way(hidden, power):
    with pytest.raises(ValueError, match=rf"'w/kernel', .* width\*\*{power}, ") as refusal:
        resolved(net(hidden), VECTORS)
    assert "roles={'w/kernel': 'hidden'}" in str(refusal.value)
    # As it asks for.
    assert (
        resolved(net(hidden), VECTORS, roles={"w/kernel": "hidden"}).roles["w/kernel"] == "hidden"
    )


@pytest.mark.parametrize(
    "hidden",
    [
        lambda h, w: 0.5 * (h @ w) / 3,
        lambda h, w: rms(h) @ w,
        lambda h, w: rms(h @ w),
        # Root mean squares, written as many do.
        lambda h, w: unit(h @ w) * len(w) ** 0.5,
        lambda h, w: unit(h @ w * len(w) ** 0.5),
        lambda h, w: (h @ w) * len(w) ** 0.5 / jnp.linalg.norm(h @ w),
        lambda h, w: h @ w - jnp.sum(h @ w, axis=-1, keepdims=True) / len(w),
        lambda h, w: jax.nn.standardize(h @ w),
        lambda h, w: jax.nn.softmax(h @ w),
        # Squares summed as a product, which is no attention.
        lambda h, w: rms_by_einsum(h @ w),
        lambda h, w: (lambda y: y / jnp.sqrt(jnp.linalg.vecdot(y, y))[:, None])(h @ w),
        lambda h, w: h @ w / len(w) * len(w),
    ],
)
def test_what_is_no_factor_of_its_own_passes(hidden):
    assert resolved(net(hidden), VECTORS).roles["w/kernel"] == "hidden"


def test_factors_of_the_same_parameters_are_multiplied():
    def apply(params, x):
        h = 3 * (x @ (params["first"]["kernel"] / 2))
        return (h @ params["last"]["kernel"] + params["last"]["bias"][None]) / 5

    shapes = {"first": {"kernel": (FEATURES, 8)}, "last": {"kernel": (8, 2), "bias": (2,)}}
    tree = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    found = uses_of(Model(lambda key: tree, apply), VECTORS).factors
    assert found == {
        frozenset({"first/kernel"}): pytest.approx(1.5),
        frozenset({"last/kernel", "last/bias"}): pytest.approx(0.2),
    }


# --- Attention ----------------------------------------------------------------------------------


class Attention(nnx.Module):
    def __init__(self, width, *, rngs, **options):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs, **options)
        self.last = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(self.attention(self.first(x)))


class LinenAttention(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        x = linen.MultiHeadDotProductAttention(2)(linen.Dense(self.width)(x))
        return linen.Dense(CLASSES)(x)


def decoder(make, scale, **options):
    def factory(width, rngs):
        return make(
            VOCABULARY, width, layers=1, heads=2, attention_scale=scale, rngs=rngs, **options
        )

    return factory


ROOT, WHOLE = "1/sqrt(head_dim)", "1/head_dim"
ATTENTION = [
    (Attention, SEQUENCES, ROOT),
    (LinenAttention, SEQUENCES, ROOT),
    (decoder(llama, ROOT), WORDS, ROOT),
    (decoder(llama, WHOLE, kv_heads=1), WORDS, WHOLE),
    (decoder(gpt2, ROOT, context=TOKENS), WORDS, ROOT),
    (decoder(gpt2, WHOLE, context=TOKENS), WORDS, WHOLE),
]


@pytest.mark.parametrize(("factory", "setting", "applied"), ATTENTION)
def test_attention_that_is_not_scaled_as_stated_is_refused(factory, setting, applied):
    resolved(factory, setting, attention=applied)
    other = ROOT if applied == WHOLE else WHOLE
    says = re.escape(f"not {other} as attention={other!r} says; state attention={applied!r}")
    with pytest.raises(ValueError, match=says):
        resolved(factory, setting, attention=other)


class OwnAttention(nnx.Module):
    """Two heads by hand: what scales the queries, and what makes the output of (q, k, v)."""

    def __init__(self, width, *, rngs, scale, attend):
        def project():
            return nnx.LinearGeneral(width, (2, width // 2), rngs=rngs)

        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.query, self.key, self.value = project(), project(), project()
        self.last = nnx.Linear(width, CLASSES, rngs=rngs)
        self.scale, self.attend = scale, attend

    def __call__(self, x):
        h = self.first(x)
        q, k, v = self.query(h), self.key(h), self.value(h)
        return self.last(self.attend(q * self.scale(q.shape[-1]), k, v).reshape(h.shape))


def at_once(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def one_by_one(q, k, v):
    return jax.lax.map(lambda one: at_once(*(x[None] for x in one))[0], (q, k, v))


def in_half(q, k, v):
    return at_once(*(x.astype(HALF) for x in (q, k, v))).astype(q.dtype)


def after_the_product(q, k, v):
    logits = jnp.einsum("bthd,bshd->bhts", q.astype(HALF), k.astype(HALF)) * q.shape[-1] ** -0.5
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits).astype(q.dtype), v)


@pytest.mark.parametrize(
    ("scale", "attend"),
    [
        (lambda size: size**-0.5, at_once),
        (lambda size: size**-0.5, one_by_one),
        (lambda size: size**-0.5, in_half),
        (lambda size: 1.0, after_the_product),
    ],
)
def test_the_scale_of_attention_is_followed(scale, attend):
    def factory(width, rngs):
        return OwnAttention(width, scale=scale, attend=attend, rngs=rngs)

    resolved(factory, SEQUENCES, attention=ROOT)
    with pytest.raises(ValueError, match=re.escape("as head_dim**-0.5, not 1/head_dim")):
        resolved(factory, SEQUENCES, attention=WHOLE)


def linear_attention(q, k, v):
    return rms(jnp.einsum("bthd,bhde->bthe", q, jnp.einsum("bshd,bshe->bhde", k, v)))


def of_unit_vectors(q, k, v):
    return at_once(unit(q) * q.shape[-1] ** 0.5, unit(k), v)


@pytest.mark.parametrize("attend", [linear_attention, of_unit_vectors])
def test_norms_are_no_scale_of_attention(attend):
    def factory(width, rngs):
        return OwnAttention(width, scale=lambda size: size**-0.5, attend=attend, rngs=rngs)

    assert resolved(factory, SEQUENCES, attention=ROOT)


class ResidualStream(linen.Module):
    width: int
    factor: bool = True

    @linen.compact
    def __call__(self, x):
        h = linen.Dense(self.width)(x)
        for _ in range(3):
            h = h + linen.Dense(self.width)(linen.LayerNorm()(h))
        return linen.Dense(CLASSES)(h / self.width if self.factor else h)


def test_one_round_of_statements_is_enough():
    with pytest.raises(ValueError, match=re.escape("as width**-1, ")) as refusal:
        resolved(ResidualStream, VECTORS)
    stated = ast.literal_eval(str(refusal.value).split("roles=")[-1].rstrip("."))
    assert set(stated) == {f"Dense_{i}/{leaf}" for i in range(4) for leaf in ("kernel", "bias")}
    assert resolved(ResidualStream, VECTORS, roles=stated)
    assert resolved(lambda width: ResidualStream(width, factor=False), VECTORS)


def test_attention_scaled_by_the_head_size_must_be_stated_under_every_table():
    options = {
        "setting": WORDS,
        "optimizer": lambda learning_rate: optax.adam(learning_rate),
        "parametrization": SP,
        "widths": [WIDE],
        "base_width": BASE,
        "hyperparameters": {"learning_rate": 0.1},
        "init_exponents": {"*": 0.5},
    }
    resolve_sweep(decoder(llama, ROOT), **options)
    with pytest.raises(ValueError, match="assumed where nothing is said; state attention='1/head_"):
        resolve_sweep(decoder(llama, WHOLE), **options)


def test_norms_of_queries_and_keys_pass():
    assert resolved(
        lambda width, rngs: Attention(width, normalize_qk=True, rngs=rngs),
        SEQUENCES,
        attention=ROOT,
    )


# --- Kernels as (out, in) under an optimizer that looks at their sides --------------------------


class Transposed(nnx.Module):
    def __init__(self, width, *, rngs, ratio):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        draw = nnx.initializers.normal(1.0)(rngs.params(), (ratio * width, width))
        self.kernel = nnx.Param(draw)
        self.last = nnx.Linear(ratio * width, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.first(x) @ self.kernel[...].T))


def test_a_hidden_kernel_stored_as_out_by_in_is_refused_where_it_matters():
    def resolve(ratio, optimizer, **options):
        return resolve_sweep(
            lambda width, rngs: Transposed(width, ratio=ratio, rngs=rngs),
            VECTORS,
            optimizer,
            muP,
            widths=[WIDE],
            base_width=BASE,
            hyperparameters={"learning_rate": 0.1},
            init_exponents={"*": 0.0},
            **options,
        )

    def adam(learning_rate):
        return optax.adam(learning_rate)

    def orthogonal(learning_rate, roles):
        return muon(learning_rate, roles=roles)

    for ratio in (1, 4):
        assert resolve(ratio, adam).roles["kernel"] == "hidden"
    assert resolve(1, orthogonal, optimizer_family="spectral").roles["kernel"] == "hidden"
    with pytest.raises(ValueError, match=r"'kernel' of shape \(32, 8\) .* store it as \(in, out\)"):
        resolve(4, orthogonal, optimizer_family="spectral")


@pytest.mark.parametrize(
    ("factory", "setting"),
    [
        (lambda width, rngs: MLP(FEATURES, width, CLASSES, depth=2, norm=True, rngs=rngs), VECTORS),
        (lambda width, rngs: CNN(1, width, CLASSES, rngs=rngs), "images"),
    ],
)
def test_the_networks_of_the_package_pass(factory, setting):
    if setting == "images":
        setting = setting_for((2, 4, 4, 1))
    assert resolved(factory, setting)
