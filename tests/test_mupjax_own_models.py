"""Models that the package does not know, in flax.nnx and flax.linen, from roles to mechanism."""

import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import mupjax
from mupjax.coord_check import coord_check, slopes
from mupjax.data import digits
from mupjax.mechanism import decomposed, explain_dataset, format_mechanisms
from mupjax.verdict import format_summaries, summarize
from theory.decomposition import decomposition_observer
from theory.trajectory import Averaging
from tolerances import float_tolerance

# A sweep with the decomposition takes 40 s to compile on two idle cores.
pytestmark = pytest.mark.timeout(600)

PATCHES, PATCH, CLASSES = 4, 16, 10
LENGTH, VOCABULARY = 5, 6
WIDTHS, BASE = [8, 16, 32], 8
STEPS = 24
NAMES = ["SP", "muP"]


class Mixer(nnx.Module):
    """An MLP-Mixer (Tolstikhin et al., arXiv 2105.01601): tokens are mixed, then channels."""

    class Block(nnx.Module):
        def __init__(self, width, rngs):
            self.norms = nnx.Dict(
                tokens=nnx.LayerNorm(width, rngs=rngs), channels=nnx.LayerNorm(width, rngs=rngs)
            )
            self.tokens = nnx.Linear(PATCHES, PATCHES, rngs=rngs)
            self.channels = nnx.List(
                [nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)]
            )

        def __call__(self, x):
            across = self.norms["tokens"](x).swapaxes(1, 2)
            x = x + self.tokens(across).swapaxes(1, 2)
            up, down = self.channels
            return x + down(nnx.gelu(up(self.norms["channels"](x))))

    def __init__(self, width, *, rngs):
        self.patches = nnx.Linear(PATCH, width, rngs=rngs)
        self.blocks = nnx.List([Mixer.Block(width, rngs)])
        self.readout = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images):
        quarters = images.reshape(-1, 2, 4, 2, 4).swapaxes(2, 3).reshape(-1, PATCHES, PATCH)
        x = self.patches(quarters)
        for block in self.blocks:
            x = block(x)
        return self.readout(x.mean(axis=1))


class Recurrent(linen.Module):
    """A classifier of token sequences: embedding, LSTM, readout of the last state."""

    width: int

    def setup(self):
        self.embed = linen.Embed(VOCABULARY, self.width)
        self.rnn = linen.RNN(linen.OptimizedLSTMCell(self.width))
        self.readout = linen.Dense(VOCABULARY)

    def __call__(self, words):
        states = jnp.asarray(self.rnn(self.embed(words)))
        return self.readout(states[:, -1])


def recall():
    """Whole-number sequences, labelled by their last token but one: something to remember."""

    def draw(key, examples):
        words = jax.random.randint(key, (examples, LENGTH), 0, VOCABULARY)
        return words, words[:, -2]

    def loss(predict, batch):
        return optax.softmax_cross_entropy_with_integer_labels(predict(batch[0]), batch[1]).mean()

    return mupjax.Setting(
        "recall",
        lambda data, key, step: draw(jax.random.fold_in(key, step), 32),
        loss,
        draw(jax.random.key(1), 64),
    )


GATES = ("i", "f", "g", "o")


class Case(NamedTuple):
    model: Any
    setting: mupjax.Setting
    roles: dict[str, str]
    inner: str
    readout: str
    rates: list[float]


CASES = {
    "nnx mixer": Case(
        Mixer,
        digits(32, 64),
        {
            "patches/kernel": "input",
            "patches/bias": "vector",
            # Mixing tokens maps positions to positions, whose number does not grow.
            "blocks/0/tokens/kernel": "fixed",
            "blocks/0/tokens/bias": "fixed",
            "blocks/0/norms/tokens/scale": "vector",
            "blocks/0/norms/tokens/bias": "vector",
            "blocks/0/norms/channels/scale": "vector",
            "blocks/0/norms/channels/bias": "vector",
            "blocks/0/channels/0/kernel": "hidden",
            "blocks/0/channels/0/bias": "vector",
            "blocks/0/channels/1/kernel": "hidden",
            "blocks/0/channels/1/bias": "vector",
            "readout/kernel": "output",
            "readout/bias": "fixed",
        },
        "blocks/0/channels/1",
        "readout",
        [2.0**k for k in (-10, -8, -6, -4)],
    ),
    "linen lstm": Case(
        Recurrent,
        recall(),
        {
            "embed/embedding": "input",
            **{f"rnn/cell/i{gate}/kernel": "hidden" for gate in GATES},
            **{f"rnn/cell/h{gate}/kernel": "hidden" for gate in GATES},
            **{f"rnn/cell/h{gate}/bias": "vector" for gate in GATES},
            "readout/kernel": "output",
            "readout/bias": "fixed",
        },
        "rnn",
        "readout",
        [2.0**k for k in (-9, -7, -5, -3)],
    ),
}


def adam(learning_rate):
    return optax.adam(learning_rate)


@pytest.fixture(
    scope="module", params=["nnx mixer", pytest.param("linen lstm", marks=pytest.mark.slow)]
)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def swept(case):
    # Nearly the iterates themselves, a mark every second update: faithful within a few steps.
    averaging = Averaging(0.0, 0.5, first_stride=1, last_stride=2, warmup_steps=8)
    return mupjax.sweep(
        case.model,
        case.setting,
        adam,
        NAMES,
        widths=WIDTHS,
        base_width=BASE,
        hyperparameters={"learning_rate": case.rates},
        steps=STEPS,
        seeds=3,
        evaluations=1,
        observers=[decomposition_observer(averaging)],
    )


def test_roles_are_those_of_the_layers(case):
    resolved = mupjax.resolve_sweep(
        case.model,
        case.setting,
        adam,
        "muP",
        widths=WIDTHS,
        base_width=BASE,
        hyperparameters={"learning_rate": 0.1},
    )
    assert dict(resolved.roles) == case.roles
    factors = resolved.factors(32)
    assert {factors.learning_rate[p] for p, role in case.roles.items() if role == "hidden"} == {
        BASE / 32
    }
    # Flax draws embeddings with a std that falls with the width, which is put right.
    if "embed/embedding" in case.roles:
        assert factors.init["embed/embedding"] == pytest.approx((32 / BASE) ** 0.5)


def test_coordinates_stay_under_mup_and_grow_under_sp(case):
    checked = coord_check(
        case.model,
        case.setting,
        adam,
        NAMES,
        widths=[32, 256],
        base_width=32,
        hyperparameters={"learning_rate": 2.0**-7},
        steps=3,
        seeds=3,
    )
    found = {
        (s.parametrization, s.layer): s.slope
        for s in slopes(checked)
        if s.quantity == "change" and s.update == 3
    }
    # At finite width corrections of relative order width**-1/2 remain, most of them in the output,
    # of which the readout's initial values are a part.
    assert found["muP", case.inner] == pytest.approx(0.0, abs=0.2)
    assert found["muP", "output"] == pytest.approx(0.0, abs=0.35)
    assert found["SP", case.inner] > 0.35
    assert found["SP", "output"] > 0.5


def test_the_sweep_is_whole_and_the_tables_differ_beyond_the_base(case, swept):
    assert swept.loss.dims == ("parametrization", "width", "learning_rate", "seed")
    assert json.loads(swept.attrs["configuration"])["roles"] == case.roles
    assert (swept.status == 0).all()
    start = swept.eval_loss.isel(eval_step=0).mean()
    assert swept.loss.mean("seed").min() < 0.7 * start
    # Compiled code may round differently from lane to lane, which many steps enlarge.
    at_base = swept.train_loss.sel(width=BASE).isel(step=slice(0, 4))
    np.testing.assert_allclose(
        at_base.sel(parametrization="SP"), at_base.sel(parametrization="muP"), rtol=1e-4
    )
    # The largest rate, where a hidden layer's of a quarter tells.
    widest = swept.loss.sel(width=32).isel(learning_rate=-1)
    difference = widest.sel(parametrization="SP") - widest.sel(parametrization="muP")
    assert (abs(difference) > 1e-3).all()


def test_one_trial_is_the_model_trained_by_hand(case, swept):
    """Wide and under SP, where every layer has one rate and Flax's own initial values."""
    if case.model is not Mixer:
        pytest.skip("its embedding does not start at Flax's own scale")
    width, rate, seed = 32, case.rates[1], 2
    key = jax.random.fold_in(jax.random.key(seed), 0)
    graph, params = nnx.split(Mixer(width, rngs=nnx.Rngs(key)))
    optimizer = optax.adam(rate)
    batches = jax.random.fold_in(jax.random.key(seed), 1)

    def loss(params, batch):
        return case.setting.loss(nnx.merge(graph, params), batch)

    @jax.jit
    def step(params, state, t):
        batch = case.setting.sample(case.setting.data, batches, t)
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, curve = optimizer.init(params), []
    for t in range(4):
        params, state, value = step(params, state, t)
        curve.append(float(value))
    recorded = swept.train_loss.sel(parametrization="SP", width=width, seed=seed)
    np.testing.assert_allclose(recorded.isel(learning_rate=1)[:4], curve, rtol=1e-4)


def test_the_decomposition_adds_up(case, swept):
    total = swept.decomposition_total
    rounding = float_tolerance(jnp.float32, STEPS * 32)
    close = functools.partial(
        np.testing.assert_allclose, rtol=rounding, atol=rounding * float(abs(total).max())
    )
    layers = swept.decomposition_layer_total
    assert sorted(layers.layer.values) == sorted(case.roles)
    close(layers.sum("layer"), total)
    split = [path for path, role in case.roles.items() if role in ("input", "hidden", "output")]
    for width in WIDTHS:
        # All of a layer's eigenvalues: the trace of its alignment matrix, an inner product.
        last = swept.decomposition_layer_top.sel(width=width, component=width)
        close(last.transpose(*layers.sel(width=width).dims), layers.sel(width=width))
        first = swept.decomposition_layer_top.sel(width=width, component=1)
        moved = abs(first - last).max(("parametrization", "learning_rate", "seed"))
        assert (moved.sel(layer=split) > 0).all()
        whole = [path for path in case.roles if path not in split]
        assert (moved.sel(layer=whole) == 0).all()
        assert np.isnan(swept.decomposition_top.sel(width=width)[..., width:]).all()


def test_the_linearized_loss_is_faithful_at_moderate_rates(swept):
    moderate = swept.isel(learning_rate=slice(0, 2))
    assert float(moderate.decomposition_faithfulness.max()) < 0.05


def test_verdict_and_mechanism_read_the_result(swept):
    summaries = summarize(swept)
    assert set(summaries) == set(NAMES)
    assert "verdict" in format_summaries(summaries)
    data = decomposed(swept)["muP"]
    for width in WIDTHS:
        ends = data.initial_loss[width] + swept.decomposition_total.sel(
            parametrization="muP", width=width
        ).transpose("seed", "learning_rate")
        np.testing.assert_allclose(data.profiles[width][..., -1], ends, rtol=1e-4)
    found = explain_dataset(swept)
    for name in NAMES:
        report, own = found[name].report, swept.sel(parametrization=name)
        change = own.decomposition_final_loss - own.decomposition_initial_loss
        fall = -change.min(["learning_rate", "seed"])
        # Under SP the largest rate is too large for some.
        lost = (abs(own.decomposition_total - change) > fall).any(["width", "seed"])
        dropped = tuple(np.log2(own.learning_rate.values[lost.values]))
        assert (report.widths, report.seeds, report.dropped) == ((8, 16, 32), 3, dropped)
        assert len(dropped) < 2
        assert [e.width for e in report.explanations] == [8, 16]
    text = format_mechanisms(found)
    assert "muP: top-κ part against learning_rate, each width against 32" in text
    assert text.count("verdict") == len(NAMES)
