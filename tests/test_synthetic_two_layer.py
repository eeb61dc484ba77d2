"""Ball indicator and multi-index: targets, losses and networks against closed forms and numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import mupjax
from mupjax.roles import leaf_paths
from synthetic.two_layer import (
    ball_indicator,
    ball_threshold,
    constant_loss,
    multi_index,
    multi_index_moments,
    two_layer,
)
from tolerances import float_tolerance, standard_error_band

SETTINGS = {"ball-indicator": ball_indicator, "multi-index": multi_index}


def batch_of(setting, seed=1, step=0):
    return setting.sample(setting.data, jax.random.key(seed), jnp.int32(step))


def constant(value):
    return lambda x: jnp.full((x.shape[0], 1), value, jnp.float32)


def mean_of(values):
    """Mean over a large batch with its band, for comparing with an expectation."""
    values = np.asarray(values, np.float64)
    return values.mean(axis=0), standard_error_band(values)


@pytest.mark.parametrize("dimension", [1, 2, 64])
def test_the_threshold_is_the_median(dimension):
    assert stats.chi2.cdf(ball_threshold(dimension), dimension) == pytest.approx(0.5, abs=1e-12)
    if dimension == 2:
        assert ball_threshold(2) == pytest.approx(2 * math.log(2), rel=1e-12)


def test_ball_labels_and_inputs():
    x, y = map(np.asarray, batch_of(ball_indicator(64, batch_size=20_000)))
    assert x.shape == (20_000, 64)
    assert y.shape == (20_000,)
    # numpy's norm, in double precision: only points within rounding of the sphere may differ.
    radius = np.square(x.astype(np.float64)).sum(1)
    clear = np.abs(radius - ball_threshold(64)) > float_tolerance(np.float32, 64) * radius
    np.testing.assert_array_equal(y[clear], radius[clear] > ball_threshold(64))
    assert clear.mean() > 0.99
    for values, expected in ((y, 0.5), (x, 0.0), (x**2, 1.0)):
        mean, band = mean_of(values)
        assert (np.abs(mean - expected) < band).all()


@pytest.mark.parametrize("directions", [1, 2, 15, 64])
def test_multi_index_moments_are_those_of_the_chi_distribution(directions):
    chi = stats.chi(directions, scale=1 / math.sqrt(directions))
    mean, variance = multi_index_moments(directions)
    assert mean == pytest.approx(chi.mean(), rel=1e-12)
    assert variance == pytest.approx(chi.var(), rel=1e-9)
    # sqrt(chi-squared / k), without the chi distribution.
    by_hand = stats.chi2.expect(lambda q: np.sqrt(q / directions), args=(directions,))
    assert mean == pytest.approx(by_hand, rel=1e-6)


def test_multi_index_variance_does_not_cancel_for_many_directions():
    k = 1_000_000
    # Stirling's series: E y = 1 - 1/(4k) + 1/(32k²) + O(k^-3).
    assert multi_index_moments(k)[1] == pytest.approx(1 / (2 * k) - 1 / (8 * k**2), rel=1e-8)


def test_multi_index_targets_and_inputs():
    d, k = 64, 15
    x, y = map(np.asarray, batch_of(multi_index(d, k, batch_size=20_000)))
    formula = np.sqrt(d / (4 * k) * np.square(x[:, :k].astype(np.float64)).sum(1))
    np.testing.assert_allclose(y, formula, rtol=float_tolerance(np.float32, k))
    mean, variance = multi_index_moments(k)
    centred = (y - mean) ** 2
    for values, expected in ((y, mean), (y**2, 1.0), (centred, variance), (x**2, 4 / d)):
        average, band = mean_of(values)
        assert (np.abs(average - expected) < band).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_best_constant_has_the_closed_form_loss(name):
    setting = SETTINGS[name](validation_examples=16384)
    best = 0.0 if name == "ball-indicator" else multi_index_moments(15)[0]
    loss = constant_loss(setting)
    y = np.asarray(setting.validation[1], np.float64)
    each = np.full_like(y, math.log(2)) if name == "ball-indicator" else (y - best) ** 2
    measured = float(setting.loss(constant(best), setting.validation))
    assert measured == pytest.approx(each.mean(), rel=float_tolerance(np.float32, 16384))
    assert abs(measured - loss) <= standard_error_band(each) + float_tolerance(np.float32) * loss
    # No other constant is better, beyond the sampling noise of the batch.
    for shift in (-0.3, 0.3):
        assert float(setting.loss(constant(best + shift), setting.validation)) > measured
    with pytest.raises(ValueError, match=r"synthetic\.two_layer"):
        constant_loss(dataclasses.replace(setting, name="digits"))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_truth_has_no_loss(name):
    setting = SETTINGS[name](dimension=16, validation_examples=4096)

    def truth(x):
        if name == "ball-indicator":
            inside = jnp.sum(x**2, axis=1) > ball_threshold(16)
            return jnp.where(inside, 200.0, -200.0)[:, None]
        return jnp.sqrt(16 / 60 * jnp.sum(x[:, :15] ** 2, axis=1))[:, None]

    assert float(setting.loss(truth, setting.validation)) < 1e-10
    if name == "ball-indicator":
        assert float(setting.metrics["accuracy"](truth, setting.validation)) == 1


@pytest.mark.parametrize("name", SETTINGS)
def test_blocks_do_not_change_the_loss(name):
    """The validation batch is read in blocks; the loss is that of the whole, by numpy."""
    setting = SETTINGS[name](dimension=16, validation_examples=6144)
    model = two_layer(16, biases="fixed", bias_std=1.0, readout_std=4.0)(32)
    params = model.init(jax.random.key(3))
    x, y = map(np.asarray, setting.validation)
    z = np.asarray(model.apply(params, x), np.float64)[:, 0]
    if name == "ball-indicator":
        expected = np.logaddexp(0, z) - y * z
        accuracy = float(setting.metrics["accuracy"](lambda x: model.apply(params, x), (x, y)))
        assert accuracy == pytest.approx(((z > 0) == (y == 1)).mean(), abs=1e-6)
    else:
        expected = (z - y) ** 2
    measured = float(setting.loss(lambda x: model.apply(params, x), setting.validation))
    assert measured == pytest.approx(expected.mean(), rel=float_tolerance(np.float32, 6144))


@pytest.mark.parametrize("name", SETTINGS)
def test_batches_are_fresh_and_validation_is_fixed(name):
    setting, again = SETTINGS[name](), SETTINGS[name]()
    np.testing.assert_array_equal(setting.validation[0], again.validation[0])
    other = SETTINGS[name](validation_seed=1)
    drawn = [other.validation[0][:256], setting.validation[0][:256]]
    drawn += [batch_of(setting, seed, step)[0] for seed in (0, 1) for step in (0, 1)]
    rows = [{row.tobytes() for row in np.asarray(x)} for x in drawn]
    assert len(set.union(*rows)) == sum(len(x) for x in drawn) == 6 * 256
    np.testing.assert_array_equal(batch_of(setting, 1, 1)[0], drawn[-1])


@pytest.mark.parametrize("biases", ["trained", "fixed", "none"])
@pytest.mark.parametrize("output_bias", [True, False])
def test_a_network_is_its_formula(biases, output_bias):
    d, n = 5, 7
    scale = {} if biases == "none" else {"bias_std": 0.5}
    model = two_layer(d, biases=biases, output_bias=output_bias, **scale)(n)
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), params)
    x = rng.normal(size=(11, d)).astype(np.float32)
    expected = np.zeros(11)
    for i in range(n):
        b = params["hidden"]["bias"][i] if biases != "none" else 0.0
        w, a = params["hidden"]["kernel"][:, i], params["readout"]["kernel"][i, 0]
        expected += a * np.maximum(x @ w + b, 0)
    if output_bias:
        expected += params["readout"]["bias"][0]
    tolerance = float_tolerance(np.float32, d * n)
    np.testing.assert_allclose(model.apply(params, x)[:, 0], expected, rtol=0, atol=10 * tolerance)
    wanted = {"hidden/kernel", "readout/kernel"} | ({"hidden/bias"} if biases != "none" else set())
    assert set(leaf_paths(params)) == wanted | ({"readout/bias"} if output_bias else set())


def test_zero_padded_units_add_nothing():
    """So that several widths may share one padded program."""
    model = two_layer(5, bias_std=1.0)(7)
    params = model.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(11, 5)).astype(np.float32)
    padded = {
        "hidden": {
            "kernel": np.pad(params["hidden"]["kernel"], ((0, 0), (0, 6))),
            "bias": np.pad(params["hidden"]["bias"], (0, 6)),
        },
        "readout": {"kernel": np.pad(params["readout"]["kernel"], ((0, 6), (0, 0)))},
    }
    assert "width" in model.options
    np.testing.assert_allclose(
        model.apply(padded, x, width=7),
        model.apply(params, x),
        rtol=float_tolerance(np.float32, 35),
        atol=float_tolerance(np.float32, 35) / 7,
    )


def test_absolute_values_are_represented_exactly():
    """Two units make |x_1|: relu(t) + relu(-t); the multi-index target of one direction is this."""
    setting = multi_index(4, 1, validation_examples=256)
    model = two_layer(4, biases="none")(2)
    kernel = np.zeros((4, 2), np.float32)
    kernel[0] = 1, -1
    # y = sqrt(d/4) |x_1| with d = 4.
    params = {"hidden": {"kernel": kernel}, "readout": {"kernel": np.ones((2, 1), np.float32)}}
    assert float(setting.loss(lambda x: model.apply(params, x), setting.validation)) < 1e-12


@pytest.mark.parametrize("width", [64, 1024])
def test_initial_scales(width):
    model = two_layer(64, input_std=0.3, readout_std=2.0, bias_std=0.7, output_bias=True)(width)
    params = model.init(jax.random.key(0))
    default = two_layer(64)(width).init(jax.random.key(0))
    for leaf, std in (
        (params["hidden"]["kernel"], 0.3),
        (params["readout"]["kernel"], 2.0 / width),
        (params["hidden"]["bias"], 0.7),
        (default["hidden"]["kernel"], 1 / 8),
    ):
        squares = np.square(np.ravel(leaf).astype(np.float64) / std)
        assert abs(squares.mean() - 1) < standard_error_band(squares)
    assert not np.any(params["readout"]["bias"])
    assert not np.any(default["hidden"]["bias"])


def test_muP_leaves_the_initial_scales_alone_and_base_width_is_the_readouts_rate():
    setting = ball_indicator(8, validation_examples=256)
    kwargs = {"widths": [16, 64], "hyperparameters": {"learning_rate": 0.01}, "steps": 1}
    resolved = mupjax.resolve_sweep(
        two_layer(8, bias_std=1.0), setting, optax.adam, "muP", base_width=4, **kwargs
    )
    for width in (16, 64):
        factors = resolved.factors(width)
        assert set(factors.init.values()) == {1.0}
        assert set(factors.multiplier.values()) == {1.0}
        rates = factors.learning_rate
        assert rates["readout/kernel"] == pytest.approx(4 / width)
        assert rates["hidden/kernel"] == rates["hidden/bias"] == 1


def test_fixed_biases_stay_where_they_are():
    """To the bit, after a few updates of Adam; the rest has moved."""
    setting = ball_indicator(8, batch_size=32, validation_examples=256)
    for biases in ("trained", "fixed"):
        model = two_layer(8, biases=biases, bias_std=1.0)(16)
        params = start = model.init(jax.random.key(0))
        adam = optax.adam(0.01)
        state = adam.init(params)
        batch = batch_of(setting)

        def loss(params, model=model, batch=batch):
            return setting.loss(lambda x: model.apply(params, x), batch)

        for _ in range(3):
            updates, state = adam.update(jax.grad(loss)(params), state)
            params = optax.apply_updates(params, updates)
        before, after = leaf_paths(start), leaf_paths(params)
        moved = {path: not np.array_equal(after[path], before[path]) for path in before}
        assert moved == {
            "hidden/kernel": True,
            "readout/kernel": True,
            "hidden/bias": biases == "trained",
        }


def test_layerwise_multipliers_are_mean_field_rates():
    """Base width 1 with the readout's rate times 16 is base width 16."""
    setting = ball_indicator(8, batch_size=32, validation_examples=256)
    losses = []
    for base, multiplier in ((1, 16.0), (16, 1.0)):
        found = mupjax.sweep(
            two_layer(8),
            setting,
            lambda learning_rate: optax.adam(learning_rate, eps=1e-30),
            "muP",
            widths=[32],
            base_width=base,
            hyperparameters={
                "learning_rate": [0.003, 0.03],
                "output_learning_rate_multiplier": multiplier,
            },
            steps=20,
            progress=False,
        )
        losses.append(found.loss.values)
        assert np.isfinite(found.loss.values).all()
    np.testing.assert_allclose(losses[0], losses[1], rtol=float_tolerance(np.float32, 2000))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_network_learns_more_than_a_constant(name):
    more = {} if name == "ball-indicator" else {"directions": 2}
    setting = SETTINGS[name](8, batch_size=128, validation_examples=2048, **more)
    found = mupjax.sweep(
        two_layer(8),
        setting,
        lambda learning_rate: optax.adam(learning_rate),
        "muP",
        widths=[32],
        base_width=16,
        hyperparameters={"learning_rate": 0.03},
        steps=150,
        evaluations=1,
        progress=False,
    )
    assert float(found.loss.squeeze()) < 0.6 * constant_loss(setting)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ball_indicator(0), r"dimension must be a whole number of at least 1, got 0"),
        (lambda: ball_indicator(batch_size=2.0), r"batch_size .* got 2.0"),  # pyright: ignore[reportArgumentType]
        (lambda: ball_indicator(validation_examples=5000), "multiple of it, got 5000: use 6144"),
        (lambda: ball_indicator(validation_seed=1.5), r"validation_seed .* at least 0, got 1.5"),  # pyright: ignore[reportArgumentType]
        (lambda: multi_index(8, 2, validation_seed=-1), "validation_seed .* at least 0, got -1"),
        (lambda: multi_index(8, 9), "directions must be at most the dimension 8, got 9"),
        (lambda: multi_index_moments(0), "directions must be"),
        (lambda: two_layer(8, biases="frozen"), "'trained', 'fixed', 'none', got 'frozen'"),  # pyright: ignore[reportArgumentType]
        (lambda: two_layer(8, biases="none", bias_std=1.0), "leave one of them out"),
        (lambda: two_layer(8, input_std=-1.0), "input_std must be a finite number"),
        (lambda: two_layer(8, readout_std=math.nan), "readout_std must be a finite number"),
        (lambda: two_layer(8, bias_std=True), "bias_std must be a finite number .* got True"),
        (lambda: two_layer(8, output_bias="no"), "output_bias must be True or False, got 'no'"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
