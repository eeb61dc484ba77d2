"""Which axes of a parameter grow, in flax.nnx."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from layer_chains import (
    ATTENTION_ROLES,
    CLASSES,
    FEATURES,
    IMAGES,
    LENGTH,
    SEQUENCES,
    TOKENS,
    anatomy,
    chain,
    linear,
    right_or_refused,
    roles,
)
from mupjax.models import MLP


def test_dense_layers_biases_and_norms():
    factory = chain(
        ("first", linear(FEATURES)),
        ("norm", lambda n, rngs: nnx.LayerNorm(n, rngs=rngs)),
        ("middle", linear()),
        ("rms", lambda n, rngs: nnx.RMSNorm(n, rngs=rngs)),
        ("last", linear(out=CLASSES)),
        ("after", linear(CLASSES, CLASSES)),
    )
    assert roles(factory) == {
        "first/kernel": "input",
        "first/bias": "vector",
        "norm/scale": "vector",
        "norm/bias": "vector",
        "middle/kernel": "hidden",
        "middle/bias": "vector",
        "rms/scale": "vector",
        "last/kernel": "output",
        "last/bias": "fixed",
        "after/kernel": "fixed",
        "after/bias": "fixed",
    }


def test_a_bottleneck_that_grows_in_proportion_is_hidden():
    factory = chain(
        ("first", linear(FEATURES)),
        ("down", lambda n, rngs: nnx.Linear(n, n // 4, rngs=rngs)),
        ("up", lambda n, rngs: nnx.Linear(n // 4, 3 * n, rngs=rngs)),
        ("last", lambda n, rngs: nnx.Linear(3 * n, CLASSES, rngs=rngs)),
    )
    found = roles(factory)
    assert [found[f"{layer}/kernel"] for layer in ("first", "down", "up", "last")] == [
        "input",
        "hidden",
        "hidden",
        "output",
    ]


def test_the_built_in_mlp():
    found = roles(lambda width, rngs: MLP(FEATURES, width, CLASSES, depth=2, norm=True, rngs=rngs))
    assert found == {
        "hidden/0/kernel": "input",
        "hidden/0/bias": "vector",
        "hidden/1/kernel": "hidden",
        "hidden/1/bias": "vector",
        "norms/0/scale": "vector",
        "norms/1/scale": "vector",
        "readout/kernel": "output",
        "readout/bias": "fixed",
    }


def test_convolutions():
    factory = chain(
        ("first", lambda n, rngs: nnx.Conv(FEATURES, n, (3, 3), rngs=rngs)),
        ("middle", lambda n, rngs: nnx.Conv(n, n, (3, 3), rngs=rngs)),
        # One kernel of 3 x 3 per channel: its fan-in does not grow.
        ("depthwise", lambda n, rngs: nnx.Conv(n, n, (3, 3), feature_group_count=n, rngs=rngs)),
        ("grouped", lambda n, rngs: nnx.Conv(n, n, (3, 3), feature_group_count=2, rngs=rngs)),
        ("norm", lambda n, rngs: nnx.GroupNorm(n, num_groups=2, rngs=rngs)),
        ("up", lambda n, rngs: nnx.ConvTranspose(n, n, (2, 2), rngs=rngs)),
        ("last", lambda n, rngs: nnx.Conv(n, CLASSES, (1, 1), rngs=rngs)),
    )
    found = roles(factory, IMAGES)
    kernels = {path.split("/")[0]: role for path, role in found.items() if path.endswith("kernel")}
    assert kernels == {
        "first": "input",
        "middle": "hidden",
        "depthwise": "input",
        "grouped": "hidden",
        "up": "hidden",
        "last": "output",
    }
    assert found["norm/scale"] == found["middle/bias"] == "vector"
    assert found["last/bias"] == "fixed"


def test_a_transposed_kernel_of_a_transposed_convolution():
    factory = chain(
        (
            "first",
            lambda n, rngs: nnx.ConvTranspose(
                FEATURES, n, (3, 3), transpose_kernel=True, rngs=rngs
            ),
        ),
        (
            "last",
            lambda n, rngs: nnx.ConvTranspose(n, CLASSES, (3, 3), transpose_kernel=True, rngs=rngs),
        ),
    )
    found = roles(factory, IMAGES)
    assert (found["first/kernel"], found["last/kernel"]) == ("input", "output")


def test_an_einsum_whose_kernel_is_laid_out_the_other_way():
    factory = chain(
        ("first", lambda n, rngs: nnx.Einsum("bi,oi->bo", (n, FEATURES), rngs=rngs)),
        ("last", lambda n, rngs: nnx.Einsum("bi,oi->bo", (CLASSES, n), rngs=rngs)),
    )
    right_or_refused({"first/kernel": "input", "last/kernel": "output"}, factory)
    # Hidden whichever way round it is laid out.
    between = chain(
        ("first", linear(FEATURES)),
        ("middle", lambda n, rngs: nnx.Einsum("bi,oi->bo", (n, n), rngs=rngs)),
        ("last", linear(out=CLASSES)),
    )
    assert roles(between)["middle/kernel"] == "hidden"


def test_general_linear_layers():
    factory = chain(
        ("first", lambda n, rngs: nnx.LinearGeneral(FEATURES, (2, n // 2), rngs=rngs)),
        ("middle", lambda n, rngs: nnx.LinearGeneral((2, n // 2), n, axis=(-2, -1), rngs=rngs)),
        ("last", lambda n, rngs: nnx.LinearGeneral(n, (2, CLASSES), rngs=rngs)),
    )
    assert roles(factory) == {
        "first/kernel": "input",
        "first/bias": "vector",
        "middle/kernel": "hidden",
        "middle/bias": "vector",
        "last/kernel": "output",
        "last/bias": "fixed",
    }


def test_general_linear_layers_with_a_batch_axis():
    def one_each(n, rngs):
        # Independent maps for each of the four sequences.
        return nnx.LinearGeneral(n, n, axis=-1, batch_axis={0: 4}, rngs=rngs)

    factory = chain(("first", linear(FEATURES)), ("each", one_each), ("last", linear(out=1)))
    found = roles(factory, SEQUENCES)
    assert found["each/kernel"] == "hidden"
    assert found["each/bias"] == "vector"


def test_general_linear_layers_with_a_batch_axis_that_grows():
    # More and more independent maps from 4 to 4 features: the fan-in of each is finite.
    def one_each(n, rngs):
        return nnx.LinearGeneral(4, 4, axis=-1, batch_axis={0: n // 4}, rngs=rngs)

    factory = chain(("first", linear(FEATURES)), ("each", one_each), ("last", linear(out=1)))
    right_or_refused({"each/kernel": "input", "each/bias": "vector"}, factory, SEQUENCES)


def attention(heads, embed=True, **options):
    """Self-attention: ``heads(width)`` heads, width features after an embedding."""

    def make(n, rngs):
        return nnx.MultiHeadAttention(
            heads(n), in_features=n if embed else FEATURES, decode=False, rngs=rngs, **options
        )

    first = [("first", linear(FEATURES))] if embed else []
    return chain(*first, ("attention", make), ("last", linear(out=CLASSES)))


def test_attention_with_more_heads():
    found = anatomy(attention(lambda n: n // 4), SEQUENCES)
    assert {p: found.leaves[p].role for p in ATTENTION_ROLES} == ATTENTION_ROLES
    assert found.leaves["attention/query/kernel"].shapes == {8: (8, 2, 4), 32: (32, 8, 4)}
    assert not found.query_growth


def test_attention_with_larger_heads():
    found = anatomy(attention(lambda n: 2), SEQUENCES)
    assert {p: found.leaves[p].role for p in ATTENTION_ROLES} == ATTENTION_ROLES
    assert found.query_growth == {"attention/query/kernel", "attention/query/bias"}


def test_attention_with_grouped_queries():
    shared = anatomy(attention(lambda n: n // 2, num_kv_heads=None), SEQUENCES)
    assert shared.leaves["attention/key/kernel"].role == "hidden"
    # Ever more query heads on the same two heads of keys and values: keys look like outputs, and no
    # table says what they should do.
    with pytest.raises(ValueError, match=r"'attention/key/kernel' .*grouped queries"):
        roles(attention(lambda n: n // 4, num_kv_heads=2), SEQUENCES)


def test_embeddings():
    factory = chain(
        ("embed", lambda n, rngs: nnx.Embed(7, n, rngs=rngs)), ("last", linear(out=CLASSES))
    )
    assert roles(factory, TOKENS) == {
        "embed/embedding": "input",
        "last/kernel": "output",
        "last/bias": "fixed",
    }


class Positions(nnx.Module):
    def __init__(self, width, rngs):
        self.position = nnx.Param(jax.random.normal(rngs.params(), (LENGTH, width)))
        self.scale = nnx.Param(jnp.ones((width,)))
        self.last = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(self.scale[...][None, None] * self.position[...][None] + 0 * x[..., :1])


def test_a_parameter_of_unknown_layout_must_be_stated():
    def factory(width, rngs):
        return Positions(width, rngs)

    with pytest.raises(
        ValueError, match="cannot infer the role of parameter 'position'"
    ) as refusal:
        roles(factory, SEQUENCES)
    text = str(refusal.value)
    assert "(3, 8) at width 8, (3, 32) at width 32" in text
    assert "roles={'position': ...}: 'output' where the model sums over the axis that grows" in text
    assert "vector, fixed, query" in text
    found = anatomy(factory, SEQUENCES, stated_roles={"pos*": "input"})
    assert found.leaves["position"].role == "input"
    assert found.leaves["position"].stated
    assert found.leaves["scale"].role == "vector"
    assert not found.leaves["scale"].stated
