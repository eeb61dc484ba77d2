"""Depth: factors against CompleteP's Table 1, and models that do not keep to them."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mupjax
from mupjax import results
from mupjax.config_file import read_sweep_file
from mupjax.depth import check_branches
from mupjax.models import CNN
from mupjax.models.transformers import Decoder
from mupjax.prepare import prepare

D, B, C = 8, 16, 3
RNG = np.random.default_rng(0)
BATCH = tuple(jnp.asarray(RNG.normal(size=(B, k)), jnp.float32) for k in (D, C))


def mean_square(predict, batch):
    return jnp.mean((predict(batch[0]) - batch[1]) ** 2)


TOY = mupjax.Setting("toy", lambda data, key, step: BATCH, mean_square, BATCH)


def adam(learning_rate, eps=1e-8):
    return optax.adam(learning_rate, eps=eps)


class Block(nnx.Module):
    """`x + r dense(relu(norm(x)))`; or, wrongly, with another power of r."""

    def __init__(self, width, multiplier, rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.dense = nnx.Linear(width, width, rngs=rngs)
        self.multiplier = multiplier

    def __call__(self, x):
        return x + self.multiplier * self.dense(nnx.relu(self.norm(x)))


class Net(nnx.Module):
    def __init__(self, width, depth, rngs, power=1):
        self.embed = nnx.Linear(D, width, rngs=rngs)
        r = depth.residual_multiplier**power
        self.blocks = nnx.List([Block(width, r, rngs) for _ in range(depth.layers)])
        self.final_norm = nnx.RMSNorm(width, rngs=rngs)
        self.readout = nnx.Linear(width, C, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.final_norm(x))


def forgetful(width, depth, rngs):
    net = Net(width, depth, rngs)
    net.blocks[-1].multiplier = 1.0
    return net


OPTIONS = {
    "widths": [16],
    "base_width": 16,
    "hyperparameters": {"learning_rate": 0.01},
    "steps": 3,
    "init_exponents": {"*": 0.0},
}


# Factors.


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_adam_is_table_1_of_completep(alpha):
    """Every row but weight decay at alpha = 1/2, which here keeps lr wd: docs/depth.md."""
    n, m = 32 / 8, 4 / 1
    resolved = mupjax.resolve_sweep(
        Net,
        TOY,
        adam,
        "muP",
        depth=mupjax.Depth(4, 1, alpha=alpha),
        **{
            **OPTIONS,
            "widths": [8, 32],
            "base_width": 8,
            "hyperparameters": {"learning_rate": 1.0, "weight_decay": 0.1},
        },
    )
    f = resolved.factors(32)
    kernel, bias, norm = (f"blocks/2/{x}" for x in ("dense/kernel", "dense/bias", "norm/scale"))
    assert f.learning_rate[kernel] == n**-1 * m ** (alpha - 1)
    assert f.learning_rate[bias] == f.learning_rate[norm] == m ** (alpha - 1)
    for path in (kernel, bias, norm):
        assert f.adam_eps[path] == n**-1 * m**-alpha
    for path in ("embed/kernel", "final_norm/scale"):
        assert (f.learning_rate[path], f.adam_eps[path]) == (1, n**-1)
    assert f.learning_rate["readout/kernel"] == n**-1
    assert f.weight_decay[kernel] == n * m ** (1 - alpha)
    assert f.weight_decay["readout/kernel"] == n
    assert resolved.depth is not None
    assert resolved.depth.residual_multiplier == m**-alpha
    # The sizes of the first weights do not depend on the depth.
    assert f.init[kernel] == f.init["embed/kernel"] * n**-0.5


@pytest.mark.parametrize(
    ("family", "alpha", "rate", "eps", "coupled", "l2"),
    [
        # Powers of m = 4.
        ("adam", 1.0, 0, -1, 0, -1),
        ("adam", 0.5, -0.5, -0.5, 0.5, 0),
        ("adam", 0.0, -1, 0, 1, 1),
        ("spectral", 1.0, 0, -1, 0, -1),
        ("spectral", 0.5, -0.5, -0.5, 0.5, 0),
        ("sgd", 1.0, 1, 0, -1, -1),
        ("sgd", 0.5, 0, 0, 0, 0),
        ("sgd", 0.0, -1, 0, 1, 1),
        ("adam", None, 0, 0, 0, 0),
    ],
)
def test_factors_of_every_family(family, alpha, rate, eps, coupled, l2):
    depth = mupjax.Depth(8, 2, alpha=alpha)
    decays: dict[mupjax.WeightDecayMode, float] = {"coupled": coupled, "l2": l2, "independent": 0}
    for mode, decay in decays.items():
        found = depth.factors(family, mode)
        assert found.learning_rate == 4.0**rate
        assert found.adam_eps == 4.0**eps
        assert found.weight_decay == 4.0**decay
    assert depth.residual_multiplier == 4.0 ** -(alpha or 0)


def test_names_of_the_presets():
    options = {"blocks": ["stage1/*", "stage2/*"], "base_multiplier": 0.5}
    assert mupjax.completep(8, 2, **options) == mupjax.Depth(8, 2, alpha=1, **options)
    assert mupjax.depth_mup(8, 2, **options) == mupjax.Depth(8, 2, alpha=0.5, **options)
    assert mupjax.depth_mup(8, 2, **options).residual_multiplier == 0.25
    assert mupjax.unscaled(8, 2, **options).residual_multiplier == 0.5


def test_the_table_shows_the_factors_of_depth():
    resolved = mupjax.resolve_sweep(Net, TOY, adam, "muP", depth=mupjax.depth_mup(4, 1), **OPTIONS)
    table = resolved.table(16).splitlines()
    assert "depth 4 (base 1), alpha 0.5, residual multiplier 0.5" in table[1]
    rows = {line.split()[0]: line.split() for line in table[3:]}
    assert rows["blocks/3/dense/kernel"][1:4] == ["hidden", "in", "block"]
    # lr, wd, lr*wd, eps
    assert rows["blocks/3/dense/kernel"][-4:] == ["0.5", "2", "1", "0.5"]
    assert rows["readout/kernel"][-4:] == ["1", "1", "1", "1"]


# Training.


def test_the_base_depth_trains_as_without_depth():
    fixed = types.SimpleNamespace(layers=2, residual_multiplier=1.0)
    options = {**OPTIONS, "hyperparameters": {"learning_rate": 0.03, "weight_decay": 0.1}}
    deep = mupjax.sweep(Net, TOY, adam, "muP", depth=mupjax.depth_mup(2, 2), **options)
    plain = mupjax.sweep(functools.partial(Net, depth=fixed), TOY, adam, "muP", **options)
    np.testing.assert_array_equal(deep.train_loss, plain.train_loss)
    np.testing.assert_array_equal(deep.loss, plain.loss)


def test_training_is_that_of_two_groups_of_parameters():
    """AdamW by hand, blocks and the rest with their own rate, decay and epsilon."""
    depth, rate, decay, eps, steps = mupjax.depth_mup(4, 1), 0.03, 0.2, 0.01, 4
    found = mupjax.sweep(
        Net,
        TOY,
        lambda learning_rate, weight_decay, eps: optax.adamw(
            learning_rate, weight_decay=weight_decay, eps=eps
        ),
        "muP",
        depth=depth,
        optimizer_family="adam",  # at this epsilon it looks like no family
        **{
            **OPTIONS,
            "steps": steps,
            "hyperparameters": {"learning_rate": rate, "weight_decay": decay, "eps": eps},
        },
    )
    model = Net(16, depth, nnx.Rngs(jax.random.fold_in(jax.random.key(0), 0)))
    graph, params = nnx.split(model)
    optimizer = optax.partition(
        {
            "blocks": optax.adamw(rate / 2, weight_decay=2 * decay, eps=eps / 2),
            "rest": optax.adamw(rate, weight_decay=decay, eps=eps),
        },
        lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: "blocks" if "blocks" in jax.tree_util.keystr(path) else "rest", tree
        ),
    )
    state, losses = optimizer.init(params), []
    for _ in range(steps):
        loss, gradient = jax.value_and_grad(
            lambda p: mean_square(lambda x: nnx.merge(graph, p)(x), BATCH)
        )(params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    np.testing.assert_allclose(found.train_loss.values.ravel(), losses, rtol=2e-5)


def test_resuming_at_another_depth_is_refused(tmp_path):
    ours, theirs = (
        prepare(Net, TOY, adam, "muP", depth=mupjax.Depth(2, 1, alpha=alpha), **OPTIONS)
        for alpha in (1.0, 0.5)
    )
    results.check_same(tmp_path, "width 16", ours.configuration, ours.configuration)
    with pytest.raises(ValueError, match=r"width 16 was run with another .*\(differing: depth\)"):
        results.check_same(tmp_path, "width 16", ours.configuration, theirs.configuration)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"layers": 0}, "depth.layers must be whole and at least 1, got 0"),
        ({"base_layers": 2.5}, "depth.base_layers must be whole and at least 1, got 2.5"),
        ({"alpha": 1.5}, r"depth.alpha must lie in \[0, 1\] .*got 1.5"),
        ({"alpha": "1"}, r"depth.alpha must lie in \[0, 1\] .*got '1'"),
        ({"blocks": []}, r"depth.blocks must be a pattern .*got \[\]"),
        ({"blocks": ["blocks/*", ""]}, "depth.blocks must be a pattern"),
        ({"base_multiplier": 0.0}, "depth.base_multiplier.* must be a positive number, got 0.0"),
    ],
)
def test_a_depth_that_is_none(arguments, text):
    with pytest.raises(ValueError, match=text):
        mupjax.Depth(**{"layers": 4, "base_layers": 2, **arguments})


@pytest.mark.parametrize(
    ("model", "depth", "text"),
    [
        (lambda width, rngs: Net(width, None, rngs), mupjax.completep(2, 1), "takes no parameter"),
        (Net, mupjax.completep(2, 1, blocks="layers/*"), r"depth.blocks\['layers/\*'\] matches no"),
        (
            lambda width, depth, rngs: Net(width, mupjax.completep(3, 1), rngs),
            mupjax.completep(2, 1),
            r"depth.layers is 2, and .* matches 3 blocks \(blocks/0, blocks/1, blocks/2\)",
        ),
        (
            Net,
            mupjax.completep(2, 1, blocks=["blocks/0/*", "blocks/1/dense/*"]),
            r"'blocks/1/norm/scale' .*it stands in a branch.*does not match it",
        ),
        (
            Net,
            mupjax.completep(2, 1, blocks=["blocks/*", "embed/*"]),
            r"'embed/.*' goes as depth.residual_multiplier\*\*-?0.0: it is matched",
        ),
        (functools.partial(Net, power=2), mupjax.completep(2, 1), r"multiplier\*\*2.0: .*once"),
        (functools.partial(Net, power=0), mupjax.completep(2, 1), r"\*\*-?0.0: .*once"),
        (forgetful, mupjax.completep(2, 1), r"'blocks/1/.*multiplier\*\*-?0.0: .*once"),
    ],
    ids=[
        *("no parameter", "no match", "count", "too little", "too much", "twice", "never"),
        "once forgotten",
    ],
)
def test_a_model_that_does_not_fit_the_depth(model, depth, text):
    with pytest.raises(ValueError, match=text):
        mupjax.resolve_sweep(model, TOY, adam, "muP", depth=depth, **OPTIONS)


def test_what_is_no_depth_is_refused():
    with pytest.raises(TypeError, match=r"depth must be a record such as .*got 4"):
        mupjax.resolve_sweep(Net, TOY, adam, "muP", depth=4, **OPTIONS)


def test_a_clip_in_front_of_a_scaled_epsilon_is_refused():
    def clipped(learning_rate):
        return optax.chain(optax.clip_by_global_norm(0.01), optax.adam(learning_rate))

    # At the base width, SP scales nothing: depth does.
    with pytest.raises(ValueError, match="max_gradient_norm"):
        mupjax.resolve_sweep(Net, TOY, clipped, "SP", depth=mupjax.completep(2, 1), **OPTIONS)


def tokens_setting(vocabulary=7, length=4):
    tokens = jnp.asarray(RNG.integers(vocabulary, size=(8, length + 1)), jnp.int32)

    def loss(predict, batch):
        logits = predict(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    return mupjax.Setting("tokens", lambda data, key, step: tokens, loss, tokens)


def decoder(width, depth, rngs):
    return Decoder(
        7,
        width,
        layers=depth.layers,
        heads=2,
        residual_multiplier=depth.residual_multiplier,
        use_bias=True,
        feed_forward="gelu",
        rngs=rngs,
    )


@pytest.mark.slow
def test_the_models_of_this_package_pass_the_check():
    check_branches(decoder, mupjax.completep(4, 1), tokens_setting(), 16)
    images = (jnp.asarray(RNG.normal(size=(4, 4, 4)), jnp.float32), BATCH[1][:4])
    check_branches(
        lambda width, depth, rngs: CNN(
            1,
            width,
            C,
            blocks=depth.layers,
            residual_multiplier=depth.residual_multiplier,
            rngs=rngs,
        ),
        mupjax.completep(4, 1),
        mupjax.Setting("images", lambda data, key, step: images, mean_square, images),
        8,
    )


@pytest.mark.parametrize(
    ("pattern", "path", "block", "everywhere"),
    [
        ("blocks/*", "blocks/3/attention/out", "blocks/3", "blocks/*/attention/out"),
        ("blocks/*", "blocks/13", "blocks/13", "blocks/*"),
        ("stage1/*", "stage1/0/dense2/kernel", "stage1/0", "stage1/*/dense2/kernel"),
        ("blocks/0/*", "blocks/0/dense/kernel", "blocks/0", "blocks/*/dense/kernel"),
        ("Block_*", "Block_2/Dense_0/kernel", "Block_2", "Block_*/Dense_0/kernel"),
    ],
)
def test_a_block_is_found_by_its_number(pattern, path, block, everywhere):
    assert mupjax.completep(2, 1, blocks=pattern).block_of(path) == (block, everywhere)
    assert mupjax.completep(2, 1, blocks=pattern).block_of("readout/0") is None


# A file.


def write(tmp_path, table):
    (tmp_path / "deep_net.py").write_text(
        "from flax import nnx\n\n"
        "def make(width, depth, rngs):\n    return nnx.Linear(1, width, rngs=rngs)\n"
    )
    path = tmp_path / "sweep.toml"
    path.write_text(
        '[model]\nfactory = "deep_net:make"\n[sweep]\nwidths = [8]\nsteps = 1\n'
        f"[hyperparameters]\nlearning_rate = 0.1\n[depth]\n{table}\n"
    )
    return path


@pytest.mark.parametrize(
    ("table", "depth"),
    [
        (
            'name = "completep"\nlayers = 8\nbase_layers = 2\nblocks = ["a/*", "b/*"]',
            mupjax.completep(8, 2, blocks=["a/*", "b/*"]),
        ),
        ('name = "depth-mup"\nlayers = 8\nbase_layers = 2', mupjax.depth_mup(8, 2)),
        ('name = "unscaled"\nlayers = 8\nbase_layers = 2', mupjax.unscaled(8, 2)),
        (
            "alpha = 0\nlayers = 8\nbase_layers = 2\nbase_multiplier = 0.5",
            mupjax.Depth(8, 2, alpha=0, base_multiplier=0.5),
        ),
    ],
)
def test_a_file_may_state_a_depth(tmp_path, table, depth):
    assert read_sweep_file(write(tmp_path, table)).arguments["depth"] == depth


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("layers = 8\nbase_layers = 2", "either name .* or alpha, got name=None, alpha=None"),
        ('name = "completep"\nlayers = 8', "needs 'base_layers'"),
        ('name = "deep"\nlayers = 8\nbase_layers = 2', "must be one of completep.*got 'deep'"),
        ('name = "completep"\nlayers = 8\nbase_layers = 2\nbase = 1', r"unknown keys \['base'\]"),
    ],
)
def test_a_file_with_a_bad_depth(tmp_path, table, text):
    with pytest.raises(ValueError, match=text):
        read_sweep_file(write(tmp_path, table))
