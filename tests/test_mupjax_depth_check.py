"""Powers of the depth in a real training, against the theory, for every kind of optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import mupjax
from mupjax.coord_check import slope_table, slopes
from mupjax.depth_check import _by_place, depth_check
from mupjax.matrix_optimizers import muon
from mupjax.roles import Layout

D, B, C = 8, 16, 3
RNG = np.random.default_rng(0)
BATCH = tuple(jnp.asarray(RNG.normal(size=(B, k)), jnp.float32) for k in (D, C))
TOY = mupjax.Setting(
    "toy",
    lambda data, key, step: BATCH,
    lambda predict, batch: jnp.mean((predict(batch[0]) - batch[1]) ** 2),
    BATCH,
)


def adam(learning_rate):
    return optax.adam(learning_rate)


def sgd(learning_rate):
    return optax.sgd(learning_rate)


def muon_and_adam(learning_rate, adam_learning_rate, roles):
    return muon(learning_rate, roles=roles, adam_learning_rate=adam_learning_rate)


def test_layers_are_averaged_over_blocks_and_the_last_one_is_kept():
    depth = mupjax.completep(11, 1)
    names = sorted([*(f"blocks/{i}" for i in range(11)), *(f"blocks/{i}/dense" for i in range(11))])
    names = ["embed", *names]
    number = [100.0 if n == "embed" else float(n.split("/")[1]) for n in names]
    given = xr.Dataset({"x": (("seed", "layer"), np.array([number]))}, coords={"layer": names})
    found = _by_place(given, depth).x.isel(seed=0)
    assert {str(k): float(found.sel(layer=k)) for k in found.layer.values} == {
        "blocks/*": 5.0,
        "blocks/*/dense": 5.0,
        "blocks/last": 10.0,
        "embed": 100.0,
    }


def stack(width, depth):
    """Residual blocks of two layers, run by a scan: as quick to compile at any depth."""
    shapes = {
        "embed": (D, width),
        "up": (depth.layers, width, width),
        "down": (depth.layers, width, width),
        "readout": (width, C),
    }

    def init(key):
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        parts = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1].tolist())
        weights = {
            name: part.reshape(shape) * shape[-2] ** -0.5
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        gain = jnp.ones((depth.layers, width))
        return {
            "embed": {"kernel": weights["embed"]},
            "blocks": {"up": weights["up"], "down": weights["down"], "gain": gain},
            "readout": {"kernel": weights["readout"]},
        }

    def intermediates(params, x):
        def block(h, w):
            scaled = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) * w["gain"][None]
            branch = jax.nn.gelu(scaled @ w["up"]) @ w["down"]
            return h + depth.residual_multiplier * branch, None

        stream, _ = jax.lax.scan(block, x @ params["embed"]["kernel"], params["blocks"])
        return {"stream": stream, "output": stream @ params["readout"]["kernel"]}

    kernel = Layout("matrix", (1,), (2,), other=(0,))
    gain = Layout("vector", (), (1,))
    return mupjax.Model(
        init,
        lambda params, x: intermediates(params, x)["output"],
        {"blocks/up": kernel, "blocks/down": kernel, "blocks/gain": gain},
        intermediates=intermediates,
    )


OPTIMIZERS = {
    "adam": (adam, {"learning_rate": 2.0**-9}),
    "sgd": (sgd, {"learning_rate": 2.0**-5}),
    "muon": (muon_and_adam, {"learning_rate": 2.0**-6, "adam_learning_rate": 2.0**-9}),
}


def stream_slopes(optimizer, alpha, layers, seeds=16):
    factory, hyperparameters = OPTIMIZERS[optimizer]
    checked = depth_check(
        stack,
        TOY,
        factory,
        "SP",
        layers=layers,
        # Small at the base depth, so that alpha = 1, whose branches at the start vanish, does not
        # show in the size of the stream.
        depth=mupjax.Depth(4, 4, alpha=alpha, base_multiplier=0.25),
        width=32,
        hyperparameters=hyperparameters,
        steps=4,
        seeds=seeds,
    )
    return checked, {(s.layer, s.quantity, s.update): s.slope for s in slopes(checked)}


def test_the_stream_of_completep_does_not_know_its_depth():
    checked, found = stream_slopes("adam", 1.0, [4, 32])
    assert found["stream", "change", 4] == pytest.approx(0, abs=0.1)
    assert found["stream", "activation", 4] == pytest.approx(0, abs=0.1)
    assert "powers of the number of layers" in slope_table(checked)


@pytest.mark.slow
def test_without_scaling_the_stream_moves_with_its_depth():
    _, found = stream_slopes("adam", None, [4, 32])
    assert found["stream", "change", 1] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_stream_does_not_know_its_depth(optimizer, alpha):
    _, found = stream_slopes(optimizer, alpha, [4, 16, 64])
    assert found["stream", "change", 4] == pytest.approx(0, abs=0.1)
    assert found["stream", "activation", 4] == pytest.approx(0, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_exponents_let_the_stream_grow(optimizer, alpha):
    """Branches of unit size add up to the square root of the depth."""
    _, found = stream_slopes(optimizer, alpha, [4, 16, 64])
    assert found["stream", "activation", 0] > 0.15


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"layers": [4]}, r"at least two depths to fit slopes, got \[4\]"),
        ({"layers": [8, 4]}, r"layers must increase without duplicates, got \[8, 4\]"),
        ({"hyperparameters": {"learning_rate": [0.1, 0.2]}}, "depth_check takes one value .*grid"),
    ],
)
def test_what_no_slope_can_be_fitted_to_is_refused(changed, text):
    arguments = {"layers": [4, 8], "hyperparameters": {"learning_rate": 0.1}, **changed}
    with pytest.raises(ValueError, match=text):
        depth_check(
            stack, TOY, sgd, "SP", depth=mupjax.completep(4, 4), width=8, steps=1, **arguments
        )
