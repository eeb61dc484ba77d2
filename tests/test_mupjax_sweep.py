"""The sweep: equal to a plain loop however it is laid out; resumable; honest about divergence.

The programs here are compiled without XLA's optimisations, which halves the time; the test of
several devices runs in a process of its own, with them.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
from flax import nnx

import mupjax
import mupjax.execute
import mupjax.groups
from mupjax import results
from mupjax.adapters import as_model
from mupjax.models import MLP, RMSNorm
from mupjax.plan import Chunking, pads_exactly
from mupjax.roles import leaf_paths, map_leaves
from mupjax.train import STATUS
from tolerances import float_tolerance

D, OUTPUTS, B, EXAMPLES = 3, 2, 8, 32


@pytest.fixture(scope="module", autouse=True)
def unoptimised_programs():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_close(found, expected, steps, name=""):
    """Losses after `steps` updates of a model whose sums have about 64 terms."""
    np.testing.assert_allclose(
        np.asarray(found),
        np.asarray(expected),
        rtol=float_tolerance(np.float32, operations=64 * max(steps, 1)),
        atol=1e-7,
        err_msg=name,
    )


# Settings and models ----------------------------------------------------------------------------


def regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2 * EXAMPLES, D)).astype(np.float32)
    pairs = (x, np.sin(2 * x[:, :OUTPUTS]) + 0.5)
    train = jax.tree.map(lambda a: jnp.asarray(a[:EXAMPLES]), pairs)
    held_out = jax.tree.map(lambda a: jnp.asarray(a[EXAMPLES:]), pairs)

    def sample(data, key, step):
        index = jax.random.randint(jax.random.fold_in(key, step), (B,), 0, EXAMPLES)
        return jax.tree.map(lambda a: a[index], data)

    def loss(predict, batch):
        return jnp.mean((predict(batch[0]) - batch[1]) ** 2)

    return mupjax.Setting("regression", sample, loss, held_out, train)


def one_draw(shapes):
    """Initial values from a single normal draw (every draw costs compile time).

    Kernels have variance 1/fan_in, norm scales mean 1; no leaf starts as a constant.
    """
    paths = {path: leaf.shape for path, leaf in leaf_paths(shapes).items()}
    ends = np.cumsum([int(np.prod(shape)) for shape in paths.values()])

    def init(key):
        flat = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1])
        drawn = dict(zip(paths, flat, strict=True))

        def leaf(path, like):
            values = drawn[path].reshape(like.shape)
            if path.endswith("kernel"):
                return values * like.shape[0] ** -0.5
            return 0.1 * values + (1.0 if path.endswith("scale") else 0.0)

        return map_leaves(leaf, shapes)

    return init


def net(width):
    """Two hidden layers with biases: every role but `fixed` matrices occurs."""
    shapes = {
        "enter": {"kernel": jnp.zeros((D, width)), "bias": jnp.zeros(width)},
        "mix": {"kernel": jnp.zeros((width, width))},
        "readout": {"kernel": jnp.zeros((width, OUTPUTS)), "bias": jnp.zeros(OUTPUTS)},
    }

    def affine(layer, x):
        return x @ layer["kernel"] + (layer["bias"][None] if "bias" in layer else 0.0)

    def apply(params, x, width=None):
        h = jnp.tanh(affine(params["mix"], jnp.tanh(affine(params["enter"], x))))
        return affine(params["readout"], h)

    return mupjax.Model(one_draw(shapes), apply, options=frozenset({"width"}))


# The same as would be measured, without the time that measuring takes.
NET_INIT = {"enter/*": 0.0, "mix/kernel": 0.5, "readout/kernel": 0.5}


def line(width):
    """f(x) = v x with v = sum(w) / sqrt(n) and w_0 = 1, so that SGD on `parabola` is a power:

    v_t = sqrt(n) prod_s (1 - eta_s), and the loss is v_t**2 / 2.
    """

    def apply(params, x):
        return (x * jnp.full((1, width), width**-0.5)) @ params["readout"]["kernel"]

    return mupjax.Model(lambda key: {"readout": {"kernel": jnp.ones((width, 1))}}, apply)


def parabola():
    ones = jnp.ones((2, 1))
    return mupjax.Setting(
        "parabola",
        lambda data, key, step: data,
        lambda predict, batch: 0.5 * jnp.mean(predict(batch) ** 2),
        ones,
        ones,
    )


def sgd(learning_rate):
    return optax.sgd(learning_rate)


def momentum(learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)


def adam(learning_rate, b1=0.9):
    return optax.adam(learning_rate, b1=b1)


def adamw(learning_rate, weight_decay=0.1):
    return optax.adamw(learning_rate, weight_decay=weight_decay)


def sweep_line(**changes):
    """SGD on the parabola; the base width is 4, so that all factors are 1 there."""
    arguments = {
        "widths": [4],
        "hyperparameters": {"learning_rate": 0.5},
        "steps": 3,
        "base_width": 4,
        "init_exponents": {"*": 0.5},
        "strategy": "bucketed",
    }
    return mupjax.sweep(line, parabola(), sgd, "SP", **(arguments | changes))


def timing(dataset):
    return json.loads(dataset.attrs["timing"])


def batch_checksum():
    """Records a number per step that tells batches apart."""

    def checksum(batch):
        weights = jnp.arange(1.0, B + 1)
        return sum(jnp.sum(jnp.sum(leaf, axis=1) * weights) for leaf in jax.tree.leaves(batch))

    def init(params, model, setting):
        return jnp.zeros((STEPS,))

    def update(state, seen):
        return state.at[seen.step].set(checksum(seen.batch))

    return mupjax.Observer(
        "batch", init, update, lambda state: {"checksum": state}, {"checksum": ("step",)}
    )


# (a) A plain loop -------------------------------------------------------------------------------


def train_by_hand(width, factors, roles, points, seeds, steps, marks):
    """Losses of every (point, seed), one trial at a time; each parameter has its own optimizer.

    Returns train losses (P, S, T) and evaluation losses (P, S, E).
    """
    model, setting = as_model(net, width, regression()), regression()
    default = {"b1": 0.9, "weight_decay": 0.0, "init_scale": 1.0, "output_multiplier": 1.0}

    def initial(seed, point):
        leaves = leaf_paths(model.init(jax.random.fold_in(jax.random.key(seed), 0)))
        return {
            path: leaf * factors.init[path] * (point["init_scale"] if leaf.ndim > 1 else 1.0)
            for path, leaf in leaves.items()
        }

    def loss(params, batch, point):
        used = {
            path: leaf
            * factors.multiplier[path]
            * (point["output_multiplier"] if path.startswith("readout/") else 1.0)
            for path, leaf in params.items()
        }
        nested = map_leaves(lambda path, leaf: used[path], model.abstract_params())
        return setting.loss(lambda x: model.apply(nested, x), batch)

    def optimizer(path, point):
        rate = point["learning_rate"] * factors.learning_rate[path]
        rate = rate * point.get(f"{roles[path]}_learning_rate_multiplier", 1.0)
        return optax.adamw(
            rate,
            b1=point["b1"],
            eps=1e-8 * factors.adam_eps[path],
            weight_decay=point["weight_decay"] * factors.weight_decay[path],
        )

    @jax.jit
    def start(seed, point):
        params = initial(seed, point)
        return params, {path: optimizer(path, point).init(params[path]) for path in params}

    @jax.jit
    def step(params, states, point, seed, t):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        batch = setting.sample(setting.data, key, t)
        value, gradient = jax.value_and_grad(loss)(params, batch, point)
        new_params, new_states = {}, {}
        for path, leaf in params.items():
            update, new_states[path] = optimizer(path, point).update(
                gradient[path], states[path], leaf
            )
            new_params[path] = leaf + update
        return new_params, new_states, value

    evaluate = jax.jit(lambda params, point: loss(params, setting.validation, point))
    train = np.full((len(points), len(seeds), steps), np.nan)
    evaluation = np.full((len(points), len(seeds), len(marks)), np.nan)
    for p, given in enumerate(points):
        point = default | given
        for s, seed in enumerate(seeds):
            params, states = start(seed, point)
            for t in range(steps + 1):
                if t in marks:
                    evaluation[p, s, list(marks).index(t)] = evaluate(params, point)
                if t < steps:
                    params, states, train[p, s, t] = step(params, states, point, seed, t)
    return train, evaluation


def points_of(axes):
    grid = np.meshgrid(*axes.values(), indexing="ij")
    return [
        dict(zip(axes, map(float, values), strict=True))
        for values in zip(*map(np.ravel, grid), strict=True)
    ]


STEPS, WIDTHS, SEEDS = 7, [4, 12], [3, 0]
AXES = {"learning_rate": [0.003, 0.02], "b1": [0.5, 0.9]}
ADAM_SWEEP: dict[str, Any] = {
    "widths": WIDTHS,
    "hyperparameters": AXES,
    "steps": STEPS,
    "seeds": SEEDS,
    "base_width": 8,
    "evaluations": 3,
    "init_exponents": NET_INIT,
}


@pytest.fixture(scope="module")
def adam_grid():
    """Adam on `net`: two parametrizations, two widths, two axes, two seeds."""
    return mupjax.sweep(
        net,
        regression(),
        adam,
        ["SP", "muP"],
        observers=[batch_checksum()],
        strategy="bucketed",
        **ADAM_SWEEP,
    )


def test_one_sweep_equals_a_loop_over_trials_and_steps(adam_grid):
    for name in ("SP", "muP"):
        resolved = mupjax.resolve_sweep(net, regression(), adam, name, **ADAM_SWEEP)
        for width in WIDTHS:
            found = adam_grid.sel(parametrization=name, width=width)
            train, evaluation = train_by_hand(
                width,
                resolved.factors(width),
                resolved.roles,
                points_of(AXES),
                SEEDS,
                STEPS,
                found.eval_step.values,
            )
            assert_close(found.train_loss.values.reshape(train.shape), train, STEPS)
            assert_close(found.eval_loss.values.reshape(evaluation.shape), evaluation, STEPS)


def test_the_loop_tells_the_parametrizations_and_hyperparameters_apart(adam_grid):
    # Otherwise the test above would prove little.
    curves = adam_grid.train_loss
    for axis in ("parametrization", "learning_rate", "b1", "seed", "width"):
        gap = abs(curves.isel({axis: 0}, drop=True) - curves.isel({axis: 1}, drop=True))
        assert float(gap.max("step").min()) > 1e-3, axis


def test_resolve_sweep_takes_every_argument_of_sweep(adam_grid, tmp_path):
    plain = mupjax.resolve_sweep(net, regression(), adam, "muP", **ADAM_SWEEP)
    full = mupjax.resolve_sweep(
        net,
        regression(),
        adam,
        "muP",
        **ADAM_SWEEP,
        strategy="bucketed",
        chunk_size=3,
        out=tmp_path / "run.nc",
        existing="error",
        progress=False,
    )
    assert full.factors(12) == plain.factors(12)


# (e) Compilations -------------------------------------------------------------------------------


def test_two_parametrizations_and_two_axes_share_one_program_per_width(adam_grid):
    assert timing(adam_grid)["compilations"] == len(WIDTHS)
    assert [p["widths"] for p in timing(adam_grid)["programs"]] == [[w] for w in WIDTHS]


# (f) Common random numbers ----------------------------------------------------------------------


def test_trials_of_a_seed_see_the_same_batches_whatever_else_differs(adam_grid):
    seen = adam_grid.batch_checksum.transpose(..., "seed", "step").values
    seen = seen.reshape(-1, len(SEEDS), STEPS)
    np.testing.assert_array_equal(seen, np.broadcast_to(seen[:1], seen.shape))
    assert len(np.unique(seen[0])) == seen[0].size  # every seed and step has a batch of its own


def test_without_common_random_numbers_every_trial_draws_its_own_batches():
    arguments: dict[str, Any] = ADAM_SWEEP | {"hyperparameters": {"learning_rate": [0.01, 0.02]}}
    found = mupjax.sweep(
        net,
        regression(),
        sgd,
        ["SP", "muP"],
        observers=[batch_checksum()],
        common_random_numbers=False,
        strategy="bucketed",
        **arguments,
    )
    seen = found.batch_checksum.values
    assert len(np.unique(seen)) == seen.size
    # What a seed fixes beside the batches stays shared.
    start = found.eval_loss.isel(eval_step=0)
    np.testing.assert_array_equal(start.isel(learning_rate=0), start.isel(learning_rate=1))


# (j) The evaluation curve -----------------------------------------------------------------------


def test_the_curve_begins_at_the_initial_loss_and_ends_at_the_final_one(adam_grid):
    assert adam_grid.eval_step.values.tolist() == [0, 2, 5, 7]
    np.testing.assert_array_equal(adam_grid.eval_loss.isel(eval_step=-1), adam_grid.loss)
    resolved = mupjax.resolve_sweep(net, regression(), adam, "muP", **ADAM_SWEEP)
    setting = regression()
    for width in WIDTHS:
        model, factors = as_model(net, width, setting), resolved.factors(width)
        for seed in SEEDS:
            params = model.init(jax.random.fold_in(jax.random.key(seed), 0))
            params = map_leaves(lambda path, leaf, f=factors: leaf * f.init[path], params)
            loss = setting.loss(lambda x, m=model, p=params: m.apply(p, x), setting.validation)
            first = adam_grid.eval_loss.sel(parametrization="muP", width=width, seed=seed)
            assert_close(first.isel(eval_step=0), float(loss), 1)


def test_more_evaluations_than_steps_evaluate_after_every_step():
    found = sweep_line(evaluations=10)
    assert found.loss.dims == ("width", "seed")
    assert found.eval_step.values.tolist() == [0, 1, 2, 3]
    expected = 2.0 * 0.25 ** np.arange(4)
    assert_close(found.eval_loss.values, expected[None, None], 3)
    assert_close(found.train_loss.values, expected[None, None, :3], 3)


def test_a_single_step_and_a_loss_that_is_infinite_only_after_it():
    found = sweep_line(
        steps=1, evaluations=10, hyperparameters={"learning_rate": [0.5, 1e30]}, seeds=[7]
    )
    assert found.sizes["learning_rate"] == 2
    assert found.seed.values.tolist() == [7]
    assert found.eval_step.values.tolist() == [0, 1]
    assert_close(found.train_loss.values.ravel(), 2.0, 1)
    assert found.status.values.ravel().tolist() == [STATUS["ok"], STATUS["non_finite"]]
    assert found.diverged_step.values.ravel().tolist() == [-1, 1]
    assert_close(found.loss.values.ravel(), [0.5, np.nan], 1)


def test_an_axis_of_one_value_stays_a_dimension_and_a_number_does_not():
    kept = sweep_line(hyperparameters={"learning_rate": [0.5]})
    assert kept.loss.dims == ("width", "learning_rate", "seed")
    assert results.configuration_of(kept)["hyperparameters"] == {"learning_rate": [0.5]}


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="'learning_rate' has an empty grid"):
        sweep_line(hyperparameters={"learning_rate": []})


# (b) Strategies ---------------------------------------------------------------------------------


def mlp(width):
    """The built-in MLP with biases and norms, none of which starts as a constant."""

    def build(width, rngs):
        return MLP(D, width, OUTPUTS, depth=2, activation=jnp.tanh, norm=True, rngs=rngs)

    model = as_model(build, width, regression())
    return dataclasses.replace(model, init=one_draw(model.abstract_params()))


def mlp_sweep(optimizer, strategy, widths, rates):
    return mupjax.sweep(
        mlp,
        regression(),
        optimizer,
        ["SP", "muP", "NTP"],
        widths=widths,
        hyperparameters={"learning_rate": rates},
        steps=6,
        seeds=2,
        base_width=4,
        evaluations=2,
        strategy=strategy,
        init_exponents={
            "hidden/0/*": 0.0,
            "hidden/1/bias": 0.0,
            "norms/*": 0.0,
            "hidden/1/kernel": 0.5,
            "readout/kernel": 0.5,
        },
    )


def assert_same_results(one, other, steps):
    assert set(one.data_vars) == set(other.data_vars)
    for name in ("loss", "train_loss", "eval_loss"):
        assert_close(one[name], other[name], steps, name)
    xr.testing.assert_equal(one[["status", "diverged_step"]], other[["status", "diverged_step"]])


@pytest.mark.parametrize(
    ("optimizer", "rates"),
    [
        pytest.param(momentum, [0.01, 0.1], marks=pytest.mark.slow),
        (adam, [1e-3, 1e-2]),
        pytest.param(adamw, [1e-3, 1e-2], marks=pytest.mark.slow),
    ],
)
def test_padded_widths_train_as_if_alone(optimizer, rates):
    padded = mlp_sweep(optimizer, "padded", [4, 6, 16], rates)
    assert timing(padded)["compilations"] == 1
    assert timing(padded)["programs"][0]["widths"] == [4, 6, 16]
    assert np.isfinite(padded.loss).all()
    # The narrowest is padded most.
    alone = [4, 6] if optimizer is momentum else [4]
    bucketed = mlp_sweep(optimizer, "bucketed", alone, rates)
    assert timing(bucketed)["compilations"] == len(alone)
    assert_same_results(padded.sel(width=alone), bucketed, steps=6)
    if optimizer is momentum:
        assert_same_results(mlp_sweep(optimizer, "auto", alone, rates), bucketed, steps=6)


class Normed(nnx.Module):
    """A net whose norm may ignore the true width, and whose padded units are not zero."""

    def __init__(self, width, norm, *, rngs):
        self.enter = nnx.Linear(D, width, rngs=rngs)
        self.norm = norm(width, rngs=rngs)
        self.readout = nnx.Linear(width, OUTPUTS, rngs=rngs)

    def __call__(self, x, width=None):
        x = jax.nn.sigmoid(self.enter(x))
        x = self.norm(x, width) if isinstance(self.norm, RMSNorm) else self.norm(x)
        return self.readout(x)


def normed_sweep(norm, strategy):
    return mupjax.sweep(
        lambda width, rngs: Normed(width, norm, rngs=rngs),
        regression(),
        sgd,
        "SP",
        widths=[4, 6],
        hyperparameters={"learning_rate": 0.1},
        steps=3,
        evaluations=1,
        base_width=4,
        strategy=strategy,
        init_exponents={"readout/kernel": 0.5, "enter/*": 0.0, "norm/*": 0.0},
    )


def test_units_that_an_activation_lifts_from_zero_are_not_counted_by_the_norm():
    padded, alone = (normed_sweep(RMSNorm, s) for s in ("padded", "bucketed"))
    assert timing(padded)["compilations"] == 1
    assert_same_results(padded, alone, steps=3)


def test_a_model_that_takes_its_width_and_ignores_it_is_never_padded():
    with pytest.raises(ValueError, match=r"at width 4, zero-padded to 6, it has another loss"):
        normed_sweep(nnx.LayerNorm, "padded")
    found = normed_sweep(nnx.LayerNorm, "auto")
    assert timing(found)["compilations"] == 2


def test_half_precision_is_no_reason_not_to_pad():
    class Half(nnx.Module):
        def __init__(self, width, *, rngs):
            self.enter = nnx.Linear(D, width, rngs=rngs, dtype=jnp.bfloat16)
            self.readout = nnx.Linear(width, OUTPUTS, rngs=rngs, dtype=jnp.bfloat16)

        def __call__(self, x, width=None):
            return self.readout(jnp.tanh(self.enter(x))).astype(jnp.float32)

    narrow, wide = (as_model(Half, width, regression()) for width in (48, 600))
    assert pads_exactly(narrow, wide, 48, regression())


def leaky(width):
    """A net whose last output is the largest absolute value stored beyond `width`."""

    shapes = {
        "enter": {"kernel": jnp.zeros((D, width))},
        "readout": {"kernel": jnp.zeros((width, OUTPUTS))},
    }

    def apply(params, x, width=None):
        enter, readout = params["enter"]["kernel"], params["readout"]["kernel"]
        if width is None:
            width = enter.shape[1]
        beyond = jnp.arange(enter.shape[1]) >= width
        largest = jnp.maximum(
            jnp.max(jnp.where(beyond[None, :], jnp.abs(enter), 0.0)),
            jnp.max(jnp.where(beyond[:, None], jnp.abs(readout), 0.0)),
        )
        out = jnp.tanh(x @ enter) @ readout
        return jnp.concatenate([out, jnp.broadcast_to(largest, (len(x), 1))], axis=1)

    return mupjax.Model(one_draw(shapes), apply, options=frozenset({"width"}))


def leak_setting():
    base = regression()
    return mupjax.Setting(
        "leak",
        base.sample,
        lambda predict, batch: jnp.mean((predict(batch[0])[:, :OUTPUTS] - batch[1]) ** 2),
        base.validation,
        base.data,
        metrics={"leak": lambda predict, batch: jnp.max(predict(batch[0])[:, OUTPUTS])},
    )


def with_constant(learning_rate):
    """Moves every coordinate by 0.02, whatever its gradient."""
    shift = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u + 0.02, updates))
    return optax.chain(optax.sgd(learning_rate), shift)


def test_padding_stays_zero_though_the_optimizer_moves_every_coordinate():
    model = leaky(6)
    unmasked = model.apply(model.init(jax.random.key(0)), jnp.ones((1, D)), width=4)
    assert float(unmasked[0, OUTPUTS]) > 0.01  # the leak would be seen
    found = mupjax.sweep(
        leaky,
        leak_setting(),
        with_constant,
        "SP",
        widths=[4, 6],
        hyperparameters={"learning_rate": [0.01, 0.1]},
        steps=4,
        base_width=4,
        strategy="padded",
        optimizer_family="sgd",
        init_exponents={"enter/*": 0.0, "readout/*": 0.5},
        evaluations=4,
    )
    assert float(abs(found.leak).max()) == 0.0
    assert np.isfinite(found.loss).all()


def scaled_by_shape(learning_rate):
    """As in Muon, the step depends on a matrix's shape, which padding changes."""

    def update(updates, state, params=None):
        def scale(u):
            return u * max(1.0, u.shape[1] / u.shape[0]) ** 0.5 if u.ndim == 2 else u

        return jax.tree.map(scale, updates), state

    shaped = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    return optax.chain(shaped, optax.sgd(learning_rate))


@pytest.mark.parametrize("strategy", ["padded", "auto"])
def test_an_optimizer_that_looks_at_shapes_is_never_silently_padded(strategy):
    arguments = {
        "hyperparameters": {"learning_rate": 0.05},
        "steps": 3,
        "base_width": 4,
        "init_exponents": {"enter/*": 0.0, "readout/*": 0.5},
    }
    setting = leak_setting()
    try:
        found = mupjax.sweep(
            leaky, setting, scaled_by_shape, "SP", widths=[4, 16], strategy=strategy, **arguments
        )
    except ValueError as error:
        assert strategy == "padded"  # to refuse is right, but "auto" has another way
        assert "strategy" in str(error)  # noqa: PT017
        return
    alone = mupjax.sweep(
        leaky, setting, scaled_by_shape, "SP", widths=[4], strategy="bucketed", **arguments
    )
    assert_same_results(found.sel(width=[4]), alone, steps=3)


# (c) Chunks -------------------------------------------------------------------------------------

FIVE_RATES = [0.01, 0.02, 0.05, 0.1, 0.2]
CHUNK_SWEEP: dict[str, Any] = {
    "widths": [6],
    "hyperparameters": {"learning_rate": FIVE_RATES},
    "steps": 5,
    "seeds": 3,
    "base_width": 4,
    "evaluations": 2,
    "init_exponents": NET_INIT,
}


def chunked(**changes):
    return mupjax.sweep(net, regression(), sgd, "muP", **(CHUNK_SWEEP | changes))


@pytest.fixture(scope="module")
def all_at_once():
    return chunked(chunk_size=15)


@pytest.mark.parametrize(
    ("size", "trials", "seeds", "chunks"),
    [(1, 1, 1, 15), (3, 3, 1, 6), (10, 5, 2, 2)],  # 5 = 3 + 2 trials; 3 = 2 + 1 seeds
)
def test_chunks_of_any_size_give_the_same_results(all_at_once, size, trials, seeds, chunks):
    found = chunked(chunk_size=size)
    (program,) = timing(found)["programs"]
    assert program["chunking"] == {
        "trials": trials,
        "seeds": seeds,
        "copy_batch": False,
        "library": "default",
    }
    assert program["chunks"] == chunks
    assert_same_results(found, all_at_once, steps=5)


def test_everything_in_one_chunk(all_at_once):
    (program,) = timing(all_at_once)["programs"]
    assert program["chunking"] == {
        "trials": 5,
        "seeds": 3,
        "copy_batch": False,
        "library": "default",
    }
    assert program["chunks"] == 1


@pytest.mark.parametrize("chunking", [Chunking(3, 1, True), Chunking(5, 2, True)])
def test_copied_batches_give_the_same_results(all_at_once, monkeypatch, chunking):
    monkeypatch.setattr(mupjax.groups, "chunking_of_size", lambda *_: chunking)
    found = chunked(chunk_size=1)
    assert timing(found)["programs"][0]["chunking"]["copy_batch"] is True
    assert_same_results(found, all_at_once, steps=5)


def test_measuring_the_chunk_size_gives_the_same_results_and_counts_its_programs():
    rates = [0.5, 1.5]
    found = sweep_line(hyperparameters={"learning_rate": rates}, chunk_size="measure")
    ruled = sweep_line(hyperparameters={"learning_rate": rates})
    # Both batch modes, the other two libraries for products, and one trial at a time.
    assert timing(found)["compilations"] == 5
    assert timing(ruled)["compilations"] == 1
    assert_same_results(found, ruled, steps=3)


# (d) Devices ------------------------------------------------------------------------------------


def compare_devices():
    """Run in a process with four virtual devices."""
    assert jax.device_count() == 4
    one = chunked(devices=jax.devices()[:1])
    four = chunked()
    assert four.attrs["device"].startswith("4 x ")
    # 5 trials by 3 seeds: neither divides, and 6 chunks of 3 trials are not a multiple of 4.
    (program,) = timing(four)["programs"]
    assert program["chunking"] == {
        "trials": 3,
        "seeds": 1,
        "copy_batch": True,
        "library": "eigen",
    }
    assert program["chunks"] == 8
    assert_same_results(four, one, steps=5)
    # A setting without data, observers, progress.
    more: dict[str, Any] = TWO_WIDTHS | {"observers": [breaking(0)]}
    one = sweep_line(devices=jax.devices()[:1], **more)
    four = sweep_line(progress=True, **more)
    assert_same_results(four, one, steps=3)
    assert_close(four.loss_total, one.loss_total, 3)


def in_a_process(statement, *arguments, **environment):
    """A Python process that runs a statement with this module imported as `t`."""
    here = Path(__file__).resolve().parent
    return subprocess.Popen(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            f"import test_mupjax_sweep as t; {statement}",
            *arguments,
        ],
        cwd=here,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_four_devices_give_what_one_gives():
    process = in_a_process(
        "t.compare_devices()",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        JAX_PLATFORMS="cpu",
    )
    try:
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, output


# What surrounds a sweep --------------------------------------------------------------------------


def test_a_progress_bar_reaches_the_end(capsys):
    sweep_line(progress=True)
    assert "100%" in capsys.readouterr().err
    sweep_line(progress=False)
    assert capsys.readouterr().err == ""


def test_the_callers_jax_settings_hold_while_programs_are_traced():
    # jax's context managers are local to a thread, and programs compile on several.
    seen = []

    def spy(width):
        straight = line(width)

        def apply(params, x):
            seen.append(jax.config.jax_default_matmul_precision)  # pyright: ignore[reportAttributeAccessIssue]
            return straight.apply(params, x)

        return mupjax.Model(straight.init, apply)

    with jax.default_matmul_precision("highest"):
        mupjax.sweep(
            spy,
            parabola(),
            sgd,
            "SP",
            widths=[4],
            hyperparameters={"learning_rate": 0.5},
            steps=1,
            base_width=4,
            init_exponents={"*": 0.5},
        )
    assert set(seen) == {"highest"}


def test_a_sweep_in_double_precision():
    jax.config.update("jax_enable_x64", True)
    try:
        found = sweep_line(hyperparameters={"learning_rate": [0.3, 5.0]}, steps=6)
    finally:
        jax.config.update("jax_enable_x64", False)
    assert found.eval_loss.dtype == np.float64
    ok = found.isel(learning_rate=0)
    expected = 2 * 0.7 ** (2 * np.arange(7.0))
    np.testing.assert_allclose(
        ok.eval_loss.values.ravel(), expected, rtol=float_tolerance(np.float64, operations=400)
    )
    np.testing.assert_array_equal(ok.loss, ok.eval_loss.isel(eval_step=-1))
    assert found.diverged_step.values.ravel().tolist() == [-1, 2]


# (g) Divergence ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diverging():
    """|1 - rate| is 0.5, 1.1, 4 and 1e30: the loss falls, rises slowly, quickly, at once."""
    return sweep_line(
        hyperparameters={"learning_rate": [0.5, 2.1, 5.0, 1e30]}, steps=6, evaluations=3
    ).isel(width=0, seed=0)


def test_every_way_to_diverge_has_its_status_and_step(diverging):
    names = ["ok", "ended_above_start", "above_threshold", "non_finite"]
    assert diverging.status.values.tolist() == [STATUS[name] for name in names]
    # 16**t first exceeds 100 at t = 2; the infinite loss is seen at step 1; a high end at the end.
    assert diverging.diverged_step.values.tolist() == [-1, 6, 2, 1]
    assert diverging.status.attrs["flag_meanings"].split() == list(STATUS)


def test_a_loss_that_rises_by_rounding_alone_has_not_diverged():
    # |1 - rate|**6 = 1 + 1.4e-6 and 1 + 6e-4: the first is what rounding does at tiny rates.
    barely, truly = 2 + 2.0**-22, 2.0001
    found = sweep_line(hyperparameters={"learning_rate": [barely, truly]}, steps=3, evaluations=1)
    start, end = found.eval_loss.isel(width=0, seed=0).values.T
    assert (end > start).all()
    expected = [STATUS["ok"], STATUS["ended_above_start"]]
    assert found.status.values.ravel().tolist() == expected


def test_a_trial_that_diverged_on_the_way_has_no_final_loss(diverging):
    expected = [2 * 0.25**6, 2 * 1.1**12, np.nan, np.nan]
    assert_close(diverging.loss, expected, 6)
    assert_close(diverging.train_loss.values[2, :3], [2, 32, 512], 6)


def test_a_diverged_trial_leaves_its_neighbours_as_they_were(diverging):
    alone = sweep_line(hyperparameters={"learning_rate": [0.5]}, steps=6, evaluations=3)
    alone = alone.isel(width=0, seed=0, learning_rate=0)
    beside = diverging.isel(learning_rate=0)
    for name in ("loss", "train_loss", "eval_loss", "status", "diverged_step"):
        np.testing.assert_array_equal(beside[name], alone[name], err_msg=name)


@pytest.mark.parametrize(("limit", "step"), [(3.0, 1), (1.0, 0)])
def test_a_loss_that_is_nan_and_never_infinite(limit, step):
    """The loss is nan where |v| > limit; v starts at 2 and then is -8."""
    base = parabola()

    def loss(predict, batch):
        out = predict(batch)
        return 0.5 * jnp.mean(jnp.where(jnp.abs(out) > limit, jnp.nan, out) ** 2)

    found = mupjax.sweep(
        line,
        dataclasses.replace(base, loss=loss),
        sgd,
        "SP",
        widths=[4],
        hyperparameters={"learning_rate": 5.0},
        steps=3,
        base_width=4,
        init_exponents={"*": 0.5},
    )
    assert found.status.values.tolist() == [[STATUS["non_finite"]]]
    assert found.diverged_step.values.tolist() == [[step]]
    assert np.isnan(found.loss).all()


def test_the_threshold_is_the_users():
    found = sweep_line(
        hyperparameters={"learning_rate": [2.1, 5.0]}, steps=3, divergence_threshold=1e6
    )
    assert found.status.values.ravel().tolist() == [STATUS["ended_above_start"]] * 2
    assert np.isfinite(found.loss).all()


# (h) Several hyperparameters --------------------------------------------------------------------

MANY_AXES = {
    "init_scale": [0.5, 1.0],
    "learning_rate": [0.003, 0.02],
    "output_multiplier": [1.0, 3.0],
    "weight_decay": [0.0, 0.5],
    "hidden_learning_rate_multiplier": [1.0, 4.0],
}
MANY_SWEEP: dict[str, Any] = {
    "widths": [6],
    "hyperparameters": {**MANY_AXES, "b1": 0.8},
    "steps": 3,
    "base_width": 4,
    "evaluations": 1,
    "application": "multipliers",
    "init_exponents": NET_INIT,
}


@pytest.fixture(scope="module")
def many_axes():
    """Five axes and a fixed hyperparameter, with forward multipliers (NTP) left in place."""
    return mupjax.sweep(net, regression(), adam, "NTP", **MANY_SWEEP)


def test_axes_come_in_the_order_given_between_width_and_seed(many_axes):
    assert many_axes.loss.dims == ("width", *MANY_AXES, "seed")
    assert many_axes.eval_loss.dims == ("width", *MANY_AXES, "seed", "eval_step")
    assert many_axes.train_loss.dims == ("width", *MANY_AXES, "seed", "step")
    for name, values in MANY_AXES.items():
        assert many_axes[name].values.tolist() == values
    assert "b1" not in many_axes.coords
    assert results.configuration_of(many_axes)["hyperparameters"] == {**MANY_AXES, "b1": 0.8}
    assert timing(many_axes)["compilations"] == 1


def test_every_hyperparameter_acts_as_in_a_plain_loop(many_axes):
    resolved = mupjax.resolve_sweep(net, regression(), adam, "NTP", **MANY_SWEEP)
    factors = resolved.factors(6)
    assert any(m != 1 for m in factors.multiplier.values())
    points = [point | {"b1": 0.8} for point in points_of(MANY_AXES)]
    train, evaluation = train_by_hand(6, factors, resolved.roles, points, [0], 3, [0, 3])
    assert_close(many_axes.train_loss.values.reshape(train.shape), train, 3)
    assert_close(many_axes.eval_loss.values.reshape(evaluation.shape), evaluation, 3)


def test_initial_scale_and_output_multiplier_set_the_initial_loss(many_axes):
    setting, model = regression(), as_model(net, 6, regression())
    params = model.init(jax.random.fold_in(jax.random.key(0), 0))
    resolved = mupjax.resolve_sweep(net, regression(), adam, "NTP", **MANY_SWEEP)
    f = resolved.factors(6)
    start = many_axes.eval_loss.isel(width=0, seed=0, eval_step=0)
    for scale in MANY_AXES["init_scale"]:
        for multiplier in MANY_AXES["output_multiplier"]:
            x, y = setting.validation
            W = {
                name: params[name]["kernel"] * f.init[path] * f.multiplier[path] * scale
                for name in params
                for path in [f"{name}/kernel"]
            }
            h = jnp.tanh(jnp.tanh(x @ W["enter"] + params["enter"]["bias"][None]) @ W["mix"])
            out = multiplier * (h @ W["readout"] + params["readout"]["bias"][None])
            found = start.sel(init_scale=scale, output_multiplier=multiplier)
            assert_close(found, float(jnp.mean((out - y) ** 2)), 1)


def test_output_multiplier_leaves_the_rest_of_a_flat_model_alone():
    """All parameters of a model of pure functions may stand beside the readout."""

    def flat(width):
        def init(key):
            into, out = jax.random.split(key)
            return {
                "w": jax.random.normal(into, (D, width)),
                "a": jax.random.normal(out, (width, OUTPUTS)) / width**0.5,
                "gain": jnp.ones((1,)),
            }

        def apply(params, x):
            return params["gain"][None, :] * jnp.tanh(x @ params["w"]) @ params["a"]

        return mupjax.Model(init, apply)

    found = mupjax.sweep(
        flat,
        regression(),
        lambda learning_rate: optax.sgd(learning_rate),
        "SP",
        widths=[6],
        base_width=6,
        hyperparameters={"learning_rate": 0.1, "output_multiplier": [1.0, 3.0]},
        steps=1,
        roles={"w": "input", "a": "output", "gain": "fixed"},
        init_exponents={"w": 0.0, "a": 0.5},
    )
    setting, model = regression(), flat(6)
    params = model.init(jax.random.fold_in(jax.random.key(0), 0))
    for factor in (1.0, 3.0):
        expected = setting.loss(lambda x, c=factor: c * model.apply(params, x), setting.validation)
        start = found.eval_loss.sel(output_multiplier=factor).isel(eval_step=0)
        assert_close(start.values.ravel(), [float(expected)], 1)


def test_a_multiplier_for_a_role_that_the_model_lacks_is_refused():
    rates = {"learning_rate": 0.1, "hidden_learning_rate_multiplier": [1.0, 2.0]}
    with pytest.raises(ValueError, match=r"'hidden_learning_rate_multiplier' would do nothing"):
        sweep_line(hyperparameters=rates)


# (i) Schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 29, 1000])
@pytest.mark.parametrize("fractions", [(0.04, 0.2), (0, 0), (0.5, 0.5), (1, 0), (0, 1), (0.3, 0.4)])
def test_warmup_stable_decay_rises_to_one_and_falls(steps, fractions):
    schedule = mupjax.wsd_schedule(steps, *fractions)
    values = np.asarray(jax.vmap(schedule)(np.arange(steps)), np.float64)
    values = np.broadcast_to(values, (steps,))
    assert values.max() == pytest.approx(1.0, rel=float_tolerance(np.float32))
    assert values.min() > 0
    slopes = np.sign(np.round(np.diff(values), 7))
    assert (np.diff(slopes) <= 0).all()  # up, then level, then down
    rise, fall = (round(steps * f) for f in fractions)
    if rise + fall < steps:
        assert (slopes > 0).sum() == rise
        assert (slopes < 0).sum() == fall
        assert values[-1] == pytest.approx(1 / (fall + 1), rel=1e-4)
        assert values[0] == pytest.approx(1 / (rise + 1), rel=1e-4)


@pytest.mark.parametrize("bad", [(0, 0.1, 0.1), (10, -0.1, 0.2), (10, 0.1, -0.2), (10, 0.6, 0.6)])
def test_impossible_schedules_are_refused(bad):
    with pytest.raises(ValueError, match="warmup \\+ cooldown <= 1, got steps="):
        mupjax.wsd_schedule(*bad)


def test_the_schedule_scales_every_update():
    T, rates = 10, np.array([0.3, 1.5])
    schedule = mupjax.wsd_schedule(T, warmup=0.3, cooldown=0.4)
    found = sweep_line(
        hyperparameters={"learning_rate": rates}, steps=T, schedule=schedule, evaluations=T
    )
    v = np.full(2, 2.0)  # sqrt(4)
    expected = [v**2 / 2]
    for t in range(T):
        v = v - rates * float(jnp.asarray(schedule(t))) * v
        expected.append(v**2 / 2)
    assert_close(found.eval_loss.values[0, :, 0], np.transpose(expected), T)


# (k) Files --------------------------------------------------------------------------------------


def breaking(width):
    """An observer that fails while the program of one width is traced; none fails at width 0."""

    def init(params, model, setting):
        if params["readout"]["kernel"].shape[0] == width:
            raise RuntimeError("the power went out")
        return jnp.zeros(())

    return mupjax.Observer(
        "loss", init, lambda state, seen: state + seen.loss, lambda state: {"total": state}
    )


TWO_WIDTHS: dict[str, Any] = {
    "widths": [4, 8],
    "seeds": 2,
    "hyperparameters": {"learning_rate": [0.5, 1.5]},
}


def two_widths(out=None, fails_at=0, **changes):
    return sweep_line(**(TWO_WIDTHS | {"observers": [breaking(fails_at)], "out": out} | changes))


@pytest.fixture(scope="module")
def uninterrupted():
    return two_widths()


def same_but_for_the_clock(one, other):
    """Equal in values, coordinates and attributes, except when and how fast they were made."""

    def timeless(dataset):
        # Only a sweep with an output path notes its first losses.
        configuration = json.loads(dataset.attrs["configuration"])
        configuration.pop("first_losses", None)
        return dataset.assign_attrs(timing="", created="", configuration=json.dumps(configuration))

    xr.testing.assert_identical(timeless(one), timeless(other))


@pytest.fixture
def interrupted(tmp_path):
    """The path of a sweep whose second width failed."""
    path = tmp_path / "deep" / "run.nc"
    with pytest.raises(RuntimeError, match="the power went out"):
        two_widths(path, fails_at=8)
    return path


def listing(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def forbid_running(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a program was built")

    monkeypatch.setattr(mupjax.execute, "build_program", refuse)


def test_an_interrupted_sweep_keeps_what_it_finished_and_resumes(interrupted, uninterrupted):
    assert listing(interrupted.parent) == ["run.nc.parts/width-0000004.nc"]
    part = mupjax.load(interrupted.parent / "run.nc.parts" / "width-0000004.nc")
    xr.testing.assert_equal(part.loss, uninterrupted.loss.sel(width=[4]))
    resumed = two_widths(interrupted, existing="resume")
    assert [p["widths"] for p in timing(resumed)["programs"]] == [[8]]
    same_but_for_the_clock(resumed, uninterrupted)
    same_but_for_the_clock(mupjax.load(interrupted), uninterrupted)
    assert listing(interrupted.parent) == ["run.nc"]


def sleep_at_width_8(out):
    """Run in a process that is killed: width 4 ends, the program of width 8 never does."""
    observer = breaking(0)

    def update(state, seen):
        if seen.params["readout"]["kernel"].shape[0] == 8:
            jax.debug.callback(lambda: time.sleep(600))
        return observer.update(state, seen)

    slow = dataclasses.replace(observer, update=update)
    two_widths(out, observers=[slow])


def test_a_killed_sweep_resumes(tmp_path, uninterrupted):
    path = tmp_path / "run.zarr"
    process = in_a_process("import sys; t.sleep_at_width_8(sys.argv[1])", str(path))
    part = results.part_path(path, 4)
    try:
        deadline = time.monotonic() + 90
        while not part.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no part was written"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    resumed = two_widths(path, existing="resume")
    assert [p["widths"] for p in timing(resumed)["programs"]] == [[8]]
    # The other process compiled with XLA's optimisations.
    assert_same_results(resumed, uninterrupted, steps=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.zarr"]


def test_a_sweep_may_be_resumed_with_further_widths(interrupted):
    resumed = two_widths(interrupted, existing="resume", widths=[2, 4, 8])
    assert [p["widths"] for p in timing(resumed)["programs"]] == [[2], [8]]
    assert resumed.width.values.tolist() == [2, 4, 8]


def test_resuming_with_another_configuration_names_what_differs(interrupted, monkeypatch):
    forbid_running(monkeypatch)
    before = listing(interrupted.parent)
    with pytest.raises(ValueError, match=r"another configuration \(differing: .*steps"):
        two_widths(interrupted, existing="resume", steps=4)
    with pytest.raises(ValueError, match=r"differing: hyperparameters"):
        two_widths(interrupted, existing="resume", hyperparameters={"learning_rate": [0.5, 1.25]})
    assert listing(interrupted.parent) == before


def test_resuming_with_another_model_of_the_same_shapes_is_refused(interrupted, monkeypatch):
    # The first width was trained with f(x) = v x; the second would be with tanh(v x).
    def bent(width):
        straight = line(width)
        return mupjax.Model(straight.init, lambda params, x: jnp.tanh(straight.apply(params, x)))

    forbid_running(monkeypatch)
    with pytest.raises(ValueError, match="cannot resume"):
        mupjax.sweep(
            bent,
            parabola(),
            sgd,
            "SP",
            **TWO_WIDTHS,
            steps=3,
            base_width=4,
            init_exponents={"*": 0.5},
            strategy="bucketed",
            observers=[breaking(0)],
            out=interrupted,
            existing="resume",
        )


def test_what_an_interruption_left_is_not_used_unless_resuming_is_asked_for(
    interrupted, monkeypatch
):
    forbid_running(monkeypatch)
    with pytest.raises(FileExistsError, match="resume"):
        two_widths(interrupted)


def test_replacing_an_interrupted_sweep_starts_afresh(interrupted, uninterrupted):
    replaced = two_widths(interrupted, existing="replace")
    assert [p["widths"] for p in timing(replaced)["programs"]] == [[4], [8]]
    same_but_for_the_clock(replaced, uninterrupted)
    assert listing(interrupted.parent) == ["run.nc"]


@pytest.fixture
def complete(tmp_path, uninterrupted):
    """A finished sweep on disk."""
    return mupjax.save(uninterrupted, tmp_path / "run.nc")


def test_a_finished_sweep_is_not_overwritten_unasked(complete, monkeypatch):
    forbid_running(monkeypatch)
    before = complete.read_bytes()
    with pytest.raises(
        FileExistsError, match=r"run.nc' holds an earlier sweep.*existing='replace'"
    ):
        two_widths(complete)
    assert complete.read_bytes() == before


def test_a_replacement_that_fails_leaves_the_earlier_sweep(complete):
    before = complete.read_bytes()
    with pytest.raises(RuntimeError, match="the power went out"):
        two_widths(complete, existing="replace", fails_at=4)
    assert complete.read_bytes() == before


def test_resuming_a_finished_sweep_returns_it(complete, uninterrupted, monkeypatch):
    forbid_running(monkeypatch)
    same_but_for_the_clock(two_widths(complete, existing="resume"), uninterrupted)


def test_resuming_a_finished_sweep_of_another_configuration_does_not_overwrite_it(
    complete, monkeypatch
):
    forbid_running(monkeypatch)
    before = complete.read_bytes()
    with pytest.raises(ValueError, match="differing: evaluation_steps, steps"):
        two_widths(complete, existing="resume", steps=4)
    assert complete.read_bytes() == before


def text_file(path):
    path.write_text("notes")


def folder_with_a_file(path):
    path.mkdir()
    (path / "notes.txt").write_text("notes")


def foreign_dataset(path):
    foreign = xr.Dataset({"x": ("t", np.arange(3.0))}, attrs={"title": "not ours"})
    if path.suffix == ".nc":
        foreign.to_netcdf(path, engine="h5netcdf")
    else:
        foreign.to_zarr(path, consolidated=False)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("existing", ["error", "replace", "resume"])
@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("make", [text_file, folder_with_a_file, foreign_dataset])
def test_what_is_no_sweep_is_never_touched(tmp_path, monkeypatch, make, suffix, existing):
    forbid_running(monkeypatch)
    path = tmp_path / f"mine{suffix}"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=f"mine{suffix}' exists and is no result of a sweep"):
        two_widths(path, existing=existing)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("existing", ["error", "replace", "resume"])
@pytest.mark.parametrize("make", [text_file, folder_with_a_file])
def test_a_neighbour_that_has_the_name_of_the_parts_folder_is_never_touched(
    tmp_path, monkeypatch, make, existing
):
    forbid_running(monkeypatch)
    make(tmp_path / "run.nc.parts")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"run\.nc\.parts"):
        two_widths(tmp_path / "run.nc", existing=existing)
    assert contents(tmp_path) == before


def test_a_parent_that_is_a_file_is_refused_at_once(tmp_path, monkeypatch):
    forbid_running(monkeypatch)
    (tmp_path / "file").write_text("notes")
    with pytest.raises(FileExistsError, match="file' is a file"):
        two_widths(tmp_path / "file" / "deeper" / "run.nc")
    assert (tmp_path / "file").read_text() == "notes"


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_a_result_survives_writing_and_reading(tmp_path, adam_grid, suffix):
    path = mupjax.save(adam_grid, tmp_path / "new" / f"run{suffix}")
    read = mupjax.load(path)
    xr.testing.assert_identical(read, adam_grid)
    assert read.attrs == adam_grid.attrs
    assert read.parametrization.values.tolist() == ["SP", "muP"]
    assert read.loss.dims == ("parametrization", "width", "learning_rate", "b1", "seed")
    for name in adam_grid.variables:
        assert read[name].dtype.kind == adam_grid[name].dtype.kind, name
    assert results.configuration_of(read) == results.configuration_of(adam_grid)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    mupjax.save(adam_grid.isel(seed=[0]), path)  # over itself
    assert mupjax.load(path).sizes["seed"] == 1


def test_the_configuration_says_what_was_run(adam_grid):
    configuration = results.configuration_of(adam_grid)
    assert configuration["setting"]["name"] == "regression"
    assert configuration["widths"] == WIDTHS
    assert configuration["hyperparameters"] == AXES
    assert configuration["seeds"] == SEEDS
    assert configuration["base_width"] == 8
    assert configuration["evaluation_steps"] == [0, 2, 5, 7]
    names = [p["name"] for p in configuration["parametrizations"]]
    assert names == ["SP", "muP"]
    assert mupjax.Parametrization.from_dict(configuration["parametrizations"][1]) == mupjax.muP
    assert adam_grid.attrs["parametrization_fingerprint"].split(", ") == [
        mupjax.SP.fingerprint(),
        mupjax.muP.fingerprint(),
    ]
    with pytest.raises(ValueError, match=r"not written by mupjax\.sweep"):
        results.configuration_of(xr.Dataset())


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_writing_that_fails_leaves_the_old_file_and_no_draft(
    tmp_path, adam_grid, monkeypatch, suffix
):
    path = mupjax.save(adam_grid, tmp_path / f"run{suffix}")
    before = contents(tmp_path)

    def half(self, draft, **kwargs):
        if Path(draft).suffix == ".zarr":
            folder_with_a_file(Path(draft))
        else:
            text_file(Path(draft))
        raise OSError("no space left on device")

    method = "to_zarr" if suffix == ".zarr" else "to_netcdf"
    monkeypatch.setattr(xr.Dataset, method, half)
    with pytest.raises(OSError, match="no space left"):
        mupjax.save(adam_grid, path)
    assert contents(tmp_path) == before


def test_a_sweep_without_out_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep_line()
    assert list(tmp_path.iterdir()) == []


def test_reading_nothing_or_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no result at"):
        mupjax.load(tmp_path / "none.nc")
    foreign_dataset(tmp_path / "other.nc")
    with h5py.File(tmp_path / "plain.nc", "w") as file:
        file["x"] = np.ones(3)
    for name in ("other.nc", "plain.nc"):
        with pytest.raises(ValueError, match=r"not written by mupjax\.sweep"):
            mupjax.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"must end in \.zarr or \.nc"):
        mupjax.load(tmp_path / "run.csv")
    shutil.rmtree(tmp_path)
