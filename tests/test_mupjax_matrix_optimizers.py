"""Muon and Dion: which parameters they orthogonalise, and how, against numpy and the SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mupjax import sweep
from mupjax.adapters import Model, as_model
from mupjax.data import digits
from mupjax.matrix_optimizers import dion, muon
from mupjax.models import MLP
from mupjax.resolve import dissect
from mupjax.roles import Layout, LeafRole, leaf_paths

MATRIX = Layout("matrix", (0,), (1,))


def roles_of(**roles):
    return {
        path: LeafRole(path, role, {}, layout=Layout("vector") if role == "vector" else MATRIX)
        for path, role in roles.items()
    }


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def matrix_sign(matrix):
    left, _, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return left @ right


def repeated(transform, gradient, steps):
    """The last of several updates with one gradient."""

    def body(state, _):
        updates, state = transform.update(gradient, state)
        return state, updates

    _, updates = jax.lax.scan(body, transform.init(gradient), None, length=steps)
    return jax.tree.map(lambda u: u[-1], updates)


OPTIMIZERS = {
    "muon": muon,
    "dion": lambda learning_rate, **rest: dion(learning_rate, rank_fraction=1.0, **rest),
}


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)])
def test_muon_moves_along_the_matrix_sign(shape):
    gradient = {"w": normal(0, *shape)}
    update = repeated(muon(0.5, roles=roles_of(w="hidden")), gradient, 2)["w"]
    scale = 0.5 * np.sqrt(shape[1] / shape[0])
    left, singular, right = np.linalg.svd(np.asarray(update), full_matrices=False)
    # Newton-Schulz as it is used brings singular values near 1, and keeps singular vectors exactly.
    assert np.all((singular > 0.65 * scale) & (singular < 1.25 * scale))
    np.testing.assert_allclose(left @ right, -matrix_sign(gradient["w"]), atol=2e-4)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)])
def test_dion_of_full_rank_tends_to_the_matrix_sign(shape):
    gradient = {"w": normal(1, *shape)}
    update = repeated(OPTIMIZERS["dion"](0.5, roles=roles_of(w="hidden")), gradient, 400)["w"]
    scale = 0.5 * np.sqrt(shape[1] / shape[0])
    np.testing.assert_allclose(update, -scale * matrix_sign(gradient["w"]), atol=1e-4 * scale)


def test_dion_is_its_equations():
    m, n, rank, mu, eta = 6, 10, 3, 0.9, 0.1
    transform = dion(
        eta, roles=roles_of(w="hidden"), rank_fraction=0.5, momentum=mu, adam_learning_rate=1.0
    )
    # Flax lays kernels out as (inputs, outputs); the equations are for (outputs, inputs).
    gradients = [normal(seed, n, m) for seed in range(4)]
    state = transform.init({"w": gradients[0]})
    Q = next(np.asarray(leaf[0]) for leaf in jax.tree.leaves(state) if leaf.ndim == 3)
    assert Q.shape == (n, rank)
    M = np.zeros((m, n))
    for gradient in gradients:
        updates, state = jax.jit(transform.update)({"w": gradient}, state)
        M = M + np.asarray(gradient).T
        P, _ = np.linalg.qr(M @ Q)
        R = M.T @ P
        Q = R / np.linalg.norm(R, axis=0)
        M = M - (1 - mu) * P @ R.T
        expected = -eta * np.sqrt(m / n) * P @ Q.T
        np.testing.assert_allclose(updates["w"], expected.T, atol=1e-6)


def test_bounded_and_proportional_rank():
    def rank(width, **options):
        gradient = {"w": normal(2, width, width)}
        transform = dion(1.0, roles=roles_of(w="hidden"), **options)
        return np.linalg.matrix_rank(repeated(transform, gradient, 1)["w"], tol=1e-3)

    assert [rank(w) for w in (8, 16, 32)] == [4, 8, 16]
    assert [rank(w, max_rank=6) for w in (8, 16, 32)] == [4, 6, 6]
    assert rank(8, rank_fraction=1.0) == 8


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_have_one_spectral_norm_at_every_width(name):
    for fan_in, fan_out in ((16, 16), (64, 64), (128, 64), (64, 256)):
        gradient = {"w": normal(3, fan_in, fan_out)}
        transform = OPTIMIZERS[name](1.0, roles=roles_of(w="hidden"))
        norm = np.linalg.norm(repeated(transform, gradient, 50)["w"], 2)
        assert norm == pytest.approx(np.sqrt(fan_out / fan_in), rel=0.25)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_but_hidden_matrices_are_adams(name):
    roles = roles_of(embedding="input", middle="hidden", readout="output", bias="vector")
    gradient = {
        "embedding": normal(4, 9, 8),
        "middle": normal(5, 8, 8),
        "readout": normal(6, 8, 3),
        "bias": normal(7, 8),
    }
    transform = OPTIMIZERS[name](0.1, roles=roles, adam_learning_rate=0.02, b1=0.8, eps=1e-3)
    adam = repeated(optax.adam(0.02, b1=0.8, eps=1e-3), gradient, 3)
    updates = repeated(transform, gradient, 3)
    for path in ("embedding", "readout", "bias"):
        np.testing.assert_allclose(updates[path], adam[path], rtol=1e-6)
    assert not np.allclose(updates["middle"], adam["middle"], rtol=0.5)


class Attention(nnx.Module):
    """Flax's attention, whose kernels have three axes, between an embedding and a readout."""

    def __init__(self, width, *, rngs):
        self.embed = nnx.Linear(5, width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            width // 4, width, width, out_features=width, decode=False, rngs=rngs
        )
        self.readout = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, x):
        return self.readout(self.attention(self.embed(x)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attention_kernels_of_three_axes_are_matrices(name):
    models = {w: as_model(Attention, w, digits()) for w in (8, 16)}
    roles = dissect(models, base_width=8).leaves
    params = models[16].init(jax.random.key(0))
    gradient = jax.tree.map(lambda p: normal(p.size, *p.shape), params)
    updates = leaf_paths(repeated(OPTIMIZERS[name](1.0, roles=roles), gradient, 200))
    shapes = {
        "attention/query/kernel": (16, 16),
        "attention/key/kernel": (16, 16),
        "attention/value/kernel": (16, 16),
        "attention/out/kernel": (16, 16),
    }
    assert leaf_paths(params)["attention/query/kernel"].shape == (16, 4, 4)
    for path, matrix in shapes.items():
        singular = np.linalg.svd(np.asarray(updates[path]).reshape(matrix), compute_uv=False)
        assert np.all((singular > 0.65) & (singular < 1.25)), path
    # Adam's updates with one gradient are signs.
    for path in set(updates) - set(shapes):
        np.testing.assert_allclose(np.abs(updates[path]), 1.0, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_gradient_moves_nothing(name):
    gradient = {"w": jnp.zeros((6, 4))}
    update = repeated(OPTIMIZERS[name](1.0, roles=roles_of(w="hidden")), gradient, 3)["w"]
    np.testing.assert_array_equal(update, 0)


@pytest.mark.parametrize("power", [-100, -140, 60, 110])
def test_dion_does_not_look_at_the_size_of_gradients(power):
    # Half a rank, so that momentum remembers; 2^-140 is below the smallest normal number.
    transform = dion(1.0, roles=roles_of(w="hidden"), rank_fraction=0.5)
    # Whole numbers: no digit is lost where numbers have fewer.
    gradient = {"w": jnp.round(8 * normal(10, 6, 8))}
    scaled = jax.tree.map(lambda g: jnp.ldexp(g, power), gradient)
    if power > -127:  # XLA's CPU code takes smaller ones for zero
        np.testing.assert_array_equal(
            repeated(transform, scaled, 5)["w"], repeated(transform, gradient, 5)["w"]
        )
    else:
        assert jnp.isfinite(repeated(transform, scaled, 5)["w"]).all()


def test_dion_in_half_precision():
    transform = dion(1.0, roles=roles_of(w="hidden"), rank_fraction=0.5)
    gradient = {"w": normal(11, 6, 8).astype(jnp.bfloat16)}
    found = repeated(transform, gradient, 5)["w"]
    assert found.dtype == jnp.bfloat16
    single = repeated(transform, jax.tree.map(lambda g: g.astype(jnp.float32), gradient), 5)["w"]
    # The direction is that of single precision; two factors round in half.
    np.testing.assert_allclose(found.astype(jnp.float32), single, rtol=3 * 2**-8)


def test_gradients_of_low_rank_are_followed_without_noise():
    # Rank 2 at rank 8: six columns of R are rounding; normalised, they would be random directions.
    gradient = {"w": normal(8, 16, 2) @ normal(9, 2, 16)}
    update = repeated(OPTIMIZERS["dion"](1.0, roles=roles_of(w="hidden")), gradient, 200)["w"]
    left, singular, right = np.linalg.svd(np.asarray(gradient["w"], np.float64))
    expected = left[:, :2] @ right[:2]
    np.testing.assert_allclose(update, -expected, atol=1e-4)
    assert singular[1] > 1


@pytest.mark.parametrize("name", ["dion", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_sweep_finds_the_family_and_trains_as_a_loop(name):
    def optimizer(learning_rate, adam_learning_rate, roles):
        rest = {"roles": roles, "adam_learning_rate": adam_learning_rate}
        if name == "dion":
            return dion(learning_rate, rank_fraction=0.25, **rest)
        return muon(learning_rate, **rest)

    setting, rates, steps = digits(), [0.02, 0.1], 6
    results = sweep(
        lambda width, rngs: MLP(64, width, 10, depth=3, rngs=rngs),
        setting,
        optimizer,
        "muP",
        widths=[16, 32],
        base_width=16,
        steps=steps,
        seeds=1,
        hyperparameters={"learning_rate": rates, "adam_learning_rate": 0.01},
    )
    model = as_model(lambda width, rngs: MLP(64, width, 10, depth=3, rngs=rngs), 16, setting)
    other = as_model(lambda width, rngs: MLP(64, width, 10, depth=3, rngs=rngs), 32, setting)
    roles = dissect({16: model, 32: other}, base_width=16).leaves
    key = jax.random.key(0)
    for i, rate in enumerate(rates):
        transform = optimizer(rate, 0.01, roles)
        params = model.init(jax.random.fold_in(key, 0))
        state, losses = transform.init(params), []

        @jax.jit
        def step(params, state, t, transform=transform):
            batch = setting.sample(setting.data, jax.random.fold_in(key, 1), t)

            def loss_of(params):
                return setting.loss(lambda *a: model.apply(params, *a), batch)

            loss, gradient = jax.value_and_grad(loss_of)(params)
            updates, state = transform.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, loss

        for t in range(steps):
            params, state, loss = step(params, state, t)
            losses.append(float(loss))
        measured = results.train_loss.sel(width=16, seed=0).isel(learning_rate=i)
        np.testing.assert_allclose(np.ravel(measured), losses, rtol=2e-4)


def test_without_hidden_matrices_or_their_axes_there_is_one_clear_error():
    with pytest.raises(ValueError, match="no parameter of the model is a hidden matrix"):
        muon(0.1, roles=roles_of(embedding="input", readout="output"))
    unknown = {"w": LeafRole("w", "hidden", {}, layout=None)}
    with pytest.raises(ValueError, match=r"which axes of the hidden matrix 'w'.*Layout\('matrix'"):
        dion(0.1, roles=unknown)
    with pytest.raises(ValueError, match=r"rank_fraction must lie in \(0, 1\], got 1.5"):
        dion(0.1, roles=roles_of(w="hidden"), rank_fraction=1.5)
    with pytest.raises(ValueError, match="max_rank must be at least 1, or None, got 0"):
        dion(0.1, roles=roles_of(w="hidden"), max_rank=0)


def test_a_pure_model_may_state_its_layout():
    def factory(width):
        shapes = {"first": (64, width), "middle": (width, width), "last": (width, 10)}

        def init(key):
            keys = dict(zip(shapes, jax.random.split(key, 3), strict=True))
            return {
                k: jax.random.normal(keys[k], shape) / shape[0] ** 0.5
                for k, shape in shapes.items()
            }

        def apply(params, x):
            return jax.nn.relu(x @ params["first"] @ params["middle"]) @ params["last"]

        return Model(init, apply, layouts=dict.fromkeys(shapes, MATRIX))

    results = sweep(
        factory,
        digits(),
        lambda learning_rate, roles: muon(learning_rate, roles=roles, adam_learning_rate=0.01),
        "muP",
        widths=[8],
        base_width=8,
        steps=3,
        hyperparameters={"learning_rate": 0.1},
    )
    assert np.isfinite(results.loss).all()
