"""Layers stacked in one parameter, as by scans: the same as layers with parameters of their own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from mupjax import Model, muP, sweep
from mupjax.data import digits
from mupjax.matrix_optimizers import dion, muon
from mupjax.roles import Layout, infer_roles
from small_sweeps import unoptimised_programs  # noqa: F401
from theory.decomposition import decomposition_observer
from theory.samplewise import samplewise_observer
from theory.trajectory import Averaging
from toy_models import CLASSES, FEATURES, SEQUENCES, VECTORS, WIDE, resolved, uses

LAYERS = 3
AVERAGE = Averaging(0.5, 0.8, 1, 2, warmup_steps=4)


def init(width):
    def draw(key):
        first, blocks, last = jax.random.split(key, 3)
        return {
            "first": {"kernel": jax.random.normal(first, (64, width)) / 8},
            "blocks": {"kernel": jax.random.normal(blocks, (LAYERS, width, 2 * width))},
            "back": {"kernel": jax.random.normal(blocks, (2 * width, LAYERS, width))},
            "last": {"kernel": jax.random.normal(last, (width, 10))},
        }

    def scaled(key):
        tree = draw(key)
        for name, fan_in in (("blocks", width), ("back", 2 * width), ("last", width)):
            tree[name] = {"kernel": tree[name]["kernel"] / fan_in**0.5}
        return tree

    return scaled


def block(h, up, down):
    return h + jax.nn.relu(h @ up) @ down


def stacked(width):
    def apply(params, x):
        def turn(h, kernels):
            return block(h, *kernels), None

        # Stacked along different axes.
        kernels = params["blocks"]["kernel"], params["back"]["kernel"].swapaxes(0, 1)
        h, _ = jax.lax.scan(turn, x @ params["first"]["kernel"], kernels)
        return h @ params["last"]["kernel"]

    return Model(init(width), apply)


def indexed(width):
    def apply(params, x):
        h = x @ params["first"]["kernel"]
        for i in range(LAYERS):
            h = block(h, params["blocks"]["kernel"][i], params["back"]["kernel"][:, i])
        return h @ params["last"]["kernel"]

    return Model(init(width), apply)


def separate(width):
    def draw(key):
        tree = init(width)(key)
        up, down = tree.pop("blocks")["kernel"], tree.pop("back")["kernel"]
        for i in range(LAYERS):
            tree[f"up{i}"], tree[f"down{i}"] = {"kernel": up[i]}, {"kernel": down[:, i]}
        return tree

    def apply(params, x):
        h = x @ params["first"]["kernel"]
        for i in range(LAYERS):
            h = block(h, params[f"up{i}"]["kernel"], params[f"down{i}"]["kernel"])
        return h @ params["last"]["kernel"]

    return Model(draw, apply)


def adam(learning_rate):
    return optax.adam(learning_rate)


def orthogonal(learning_rate, roles):
    return muon(learning_rate, roles=roles)


@functools.cache
def trained(factory, optimizer, *, singly=False):
    """With the decomposition, or with that of single examples in two ways."""
    options: dict[str, Any] = {"keep_psi": True, "validation_examples": 16}
    by_example = [
        samplewise_observer(AVERAGE, **options),
        samplewise_observer(AVERAGE, rank_one=True, name="rank_one", **options),
    ]
    return sweep(
        factory,
        digits(batch_size=16),
        optimizer,
        muP,
        widths=[16],
        base_width=8,
        steps=12,
        hyperparameters={"learning_rate": [2**-7, 2**-5]},
        optimizer_family="spectral" if optimizer is orthogonal else None,
        observers=by_example
        if singly
        else [decomposition_observer(AVERAGE, validation_examples=32)],
    )


@pytest.mark.parametrize(
    ("factory", "optimizer"), [(stacked, adam), (indexed, adam), (stacked, orthogonal)]
)
def test_trained_and_decomposed_as_layers_of_their_own(factory, optimizer):
    found, expected = (trained(f, optimizer) for f in (factory, separate))
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    top = expected.decomposition_top
    np.testing.assert_allclose(
        found.decomposition_top, top, rtol=1e-4, atol=1e-4 * float(abs(top).max())
    )
    # The components of a parameter are sums over its layers.
    of_layer = found.decomposition_layer_top.sel(layer="blocks/kernel")
    own = expected.decomposition_layer_top.sel(layer=[f"up{i}/kernel" for i in range(LAYERS)])
    np.testing.assert_allclose(
        of_layer, own.sum("layer", skipna=False), atol=1e-4 * float(abs(top).max())
    )


@pytest.mark.parametrize("name", ["samplewise", "rank_one"])
def test_single_examples_too(name):
    found, expected = (trained(f, adam, singly=True)[f"{name}_psi"] for f in (stacked, separate))
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(abs(expected).max()))


# --- Flax's scans -------------------------------------------------------------------------------


class NNXStack(nnx.Module):
    def __init__(self, width, *, rngs, make):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def drawn(rngs):
            return make(width, rngs)

        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.blocks = drawn(rngs)
        self.last = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return self.last(run(self.first(x), self.blocks))


def attention(width, rngs):
    return nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)


class LinenBlock(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x, _):
        x = x + linen.MultiHeadDotProductAttention(2, name="attention")(linen.LayerNorm()(x))
        return x + linen.Dense(self.width, name="dense")(x), None


class LinenStack(linen.Module):
    width: int
    axis: int = 0

    @linen.compact
    def __call__(self, x):
        scanned = linen.scan(
            LinenBlock,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = scanned(self.width, name="blocks")(linen.Dense(self.width)(x), None)
        return linen.Dense(CLASSES)(x)


def test_roles_and_layouts_of_flax_layers_in_a_scan():
    found = resolved(
        lambda width, rngs: NNXStack(width, rngs=rngs, make=attention),
        SEQUENCES,
        attention="1/sqrt(head_dim)",
    )
    blocks = {p.removeprefix("blocks/"): r for p, r in found.roles.items() if "blocks" in p}
    assert blocks == {
        **{f"{name}/kernel": "hidden" for name in ("key", "value", "out")},
        **{f"{name}/bias": "vector" for name in ("key", "value", "out")},
        "query/kernel": "query",
        "query/bias": "query_vector",
    }
    leaf = found.anatomy.leaves["blocks/query/kernel"]
    assert leaf.shapes[WIDE] == (LAYERS, WIDE, 2, WIDE // 2)
    assert leaf.layout == Layout("matrix", (1,), (2, 3), query=True, stacked=(0,))
    # As of a hidden matrix, and the root of the head size that is left for it.
    assert found.factors(WIDE).init["blocks/query/kernel"] == pytest.approx(4 ** (-0.5 - 0.5))


@pytest.mark.parametrize("axis", [0, 1])
def test_linen_scans_along_either_axis(axis):
    found = resolved(lambda width: LinenStack(width, axis), SEQUENCES, attention="1/sqrt(head_dim)")
    leaves = found.anatomy.leaves
    assert leaves["blocks/dense/kernel"].role == "hidden"
    rest = (1, 2) if axis == 0 else (0, 2)
    layout = Layout("matrix", rest[:1], rest[1:], stacked=(axis,))
    assert leaves["blocks/dense/kernel"].layout == layout
    assert leaves["blocks/attention/key/kernel"].role == "hidden"


class Ensemble(linen.Module):
    """Layers over one input: their axis is in no product's batch."""

    width: int

    @linen.compact
    def __call__(self, x):
        vmap: Any = linen.vmap
        over = vmap(
            linen.Dense,
            in_axes=None,
            axis_size=LAYERS,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        h = linen.Dense(self.width)(x)
        return linen.Dense(CLASSES)(over(self.width, name="members")(h).mean(0))


def test_layers_over_one_input():
    leaf = resolved(Ensemble, VECTORS).anatomy.leaves["members/kernel"]
    assert leaf.role == "hidden"
    assert leaf.layout == Layout("matrix", (1,), (2,), stacked=(0,))


@pytest.mark.parametrize(
    "make",
    [
        lambda n, rngs: nnx.Linear(n, n, rngs=rngs),
        lambda n, rngs: nnx.LinearGeneral(n, n, rngs=rngs),
        lambda n, rngs: nnx.Conv(n, n, (2,), rngs=rngs),
    ],
    ids=["linear", "general", "convolution"],
)
def test_matrix_optimizers_take_them_one_by_one(make):
    found = resolved(lambda width, rngs: NNXStack(width, rngs=rngs, make=make), SEQUENCES)
    leaves = found.anatomy.leaves
    shape = leaves["blocks/kernel"].shapes[WIDE]
    # Of a good condition, which five iterations bring near 1.
    noise = jax.random.normal(jax.random.key(0), shape) / WIDE
    tree = {
        "blocks": {"kernel": noise + jnp.eye(WIDE).reshape((1,) * (len(shape) - 2) + (WIDE, WIDE))}
    }
    roles = {"blocks/kernel": leaves["blocks/kernel"]}
    for optimizer in (muon(1.0, roles=roles), dion(1.0, roles=roles, rank_fraction=1.0)):
        state, update = optimizer.init(tree), None
        for _ in range(30):
            update, state = optimizer.update(tree, state, tree)
        matrices = jax.tree.leaves(update)[0].reshape(-1, WIDE, WIDE)
        singular = jnp.linalg.svd(matrices, compute_uv=False)
        assert ((singular > 0.6) & (singular < 1.3)).all()


# --- What is not taken for stacked --------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "product", "stacked"),
    [
        ((4, 5, 8), lambda w, x: jnp.einsum("bd,bde->be", x, w), {0}),
        ((5, 4, 8), lambda w, x: jax.vmap(jnp.matmul)(x, w.swapaxes(0, 1)), {1}),
        ((5, 2, 8), lambda w, x: x @ w[:, 1], {1}),
        ((2, 5, 8), lambda w, x: sum(x @ one for one in jnp.unstack(w)), {0}),
        # One matrix from several axes, or several that are produced.
        ((5, 2, 8), lambda w, x: jnp.einsum("bd,dke->bke", x, w), None),
        ((5, 2, 8), lambda w, x: x @ w.reshape(5, 16), None),
        # Once whole, once by its rows.
        ((3, 5, 5), lambda w, x: x @ w[0] + jnp.einsum("bd,kde->bke", x, w)[:, 0], None),
    ],
)
def test_axes_of_independent_matrices(shape, product, stacked):
    found = uses(lambda params, x: product(params["w"], x), {"w": shape}, VECTORS).stacked
    assert found == ({} if stacked is None else {"w": frozenset(stacked)})


def test_layers_that_grow_in_number_are_refused():
    shapes = {n: {"blocks/kernel": (n // 4, n, n), "last/kernel": (n, 3)} for n in (8, 16)}
    with pytest.raises(ValueError, match="its axis 0 grows"):
        infer_roles(shapes, base_width=8, stacked={"blocks/kernel": (0,)})
    # A layout that covers all axes is believed.
    whole = Layout("matrix", (0, 1), (2,))
    fixed = {n: {"w/kernel": (3, 8, n)} for n in (8, 16)}
    found = infer_roles(
        fixed, base_width=8, layouts={"w/kernel": whole}, stacked={"w/kernel": (0,)}
    )
    assert found["w/kernel"].layout == whole
