"""Modes of the kernel recorded in training: the closed form, and the sum over modes.

Gradient descent on the parameters, run by the sweep engine with `theory.ntk.ntk_observer`, against
powers of the eigenvalues of kernels written out in `synthetic.linearized`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mupjax
from synthetic.linearized import (
    fixed_points,
    linearize,
    random_features,
    random_features_kernel,
    two_layer_kernel,
    two_layer_relu,
)
from theory.ntk import (
    empirical_ntk,
    infinite_width_kernels,
    linearized_ensemble,
    linearized_training,
    ntk_observer,
)
from theory.trajectory import Averaging
from tolerances import float_tolerance

P, D, STEPS, SEEDS = 7, 3, 12, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(P, D))
Y = np.sin(X.sum(axis=1))
EVERY_STEP = Averaging(0.0, 0.0, 1, 1, 0)
AS_BUILT = mupjax.Parametrization(
    "as built",
    {
        family: {role: mupjax.Exponents() for role in ("input", "hidden", "output", "vector")}
        for family in ("sgd", "adam")
    },
)
FAMILIES = {
    "random features": (random_features(D), random_features(D), random_features_kernel),
    "two-layer": (two_layer_relu(D), linearize(two_layer_relu(D), centred=True), two_layer_kernel),
}


@pytest.fixture(scope="module", autouse=True)
def unoptimised_programs():
    """Compiling is most of the time here, and half of that is XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def initial(model, seed: int):
    """The initial weights of one trial of the engine."""
    return model.init(jax.random.fold_in(jax.random.key(seed), 0))


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_in_closed_form_are_the_models_own(name) -> None:
    base, _, kernel = FAMILIES[name]
    with jax.enable_x64(True):
        model = base(9)
        params = jax.tree.map(lambda p: p + 0.1, initial(model, 3))
        expected = empirical_ntk(model.apply, params, X)
        np.testing.assert_allclose(kernel(params, jnp.asarray(X)), expected, rtol=1e-12)


def test_random_features_average_to_the_infinite_kernel() -> None:
    limit = infinite_width_kernels(X, depth=1, activation="erf").nngp
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 400)
        params = jax.vmap(random_features(D)(64).init)(keys)
        kernels = np.asarray(jax.vmap(random_features_kernel, (0, None))(params, jnp.asarray(X)))
    error = np.std(kernels, axis=0, ddof=1) / np.sqrt(len(keys))
    assert (np.abs(np.mean(kernels, axis=0) - limit) < 4.5 * error).all()
    assert (error < 0.01).all()


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("two-layer", (4,)),
        pytest.param("two-layer", (5, 8), marks=pytest.mark.slow),
        pytest.param("random features", (4, 8), marks=pytest.mark.slow),
    ],
)
def test_training_by_modes_is_the_closed_form(name, widths) -> None:
    """Every mode, width and seed, from slow rates to one that diverges, to float tolerance."""
    base, factory, kernel = FAMILIES[name]
    rates = (0.2, 1.0, 16.0)
    with jax.enable_x64(True):
        dataset = mupjax.sweep(
            factory,
            fixed_points(X, Y),
            lambda learning_rate: optax.sgd(learning_rate),
            AS_BUILT,
            widths=widths,
            hyperparameters={"learning_rate": rates},
            steps=STEPS,
            seeds=SEEDS,
            divergence_threshold=1e60,
            evaluations=1,
            observers=[ntk_observer(EVERY_STEP)],
            strategy="bucketed",
        )
        tolerance = float_tolerance(np.float64, operations=1000 * STEPS)
        for n in dataset.width.values:
            for seed in dataset.seed.values:
                K = kernel(initial(base(n), seed), jnp.asarray(X))
                training = linearized_training(K, -Y)
                trial = dataset.sel(width=n, seed=seed)
                expected = linearized_ensemble([training]).mode_changes(rates, STEPS)
                scale = np.abs(expected).max(axis=1, keepdims=True)
                assert (np.abs(trial.ntk_modes.values - expected) < tolerance * scale).all()
                np.testing.assert_allclose(
                    trial.ntk_eigenvalues[0], training.eigenvalues, atol=1e-12 * float(K.max()) * P
                )
                np.testing.assert_allclose(
                    trial.loss, training.loss(np.array(rates), STEPS), rtol=tolerance
                )
    assert float(dataset.loss.max()) > 1e3
    assert float(dataset.ntk_faithfulness.max()) < tolerance


def net(width: int) -> mupjax.Model:
    """Two outputs, tanh: not linear in its weights."""

    def init(key):
        a, b = jax.random.split(key)
        return {
            "enter": {"kernel": jax.random.normal(a, (D, width))},
            "readout": {"kernel": jax.random.normal(b, (width, 2))},
        }

    def apply(p, x):
        return jnp.tanh(x @ p["enter"]["kernel"]) @ p["readout"]["kernel"] / np.sqrt(width)

    return mupjax.Model(init, apply)


def train(optimizer, averaging, family, **options):
    y = np.stack([Y, -(Y**2)], axis=1)
    with jax.enable_x64(True):
        return mupjax.sweep(
            net,
            fixed_points(X, y),
            optimizer,
            AS_BUILT,
            widths=(6,),
            hyperparameters={"learning_rate": (0.1, 0.3)},
            steps=STEPS,
            seeds=1,
            evaluations=1,
            optimizer_family=family,
            observers=[ntk_observer(averaging, columns=4, **options)],
        )


@pytest.mark.parametrize(
    ("optimizer", "family", "averaging", "options"),
    [
        pytest.param(
            lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
            "sgd",
            EVERY_STEP,
            {"kernel": "trajectory"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda learning_rate: optax.adam(learning_rate),
            "adam",
            Averaging(0.5, 0.9, 1, 3, 8),
            {"kernel": "initial", "rule": "forward"},
            marks=pytest.mark.slow,
        ),
        (
            lambda learning_rate: optax.adam(learning_rate),
            "adam",
            Averaging(0.5, 0.9, 2, 2, 8),
            {"kernel": infinite_width_kernels(X[:5], depth=1).ntk, "validation_examples": 5},
        ),
    ],
    ids=["momentum", "Adam, average, forward", "Adam, average, infinite width"],
)
def test_modes_sum_to_the_linearized_change(optimizer, family, averaging, options) -> None:
    """`ntk_total` is summed over parameters, `ntk_modes` over outputs."""
    dataset = train(optimizer, averaging, family, **options)
    total, modes = dataset.ntk_total, dataset.ntk_modes
    assert modes.sizes["mode"] == (5 if "validation_examples" in options else 2 * P)
    scale = np.abs(modes).sum("mode")
    assert (np.abs(modes.sum("mode") - total) < 1e-13 * scale).all()
    assert (np.abs(total) > 1e-3).all()
    assert (np.abs(modes.isel(mode=0) / total - 1) > 1e-2).all()


@pytest.mark.slow
def test_gradient_descent_by_hand_along_a_kernel_that_moves() -> None:
    """`−η κ_i (u_iᵀ ∇_f L)²`, with the kernel of every step, by NumPy."""
    options = {"kernel": "trajectory", "rule": "forward"}
    dataset = train(lambda learning_rate: optax.sgd(learning_rate), EVERY_STEP, "sgd", **options)
    found = dataset.isel(width=0, seed=0, learning_rate=1)
    y, rate = np.stack([Y, -(Y**2)], axis=1), 0.3
    with jax.enable_x64(True):
        params = jax.tree.map(np.asarray, initial(net(6), 0))
        W, a = params["enter"]["kernel"], params["readout"]["kernel"] / np.sqrt(6)
    expected = 0.0
    for _ in range(STEPS):
        h = np.tanh(X @ W)
        slope = (1 - h**2)[:, None, :] * a.T[None]
        J = np.einsum("pd,pcn->pcdn", X, slope).reshape(P * 2, -1)
        readout = np.einsum("pn,ce->pcne", h / np.sqrt(6), np.eye(2)).reshape(P * 2, -1)
        J = np.concatenate([J, readout], axis=1)
        kappa, U = np.linalg.eigh(J @ J.T)
        g = ((h @ a - y) / P).ravel()
        expected = expected - rate * (kappa * (U.T @ g) ** 2)[::-1]
        step = rate * J.T @ g
        W = W - step[: W.size].reshape(W.shape)
        a = a - step[W.size :].reshape(a.shape) / np.sqrt(6)
    np.testing.assert_allclose(found.ntk_modes, expected, rtol=1e-9, atol=1e-13)


def test_what_the_observer_refuses_when_the_sweep_starts(monkeypatch) -> None:
    from theory.ntk import observer

    sgd = optax.sgd
    with pytest.raises(ValueError, match="kernel is of 5 rows; expected 14 or 7"):
        train(lambda learning_rate: sgd(learning_rate), EVERY_STEP, "sgd", kernel=np.eye(5))
    monkeypatch.setattr(observer, "_LARGEST_KERNEL_BYTES", 1000)
    with pytest.raises(ValueError, match=r"14 outputs on the validation batch.*set valid"):
        train(lambda learning_rate: sgd(learning_rate), EVERY_STEP, "sgd")


def test_a_sweep_with_another_given_kernel_is_another_sweep():
    eye = np.eye(4)
    facts = [
        ntk_observer(Averaging(0, 0, 1, 1, 0), kernel=kernel).configuration["kernel"]
        for kernel in (eye, eye.astype(np.float32), 2 * eye)
    ]
    assert facts[0] == facts[1] != facts[2]
