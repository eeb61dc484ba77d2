"""What users of muP packages trip over in attention: what its logits are divided by."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from mupjax import SP, Setting, mean_field, muP
from mupjax.roles import map_leaves
from sine_regression import BASE, FEATURES, KEY, OUTPUTS, WIDTH, M, resolved, with_fixed_weights
from tolerances import float_tolerance

SEQUENCE = jax.random.normal(jax.random.key(2), (4, 3, FEATURES))
SEQUENCES = Setting(
    "sequences",
    lambda data, key, step: SEQUENCE,
    lambda predict, batch: jnp.mean(jnp.square(predict(batch))),
    SEQUENCE,
)


class Attending(nnx.Module):
    def __init__(self, width, heads, embed, options, rngs):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs) if embed else None
        into = width if embed else FEATURES
        self.attention = nnx.MultiHeadAttention(
            heads, in_features=into, qkv_features=width, decode=False, rngs=rngs, **options
        )
        self.last = nnx.Linear(into, OUTPUTS, rngs=rngs)

    def __call__(self, x):
        x = x if self.first is None else self.first(x)
        return self.last(self.attention(x))


def attending(heads, embed=True, **options):
    return lambda width, rngs: Attending(width, heads(width), embed, options, rngs)


ATTENTION = {"setting": SEQUENCES, "init_exponents": {"*": 0.0}}


def over_the_size(query, key, value, **options):
    """Flax's attention, whose logits are divided by the head size and not by its root."""
    return nnx.dot_product_attention(query / query.shape[-1] ** 0.5, key, value, **options)


LARGER_HEADS = attending(lambda width: 2)
DIVIDES_BY_THE_SIZE: dict[str, Any] = {"attention_fn": over_the_size}
# Initial values that need no correction, so that only the attention scale is seen.
NO_CORRECTION = {
    "first/*": 0.0,
    "attention/*/kernel": 0.5,
    "attention/*/bias": 0.0,
    "last/kernel": 1.0,
}


def test_attention_scale_larger_heads_must_be_said_what_the_model_does():
    with pytest.raises(ValueError, match=r"attention='1/sqrt\(head_dim\)'") as refusal:
        resolved(LARGER_HEADS, **ATTENTION)
    text = str(refusal.value)
    assert "'attention/query/" in text
    assert "attention='1/head_dim'" in text
    assert "keep the head size fixed" in text
    with pytest.raises(ValueError, match="attention must be"):
        resolved(LARGER_HEADS, attention="1/d", **ATTENTION)
    # SP divides by the root itself: nothing to say.
    resolved(LARGER_HEADS, parametrization=SP, **ATTENTION)


def test_attention_scale_more_heads_of_one_size_need_nothing():
    more = resolved(attending(lambda width: width // 4), **ATTENTION)
    assert set(more.factors(WIDTH).multiplier.values()) == {1.0}
    assert more.roles["attention/query/kernel"] == "hidden"


def with_factors(params, factors):
    """The parameters as the model uses them at the start."""
    return map_leaves(
        lambda path, leaf: leaf * factors.init[path] * factors.multiplier[path], params
    )


def attend_by_hand(params, x, scale):
    params = jax.tree.map(np.asarray, params)

    def project(name, h):
        layer = params["attention"][name]
        return np.einsum("btn,nhd->bthd", h, layer["kernel"]) + layer["bias"]

    h = x @ params["first"]["kernel"] + params["first"]["bias"]
    query, key, value = (project(name, h) for name in ("query", "key", "value"))
    logits = scale * np.einsum("bthd,bshd->bhts", query, key)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("bhts,bshd->bthd", weights, value)
    out = params["attention"]["out"]
    h = np.einsum("bthd,hdn->btn", mixed, out["kernel"]) + out["bias"]
    return h @ params["last"]["kernel"] + params["last"]["bias"]


@pytest.mark.parametrize("application", ["folded", "multipliers"])
def test_attention_scale_one_over_the_head_size_relative_to_the_base(application):
    of_sweep = resolved(
        LARGER_HEADS,
        setting=SEQUENCES,
        init_exponents=NO_CORRECTION,
        attention="1/sqrt(head_dim)",
        application=application,
    )
    assert of_sweep.roles["attention/query/kernel"] == "query"
    assert of_sweep.roles["attention/query/bias"] == "query_vector"
    model = with_fixed_weights(LARGER_HEADS, SEQUENCES)(WIDTH)
    params = model.init(KEY)
    apply = jax.jit(model.apply)
    got = apply(with_factors(params, of_sweep.factors(WIDTH)), SEQUENCE)
    scale = muP.attention_scale(head_dim=WIDTH // 2, base_head_dim=BASE // 2)
    expected = attend_by_hand(params, np.asarray(SEQUENCE), scale)
    rtol = float_tolerance(np.float32, operations=WIDTH)
    largest = np.max(np.abs(expected))
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * largest)
    assert np.max(np.abs(apply(params, SEQUENCE) - expected)) > 1e-2 * largest


def test_attention_scale_a_model_that_divides_by_the_head_size_itself():
    model = attending(lambda width: 2, **DIVIDES_BY_THE_SIZE)
    own = resolved(model, attention="1/head_dim", application="multipliers", **ATTENTION)
    assert set(own.factors(WIDTH).multiplier.values()) == {1.0}
    # SP wants the root: the query projection has to carry the rest.
    standard = resolved(
        model,
        parametrization=SP,
        attention="1/head_dim",
        application="multipliers",
        **ATTENTION,
    )
    assert standard.factors(WIDTH).multiplier["attention/query/kernel"] == M**0.5


@pytest.mark.parametrize("parametrization", [muP, mean_field], ids=lambda p: p.name)
def test_attention_scale_a_query_that_reads_finite_features_stays_an_input_layer(parametrization):
    both = {
        said: resolved(
            attending(lambda width: 2, embed=False, **options),
            optimizer=optax.adam,
            parametrization=parametrization,
            attention=said,
            application="multipliers",
            **ATTENTION,
        ).factors(WIDTH)
        for said, options in (("1/head_dim", DIVIDES_BY_THE_SIZE), ("1/sqrt(head_dim)", {}))
    }
    path = "attention/query/kernel"
    plain, carrying = both["1/head_dim"], both["1/sqrt(head_dim)"]
    assert carrying.multiplier[path] == M**-0.5 * plain.multiplier[path]
    assert carrying.learning_rate[path] == plain.learning_rate[path] == 1.0
    assert carrying.init[path] == plain.init[path] == 1.0


def test_attention_scale_where_number_and_size_of_heads_grow():
    factors = resolved(
        attending(lambda width: {8: 2, 32: 4}[width]),
        attention="1/sqrt(head_dim)",
        application="multipliers",
        **ATTENTION,
    ).factors(WIDTH)
    # From 2 heads of 4 to 4 heads of 8: the head size doubles while the width quadruples.
    for leaf in ("kernel", "bias"):
        assert factors.multiplier[f"attention/query/{leaf}"] == pytest.approx(2**-0.5)


def test_attention_scale_of_a_head_size_that_goes_as_no_power_is_refused():
    factory = attending(lambda width: {8: 2, 16: 2, 32: 4}[width])
    with pytest.raises(
        ValueError, match=r"4 at width 8, 8 at width 16, 8 at width 32\) goes as no"
    ):
        resolved(factory, widths=[16, 32], attention="1/sqrt(head_dim)", **ATTENTION)
    # Nothing to make up for.
    factory = attending(lambda width: {8: 2, 16: 2, 32: 4}[width], **DIVIDES_BY_THE_SIZE)
    resolved(factory, widths=[16, 32], attention="1/head_dim", **ATTENTION)


class LinenAttending(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(self.width, name="first")(x)
        x = linen.MultiHeadDotProductAttention(2, normalize_qk=True, name="attention")(x)
        return linen.Dense(OUTPUTS, name="last")(x)


@pytest.mark.parametrize(
    "factory",
    [attending(lambda width: 2, normalize_qk=True), LinenAttending],
    ids=["nnx", "linen"],
)
def test_attention_scale_is_not_lost_in_a_norm_of_the_queries(factory):
    of_sweep = resolved(
        factory,
        attention="1/sqrt(head_dim)",
        setting=SEQUENCES,
        init_exponents={**NO_CORRECTION, "attention/*_ln/scale": 0.0},
    )
    factors = of_sweep.factors(WIDTH)
    assert of_sweep.roles["attention/query_ln/scale"] == "query_vector"
    assert {path for path, factor in factors.init.items() if factor != 1} == {
        "attention/query_ln/scale"
    }
    model = with_fixed_weights(factory, SEQUENCES)(WIDTH)
    params = model.init(KEY)
    apply = jax.jit(model.apply)
    before = apply(params, SEQUENCE)
    after = apply(with_factors(params, factors), SEQUENCE)
    assert jnp.max(jnp.abs(after - before)) > 1e-3 * jnp.max(jnp.abs(before))
