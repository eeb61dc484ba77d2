"""What a model's program does with its parameters: what is followed, and how far."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from toy_models import BATCH, FEATURES, SEQUENCES, TOKENS, VECTORS, VOCABULARY, WORDS, uses


def sets(*over):
    return frozenset(frozenset(axes) for axes in over)


@pytest.mark.parametrize(
    ("shape", "product", "summed"),
    [
        ((5, 8), lambda w, x: x @ w, {0}),
        ((8, 5), lambda w, x: x @ w.T, {1}),
        ((8, 5), lambda w, x: jnp.einsum("oi,bi->bo", w, x), {1}),
        # Through functions of single entries, casts and factors.
        ((8, 5), lambda w, x: x @ (0.5 * jnp.tanh(w)).T.astype(jnp.float16), {1}),
        ((5, 2, 4), lambda w, x: x @ w.reshape(5, 8), {0}),
        ((2, 4, 5), lambda w, x: x @ w.reshape(8, 5).T, {2}),
        ((40,), lambda w, x: x @ w.reshape(5, 8), {0}),
        ((5, 24), lambda w, x: x @ w[:, 8:16], {0}),
        ((1, 5, 8), lambda w, x: x @ w[0], {1}),
        ((5, 8), lambda w, x: x @ jnp.concatenate([w, 2 * w], axis=1), {0}),
        ((5, 8), lambda w, x: jax.jit(jnp.matmul)(x, w), {0}),
        ((5, 8), lambda w, x: jax.checkpoint(jnp.matmul)(x, w), {0}),
        ((5, 8), lambda w, x: jax.vmap(lambda row: row @ w)(x), {0}),
        ((5,), lambda w, x: x @ w[:, None], {0}),
    ],
)
def test_axes_summed_over_are_those_of_the_parameter(shape, product, summed):
    found = uses(lambda params, x: product(params["w"], x), {"w": shape})
    assert found.summed == {"w": sets(summed)}
    assert found.inner == ()


def test_convolutions_and_looked_up_rows():
    def convolve(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )

    assert uses(convolve, {"w": (3, 5, 8)}, SEQUENCES).summed == {"w": sets({1})}
    looked_up = uses(lambda params, x: params["w"][x], {"w": (VOCABULARY, 8)}, WORDS)
    assert looked_up.summed == {"w": sets({0})}


def test_stacked_layers_are_seen_inside_their_scan():
    def apply(params, x):
        carry = jnp.zeros((BATCH, 8))

        def layer(carry, w):
            # The carry starts as a constant and depends on the input from the first turn on.
            return jnp.tanh(carry @ w.T + x @ params["first"]), None

        return jax.lax.scan(layer, carry, params["stack"])[0]

    found = uses(apply, {"first": (5, 8), "stack": (3, 8, 8)})
    # Axis 2 of the stacked parameter, whose axis 0 counts the layers.
    assert found.summed == {"first": sets({0}), "stack": sets({2})}


def test_what_has_no_operands_or_no_results_is_passed_by():
    def apply(params, x):
        jax.debug.callback(lambda: None)
        draws = jax.random.normal(jax.random.key(0), (8, 8))
        return x @ params["w"] @ draws

    assert uses(apply, {"w": (5, 8)}).summed == {"w": sets({0})}


def test_products_of_two_activations_are_sized_and_products_of_two_parameters_ignored():
    def attend(params, x):
        first = x @ params["w"]
        return jax.nn.softmax(first @ first.swapaxes(-1, -2)) @ first

    found = uses(attend, {"w": (5, 8)}, SEQUENCES)
    assert tuple(product.size for product in found.inner) == (8, TOKENS)
    low_rank = uses(lambda p, x: x @ (p["a"] @ p["b"]), {"a": (5, 2), "b": (2, 8)})
    assert low_rank.summed == {"a": frozenset(), "b": frozenset()}


def test_matrices_multiplied_entry_by_entry_tell_nothing_of_each_other():
    shapes = {"w": (5, 8), "gate": (5, 8), "gain": (8,)}
    found = uses(lambda p, x: x @ (2 * p["w"] * jnp.tanh(p["gate"])), shapes)
    assert found.summed == {}
    assert found.entrywise == {"w", "gate"}
    assert found.factors == {frozenset({"w"}): 2.0}
    # Not so the gains of columns, or weights over their norm.
    spread = uses(lambda p, x: x @ (p["w"] * p["gain"][None]), shapes)
    assert spread.summed == {"w": sets({0})}
    normal = uses(
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)), shapes
    )
    assert normal.summed == {"w": sets({0})}


def test_all_calls_of_the_model_are_read_and_what_makes_its_outputs():
    def apply(params, x, back=False):
        h = jnp.tanh(x @ params["w"])
        return 3 * h @ params["w"].T if back else h * jax.nn.softmax(h @ params["r"])[:, :1]

    def loss(predict, x):
        both = jnp.mean(predict(x)) + jnp.mean(predict(x)), jnp.mean(predict(x, back=True))
        return both[0] + jnp.square(both[1])

    shapes = {"w": (FEATURES, 8), "r": (8, 3)}
    found = uses(apply, shapes, dataclasses.replace(VECTORS, loss=loss))
    assert found.summed == {"w": sets({0}, {1}), "r": sets({0})}
    # The call that is made twice counts once, and of both calls the factor farthest from 1.
    assert found.factors == {frozenset({"w"}): 3.0}
    assert found.outputs == {"w", "r"}
    assert uses(lambda p, x: jnp.tanh(x @ p["w"]) @ p["r"], shapes).outputs == {"r"}
