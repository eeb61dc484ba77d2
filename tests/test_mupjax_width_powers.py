"""Coordinate checks of every model: measured powers of the width against those that are counted.

Every layer's output at the start, and its change by one update of each parameter by itself, under
every parametrization and optimizer; `width_powers` counts what they should be. The loss is linear
in the outputs, so that its gradient there is the same at every width: under muP the error of any
other loss still changes with the width, as the initial outputs vanish.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mupjax import Setting
from mupjax.adapters import as_model
from mupjax.coord_check import coord_check, slopes
from mupjax.matrix_optimizers import muon
from mupjax.models import CNN, MLP, gpt2, llama
from mupjax.roles import leaf_paths
from width_powers import ATTENTION, Count, decoder_changes, plain_changes, starts
from width_responses import powers, resolved, responses, with_logits

TOLERANCE = 0.1
OUTPUTS, VOCABULARY, LENGTH = 4, 4, 3
ALL = ("SP", "NTP", "muP")


def linear(inputs, shape):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    batch = (inputs, weights)
    return Setting(
        "linear",
        lambda data, key, step: data,
        lambda predict, batch: jnp.sum(predict(batch[0]) * batch[1]),
        batch,
        batch,
    )


# Few examples: an update goes along each of them by a share that falls with their number, and a
# small share shows late in the width.
def arrays(*shape):
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    return linear(inputs, (shape[0], OUTPUTS))


def text():
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(2, LENGTH))
    return linear(jnp.asarray(tokens, jnp.int32), (2, LENGTH, VOCABULARY))


class Case(NamedTuple):
    factory: Any
    setting: Setting
    names: tuple[str, ...] = ALL
    options: dict[str, Any] = {}  # noqa: RUF012
    heads: str = ""
    power: float = 0.5
    rope: bool = True


def decoder(make, heads, **options):
    """Of one block; heads: which of number and size of the heads `grows`."""
    given = {"heads": 2} if heads == "size" else {"head_size": 4}

    def factory(width, rngs):
        return make(VOCABULARY, width, layers=1, hidden_ratio=1, rngs=rngs, **given, **options)

    return factory


_BIASED = {"context": LENGTH, "use_bias": True}
CASES = {
    "mlp": Case(
        lambda width, rngs: MLP(8, width, OUTPUTS, depth=2, norm=True, rngs=rngs), arrays(6, 8)
    ),
    "cnn": Case(
        lambda width, rngs: CNN(2, width, OUTPUTS, blocks=1, rngs=rngs), arrays(2, 3, 3, 2)
    ),
    "llama, heads grow in size, fixed kv_heads, scale 1/d": Case(
        decoder(llama, "size", kv_heads=1, attention_scale="1/head_dim"),
        text(),
        options={"attention": "1/head_dim"},
        heads="size",
        power=1.0,
    ),
    "gpt2, heads grow in number, biases, layer norm": Case(
        decoder(gpt2, "number", norm="layer", **_BIASED), text(), rope=False, heads="number"
    ),
    "llama, heads grow in size, scale 1/sqrt(d) made up for": Case(
        decoder(llama, "size"),
        text(),
        options={"attention": "1/sqrt(head_dim)"},
        heads="size",
    ),
    "llama, heads grow in number, queries_per_kv": Case(
        decoder(llama, "number", queries_per_kv=2), text(), heads="number"
    ),
    "gpt2, heads grow in size, biases": Case(
        decoder(gpt2, "size", attention_scale="1/head_dim", **_BIASED),
        text(),
        options={"attention": "1/head_dim"},
        rope=False,
        heads="size",
        power=1.0,
    ),
    "gpt2, tied, heads grow in number": Case(
        decoder(gpt2, "number", context=LENGTH, tied=True),
        text(),
        names=("NTP", "muP"),
        options={"roles": {"embed/embedding": "tied"}},
        rope=False,
        heads="number",
    ),
}
FAST = list(CASES)[:4]
# Widths, numbers of seeds and base widths at which nothing but the power is left to see; grouped
# queries, of which there are few at small widths, take larger ones. Where a scale is made up for,
# logits are of order one at the base width, and the softmax is far from its limit.
MANY = {
    model: ((128, 512), 120, 128)
    if "queries_per_kv" in model
    else ((64, 256), 480, 4 if "made up for" in model else 64)
    for model in CASES
} | {"cnn": ((64, 256), 120, 64)}
SIZES = {"mlp": ((48, 192), 48), "cnn": ((32, 128), 16)}


@functools.cache
def measured(model, widths=None, seeds=None, base_width=None):
    case = CASES[model]
    usual = SIZES.get(model, ((40, 160), 24))
    widths, seeds = widths or usual[0], seeds or usual[1]
    tables = resolved(
        case.factory,
        case.setting,
        base_width or widths[0],
        case.names,
        ("sgd", "adam", "muon"),
        measure=not case.heads,
        **case.options,
    )

    def coordinates(outputs):
        # A tied readout's products still lack the multiplier that makes them the outputs.
        kept = {layer: h for layer, h in outputs.items() if layer != "embed/attend"}
        return with_logits(kept, case.power, case.rope) if case.heads else kept

    return powers(
        {
            width: responses(
                case.factory, case.setting, width, tables, seeds, coordinates, model == "cnn"
            )
            for width in widths
        },
        many_heads=case.heads == "number",
    )


def counted(case, name, optimizer):
    grows = case.heads == "size"
    carried = ATTENTION[name] - case.power if grows else 0.0
    return Count(name, optimizer, head_grows=grows, carried=carried)


def cells(models):
    return [
        pytest.param(model, name, marks=() if model in FAST else pytest.mark.slow)
        for model in models
        for name in CASES[model].names
    ]


class Off(NamedTuple):
    """By how much a power is off, its standard error, and whether the theory says a single one."""

    where: tuple[str, ...]
    by: float
    error: float
    sharp: bool


def starts_off(case, name, begin):
    expected = starts(counted(case, name, "sgd"), [layer for layer in begin if layer != "loss"])
    found = []
    for layer, low in expected.items():
        # A tied readout meets the token's own embedding in the stream: a sum of one sign.
        own = layer == "output" and "tied" in case.options.get("roles", {}).values()
        power, error = begin[layer]
        off = max(low - power, power - (low + 0.5 if own else low))
        found.append(Off((layer,), off, error, not own))
    return found


def changes_off(case, name, optimizer, begin, moved):
    count = counted(case, name, optimizer)
    changes = decoder_changes if case.heads else plain_changes
    found = []
    for parameter, at in moved.items():
        if parameter.endswith("key/bias") and not case.rope:
            # A constant added to all logits of a query: the softmax does not see it.
            continue
        expected = changes(count, parameter, list(begin))
        reached = {layer for layer, (power, _) in at.items() if np.isfinite(power)}
        assert reached == set(expected), parameter
        for layer in reached:
            # Where the theory says two powers, the measurement lies between.
            low, high = min(expected[layer]), max(expected[layer])
            power, error = at[layer]
            off = max(low - power, power - high)
            found.append(Off((parameter, layer), off, error, low == high))
    # Most say one.
    assert sum(one.sharp for one in found) > 0.6 * len(found)
    return found


@pytest.mark.parametrize(("model", "name"), cells(CASES))
def test_initial_outputs_have_the_powers_of_the_theory(model, name):
    begin, _ = measured(model)["sgd", name]
    found = starts_off(CASES[model], name, begin)
    assert found
    assert [off for off in found if not off.by < TOLERANCE + 3 * off.error] == []


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
@pytest.mark.parametrize(("model", "name"), cells(CASES))
def test_changes_have_the_powers_of_the_theory(model, name, optimizer):
    found = changes_off(CASES[model], name, optimizer, *measured(model)[optimizer, name])
    assert [off for off in found if not off.by < TOLERANCE + 3 * off.error] == []


@pytest.mark.slow  # minutes for each model, and some 10 GB
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MANY)
def test_with_many_seeds_every_power_is_within_a_tenth(model):
    case, found = CASES[model], []
    for (optimizer, name), (begin, moved) in measured(model, *MANY[model]).items():
        found += starts_off(case, name, begin)
        found += changes_off(case, name, optimizer, begin, moved)
    # Else the tenth would be one of chance.
    assert [off for off in found if not off.error < TOLERANCE / 2] == []
    assert [off for off in found if not off.by < TOLERANCE] == []


def optimizer(name):
    """As `width_responses.OPTIMIZERS`, for the engine."""
    if name == "muon":
        return lambda learning_rate, roles: muon(learning_rate, roles=roles, eps=1e-20)
    if name == "adam":
        return lambda learning_rate: optax.adam(learning_rate, eps=1e-20)
    return lambda learning_rate: optax.sgd(learning_rate)


@pytest.mark.slow  # compiles a training for every model and optimizer
@pytest.mark.parametrize("name", ["sgd", "adam", "muon"])
@pytest.mark.parametrize(
    "model", [model for model, case in CASES.items() if case.names == ALL and case.heads != "size"]
)
def test_a_few_whole_updates_have_the_largest_powers(model, name):
    """In training, with a rate so small that features stay in the linear range.

    Where the head size grows, powers half apart meet in every layer.
    """
    case, steps = CASES[model], 3
    dataset = coord_check(
        case.factory,
        case.setting,
        optimizer(name),
        ALL,
        widths=[64, 256],
        base_width=64,
        hyperparameters={"learning_rate": 1e-5 if name == "adam" else 1e-4},
        steps=steps,
        seeds=16,
        optimizer_family="spectral" if name == "muon" else None,
        **case.options,
    )
    layers = [str(layer) for layer in dataset.layer.values]
    parameters = parameters_of(case)
    changes = decoder_changes if case.heads else plain_changes
    for slope in slopes(dataset):
        if (slope.quantity, slope.update) != ("change", steps):
            continue
        count = counted(case, slope.parametrization, name)
        counts = [
            max(expected[slope.layer])
            for parameter in parameters
            if slope.layer in (expected := changes(count, parameter, layers))
        ]
        # A sum of several parameters' powers half apart lies between them at these widths; in
        # decoders, where many small ones meet a large one, also one of powers a whole apart.
        high = max(counts)
        low = min(power for power in counts if power >= high - (1.0 if case.heads else 0.5))
        band = TOLERANCE + slope.interval[1] - slope.interval[0]
        assert low - band < slope.slope < high + band, slope


def parameters_of(case):
    model = as_model(case.factory, 64, case.setting)
    return list(leaf_paths(model.abstract_params()))
