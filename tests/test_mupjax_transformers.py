"""Decoders against a plain numpy twin, and the invariances of their parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mupjax import resolve_sweep
from mupjax.models.transformers import Attention, Decoder, apply_rope, gpt2, llama
from mupjax.roles import leaf_paths
from mupjax.setting import Setting

V, T = 13, 6


def tokens(seed=0, batch=3, length=T):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (batch, length)))


def parameters(model):
    """Every parameter, moved off its initial value so that biases and scales count."""
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), state)
    nnx.update(model, jax.tree.map(lambda p: p, moved))
    return {path: np.asarray(leaf, np.float64) for path, leaf in leaf_paths(moved).items()}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotated(x, theta):
    """By complex numbers: pair (i, i + D/2) times exp(i t theta^(-2i/D))."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    t = np.arange(x.shape[0])[:, None, None]
    turned = pairs * np.exp(1j * t * theta ** (-2 * np.arange(half) / x.shape[-1]))
    return np.concatenate([turned.real, turned.imag], -1)


def norm(x, p, path, kind):
    if kind == "rms":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{path}/scale"]
    x = x - x.mean(-1, keepdims=True)
    return (
        x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{path}/scale"] + p[f"{path}/bias"]
    )


def twin(p, sequence, *, layers, heads, kv_heads, kind, theta, power, residual, swiglu, tied=False):
    """Logits for one sequence, one position and one head at a time."""
    x = p["embed/embedding"][sequence]
    if "position/embedding" in p:
        x = x + p["position/embedding"][: len(sequence)]
    for layer in range(layers):
        at = f"blocks/{layer}/"
        h = norm(x, p, at + "attention_norm", kind)

        def project(name, at=at, h=h):
            full = f"{at}attention/{name}"
            return np.einsum("tn,nhd->thd", h, p[f"{full}/kernel"]) + p.get(f"{full}/bias", 0.0)

        q, k, v = project("query"), project("key"), project("value")
        if theta is not None:
            q, k = rotated(q, theta), rotated(k, theta)
        size = q.shape[-1]
        seen = np.zeros_like(q)
        for t in range(len(sequence)):
            for head in range(heads):
                group = head // (heads // kv_heads)
                logits = k[: t + 1, group] @ q[t, head] / size**power
                seen[t, head] = softmax(logits) @ v[: t + 1, group]
        out = np.einsum("thd,hdn->tn", seen, p[f"{at}attention/out/kernel"])
        x = x + residual * (out + p.get(f"{at}attention/out/bias", 0.0))
        h = norm(x, p, at + "feed_forward_norm", kind)
        ff = at + "feed_forward/"
        up = h @ p[ff + "up/kernel"] + p.get(ff + "up/bias", 0.0)
        if swiglu:
            gate = h @ p[ff + "gate/kernel"]
            hidden = gate / (1 + np.exp(-gate)) * up
        else:
            hidden = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + residual * (hidden @ p[ff + "down/kernel"] + p.get(ff + "down/bias", 0.0))
    x = norm(x, p, "final_norm", kind)
    return x @ (p["embed/embedding"].T if tied else p["readout/kernel"])


def test_llama_is_its_numpy_twin():
    model = llama(
        V, 16, layers=2, heads=4, kv_heads=2, attention_scale="1/head_dim", rngs=nnx.Rngs(0)
    )
    p, batch = parameters(model), tokens()
    for sequence, logits in zip(np.asarray(batch), model(batch), strict=True):
        expected = twin(
            p,
            sequence,
            layers=2,
            heads=4,
            kv_heads=2,
            kind="rms",
            theta=1e4,
            power=1.0,
            residual=1.0,
            swiglu=True,
        )
        np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-5)


def test_gpt2_is_its_numpy_twin():
    model = gpt2(
        V,
        16,
        context=T,
        layers=3,
        head_size=8,
        use_bias=True,
        norm="layer",
        tied=True,
        residual_multiplier=1 / 3,
        rngs=nnx.Rngs(0),
    )
    p, batch = parameters(model), tokens()
    for sequence, logits in zip(np.asarray(batch), model(batch, 0.5), strict=True):
        expected = twin(
            p,
            sequence,
            layers=3,
            heads=2,
            kv_heads=2,
            kind="layer",
            theta=None,
            power=0.5,
            residual=1 / 3,
            swiglu=False,
            tied=True,
        )
        np.testing.assert_allclose(logits, 0.5 * expected, rtol=2e-4, atol=2e-5)


def test_rotary_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(np.tile(rng.normal(size=8), (1, 32, 1, 1)), jnp.float32) for _ in "qk")
    products = jnp.einsum("bthd,bshd->ts", apply_rope(q), apply_rope(k))
    for distance in (-5, 0, 3, 20):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert np.std(products[0]) > 0.1


def test_rotations_of_long_texts_are_precise():
    # In single precision angles of some thousands would be off by 4e-4.
    length, size = 8192, 16
    x = np.random.default_rng(0).normal(size=(1, length, 1, size))
    angle = np.outer(np.arange(length), 500.0 ** (-np.arange(size // 2) / (size // 2)))
    turned = (x[..., : size // 2] + 1j * x[..., size // 2 :])[0, :, 0] * np.exp(1j * angle)
    found = apply_rope(jnp.asarray(x, jnp.float32), theta=jnp.float32(500))[0, :, 0]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama(V, 16, layers=2, heads=2, rngs=nnx.Rngs(0)),
        lambda: gpt2(V, 16, context=T, layers=2, heads=2, rngs=nnx.Rngs(0)),
    ],
    ids=["llama", "gpt2"],
)
def test_later_tokens_do_not_reach_earlier_logits(make):
    model, batch = make(), tokens()
    changed = batch.at[:, 4].set((batch[:, 4] + 1) % V)
    before, after = model(batch), model(changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-3


def test_zero_query_attends_uniformly_and_zero_readout_says_nothing():
    attention = Attention(8, 2, 4, zero_query=True, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, 8)), jnp.float32)
    values = attention.value(x)
    running = jnp.cumsum(values, axis=1) / jnp.arange(1, T + 1)[None, :, None, None]
    np.testing.assert_allclose(attention(x), attention.out(running), atol=1e-6)
    model = llama(V, 16, layers=1, heads=2, zero_readout=True, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(tokens()), 0)


def test_bfloat16_computes_in_half_and_keeps_parameters_whole():
    single = llama(V, 32, layers=2, heads=2, rngs=nnx.Rngs(0))
    half = llama(V, 32, layers=2, heads=2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    kept = leaf_paths(nnx.to_pure_dict(nnx.state(half, nnx.Param)))
    assert {leaf.dtype for leaf in kept.values()} == {jnp.dtype("float32")}
    logits = half(tokens())
    assert logits.dtype == jnp.float32
    gap = np.abs(logits - single(tokens())).max()
    assert 1e-6 < gap < 0.1


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_numbers_of_parameters():
    n, layers = 32, 3
    block = 4 * n * n + 3 * 4 * n * n + 2 * n
    assert count(llama(V, n, layers=layers, rngs=nnx.Rngs(0))) == 2 * V * n + layers * block + n
    grouped = llama(V, n, layers=layers, kv_heads=2, rngs=nnx.Rngs(0))
    assert count(grouped) == 2 * V * n + layers * (block - 2 * n * n * 3 // 4) + n
    block = 4 * n * n + 2 * 4 * n * n + 2 * n
    model = gpt2(V, n, context=T, layers=layers, tied=True, rngs=nnx.Rngs(0))
    assert count(model) == (V + T) * n + layers * block + n


def next_token():
    data = tokens(5, 64, T + 1)

    def loss(predict, batch):
        logits = predict(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    return Setting(
        "tokens", lambda data, key, step: jax.random.choice(key, data, (8,)), loss, data[:8], data
    )


ROLES = {
    "embed/embedding": "input",
    "position/embedding": "input",
    "readout/kernel": "output",
    "final_norm/scale": "vector",
    "attention/query/kernel": "hidden",
    "attention/query/bias": "vector",
    "attention/key/kernel": "hidden",
    "attention/value/kernel": "hidden",
    "attention/out/kernel": "hidden",
    "attention/out/bias": "vector",
    "feed_forward/gate/kernel": "hidden",
    "feed_forward/down/kernel": "hidden",
}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (
            lambda width, rngs: llama(
                V, width, layers=1, kv_heads=2, attention_scale="1/head_dim", rngs=rngs
            ),
            {"attention": "1/head_dim"},
        ),
        (
            lambda width, rngs: gpt2(
                V, width, context=T, layers=1, head_size=8, use_bias=True, rngs=rngs
            ),
            {},
        ),
        (
            lambda width, rngs: llama(V, width, layers=1, head_size=4, tied=True, rngs=rngs),
            {"roles": {"embed/embedding": "tied"}},
        ),
    ],
    ids=["llama", "gpt2", "tied"],
)
def test_every_parameter_gets_its_role(make, options):
    resolved = resolve_sweep(
        make,
        next_token(),
        lambda learning_rate: optax.adam(learning_rate),
        "muP",
        widths=[16, 32],
        base_width=16,
        hyperparameters={"learning_rate": 0.01},
        **options,
    )
    expected = ROLES | options.get("roles", {})
    for path, role in resolved.roles.items():
        short = path.removeprefix("blocks/0/")
        if short in expected:
            assert role == expected[short], path
        elif "norm" in path or path.endswith("bias"):
            assert role == "vector", path
        else:
            assert role == "hidden", path


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"heads": 3}, "heads=3 does not divide the width 16: the nearest width that fits is 15"),
        ({"head_size": 6}, "head_size=6 does not divide the width 16: .* fits is 18"),
        ({"heads": 2, "head_size": 8}, "give heads .* or head_size"),
        ({}, "give heads .* or head_size"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads is 3, which does not divide the 4 heads"),
        ({"head_size": 4, "queries_per_kv": 3}, "queries_per_kv=3 must divide the 4 heads"),
        ({"heads": 2, "norm": "batch"}, "norm must be one of rms, layer, got 'batch'"),
        ({"heads": 2, "positions": "learned"}, "context is the number of learned positions"),
        ({"heads": 2, "hidden_ratio": 2.7}, "hidden_ratio . width must be a whole number"),
        ({"heads": 2, "tied": True, "zero_readout": True}, "zero_readout would start the tied"),
        ({"heads": 16}, "head size is 1: choose"),
    ],
)
def test_what_does_not_fit_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Decoder(V, 16, layers=1, rngs=nnx.Rngs(0), **options)(tokens())


def test_a_sequence_longer_than_the_learned_positions_is_refused():
    model = gpt2(V, 16, context=4, layers=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the sequence has 6 tokens, and the model learns 4"):
        model(tokens())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"layers": 0}, "layers must be whole and at least 1, got 0"),
        ({"vocabulary": 0}, "vocabulary must be whole and at least 1, got 0"),
        ({"width": -8}, "width must be whole and at least 1, got -8"),
        ({"queries_per_kv": 0}, "queries_per_kv must be whole and at least 1, got 0"),
        ({"positions": "learned", "context": 0}, "context must be whole and at least 1, got 0"),
    ],
)
def test_a_size_that_is_none_is_named(options, text):
    given = {"vocabulary": V, "width": 16, "head_size": 4, "layers": 1} | options
    with pytest.raises(ValueError, match=text):
        Decoder(**given, rngs=nnx.Rngs(0))
