"""What models of one's own do with their parameters that is refused, and what is not."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

from mupjax import Model, muP, resolve_sweep
from mupjax.models import gpt2
from mupjax.program import Inner as Product
from toy_models import (
    BASE,
    BATCH,
    CLASSES,
    FEATURES,
    SEQUENCES,
    TOKENS,
    VECTORS,
    VOCABULARY,
    WIDE,
    WORDS,
    resolved,
    uses,
)

# --- What is refused ----------------------------------------------------------------------------


def roles(*args, **stated):
    return dict(resolved(*args, **stated).roles)


class OutByIn(nnx.Module):
    """Kernels stored as (out, in), under Flax's name."""

    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (CLASSES, width)))

    def __call__(self, x):
        return self.first(x) @ self.kernel[...].T


class Autoencoder(nnx.Module):
    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.first(x)) @ self.first.kernel[...].T


class TiedBesideAHead(nnx.Module):
    def __init__(self, width, *, rngs):
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.value = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x, readout_multiplier=1.0):
        x = self.embed(x)
        return {"words": readout_multiplier * self.embed.attend(x), "value": self.value(x)}


class LinenTiedBesideAHead(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        embed = linen.Embed(VOCABULARY, self.width, name="embed")
        return embed.attend(embed(x)), linen.Dense(1)(embed(x))


class VectorReadout(nnx.Module):
    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x):
        return self.first(x) @ self.scale[...]


@pytest.mark.parametrize(
    ("factory", "setting", "path", "advice"),
    [
        (OutByIn, VECTORS, "kernel", "as of role 'output'"),
        (VectorReadout, VECTORS, "scale", "as of role 'output'"),
        (Autoencoder, VECTORS, "first/kernel", "roles={'first/kernel': 'tied'}"),
        (TiedBesideAHead, WORDS, "embed/embedding", "roles={'embed/embedding': 'tied'}"),
        (LinenTiedBesideAHead, WORDS, "embed/embedding", "roles={'embed/embedding': 'tied'}"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_use_that_contradicts_the_inferred_role_is_refused(factory, setting, path, advice):
    with pytest.raises(ValueError, match=f"parameter '{path}' with shapes") as refusal:
        resolved(factory, setting)
    assert advice in str(refusal.value)


class WithReconstruction(nnx.Module):
    """Reads its embedding at both ends, but in two calls."""

    def __init__(self, width, *, rngs):
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x, back=False, readout_multiplier=1.0):
        h = jnp.tanh(self.embed(x))
        return readout_multiplier * self.embed.attend(h) if back else self.head(h)


@pytest.mark.parametrize("first", ["head", "reconstruction"])
def test_what_a_later_call_of_the_model_does_counts_as_much(first):
    def loss(predict, x):
        terms = [lambda: jnp.mean(predict(x)), lambda: 0.3 * jnp.mean(predict(x, back=True))]
        return sum(term() for term in (terms if first == "head" else terms[::-1]))

    setting = dataclasses.replace(WORDS, loss=loss)
    with pytest.raises(ValueError, match="'tied'"):
        resolved(WithReconstruction, setting)
    assert roles(WithReconstruction, setting, roles={"embed/*": "tied"})["head/kernel"] == "output"


class Gated(nnx.Module):
    """A hidden kernel with a gate for each of its entries."""

    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.mid = nnx.Linear(width, width, rngs=rngs)
        self.gate = nnx.Param(jnp.ones((width, width)))
        self.last = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        x = x @ (self.mid.kernel[...] * self.gate[...]) if self.gated else x * self.gate[0][None]
        return self.last(x)

    gated = True


class Row(Gated):
    gated = False


@pytest.mark.parametrize("factory", [Gated, Row])
def test_a_matrix_used_entry_by_entry_is_not_taken_for_a_hidden_layer(factory):
    """As hidden it would start as width**-0.5 and learn as width**-1."""
    with pytest.raises(ValueError, match=r"'gate' with shapes .* used entry by entry") as refusal:
        resolved(factory)
    assert "roles={'gate': 'hidden'}" in str(refusal.value)
    found = roles(factory, roles={"gate": "fixed"})
    assert (found["gate"], found["mid/kernel"]) == ("fixed", "hidden")


@pytest.mark.parametrize(
    "use",
    [
        lambda h, w: jax.lax.cond(h[0, 0] > 0, lambda h: h @ w, lambda h: 2 * h @ w, h),
        lambda h, w: jax.lax.while_loop(lambda h: h[0, 0] > 9, lambda h: h @ w, h),
        lambda h, w: h @ jnp.linalg.qr(w)[0],
        lambda h, w: (h @ jnp.pad(w, ((0, 0), (0, 1))))[:, :-1],
        lambda h, w: h @ (w @ w),
    ],
    ids=["cond", "while", "qr", "pad", "of two"],
)
def test_a_matrix_whose_product_is_not_followed_is_a_hidden_layer_s(use):
    def factory(width):
        def init(key):
            return {
                "enter": {"kernel": jnp.ones((FEATURES, width))},
                "w": jnp.ones((width, width)),
                "leave": {"kernel": jnp.ones((width, CLASSES))},
            }

        def apply(params, x):
            return use(x @ params["enter"]["kernel"], params["w"]) @ params["leave"]["kernel"]

        return Model(init, apply)

    assert roles(factory)["w"] == "hidden"


def test_a_sweep_refuses_it_too():
    with pytest.raises(ValueError, match="parameter 'kernel' with shapes"):
        resolve_sweep(
            OutByIn,
            VECTORS,
            lambda learning_rate: optax.adam(learning_rate),
            muP,
            widths=[WIDE],
            base_width=BASE,
            hyperparameters={"learning_rate": 0.1},
            init_exponents={"*": 0.0},
        )


def test_a_stated_role_is_not_questioned():
    assert roles(OutByIn, roles={"kernel": "output"})["kernel"] == "output"
    tied = roles(TiedBesideAHead, WORDS, roles={"embed/*": "tied"})
    assert tied["embed/embedding"] == "tied"


def own_attention(heads, power=0.5):
    """Attention made of plain dense layers, as many write it; logits over a power of the size."""

    class Attention(nnx.Module):
        def __init__(self, width, *, rngs):
            self.first = nnx.Linear(FEATURES, width, rngs=rngs)
            self.q, self.k, self.v = (nnx.Linear(width, width, rngs=rngs) for _ in "qkv")
            self.last = nnx.Linear(width, CLASSES, rngs=rngs)
            self.heads = heads(width)

        def __call__(self, x):
            x = self.first(x)
            q, k, v = (
                layer(x).reshape(BATCH, TOKENS, self.heads, -1)
                for layer in (self.q, self.k, self.v)
            )
            logits = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** power
            mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), v)
            return self.last(mixed.reshape(x.shape))

    return Attention


LARGER, MORE = own_attention(lambda width: 2), own_attention(lambda width: width // 4)
QUERIES = {"q/kernel": "query", "q/bias": "query_vector"}


def test_attention_of_ones_own_with_larger_heads_must_be_said_what_it_does():
    with pytest.raises(ValueError, match="sums over 4 entries at width 8 and 16 at width 32") as no:
        resolved(LARGER, SEQUENCES)
    assert "roles={'*/q/kernel': 'query'" in str(no.value)
    with pytest.raises(ValueError, match="muP scales such products otherwise"):
        resolved(LARGER, SEQUENCES, attention="1/sqrt(head_dim)")
    # What muP asks for, but not SP.
    with pytest.raises(ValueError, match="SP scales such products otherwise"):
        resolved(LARGER, SEQUENCES, attention="1/head_dim")
    resolved(MORE, SEQUENCES)


@pytest.mark.parametrize(("said", "missing"), [("1/sqrt(head_dim)", 0.5), ("1/head_dim", 0.0)])
def test_stated_queries_carry_what_the_model_leaves_open(said, missing):
    model = own_attention(lambda width: 2, power=1 - missing)
    found = resolved(
        model, SEQUENCES, attention=said, roles=QUERIES, application="multipliers"
    ).factors(WIDE)
    ratio = WIDE / BASE
    assert found.multiplier["q/kernel"] == pytest.approx(ratio**-missing)
    assert found.multiplier["q/bias"] == pytest.approx(ratio**-missing)
    assert found.multiplier["k/kernel"] == 1.0


class Attentions(nnx.Module):
    """Flax's attention, with or without norms of its queries, and then two of one's own."""

    def __init__(self, width, *, rngs, normalised=False):
        self.flax = nnx.MultiHeadAttention(
            2, width, normalize_qk=normalised, decode=False, rngs=rngs
        )
        self.own = nnx.List([LARGER(width, rngs=rngs), LARGER(width, rngs=rngs)])
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.back = nnx.Linear(width, FEATURES, rngs=rngs)

    def __call__(self, x):
        x = self.back(self.flax(self.first(x)))
        return sum(own(x) for own in self.own)


@pytest.mark.parametrize("normalised", [False, True])
def test_one_attention_that_is_known_does_not_excuse_another(normalised):
    def factory(width, rngs):
        return Attentions(width, normalised=normalised, rngs=rngs)

    said: dict[str, Any] = {"attention": "1/sqrt(head_dim)"}
    with pytest.raises(ValueError, match=r"made by 'own/0/k/bias', .*'own/0/q/kernel'"):
        resolved(factory, SEQUENCES, **said)
    first = {f"own/0/{path}": role for path, role in QUERIES.items()}
    with pytest.raises(ValueError, match=r"made by 'own/1/k/bias', .*'own/1/q/kernel'"):
        resolved(factory, SEQUENCES, roles=first, **said)
    both = {f"own/*/{path}": role for path, role in QUERIES.items()}
    found = resolved(factory, SEQUENCES, roles=both, application="multipliers", **said).factors(
        WIDE
    )
    carrying = {path for path, factor in found.multiplier.items() if factor == 0.5}
    assert {"own/0/q/kernel", "own/1/q/kernel"} < carrying


def test_what_made_a_product_is_followed_from_the_last_product_on():
    def apply(params, x):
        q, k = (
            jnp.cumsum((x @ params["w"]) @ params[n] + params["b"][None, None], axis=1)
            for n in "qk"
        )
        return q @ k.swapaxes(1, 2)

    found = uses(apply, {"w": (5, 8), "q": (8, 8), "k": (8, 8), "b": (8,)}, SEQUENCES)
    assert found.inner == (Product(8, frozenset({"q", "k", "b"}), 1.0, normalised=True),)


def test_the_decoders_of_the_package_pass():
    def factory(width, rngs):
        return gpt2(VOCABULARY, width, layers=1, head_size=4, context=TOKENS, rngs=rngs)

    found = roles(factory, WORDS)
    assert set(found.values()) >= {"input", "hidden", "output"}


# --- Other habits -------------------------------------------------------------------------------


class Shared(nnx.Module):
    """One layer under two names, a parameter of its own kind, and a layer called query."""

    class Weight(nnx.Param):
        pass

    def __init__(self, width, *, rngs):
        self.query = nnx.Linear(FEATURES, width, rngs=rngs)
        self.again = self.middle = nnx.Linear(width, width, rngs=rngs)
        self.kernel = Shared.Weight(jax.random.normal(rngs.params(), (width, CLASSES)))

    def __call__(self, x):
        return self.middle(self.again(self.query(x))) @ self.kernel[...]


def test_shared_layers_are_one_parameter():
    assert roles(Shared) == {
        "again/bias": "vector",
        "again/kernel": "hidden",
        "kernel": "output",
        "query/bias": "vector",
        "query/kernel": "input",
    }


class Inner(linen.Module):
    core: linen.Module

    @linen.compact
    def __call__(self, x):
        return linen.Dense(x.shape[-1])(self.core(x))


class SharedLinen(linen.Module):
    """Modules made in `setup`, in a list and a dict, and one handed to two others."""

    width: int

    def setup(self):
        self.layers = [linen.Dense(self.width), linen.Dense(self.width)]
        self.core = linen.DenseGeneral((2, self.width // 2), name="core")
        self.merge = linen.DenseGeneral(self.width, axis=(-2, -1))
        self.heads = {"a": linen.Dense(CLASSES), "b": linen.Dense(1)}

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        x = self.merge(self.core(x) + self.core(2 * x))
        return {name: head(x) for name, head in self.heads.items()}


def test_linen_modules_of_setup_in_lists_and_dicts():
    found = roles(SharedLinen)
    kernels = {path.split("/")[0]: role for path, role in found.items() if path.endswith("kernel")}
    assert kernels == {
        "layers_0": "input",
        "layers_1": "hidden",
        "core": "hidden",
        "merge": "hidden",
        "heads_a": "output",
        "heads_b": "output",
    }


def test_a_linen_module_handed_to_two_others_is_one_parameter():
    class Net(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.Dense(self.width, name="first")(x)
            core = linen.DenseGeneral(self.width, name="core")
            x = Inner(core, name="one")(x) + Inner(core, name="two")(x)
            return linen.Dense(CLASSES, name="last")(x)

    found = roles(Net)
    assert {path for path, role in found.items() if role == "hidden"} == {
        "core/kernel",
        "one/Dense_0/kernel",
        "two/Dense_0/kernel",
    }


def test_partitioned_linen_parameters_are_unboxed():
    class Net(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            start = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
            x = linen.Dense(self.width, kernel_init=start, name="first")(x)
            return linen.Dense(CLASSES, name="last")(x)

    found = roles(Net)
    assert (found["first/kernel"], found["last/kernel"]) == ("input", "output")


class Keeping(nnx.Module):
    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.table = jnp.sin(jnp.arange(width))
        self.last = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.last(self.first(x) + self.table[None])


def test_an_array_that_is_no_parameter_is_refused():
    with pytest.raises(ValueError, match=r"array 'table' that is no parameter.*compute it where"):
        roles(Keeping)


class Counting(nnx.Module):
    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.count = nnx.Param(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        return self.first(x)


class Dropping(nnx.Module):
    def __init__(self, width, *, rngs):
        self.first = nnx.Linear(FEATURES, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x):
        return self.dropout(self.first(x))


class LinenDropping(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x, train=True):
        x = linen.Dropout(0.5, deterministic=not train)(linen.Dense(self.width)(x))
        return linen.Dense(CLASSES)(x)


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        (Counting, "parameter 'count' is of type int32, which no optimizer can train"),
        (Dropping, "no random keys: make dropout deterministic"),
        (LinenDropping, "no random keys: make dropout deterministic"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_trained_is_refused(factory, text):
    with pytest.raises(ValueError, match=text):
        resolve_sweep(
            factory,
            VECTORS,
            lambda learning_rate: optax.adam(learning_rate),
            "SP",
            widths=[BASE],
            hyperparameters={"learning_rate": 0.1},
        )
