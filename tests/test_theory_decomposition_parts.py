"""The parts of the decomposition: which side counts, few eigenvalues, what is to blame, files."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
from flax import nnx

import mupjax
from mupjax.adapters import as_model
from mupjax.config_file import read_sweep_file
from mupjax.lapack import one_at_a_time
from mupjax.prepare import prepare
from mupjax.roles import Layout
from theory.alignment import alignment_eigenvalues
from theory.decomposition import decomposition_observer
from theory.faithfulness import faithfulness_report
from theory.krylov import top_alignment_eigenvalues
from theory.layers import layers_of
from theory.trajectory import GWB_LLAMA, Averaging, Rule
from tolerances import float_tolerance


@pytest.fixture(scope="module", autouse=True)
def unoptimised_programs():
    """Compiling is most of the time here, and half of that is XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# Layers -----------------------------------------------------------------------------------------


class Zoo(nnx.Module):
    """One of everything: embedding, attention, an MLP four times as wide, convolution, norms."""

    def __init__(self, width, rngs):
        init = nnx.initializers.normal(0.1)
        self.embed = nnx.Embed(11, width, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(
            num_heads=width // 4, in_features=width, kernel_init=init, rngs=rngs, decode=False
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=init, rngs=rngs)
        self.conv = nnx.Conv(width, 2 * width, (3,), kernel_init=init, rngs=rngs)
        self.readout = nnx.Linear(2 * width, 5, kernel_init=init, rngs=rngs)

    def __call__(self, tokens):
        h = self.norm(self.attend(self.embed(tokens)))
        return self.readout(self.conv(self.down(nnx.relu(self.up(h)))))


def tokens():
    def loss(predict, batch):
        return jnp.mean(predict(batch) ** 2)

    batch = jnp.zeros((2, 6), jnp.int32)
    return mupjax.Setting("tokens", lambda data, key, step: batch, loss, batch)


def with_roles(factory, setting, **options):
    plan = prepare(
        factory,
        setting,
        lambda learning_rate: optax.sgd(learning_rate),
        "SP",
        widths=[8],
        base_width=4,
        hyperparameters={"learning_rate": 0.1},
        **options,
    )
    return plan.models[8]


def test_the_side_of_the_width_of_every_layer():
    model = with_roles(Zoo, tokens(), init_exponents={"embed/embedding": 0.0, "*kernel": 0.0})
    found = {layer.path: (layer.axes, layer.size) for layer in layers_of(model)}
    assert {path: value for path, value in found.items() if value[1]} == {
        "embed/embedding": ((1,), 8),  # (vocabulary, n): what it feeds
        "attend/query/kernel": ((0,), 8),  # (n, heads, head size): equal sides, the inputs
        "attend/key/kernel": ((0,), 8),
        "attend/value/kernel": ((0,), 8),
        "attend/out/kernel": ((0, 1), 8),  # (heads, head size, n), heads jointly
        "up/kernel": ((0,), 8),  # (n, 4n): the block's width
        "down/kernel": ((1,), 8),  # (4n, n)
        "conv/kernel": ((1,), 8),  # (space, n, 2n)
        "readout/kernel": ((0,), 16),  # (2n, classes): what it reads
    }
    whole = [path for path, value in found.items() if not value[1]]
    assert all(path.endswith(("bias", "scale")) for path in whole)
    # What is not the width is laid out along the rows.
    matrix = {layer.path: layer for layer in layers_of(model)}["conv/kernel"].matrix
    kernel = np.arange(3 * 8 * 16).reshape(3, 8, 16)
    expected = np.stack([kernel[:, i, :].ravel() for i in range(8)], axis=1)
    np.testing.assert_array_equal(matrix(jnp.asarray(kernel)), expected)
    stated = {layer.path: layer for layer in layers_of(model, {"up/*": "fan_out", "e*": "whole"})}
    assert (stated["up/kernel"].axes, stated["up/kernel"].size) == ((1,), 32)
    assert stated["embed/embedding"].axes == ()


def test_layers_without_a_layout():
    """Stated roles: the axes that grow are the width; of two that grow it has to be known."""

    def factory(width):
        def init(key):
            return {
                "positions": jnp.ones((3, 2, width)),
                "mixer": jnp.ones((2, width, width)),
                "fixed": jnp.ones((3, 2)),
                "kernel": jnp.ones((2, width)),
            }

        return mupjax.Model(
            init, lambda params, x: sum(jnp.sum(p) for p in jax.tree.leaves(params))
        )

    setting = dataclasses.replace(tokens(), loss=lambda predict, batch: predict(batch) ** 2)
    model = with_roles(factory, setting, roles={"positions": "input", "mixer": "hidden"})
    with pytest.raises(ValueError, match=r"'mixer' of shape .* which of its axes are summed over"):
        layers_of(model)
    found = {layer.path: layer.axes for layer in layers_of(model, {"mixer": "whole"})}
    assert found == {"positions": (2,), "mixer": (), "fixed": (), "kernel": (1,)}
    leaf = dataclasses.replace(model.roles["mixer"], layout=Layout("matrix", (0,), (1,)))
    stacked = dataclasses.replace(model, roles={**model.roles, "mixer": leaf})
    with pytest.raises(ValueError, match="not those of its layer alone"):
        layers_of(stacked)


def test_a_model_without_roles():
    with pytest.raises(ValueError, match="run the observer by"):
        layers_of(as_model(Zoo, 8, tokens()))


# Eigenvalues ------------------------------------------------------------------------------------


def matrices(kind, shape=(2, 40, 50)):
    rng = np.random.default_rng(0)
    g, d = rng.normal(size=shape), rng.normal(size=shape)
    if kind == "rank one":
        g = g[..., :1] * d[..., :1, :]
    if kind == "descent":
        d = -g
    return (1e-12 * g if kind == "tiny" else g).astype(np.float32), d.astype(np.float32)


@pytest.mark.parametrize("kind", ["full", "rank one", "descent", "tiny"])
def test_few_eigenvalues_are_the_largest_ones(kind):
    g, d = matrices(kind)
    found = jax.jit(lambda g, d: top_alignment_eigenvalues(g, d, 4))(g, d)
    with jax.enable_x64(True):
        expected = np.asarray(alignment_eigenvalues(g.astype(float), d.astype(float))[..., :4])
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    rounding = float_tolerance(np.float32, 2000) * largest
    error = np.abs(np.asarray(found.eigenvalues) - expected)
    assert (error <= np.asarray(found.residuals) + rounding).all()
    assert (found.residuals <= 1e-4 * largest).all()


def test_few_eigenvalues_of_nothing_and_of_nan():
    g, d = matrices("full")
    assert (top_alignment_eigenvalues(0 * g, d, 3).eigenvalues == 0).all()
    g[1, 3, 3] = np.nan
    found = top_alignment_eigenvalues(g, d, 3)
    # Zero though neither factor is: they share no row.
    apart = np.arange(g.shape[1])[None, :, None] < 2
    nothing = top_alignment_eigenvalues(g * apart, d * ~apart, 3)
    assert (nothing.eigenvalues[0] == 0).all()
    assert (nothing.residuals[0] == 0).all()
    assert np.isfinite(found.eigenvalues[0]).all()
    assert np.isnan(found.eigenvalues[1]).all()
    with pytest.raises(ValueError, match="count must lie between 1 and 49"):
        top_alignment_eigenvalues(g, d, 50)
    with pytest.raises(ValueError, match=r"\(3,\) and update \(3,\)"):
        top_alignment_eigenvalues(np.ones(3), np.ones(3), 1)
    with pytest.raises(TypeError, match="count must be a whole number, got True"):
        top_alignment_eigenvalues(g, d, True)
    with pytest.raises(TypeError, match="float32 or both float64, got float16"):
        top_alignment_eigenvalues(g.astype(np.float16), d.astype(np.float16), 3)


def test_one_at_a_time_is_a_loop_on_a_cpu():
    def trace(a, b):
        return jnp.linalg.eigvalsh(a) + jnp.linalg.eigvalsh(b)

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4, 4)), rng.normal(size=(4, 4))
    a, b = a + np.swapaxes(a, -1, -2), b + b.T
    safe = one_at_a_time(trace)
    mapped = jax.jit(jax.vmap(jax.vmap(lambda x: safe(x, jnp.asarray(b)))))
    expected = np.linalg.eigvalsh(a) + np.linalg.eigvalsh(b)
    np.testing.assert_allclose(mapped(a), expected, rtol=1e-4, atol=1e-5)
    if jax.default_backend() == "cpu":
        # No decomposition in the program has more than one matrix to work on.
        text = mapped.lower(a).compile().as_text() or ""
        calls = [line for line in text.splitlines() if "syevd" in line and "custom-call" in line]
        assert calls
        assert not any("[2,3,4,4]" in line or "[3,4,4]" in line for line in calls)


# Faithfulness -----------------------------------------------------------------------------------


def quartic(noise=0.0):
    """Loss ¼ Σ w⁴, with noise in the training gradients."""

    def sample(data, key, step):
        draw = jax.random.normal(jax.random.fold_in(key, step), (1, 2))
        return {"push": noise * draw}

    def loss(predict, batch):
        w = predict(batch["push"])
        return jnp.sum(w**4) / 4 + jnp.sum(batch["push"][0] * w)

    return mupjax.Setting("quartic", sample, loss, {"push": jnp.zeros((1, 2))})


def point(width):
    """Two numbers, spread over `width` columns."""
    start = jnp.asarray([1.0, 0.8])

    def apply(params, x):
        return jnp.mean(params["kernel"], axis=1)

    return mupjax.Model(lambda key: {"kernel": jnp.tile(start[:, None], (1, width))}, apply)


def causes(averaging, rate, noise=0.0, momentum=0.0, rule: Rule = "trapezoid", steps=240):
    found = mupjax.sweep(
        point,
        quartic(noise),
        lambda learning_rate: optax.sgd(learning_rate, momentum=momentum),
        "SP",
        widths=[2],
        base_width=2,
        hyperparameters={"learning_rate": [rate]},
        steps=steps,
        roles={"kernel": "input"},
        observers=[decomposition_observer(averaging, rule=rule)],
    )
    return faithfulness_report(found)


def plain(stride, coefficient=0.0):
    return Averaging(coefficient, coefficient, stride, stride, 0)


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # cause, an example of it, and what cures it
    ("rule", {"averaging": plain(8), "rate": 0.05, "rule": "forward"}, {"rule": "trapezoid"}),
    ("subsampling", {"averaging": plain(80), "rate": 0.05}, {"averaging": plain(8)}),
    (
        "EMA window",
        {"averaging": plain(4), "rate": 0.3, "noise": 1.5},
        {"averaging": plain(4, 0.98)},
    ),
    ("learning rate", {"averaging": plain(8), "rate": 0.1, "momentum": 0.99}, {"rate": 0.002}),
    ("learning rate", {"averaging": plain(1), "rate": 0.9}, {"rate": 0.1}),
    ("no change", {"averaging": plain(2), "rate": 1e-30}, {"rate": 0.05}),
    ("no mark", {"averaging": plain(4), "rate": 0.05, "steps": 3}, {"averaging": plain(1)}),
]


@pytest.mark.parametrize(("cause", "example", "cure"), CASES)
def test_the_cause_that_is_named_is_the_one_that_cures(cause, example, cure):
    report = causes(**example)
    assert report.causes == {cause: 1}, (report, report.worst)
    assert report.unfaithful == report.trials == 1
    assert not report.worst <= 0.05
    assert report.cause.item() == cause
    assert f"Cause in 1: {cause}" in str(report)
    cured = causes(**(example | cure))
    assert cured.unfaithful == 0, cured
    assert cured.cause.item() == ""


def test_a_dataset_without_decomposition():
    with pytest.raises(ValueError, match="run without decomposition_observer"):
        faithfulness_report(xr.Dataset())


# Files ------------------------------------------------------------------------------------------

FILE = """
[sweep]
parametrizations = ["muP"]
widths = [4]
base_width = 4
steps = 10
[hyperparameters]
learning_rate = 0.01
[decomposition]
"""


def test_a_sweep_file_asks_for_the_decomposition(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(FILE + 'averaging = "gwb-llama"\ntimes = 3\ncomponents = 2\n')
    (observer,) = read_sweep_file(path).arguments["observers"]
    assert observer.configuration["averaging"] == dataclasses.asdict(GWB_LLAMA)
    assert observer.configuration["times"] == [0, 4, 10]
    table = "{first_coefficient = 0.5, last_coefficient = 0.5, first_stride = 1, last_stride = 1, "
    path.write_text(FILE + f"averaging = {table} warmup_steps = 0}}\n")
    (observer,) = read_sweep_file(path).arguments["observers"]
    assert observer.configuration["averaging"] == dataclasses.asdict(plain(1, 0.5))


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('averaging = "large"', "averaging must be one of laptop, gwb-llama, gwb-gpt2"),
        ("averaging = {stride = 3}", r"\[decomposition\]: averaging: .*'stride'|missing"),
        ("rank = 3", "unknown keys"),
        ("times = 1", "at least 2"),
        ("components = 0", "components must be whole"),
    ],
)
def test_bad_decomposition_tables(tmp_path, line, text):
    path = tmp_path / "run.toml"
    path.write_text(FILE + line + "\n")
    with pytest.raises(ValueError, match=text):
        read_sweep_file(path)
