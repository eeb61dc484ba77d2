"""The plain loop over trials and steps that a sweep has to equal."""

import jax
import numpy as np
import optax

from mupjax.adapters import as_model
from mupjax.roles import leaf_paths, map_leaves
from small_sweeps import net, regression


def train_by_hand(width, factors, roles, points, seeds, steps, marks):
    """Losses of every (point, seed), one trial at a time; each parameter has its own optimizer.

    Returns train losses (P, S, T) and evaluation losses (P, S, E).
    """
    model, setting = as_model(net, width, regression()), regression()
    default = {"b1": 0.9, "weight_decay": 0.0, "init_scale": 1.0, "output_multiplier": 1.0}

    def initial(seed, point):
        leaves = leaf_paths(model.init(jax.random.fold_in(jax.random.key(seed), 0)))
        return {
            path: leaf * factors.init[path] * (point["init_scale"] if leaf.ndim > 1 else 1.0)
            for path, leaf in leaves.items()
        }

    def loss(params, batch, point):
        used = {
            path: leaf
            * factors.multiplier[path]
            * (point["output_multiplier"] if path.startswith("readout/") else 1.0)
            for path, leaf in params.items()
        }
        nested = map_leaves(lambda path, leaf: used[path], model.abstract_params())
        return setting.loss(lambda x: model.apply(nested, x), batch)

    def optimizer(path, point):
        rate = point["learning_rate"] * factors.learning_rate[path]
        rate = rate * point.get(f"{roles[path]}_learning_rate_multiplier", 1.0)
        return optax.adamw(
            rate,
            b1=point["b1"],
            eps=1e-8 * factors.adam_eps[path],
            weight_decay=point["weight_decay"] * factors.weight_decay[path],
        )

    @jax.jit
    def start(seed, point):
        params = initial(seed, point)
        return params, {path: optimizer(path, point).init(params[path]) for path in params}

    @jax.jit
    def step(params, states, point, seed, t):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        batch = setting.sample(setting.data, key, t)
        value, gradient = jax.value_and_grad(loss)(params, batch, point)
        new_params, new_states = {}, {}
        for path, leaf in params.items():
            update, new_states[path] = optimizer(path, point).update(
                gradient[path], states[path], leaf
            )
            new_params[path] = leaf + update
        return new_params, new_states, value

    evaluate = jax.jit(lambda params, point: loss(params, setting.validation, point))
    train = np.full((len(points), len(seeds), steps), np.nan)
    evaluation = np.full((len(points), len(seeds), len(marks)), np.nan)
    for p, given in enumerate(points):
        point = default | given
        for s, seed in enumerate(seeds):
            params, states = start(seed, point)
            for t in range(steps + 1):
                if t in marks:
                    evaluation[p, s, list(marks).index(t)] = evaluate(params, point)
                if t < steps:
                    params, states, train[p, s, t] = step(params, states, point, seed, t)
    return train, evaluation


def points_of(axes):
    grid = np.meshgrid(*axes.values(), indexing="ij")
    return [
        dict(zip(axes, map(float, values), strict=True))
        for values in zip(*map(np.ravel, grid), strict=True)
    ]
