"""Which axes of a parameter grow, in flax.nnx, flax.linen and plain functions."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

from mupjax import Model, Setting, muP, resolve_sweep, sweep
from mupjax.adapters import as_model
from mupjax.models import MLP
from mupjax.resolve import dissect, resolve
from mupjax.roles import Layout, infer_roles
from tolerances import float_tolerance

BASE, WIDE = 8, 32
FEATURES, LENGTH, CLASSES = 6, 3, 5


def setting_for(shape, tokens=False):
    dtype = jnp.int32 if tokens else jnp.float32

    def sample(data, key, step):
        key = jax.random.fold_in(key, step)
        return jax.random.randint(key, shape, 0, 7) if tokens else jax.random.normal(key, shape)

    return Setting(
        "toy",
        sample=sample,
        loss=lambda predict, batch: jnp.mean(jnp.square(predict(batch))),
        validation=jnp.ones(shape, dtype),
    )


SEQUENCES = setting_for((4, LENGTH, FEATURES))
VECTORS = setting_for((4, FEATURES))
IMAGES = setting_for((4, 8, 8, FEATURES))
TOKENS = setting_for((4, LENGTH), tokens=True)


def anatomy(factory, setting=VECTORS, widths=(BASE, WIDE), base=BASE, **stated):
    """Roles from shapes alone: with every initial exponent stated, nothing is computed."""
    models = {width: as_model(factory, width, setting) for width in widths}
    return dissect(models, base_width=base, stated_init_exponents={"*": 0.0}, **stated)


def roles(*args, **kwargs):
    return {path: leaf.role for path, leaf in anatomy(*args, **kwargs).leaves.items()}


def chain(*layers):
    """An nnx factory for layers ``name, make(width, rngs)`` applied one after the other."""

    class Chain(nnx.Module):
        def __init__(self, width, rngs):
            for name, make in layers:
                setattr(self, name, make(width, rngs))

        def __call__(self, x):
            for name, _ in layers:
                x = getattr(self, name)(x)
            return x

    return lambda width, rngs: Chain(width, rngs)


def linear(into=None, out=None, **options):
    """A dense layer; None is the width."""
    return lambda n, rngs: nnx.Linear(into or n, out or n, rngs=rngs, **options)


# --- flax.nnx ---------------------------------------------------------------------------------


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


def right_or_refused(expected, factory, setting=VECTORS, **kwargs):
    """Kernels whose layout cannot be read must be asked for, never guessed."""
    try:
        found = roles(factory, setting, **kwargs)
    except ValueError as error:
        assert "cannot infer the role" in str(error)  # noqa: PT017
        return
    assert {path: found[path] for path in expected} == expected


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


class Stack(nnx.Module):
    """Three layers whose parameters are stacked along a first axis."""

    def __init__(self, width, make, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs):
            return make(width, rngs)

        self.blocks = stacked(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


@pytest.mark.parametrize(
    "make",
    [
        lambda n, rngs: nnx.Linear(n, n, rngs=rngs),
        lambda n, rngs: nnx.LinearGeneral(n, n, rngs=rngs),
        lambda n, rngs: nnx.Conv(n, n, (2,), rngs=rngs),
    ],
    ids=["linear", "general", "convolution"],
)
def test_stacked_layers_are_hidden_or_refused(make):
    factory = chain(
        ("first", linear(FEATURES)),
        ("stack", lambda n, rngs: Stack(n, make, rngs)),
        ("last", linear(out=CLASSES)),
    )
    right_or_refused({"stack/blocks/kernel": "hidden"}, factory, SEQUENCES)


def attention(heads, embed=True, **options):
    """Self-attention: ``heads(width)`` heads, width features after an embedding."""

    def make(n, rngs):
        return nnx.MultiHeadAttention(
            heads(n), in_features=n if embed else FEATURES, decode=False, rngs=rngs, **options
        )

    first = [("first", linear(FEATURES))] if embed else []
    return chain(*first, ("attention", make), ("last", linear(out=CLASSES)))


ATTENTION_ROLES = {
    **{f"attention/{name}/kernel": "hidden" for name in ("query", "key", "value", "out")},
    **{f"attention/{name}/bias": "vector" for name in ("query", "key", "value", "out")},
}


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
    assert "roles={'position': 'input'}" in text
    assert "vector, fixed, query" in text
    found = anatomy(factory, SEQUENCES, stated_roles={"pos*": "input"})
    assert found.leaves["position"].role == "input"
    assert found.leaves["position"].stated
    assert found.leaves["scale"].role == "vector"
    assert not found.leaves["scale"].stated


# --- Statements -------------------------------------------------------------------------------

TWO_LAYERS = chain(("first", linear(FEATURES)), ("last", linear(out=CLASSES)))


def test_a_stated_role_overrides_inference():
    found = anatomy(TWO_LAYERS, stated_roles={"last/*": "fixed"})
    assert {p: leaf.role for p, leaf in found.leaves.items()} == {
        "first/kernel": "input",
        "first/bias": "vector",
        "last/kernel": "fixed",
        "last/bias": "fixed",
    }
    assert found.leaves["last/kernel"].stated
    assert not found.leaves["first/kernel"].stated


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"roles\['readout/\*'\] matches no parameter") as refusal:
        roles(TWO_LAYERS, stated_roles={"readout/*": "output"})
    assert "first/kernel" in str(refusal.value)
    models = {w: as_model(TWO_LAYERS, w, VECTORS) for w in (BASE, WIDE)}
    with pytest.raises(ValueError, match=r"init_exponents\['readout/\*'\] matches no parameter"):
        dissect(models, base_width=BASE, stated_init_exponents={"readout/*": 0.5})


def test_two_patterns_for_one_parameter_are_an_error():
    with pytest.raises(
        ValueError, match=r"'last/kernel' is matched by two patterns in roles, '\*/kernel' and 'las"
    ):
        roles(TWO_LAYERS, stated_roles={"*/kernel": "hidden", "last/*": "output"})


def test_an_unknown_role_is_an_error():
    with pytest.raises(
        ValueError, match=r"roles\['last/\*'\] = 'readout' is no role; choose one of"
    ):
        roles(TWO_LAYERS, stated_roles={"last/*": "readout"})


def test_two_patterns_for_one_initial_scale_are_an_error():
    models = {w: as_model(TWO_LAYERS, w, VECTORS) for w in (BASE, WIDE)}
    with pytest.raises(ValueError, match="two patterns in init_exponents"):
        dissect(models, base_width=BASE, stated_init_exponents={"last/kernel": 0.5, "*": 0.0})


def test_an_initial_exponent_passes_by_fixed_parameters_unless_they_are_named():
    models = {w: as_model(TWO_LAYERS, w, VECTORS) for w in (BASE, WIDE)}

    def exponents(stated):
        stated = {"first/*": 0.0, **stated}
        return dissect(models, base_width=BASE, stated_init_exponents=stated).init_exponents

    assert exponents({"last/*": 0.5})["last/bias"] == 0.0
    assert exponents({"last/bias": 0.5})["last/bias"] == 0.5


# --- What cannot be a family of widths ----------------------------------------------------------


def test_a_factory_that_ignores_the_width_is_an_error():
    factory = chain(("first", linear(FEATURES, 16)), ("last", linear(16, CLASSES)))
    with pytest.raises(
        ValueError, match="ignores its argument, so a parametrization would silently"
    ):
        roles(factory)
    with pytest.raises(ValueError, match="no parameter changes its shape between widths"):
        resolve_sweep(
            factory,
            VECTORS,
            lambda learning_rate: optax.sgd(learning_rate),
            muP,
            widths=[BASE],
            base_width=BASE,
            hyperparameters={"learning_rate": 0.1},
        )


@pytest.mark.parametrize(
    "size",
    [lambda n: n + 1, lambda n: n * n // 8, lambda n: 8 if n < 32 else 16],
    ids=["offset", "square", "slower"],
)
def test_disproportionate_growth_is_an_error(size):
    factory = chain(
        ("first", lambda n, rngs: nnx.Linear(FEATURES, size(n), rngs=rngs)),
        ("last", lambda n, rngs: nnx.Linear(size(n), CLASSES, rngs=rngs)),
    )
    with pytest.raises(ValueError, match="grow, but not in proportion to the width") as refusal:
        roles(factory)
    assert "first/" in str(refusal.value)
    assert "State it" in str(refusal.value)


def test_growth_is_checked_at_every_width():
    factory = chain(
        ("first", lambda n, rngs: nnx.Linear(FEATURES, n if n < 64 else 48, rngs=rngs)),
        ("last", lambda n, rngs: nnx.Linear(n if n < 64 else 48, CLASSES, rngs=rngs)),
    )
    assert roles(factory)["first/kernel"] == "input"
    with pytest.raises(ValueError, match="not in proportion"):
        roles(factory, widths=(8, 32, 64))


def test_a_depth_that_depends_on_the_width_is_an_error():
    def factory(width, rngs):
        return MLP(FEATURES, width, CLASSES, depth=1 if width == BASE else 2, rngs=rngs)

    with pytest.raises(ValueError, match="other parameters at width 32 than at width 8") as refusal:
        roles(factory)
    assert "hidden/1/bias" in str(refusal.value)


def test_a_number_of_axes_that_depends_on_the_width_is_an_error():
    shapes = {8: {"kernel": (6, 8)}, 32: {"kernel": (6, 4, 8)}}
    with pytest.raises(ValueError, match="its number of axes depends on the width"):
        infer_roles(shapes, base_width=8)


def test_widths_below_the_base_do_as_well():
    assert roles(TWO_LAYERS, widths=(4, 8), base=8)["last/kernel"] == "output"


# --- Models with state, or drawn too early ------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        lambda n, rngs: nnx.BatchNorm(n, rngs=rngs),
        lambda n, rngs: nnx.Dropout(0.5, rngs=rngs),
    ],
    ids=["batch norm", "dropout"],
)
def test_a_module_with_state_is_refused(layer):
    factory = chain(("first", linear(FEATURES)), ("stateful", layer), ("last", linear(out=1)))
    with pytest.raises(ValueError, match="has state other than parameters") as refusal:
        roles(factory)
    assert "stateful/" in str(refusal.value)


def test_a_recurrent_module_must_not_keep_a_key_for_its_carry():
    def factory(keep):
        class Net(nnx.Module):
            def __init__(self, width, *, rngs):
                cell = nnx.LSTMCell(FEATURES, width, rngs=rngs)
                self.rnn = nnx.RNN(cell, rngs=keep)
                self.last = nnx.Linear(width, CLASSES, rngs=rngs)

            def __call__(self, x):
                return self.last(jnp.asarray(self.rnn(x, rngs=nnx.Rngs(0)))[:, -1])

        return Net

    with pytest.raises(ValueError, match=r"nnx\.RNN: rngs=False when it is made"):
        roles(factory(True), SEQUENCES)
    found = roles(factory(False), SEQUENCES)
    gates = "igo"  # the forget gate is called if_ and hf
    assert {found[f"rnn/cell/i{g}/kernel"] for g in gates} == {"input"}
    assert {found[f"rnn/cell/h{g}/kernel"] for g in gates} == {"hidden"}
    assert {found[f"rnn/cell/h{g}/bias"] for g in gates} == {"vector"}
    model = as_model(factory(False), BASE, SEQUENCES)
    out = jax.eval_shape(model.apply, model.abstract_params(), SEQUENCES.validation)
    assert out.shape == (4, CLASSES)


def test_a_linen_module_with_state_is_refused():
    class WithBatchNorm(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=False)(linen.Dense(self.width)(x))
            return linen.Dense(CLASSES)(x)

    with pytest.raises(ValueError, match=r"variable collections other than params .*batch_stats"):
        roles(WithBatchNorm)


def test_a_factory_that_draws_its_own_random_numbers_is_refused():
    with pytest.raises(
        TypeError, match="every seed would start alike: write it as `lambda width, r"
    ):
        roles(lambda width: MLP(FEATURES, width, CLASSES, rngs=nnx.Rngs(0)))


def test_an_nnx_class_is_a_factory_itself():
    class Net(nnx.Module):
        def __init__(self, width, classes=CLASSES, *, rngs):
            self.first = nnx.Linear(FEATURES, width, rngs=rngs)
            self.last = nnx.Linear(width, classes, rngs=rngs)

        def __call__(self, x):
            return self.last(self.first(x))

    expected = {
        "first/bias": "vector",
        "first/kernel": "input",
        "last/bias": "fixed",
        "last/kernel": "output",
    }
    assert roles(Net) == expected
    assert roles(functools.partial(Net, classes=CLASSES + 1)) == expected
    with pytest.raises(TypeError, match="every seed would start alike"):
        roles(functools.partial(Net, rngs=nnx.Rngs(0)))


def test_something_that_is_no_model_is_refused():
    with pytest.raises(TypeError, match="must be a function of the width"):
        roles(MLP(FEATURES, 8, CLASSES, rngs=nnx.Rngs(0)).hidden)
    with pytest.raises(TypeError, match="returned int at width 8: expected a flax module"):
        roles(lambda width: width)
    with pytest.raises(ValueError, match="the model factory refuses width 8: din, width"):
        roles(lambda width, rngs: MLP(0, width, CLASSES, rngs=rngs))


# --- Nothing is allocated -----------------------------------------------------------------------


def test_roles_of_a_huge_model_are_found_without_allocating_it():
    # A kernel of 2**40 entries: 4 TiB.
    widths = (2**10, 2**20)
    expected = {"first/kernel": "input", "middle/kernel": "hidden", "last/kernel": "output"}
    factory = chain(("first", linear(4)), ("middle", linear()), ("last", linear(out=2)))
    found = anatomy(factory, setting_for((1, 4)), widths=widths, base=2**10)
    assert {path: found.leaves[path].role for path in expected} == expected
    factors = resolve(muP, found, "adam").factors(2**20)
    assert factors.learning_rate["middle/kernel"] == 2.0**-10


def test_roles_of_a_huge_linen_model_are_found_without_allocating_it():
    class Net(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.Dense(self.width, name="middle")(linen.Dense(self.width, name="first")(x))
            return linen.Dense(2, name="last")(x)

    found = roles(Net, setting_for((1, 4)), widths=(2**10, 2**20), base=2**10)
    assert found["middle/kernel"] == "hidden"


def test_a_huge_model_goes_through_resolve_sweep():
    resolved = resolve_sweep(
        chain(("first", linear(FEATURES)), ("middle", linear()), ("last", linear(out=2))),
        VECTORS,
        lambda learning_rate: optax.adam(learning_rate),
        "muP",
        widths=[2**20],
        base_width=2**10,
        hyperparameters={"learning_rate": 0.1},
        init_exponents={"first/kernel": 0, "middle/kernel": 0.5, "last/kernel": 0.5, "*bias": 0},
    )
    factors = resolved.factors(2**20)
    assert factors.init == {
        "first/bias": 1.0,
        "first/kernel": 1.0,
        "middle/bias": 1.0,
        "middle/kernel": 1.0,
        "last/bias": 1.0,
        "last/kernel": 2.0**-5,
    }
    assert "(1048576, 1048576)" in resolved.table(2**20)


# --- Plain functions and linen ------------------------------------------------------------------


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


def test_stacked_linen_layers_are_hidden_or_refused():
    class Block(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x, _):
            return linen.DenseGeneral(self.width, name="dense")(x), None

    class Net(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.Dense(self.width)(x)
            scanned = linen.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = scanned(self.width, name="blocks")(x, None)
            return linen.Dense(CLASSES)(x)

    right_or_refused({"blocks/dense/kernel": "hidden"}, Net)


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
