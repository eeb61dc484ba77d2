"""The sample-wise decomposition against explicit gradients of every example, and its identities."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import mupjax
from mupjax.data import classification
from mupjax.models import MLP
from mupjax.observe import Observation
from mupjax.roles import infer_roles, leaf_paths
from theory.decomposition import decomposition_observer
from theory.sample_groups import extreme, overlap
from theory.samplewise import mean_component_index, sample_losses_observer, samplewise_observer
from theory.trajectory import Averaging
from tolerances import float_tolerance

D, CLASSES, P, STEPS = 5, 3, 7, 9
AVERAGING = Averaging(0.3, 0.6, 1, 3, 5)


@pytest.fixture(scope="module", autouse=True)
def unoptimised_programs():
    """Compiling is most of the time here, and half of that is XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def net(width):
    """Two tanh layers with a bias; kernels (in, out)."""
    sizes = {"a": (D, width), "b": (width, width), "c": (width, CLASSES)}

    def init(key):
        keys = jax.random.split(key, 3)
        params = {
            name: {"kernel": jax.random.normal(k, s, float) / math.sqrt(s[0])}
            for k, (name, s) in zip(keys, sizes.items(), strict=True)
        }
        return params | {"a": params["a"] | {"bias": jnp.zeros(width)}}

    def apply(params, x):
        h = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        return jnp.tanh(h @ params["b"]["kernel"]) @ params["c"]["kernel"]

    return mupjax.Model(init, apply)


def problem():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(P, D)), rng.normal(size=(P, CLASSES))

    def loss(predict, batch):
        return jnp.mean((predict(batch[0]) - batch[1]) ** 2)

    return mupjax.Setting("regression", lambda data, key, step: data, loss, (x, y), (x, y))


@functools.cache
def walk(width):
    """A model with its roles, and parameters that walk at random."""
    model = net(width)
    shapes = {
        n: {path: leaf.shape for path, leaf in leaf_paths(net(n).abstract_params()).items()}
        for n in (width, 2 * width)
    }
    model = dataclasses.replace(model, roles=infer_roles(shapes, base_width=width))
    points = [model.init(jax.random.key(0))]
    for t in range(STEPS):
        move = net(width).init(jax.random.key(t + 1))
        points.append(jax.tree.map(lambda w, m: w + 0.1 * m, points[-1], move))
    return model, points


def observed(width, observer):
    """What an observer records of that walk, without an engine."""
    model, points = walk(width)
    setting = problem()
    state = observer.init(points[0], model, setting)
    update = jax.jit(
        lambda s, before, after, step: observer.update(
            s, Observation(step, before, after, jnp.zeros(()), None, width, model, setting)
        )
    )
    for t, (before, after) in enumerate(itertools.pairwise(points)):
        state = update(state, before, after, jnp.int32(t))
    return observer.result(state)


def by_hand(width, rule):
    """ψ and the losses at both ends: explicit gradients, dense eigenvectors, loops."""
    model, points = walk(width)
    x, y = problem().validation
    average, averages = points[0], {0: points[0]}
    for t in range(STEPS):
        window = np.interp(t, [0, 5], [1 / 0.7, 1 / 0.4])
        average = jax.tree.map(lambda a, w, n=window: a + (w - a) / n, average, points[t + 1])
        averages[t + 1] = average
    one = jax.jit(
        jax.value_and_grad(lambda p, x, y: jnp.mean((model.apply(p, x[None])[0] - y) ** 2))
    )
    marks = AVERAGING.marks(STEPS)
    at = {m: [one(averages[m], x[i], y[i]) for i in range(P)] for m in marks}
    psi = np.zeros((P, width))
    for s, e in itertools.pairwise(marks):
        for layer, name in [("a", "kernel"), ("a", "bias"), ("b", "kernel"), ("c", "kernel")]:
            delta = np.asarray(averages[e][layer][name] - averages[s][layer][name])
            starts, ends = ([np.asarray(g[layer][name]) for _, g in at[m]] for m in (s, e))
            each = [
                a if rule == "forward" else (a + b) / 2 for a, b in zip(starts, ends, strict=True)
            ]
            if name == "bias":
                psi[:, 0] += [g @ delta for g in each]
                continue
            if layer != "a":  # the width is what these layers read
                delta, each = delta.T, [g.T for g in each]
            mean = np.mean(each, axis=0)
            values, vectors = np.linalg.eigh((mean.T @ delta + delta.T @ mean) / 2)
            for j, k in enumerate(np.argsort(-np.abs(values))):
                u = vectors[:, k]
                psi[:, j] += [u @ g.T @ delta @ u for g in each]
    return psi, *(np.array([loss for loss, _ in at[m]]) for m in (0, marks[-1]))


# 4: thin layers and dense; 13: the first and the last layer have fewer components than units.
@pytest.mark.parametrize(
    ("width", "options"),
    [
        (4, {"rule": "forward"}),
        pytest.param(13, {"rule": "trapezoid", "chunk": 3}, marks=pytest.mark.slow),
        (13, {"rule": "trapezoid", "rank_one": True}),
    ],
)
def test_equals_explicit_gradients_of_every_example(width, options):
    with jax.enable_x64(True):
        found = observed(width, samplewise_observer(AVERAGING, keep_psi=True, **options))
        psi, initial, final = by_hand(width, options["rule"])
    # The spectra have null directions, in which ψ is 0 whatever the vectors are.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-11)
    assert np.abs(psi).max() > 0.05
    close(found["psi"], psi)
    close(found["initial_loss"], initial)
    close(found["final_loss"], final)
    close(found["total"], psi.sum(axis=1))
    close(found["top"], np.cumsum(psi.mean(axis=0)))
    index = np.arange(1, width + 1)
    close(found["mci"], (np.abs(psi) * index).sum(1) / np.abs(psi).sum(1))
    assert float(found["rank_error"]) < 1e-12


def test_the_mean_over_examples_is_the_decomposition():
    with jax.enable_x64(True):
        _, initial, final = by_hand(4, "trapezoid")
        found = observed(4, samplewise_observer(AVERAGING))
        whole = observed(4, decomposition_observer(AVERAGING))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-11)
    close(found["top"], whole["top"])
    close(np.asarray(found["total"]).mean(), whole["total"])
    close(np.asarray(found["final_loss"]).mean(), whole["final_loss"])
    np.testing.assert_allclose(
        [whole["initial_loss"], whole["final_loss"]], [initial.mean(), final.mean()]
    )


@functools.cache
def swept():
    """A sweep in single precision with the decomposition beside."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, D)).astype(np.float32)
    y = rng.integers(0, CLASSES, 90)
    setting = classification("noise", (x[:60], y[:60]), (x[60:], y[60:]), batch_size=8)
    return mupjax.sweep(
        lambda width, rngs: MLP(D, width, CLASSES, rngs=rngs),
        setting,
        lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
        "muP",
        widths=[16],
        base_width=3,
        hyperparameters={"learning_rate": [0.05, 0.2]},
        steps=30,
        seeds=1,
        observers=[
            decomposition_observer(AVERAGING),
            samplewise_observer(AVERAGING, keep_psi=True, rank_one=True),
            sample_losses_observer(AVERAGING, chunk=7),
        ],
    )


@pytest.mark.slow
def test_in_a_sweep_sums_over_samples_are_the_decomposition():
    found = swept()
    atol = float_tolerance(np.float32, 30 * 30 * 8) * float(abs(found.decomposition_top).max())
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=atol)
    assert abs(found.decomposition_total).min() > 0.01
    close(found.samplewise_top, found.decomposition_top)
    close(found.samplewise_total.mean("sample"), found.decomposition_total)
    for end in ("initial", "final"):
        close(found[f"samplewise_{end}_loss"].mean("sample"), found[f"decomposition_{end}_loss"])
    close(found.samples_final_loss, found.samplewise_final_loss)
    assert 0 < float(found.samplewise_rank_error.max()) < 1e-5
    index = mean_component_index(jnp.asarray(found.samplewise_psi.values))
    close(index, found.samplewise_mci)
    # Every example on its own is linearized, not only their mean.
    change = found.samplewise_final_loss - found.samplewise_initial_loss
    off = abs(found.samplewise_total - change).sel(learning_rate=0.05)
    assert float(off.max()) < 0.05 * float(abs(change).max())


def test_gradients_that_are_not_of_rank_one_are_warned_of(caplog):
    def sequence(width):
        def init(key):
            a, b = jax.random.split(key)
            return {
                "a": jax.random.normal(a, (D, width)),
                "b": jax.random.normal(b, (width, CLASSES)),
            }

        # Every example meets the first matrix twice.
        return mupjax.Model(
            init, lambda p, x: (jnp.tanh(x @ p["a"]) + jnp.tanh(x[:, ::-1] @ p["a"])) @ p["b"]
        )

    options = {"widths": [4], "base_width": 4, "steps": 4, "hyperparameters": {"learning_rate": 1}}
    with caplog.at_level("WARNING", logger="mupjax"):
        mupjax.sweep(
            sequence,
            problem(),
            lambda learning_rate: optax.sgd(learning_rate),
            "muP",
            observers=[samplewise_observer(AVERAGING, rank_one=True)],
            roles={"a": "input", "b": "output"},
            init_exponents={"a": 0, "b": 0},
            **options,  # type: ignore[arg-type]
        )
    assert "not of rank one" in caplog.text


@pytest.mark.parametrize(("weighing", "sound"), [("sum", 0), ("normalised", 0), ("mean", 1)])
def test_a_loss_that_is_no_mean_over_examples_is_warned_of(caplog, weighing, sound):
    mean, weight = problem(), np.arange(1.0, P + 1)

    def loss(predict, batch):
        x, y, w = batch
        each = w * jnp.mean((predict(x) - y) ** 2, axis=-1)
        # In a batch of one, normalised weights cancel.
        normal = {"sum": 1.0, "normalised": jnp.sum(w), "mean": len(w)}[weighing]
        return jnp.sum(each) / normal

    held = (*mean.validation, weight)
    setting = dataclasses.replace(
        mean, sample=lambda data, key, step: data, loss=loss, data=held, validation=held
    )
    with caplog.at_level("WARNING", logger="mupjax"):
        found = mupjax.sweep(
            net,
            setting,
            lambda learning_rate: optax.sgd(learning_rate),
            "muP",
            widths=[4],
            base_width=4,
            steps=4,
            hyperparameters={"learning_rate": 0.1},
            observers=[samplewise_observer(AVERAGING)],
        )
    assert ("no plain mean over examples" in caplog.text) == (not sound)
    assert (float(found.samplewise_mean_error.max()) < 1e-5) == sound


@pytest.mark.parametrize("bad", [0, 2.5, True])
def test_an_impossible_chunk(bad):
    for make in (samplewise_observer, sample_losses_observer):
        with pytest.raises(ValueError, match=f"chunk must be whole and at least 1, got {bad}"):
            make(AVERAGING, chunk=bad)


def test_examples_without_a_common_axis():
    model, points = walk(4)
    x, y = problem().validation
    setting = dataclasses.replace(problem(), validation=(x, y, np.ones(2)))
    observer = samplewise_observer(AVERAGING)
    with jax.enable_x64(True), pytest.raises(ValueError, match="one leading axis of examples"):
        observer.init(points[0], model, setting)


def test_the_index_of_known_rows():
    psi = jnp.array([[1.0, 0, 0, 0], [0, 0, 0, -2.0], [1.0, -1.0, 1.0, 1.0], [0, 0, 0, 0]])
    index = mean_component_index(psi)
    np.testing.assert_allclose(index[:3], [1, 4, 2.5], rtol=1e-6)
    assert np.isnan(index[3])


def test_the_ends_of_a_ranking():
    scores = np.array([5.0, np.nan, 1.0, 4.0, 2.0, 3.0])
    np.testing.assert_array_equal(extreme(scores, 1 / 3, "lowest"), [2, 4])
    np.testing.assert_array_equal(extreme(scores, 1 / 3, "highest"), [0, 3])
    assert len(extreme(np.arange(100.0), 0.05, "lowest")) == 5
    with pytest.raises(ValueError, match="only 5 of 6 examples have a finite score"):
        extreme(scores, 1.0, "lowest")
    with pytest.raises(ValueError, match=r"share lie in \(0, 1\], got .* and 0"):
        extreme(scores, 0, "lowest")
    with pytest.raises(ValueError, match="end must be"):
        extreme(scores, 0.5, "low")  # type: ignore[arg-type]


def test_overlaps_of_known_and_of_independent_rankings():
    base = np.arange(200.0)
    same = overlap([base, 3 * base + 1, -base], 0.05, "highest")
    np.testing.assert_array_equal(same.shares, [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert (same.count, same.chance) == (10, 0.05)
    rng = np.random.default_rng(0)
    chance = overlap(rng.normal(size=(120, 200)), 0.05, "lowest")
    shares = chance.shares[np.triu_indices(120, 1)]
    # 7140 pairs, nearly independent: sd of the mean 0.0008; the interval holds 90 % or more.
    assert shares.mean() == pytest.approx(0.05, abs=0.004)
    low, high = chance.chance_interval
    assert ((shares >= low) & (shares <= high)).mean() >= 0.9
    tail = stats.hypergeom(200, 10, 10).sf(round(10 * high) - 1)
    assert tail > 0.05
