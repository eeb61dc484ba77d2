"""A small regression, models that start from fixed weights, and their training by hand."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mupjax import Setting, muP, resolve_sweep
from mupjax.adapters import as_model
from mupjax.models import MLP
from mupjax.roles import leaf_paths, map_leaves
from tolerances import float_tolerance

BASE, WIDTH, M = 8, 32, 4
STEPS, BATCH, FEATURES, OUTPUTS = 12, 16, 6, 3
# Single precision; every step sums over up to 32 units.
TOLERANCE = float_tolerance(np.float32, operations=STEPS * WIDTH)


def regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, BATCH, FEATURES))
    y = np.sin(x @ rng.normal(size=(FEATURES, OUTPUTS)))
    data = (jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    return Setting(
        "sines",
        sample=lambda data, key, step: jax.tree.map(lambda a: a[step], data),
        loss=lambda predict, batch: jnp.mean(jnp.square(predict(batch[0]) - batch[1])),
        validation=jax.tree.map(lambda a: a[0], data),
        data=data,
    )


SETTING = regression()
# Where the answer does not depend on it.
KEY = jax.random.key(0)


def with_fixed_weights(factory, setting=SETTING):
    """The same model, whose every seed starts from the same weights; biases are not zero."""

    @functools.cache
    def fixed(width):
        model = as_model(factory, width, setting)
        rng = np.random.default_rng(width)

        def draw(path, leaf):
            noise = rng.normal(size=leaf.shape)
            if leaf.ndim < 2:
                value = path.endswith("scale") + 0.1 * noise
            else:
                # Flax draws an embedding with std 1/sqrt(features).
                value = noise / leaf.shape[path.endswith("embedding")] ** 0.5
            return jnp.asarray(value, jnp.float32)

        params = map_leaves(draw, model.abstract_params())
        return dataclasses.replace(model, init=lambda key: jax.tree.map(lambda a: a, params))

    return fixed


def mlp(width, rngs):
    return MLP(FEATURES, width, OUTPUTS, depth=2, norm=True, rngs=rngs)


FIXED_MLP = with_fixed_weights(mlp)
MLP_EXPONENTS = {
    "hidden/0/kernel": 0,
    "hidden/1/kernel": 0.5,
    "readout/kernel": 0.5,
    "*bias": 0,
    "*scale": 0,
}
COMMON = {
    "base_width": BASE,
    "widths": [WIDTH],
    "init_exponents": MLP_EXPONENTS,
    "steps": STEPS,
    "evaluations": 1,
}
# So large that it decides as much as the gradients do.
EPS = 1e-2


def sgd(learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)


def adam(learning_rate):
    return optax.adam(learning_rate, eps=EPS)


def resolved(factory, optimizer=sgd, parametrization: Any = muP, setting=SETTING, **options):
    """What the sweep would do, without training."""
    options = {
        "widths": [WIDTH],
        "base_width": BASE,
        "hyperparameters": {"learning_rate": 0.1},
        **options,
    }
    return resolve_sweep(factory, setting, optimizer, parametrization, **options)


def train_by_hand(params, transforms, predict, setting=SETTING, clip=math.inf):
    """Losses before every update; each parameter has an optimizer of its own, by path."""

    @jax.jit
    def step(params, states, batch):
        def loss_of(params):
            return setting.loss(lambda *inputs: predict(params, *inputs), batch)

        loss, gradient = jax.value_and_grad(loss_of)(params)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)))
        gradient = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / norm), gradient)
        gradients, now = leaf_paths(gradient), leaf_paths(params)
        moved, new_states = {}, {}
        for path, transform in transforms.items():
            update, new_states[path] = transform.update(gradients[path], states[path], now[path])
            moved[path] = now[path] + update
        return map_leaves(lambda path, leaf: moved[path], params), new_states, loss

    states = {path: transforms[path].init(leaf) for path, leaf in leaf_paths(params).items()}
    losses = []
    for t in range(STEPS):
        batch = setting.sample(setting.data, KEY, jnp.int32(t))
        params, states, loss = step(params, states, batch)
        losses.append(float(loss))
    return np.array(losses)


def curve(dataset, **where):
    return dataset["train_loss"].sel(where).values.ravel()
