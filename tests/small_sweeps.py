"""Small settings and models, and sweeps over them."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import mupjax
from mupjax.roles import leaf_paths, map_leaves
from tolerances import float_tolerance

D, OUTPUTS, B, EXAMPLES = 3, 2, 8, 32


# It halves the time that programs take to compile. Importing it is enough: it holds for the file.
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


def adam(learning_rate, b1=0.9):
    return optax.adam(learning_rate, b1=b1)


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


def assert_same_results(one, other, steps):
    assert set(one.data_vars) == set(other.data_vars)
    for name in ("loss", "train_loss", "eval_loss"):
        assert_close(one[name], other[name], steps, name)
    xr.testing.assert_equal(one[["status", "diverged_step"]], other[["status", "diverged_step"]])


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
