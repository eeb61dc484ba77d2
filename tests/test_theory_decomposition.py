"""The decomposition recorded by a sweep against plain loops and dense eigenvalues in double."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mupjax
from mupjax import results
from mupjax.resolve import Factors
from mupjax.roles import map_leaves
from theory.decomposition import decomposition_observer
from theory.trajectory import Averaging
from tolerances import float_tolerance

D, CLASSES, B, P = 5, 2, 8, 12
WIDTHS, RATES, SEEDS, STEPS = (3, 8), (0.05, 0.2), 2, 17
AVERAGING = Averaging(0.5, 0.8, 2, 3, 8)
TIMES = [0, 5, 9, 12, 99]
SGD: dict[str, Any] = {
    "hyperparameters": {"learning_rate": RATES},
    "widths": WIDTHS,
    "steps": STEPS,
    "seeds": SEEDS,
    "base_width": 3,
}


@pytest.fixture(scope="module", autouse=True)
def unoptimised_programs():
    """Compiling is most of the time here, and half of that is XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def momentum(learning_rate):
    return optax.sgd(learning_rate, momentum=0.5)


def net(width):
    """tanh network with two hidden layers and one bias, in the precision of the day."""

    def init(key):
        keys = jax.random.split(key, 3)
        sizes = [(D, width), (width, width), (width, CLASSES)]
        kernels = [
            # The same numbers in either precision.
            jax.random.normal(k, s, jnp.float32).astype(float) / np.sqrt(s[0])
            for k, s in zip(keys, sizes, strict=True)
        ]
        return {
            "in": {"kernel": kernels[0], "bias": jnp.zeros(width)},
            "mid": {"kernel": kernels[1]},
            "out": {"kernel": kernels[2]},
        }

    def apply(params, x):
        h = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None, :])
        h = jnp.tanh(h @ params["mid"]["kernel"])
        return h @ params["out"]["kernel"]

    return mupjax.Model(init, apply)


def regression():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, D)), rng.normal(size=(64, CLASSES))

    def sample(data, key, step):
        index = jax.random.randint(jax.random.fold_in(key, step), (B,), 0, 64 - P, jnp.int32)
        return jax.tree.map(lambda a: a[index], data)

    def loss(predict, batch):
        return jnp.mean((predict(batch[0]) - batch[1]) ** 2)

    data = (jnp.asarray(x), jnp.asarray(y))
    return mupjax.Setting("regression", sample, loss, (data[0][-P:], data[1][-P:]), data)


def run(*, double=True, **options):
    """A sweep with the observer; `sweep` overrides the sweep's own arguments."""
    changes = options.pop("sweep", {})
    with jax.enable_x64(double):
        return mupjax.sweep(
            net,
            regression(),
            momentum,
            "muP",
            observers=[decomposition_observer(AVERAGING, **options)],
            **(SGD | changes),
        )


@functools.cache
def recorded(rule="trapezoid"):
    return run(rule=rule, times=TIMES)


def by_hand(width, rate, seed, rule):
    """φ^k by layer, totals, and the losses at all marks, one trial at a time, in NumPy."""
    setting, model = regression(), net(width)
    factors: Factors = mupjax.resolve_sweep(net, setting, momentum, "muP", **SGD).factors(width)
    key = jax.random.key(seed)
    batch_key = jax.random.fold_in(key, 1)
    params = map_leaves(
        lambda path, w: w * factors.init[path], model.init(jax.random.fold_in(key, 0))
    )
    velocity = jax.tree.map(jnp.zeros_like, params)
    loss = jax.jit(
        jax.value_and_grad(lambda p, batch: setting.loss(lambda x: model.apply(p, x), batch))
    )

    @jax.jit
    def step(params, velocity, t):
        _, gradient = loss(params, setting.sample(setting.data, batch_key, t))
        velocity = jax.tree.map(lambda v, g: 0.5 * v + g, velocity, gradient)
        params = map_leaves(
            lambda path, w, v: w - rate * factors.learning_rate[path] * v, params, velocity
        )
        return params, velocity

    average, points = jax.device_get(params), {0: jax.device_get(params)}
    for t in range(STEPS):
        params, velocity = step(params, velocity, jnp.int32(t))
        window = np.interp(t, [0, 8], [2, 5])
        now = jax.device_get(params)
        average = jax.tree.map(lambda a, w, n=window: a + (w - a) / n, average, now)
        points[t + 1] = average
    marks = AVERAGING.marks(STEPS)
    at = {mark: loss(points[mark], setting.validation) for mark in marks}
    layers = [("in", "bias"), ("in", "kernel"), ("mid", "kernel"), ("out", "kernel")]
    sums = np.zeros((len(marks), len(layers), width))
    for j, (a, b) in enumerate(itertools.pairwise(marks), start=1):
        for i, (layer, name) in enumerate(layers):
            ends = [np.asarray(at[mark][1][layer][name]) for mark in (a, b)]
            g = ends[0] if rule == "forward" else (ends[0] + ends[1]) / 2
            delta = np.asarray(points[b][layer][name] - points[a][layer][name])
            if name == "bias":
                sums[j, i] = g @ delta
                continue
            # The width is where the input layer ends, and where the others begin.
            if layer != "in":
                g, delta = g.T, delta.T
            values = np.linalg.eigvalsh((g.T @ delta + delta.T @ g) / 2)
            sums[j, i] = np.cumsum(values[np.argsort(-np.abs(values))])
    losses = {mark: float(value) for mark, (value, _) in at.items()}
    return marks, np.cumsum(sums, axis=0), losses


@pytest.mark.parametrize("rule", ["trapezoid", pytest.param("forward", marks=pytest.mark.slow)])
def test_everything_recorded_is_that_of_a_plain_loop(rule):
    dataset = recorded(rule)
    for width, rate, seed in {"trapezoid": [(8, 0.05, 1)], "forward": [(3, 0.2, 0)]}[rule]:
        cell = dataset.sel(width=width, learning_rate=rate, seed=seed)
        with jax.enable_x64(True):
            marks, tops, losses = by_hand(width, rate, seed, rule)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
        close(cell.decomposition_layer_top[:, :width], tops[-1])
        close(cell.decomposition_layer_total, tops[-1, :, -1])
        close(cell.decomposition_top[:width], tops[-1].sum(axis=0))
        close(cell.decomposition_total, tops[-1, :, -1].sum())
        close(cell.decomposition_initial_loss, losses[0])
        close(cell.decomposition_final_loss, losses[marks[-1]])
        assert cell.decomposition_updates == marks[-1]
        for row, time in enumerate(cell.time.values):
            if time <= STEPS:
                assert time == max(mark for mark in marks if mark <= TIMES[row])
                found = cell.decomposition_time_top[row, :width]
                close(found, tops[marks.index(time)].sum(axis=0))
                close(cell.decomposition_time_loss[row], losses[time])


def test_layers_and_shapes():
    dataset = recorded()
    assert dataset.layer.values.tolist() == ["in/bias", "in/kernel", "mid/kernel", "out/kernel"]
    assert dataset.component.values.tolist() == list(range(1, 9))
    assert dataset.decomposition_top.dims == ("width", "learning_rate", "seed", "component")
    narrow = dataset.sel(width=3)
    assert np.isnan(narrow.decomposition_top.sel(component=slice(4, None))).all()
    # Not reached within the run.
    assert dataset.time.values[-1] == AVERAGING.marks(99)[-1] > STEPS
    assert np.isnan(dataset.decomposition_time_top[..., -1, :]).all()
    assert np.isnan(dataset.decomposition_time_loss[..., -1]).all()


@pytest.mark.parametrize("rule", ["trapezoid", "forward"])
def test_identities(rule):
    dataset = recorded(rule)
    total = dataset.decomposition_total
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13)
    # All of k gives the total, at every width; so do all layers.
    for width in WIDTHS:
        close(dataset.decomposition_top.sel(width=width, component=width), total.sel(width=width))
    close(dataset.decomposition_layer_total.sum("layer"), total)
    close(dataset.decomposition_layer_top.sum("layer", skipna=False), dataset.decomposition_top)
    close(dataset[f"decomposition_{rule}_total"], total)
    change = dataset.decomposition_final_loss - dataset.decomposition_initial_loss
    close(dataset.decomposition_faithfulness, abs(total - change) / abs(change))
    assert (dataset.decomposition_spectrum_error == 0).all()
    assert (dataset.decomposition_straightness <= 1).all()
    # The trapezoid is the better one.
    off = {r: abs(dataset[f"decomposition_{r}_total"] - change) for r in ("forward", "trapezoid")}
    assert (off["trapezoid"] < off["forward"] / 2).all()


def test_single_precision_is_accurate():
    double, single = recorded(), run(double=False, times=TIMES)
    assert single.decomposition_top.dtype == np.float32
    for name in ("top", "layer_top", "layer_total", "total", "time_top", "time_loss"):
        expected = double[f"decomposition_{name}"]
        # Sums over steps of products over examples and units; the largest share is about 1.
        largest = float(abs(expected).max())
        atol = float_tolerance(np.float32, STEPS * P * 8) * largest
        np.testing.assert_allclose(single[f"decomposition_{name}"], expected, rtol=0, atol=atol)


@pytest.mark.slow
def test_fewer_components_are_the_first_ones():
    few = run(components=2)
    assert few.component.values.tolist() == [1, 2]
    for name in ("top", "layer_top"):
        expected = recorded()[f"decomposition_{name}"].sel(component=[1, 2])
        np.testing.assert_allclose(few[f"decomposition_{name}"], expected, rtol=1e-12)
    np.testing.assert_allclose(few.decomposition_total, recorded().decomposition_total, rtol=1e-12)


def test_one_example_has_gradients_of_rank_one():
    """A gradient of rank one gives an alignment matrix of rank two, in single precision too."""
    options: dict[str, Any] = {"rule": "forward", "validation_examples": 1, "double": False}
    dataset = run(**options, sweep={"widths": [8]})
    matrices = dataset.decomposition_layer_top.sel(layer=["in/kernel", "mid/kernel", "out/kernel"])
    rest = abs(matrices.sel(component=slice(3, None)) - matrices.sel(component=2))
    # Relative to the positive and the negative eigenvalue, which largely cancel.
    assert float(rest.max()) < 1e-5 * float(abs(matrices.sel(component=1)).max())
    assert float(abs(matrices.sel(component=1) - matrices.sel(component=2)).min()) > 1e-4


def test_updates_too_small_to_move_anything():
    hyperparameters = {"learning_rate": [1e-30]}
    dataset = run(double=False, sweep={"hyperparameters": hyperparameters, "widths": [8]})
    for name in ("top", "layer_top", "layer_total", "total"):
        # Only the bias moves, from zero.
        assert (abs(dataset[f"decomposition_{name}"]) < 1e-28).all(), name
    assert np.isfinite(dataset.decomposition_final_loss).all()


@pytest.mark.slow
def test_the_lanczos_route_agrees_up_to_the_error_it_states():
    wide: dict[str, Any] = {"widths": [64], "steps": 6, "seeds": 1}
    exact = run(components=3, double=False, sweep=wide)
    found = run(components=3, double=False, spectrum="lanczos", sweep=wide)
    error = float(found.decomposition_spectrum_error.max())
    assert 0 < error < 1e-4 * float(abs(exact.decomposition_total).min())
    rounding = float_tolerance(np.float32, 6 * P * 64) * float(abs(exact.decomposition_top).max())
    np.testing.assert_allclose(
        found.decomposition_top, exact.decomposition_top, rtol=0, atol=error + rounding
    )
    np.testing.assert_array_equal(found.decomposition_total, exact.decomposition_total)


@pytest.mark.parametrize("ending", ["nc", "zarr"])
def test_saved_and_resumed(tmp_path, ending):
    out = tmp_path / f"run.{ending}"
    run(times=TIMES, sweep={"out": out})
    loaded = results.load(out)
    for name in ("top", "layer_top", "time_top", "faithfulness"):
        expected = recorded()[f"decomposition_{name}"]
        np.testing.assert_array_equal(loaded[f"decomposition_{name}"], expected)
    assert loaded.layer.values.tolist() == recorded().layer.values.tolist()
    facts = results.configuration_of(loaded)["observers"][0]
    assert facts["averaging"]["last_stride"] == 3
    with pytest.raises(ValueError, match="differing: observers"):
        run(times=TIMES, rule="forward", sweep={"out": out, "existing": "resume"})


# Batched decompositions on two devices hang within a few steps (mupjax.lapack): with them, this
# ran into its timeout in every one of 4 runs.
ON_TWO_DEVICES = """
import jax, optax, sys
import mupjax
from mupjax.data import digits
from mupjax.models import MLP
from theory.decomposition import decomposition_observer
from theory.trajectory import Averaging
assert len(jax.devices()) == 2
found = mupjax.sweep(
    lambda width, rngs: MLP(64, width, 10, depth=2, rngs=rngs), digits(validation_examples=50),
    lambda learning_rate: optax.sgd(learning_rate), "SP", widths=[48], steps=30, seeds=2,
    hyperparameters={"learning_rate": [0.001 * (i + 1) for i in range(10)]}, chunk_size=10,
    observers=[decomposition_observer(Averaging(0.5, 0.5, 1, 1, 0))],
)
assert (found.decomposition_faithfulness < 0.05).all()
"""


def test_two_devices_with_batches_of_ten_do_not_hang():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-c", ON_TWO_DEVICES],
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | {"XLA_FLAGS": flags},
        timeout=90,
        check=True,
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rule": "midpoint"}, "rule must be one of forward, trapezoid, got 'midpoint'"),
        ({"components": 0}, "components must be whole and at least 1, got 0"),
        ({"components": 2.0}, "components must be whole and at least 1, got 2.0"),
        ({"spectrum": "power"}, "spectrum must be one of exact, lanczos, got 'power'"),
        ({"spectrum": "lanczos"}, "say how many by components"),
        ({"times": []}, "times must be whole numbers"),
        ({"times": [-1]}, "times must be whole numbers"),
        ({"times": [0.5]}, "times must be whole numbers"),
        ({"sides": {"nothing*": "whole"}}, r"sides\['nothing\*'\] matches no parameter"),
        ({"sides": {"*": "rows"}}, "must be one of fan_in, fan_out, whole, got 'rows'"),
        ({"sides": {"*": "whole"}}, "nothing to decompose"),
        (
            {"sides": {"*/kernel": "fan_in", "out/*": "fan_out"}},
            r"sides\['out/\*'\] says 'fan_out' of parameter 'out/kernel', and another",
        ),
        ({"validation_examples": 99}, "holds 12"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        run(**options)
