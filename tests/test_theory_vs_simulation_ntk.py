"""The engine's training of linearized networks equals the closed form of their tangent kernel.

Two independent ways to one number: gradient descent on the parameters, run by the sweep engine
(`synthetic.linearized`), and powers of the eigenvalues of the kernel (`theory.ntk`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mupjax
from synthetic.linearized import fixed_points, linearize, two_layer_relu
from synthetic.quadratic import PowerLawQuadratic
from theory.ntk import empirical_ntk, infinite_width_kernels, linearized_training
from tolerances import float_tolerance

P, D, STEPS, SEEDS = 6, 4, 24, 2
WIDTHS = (8, 16)
AS_BUILT = mupjax.Parametrization(
    "as built",
    {"sgd": {role: mupjax.Exponents() for role in ("input", "hidden", "output", "vector")}},
)


@pytest.fixture(scope="module", autouse=True)
def unoptimised_programs():
    """Compiling is most of the time here, and half of that is XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def points(seed: int, count: int, outputs: tuple[int, ...] = ()):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, D))
    y = np.sin(x @ rng.normal(size=(D, *outputs)))
    return x, y


def run(factory, train, test, rates, *, widths=WIDTHS, steps=STEPS, seeds=SEEDS, **options):
    with jax.enable_x64(True):
        return mupjax.sweep(
            factory,
            fixed_points(*train, validation=test),
            lambda learning_rate: optax.sgd(learning_rate),
            AS_BUILT,
            widths=widths,
            hyperparameters={"learning_rate": rates},
            steps=steps,
            seeds=seeds,
            evaluations=4,
            **options,
        )


def initial(model, seed: int):
    """The initial weights of one trial of the engine."""
    return model.init(jax.random.fold_in(jax.random.key(seed), 0))


def check_closed_form(base, train, test, rates, dataset) -> None:
    (x, y), (x_test, y_test) = train, test
    tolerance = float_tolerance(np.float64, operations=100 * STEPS)
    for n in dataset.width.values:
        model = base(n)
        for seed in dataset.seed.values:
            with jax.enable_x64(True):
                params = initial(model, seed)
                kernel = empirical_ntk(model.apply, params, x, chunk_size=4)
                cross = empirical_ntk(model.apply, params, x_test, x, chunk_size=4)
                before = np.asarray(model.apply(params, x)) - y
                test_before = np.asarray(model.apply(params, x_test)) - y_test
            training = linearized_training(kernel, before)
            trial = dataset.sel(width=n, seed=seed)
            np.testing.assert_allclose(
                trial.train_loss,
                training.loss(np.array(rates)[:, None], np.arange(STEPS)),
                rtol=tolerance,
            )
            for r, rate in enumerate(rates):
                for e, step in enumerate(dataset.eval_step.values):
                    residual = test_before + training.change(cross, rate, int(step))
                    expected = np.sum(residual**2) / (2 * len(x_test))
                    found = float(trial.eval_loss[r, e])
                    assert found == pytest.approx(expected, rel=tolerance), (n, seed, rate, step)


def test_two_layer_relu_at_every_width_rate_and_step() -> None:
    """From slow rates over the optimal one, of one trial, to one far beyond stability."""
    train, test = points(0, P), points(1, 3)
    base = two_layer_relu(D)
    with jax.enable_x64(True):
        model = base(WIDTHS[1])
        params = initial(model, 0)
        kernel = empirical_ntk(model.apply, params, train[0])
        residual = np.asarray(model.apply(params, train[0])) - train[1]
    best = linearized_training(kernel, residual).optimum(STEPS - 1)
    rates = tuple(best.learning_rate * np.array([0.03, 0.97, 1.0, 1.03, 5.0]))
    dataset = run(linearize(base), train, test, rates, strategy="padded")
    check_closed_form(base, train, test, rates, dataset)
    trained = dataset.train_loss.sel(width=WIDTHS[1], seed=0, step=STEPS - 1).values
    assert trained[2] == pytest.approx(best.loss, rel=1e-11)
    assert trained[2] < min(trained[1], trained[3])
    assert trained[4] > 1e10


def test_several_outputs_and_more_layers() -> None:
    """Nothing is special about that network: tanh, two hidden layers, biases, two outputs."""

    def net(width: int) -> mupjax.Model:
        def init(key):
            keys = jax.random.split(key, 4)
            draw = jax.random.normal
            return {
                "enter": {"kernel": draw(keys[0], (D, width)), "bias": draw(keys[1], (width,))},
                "mix": {"kernel": draw(keys[2], (width, width))},
                "readout": {"kernel": draw(keys[3], (width, 2))},
            }

        def apply(p, x):
            h = jnp.tanh(x @ p["enter"]["kernel"] + p["enter"]["bias"][None])
            h = jnp.tanh(h @ p["mix"]["kernel"] / np.sqrt(width))
            return h @ p["readout"]["kernel"] / np.sqrt(width)

        return mupjax.Model(init, apply)

    train, test = points(2, P, (2,)), points(3, 3, (2,))
    dataset = run(linearize(net), train, test, (0.1, 1.0), widths=(6,), seeds=1)
    check_closed_form(net, train, test, (0.1, 1.0), dataset)


def test_kernels_of_the_initial_networks_average_to_the_infinite_one() -> None:
    """`synthetic.linearized` and `theory.ntk.analytic` mean the same network: exact in the mean."""
    x, _ = points(5, 4)
    model = two_layer_relu(D)(16)
    x32 = jnp.asarray(x, jnp.float32)

    def kernel(key):
        rows = jax.jacrev(lambda p: model.apply(p, x32))(model.init(key))
        flat = jnp.concatenate([leaf.reshape(4, -1) for leaf in jax.tree.leaves(rows)], axis=1)
        return flat @ flat.T

    kernels = jax.jit(jax.vmap(kernel))(jax.random.split(jax.random.key(0), 4000))
    kernels = np.asarray(kernels, np.float64)
    limit = infinite_width_kernels(x, depth=1).ntk
    error = kernels.std(axis=0, ddof=1) / np.sqrt(len(kernels))
    assert (np.abs(kernels.mean(axis=0) - limit) < 4.5 * error).all()
    assert (error < 0.01 * np.abs(limit).max()).all()


@pytest.mark.slow
def test_true_training_approaches_the_linearized_one_as_one_over_root_width() -> None:
    """The network itself, not linearized, trained by the engine: difference of final losses."""
    train = points(6, P)
    rates, widths, seeds, steps = (0.3,), (64, 256, 1024, 4096), 24, 30
    base = two_layer_relu(D)
    options = {"widths": widths, "steps": steps, "seeds": seeds}
    true = run(base, train, None, rates, **options).loss.squeeze().values
    linear = run(linearize(base), train, None, rates, **options).loss.squeeze().values
    gap = np.abs(true - linear)
    y = np.log(gap.mean(axis=1))
    error = gap.std(axis=1, ddof=1) / gap.mean(axis=1) / np.sqrt(seeds)
    x = np.log(widths) - np.log(widths).mean()
    slope, standard_error = x @ y / (x @ x), np.sqrt(np.sum((x * error) ** 2)) / (x @ x)
    assert standard_error < 0.1
    assert abs(slope + 0.5) < 4 * standard_error


def test_the_quadratic_is_linearized_training_with_its_own_spectrum() -> None:
    """`synthetic.quadratic` and `theory.ntk` were written apart: sums over modes of one problem."""
    a, b, n, T = 1.5, 1.8, 30, 40
    quadratic = PowerLawQuadratic(a, b)
    i = np.arange(1.0, n + 1)
    # Residuals √λ (w − w*) have the kernel P diag(λ) under the loss (1/2P)‖·‖², with P = n points.
    training = linearized_training(n * np.diag(i**-a), np.sqrt(n) * i ** (-b / 2))
    rates = np.array([0.0, 0.5, 1.0, 1.7, 2.4])
    beyond = float(quadratic.loss(0.0, steps=T, width=n)) - 0.5 * np.sum(i**-b)
    np.testing.assert_allclose(
        training.loss(rates, T) + beyond, quadratic.loss(rates, steps=T, width=n), rtol=1e-12
    )
    best, other = training.optimum(T), quadratic.optimum(steps=T, width=n)
    assert best.learning_rate == pytest.approx(other.learning_rate, rel=1e-13)
    assert best.loss + beyond == pytest.approx(other.loss, rel=1e-13)
