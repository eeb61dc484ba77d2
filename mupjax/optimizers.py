"""What the engine must know of an optax optimizer, and schedules with unit peak."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mupjax.parametrization import Family

__all__ = [
    "OptimizerFactory",
    "OptimizerTraits",
    "check_schedule",
    "examine",
    "factory_parameters",
    "wsd_schedule",
]

OptimizerFactory = Callable[..., optax.GradientTransformation]
"""A function of named hyperparameters, such as ``lambda learning_rate, b2: optax.adam(...)``. It
is called with traced scalars."""


@dataclasses.dataclass(frozen=True)
class OptimizerTraits:
    """Facts about an optimizer, found by feeding it small known gradients.

    Attributes:
      family: which exponents of a parametrization apply to it.
      own_decay: ``none``: parameters do not enter the update; ``decoupled``: they enter through an
        added term proportional to them (``optax.adamw``); ``other``: in another way (LAMB).
    """

    family: Family
    own_decay: Literal["none", "decoupled", "other"]


def examine(
    factory: OptimizerFactory,
    hyperparameters: Mapping[str, float],
    family: Family | None = None,
) -> OptimizerTraits:
    """Determine an optimizer's family and whether it decays weights by itself.

    The first update of a linear optimizer doubles with the gradient (``sgd``); that of an Adam-like
    one does not change with its scale and treats entries one by one (``adam``); that of a spectral
    one does not change with its scale and has equal singular values (``spectral``).

    Args:
      factory: the optimizer factory.
      hyperparameters: one value for each of its parameters.
      family: stated by the user; skips that part of the examination.

    Raises:
      TypeError: the factory gives no optax transformation.
      ValueError: the family cannot be told and is not stated.
    """
    transform = factory(**hyperparameters)
    if not isinstance(transform, optax.GradientTransformation):
        raise TypeError(
            "the optimizer factory must return an optax.GradientTransformation, "
            f"got {type(transform).__name__}."
        )
    rng = np.random.default_rng(0)
    shapes = {"kernel": (6, 4), "bias": (4,)}
    # Small gradients, so that a clipped optimizer shows its unclipped rule, but no entry near zero,
    # where Adam's epsilon would show.
    gradient = {
        k: (0.05 * rng.uniform(0.5, 1.5, s) * rng.choice([-1.0, 1.0], s)).astype(np.float32)
        for k, s in shapes.items()
    }
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    zeros = jax.tree.map(np.zeros_like, params)

    @jax.jit
    def first_update(gradient: Any, params: Any) -> jax.Array:
        updates: Any = transform.update(gradient, transform.init(params), params)[0]
        return jnp.concatenate([jnp.ravel(updates[k]) for k in shapes])

    def update(gradient: Any, params: Any) -> np.ndarray:
        return np.asarray(first_update(gradient, params))

    plain = update(gradient, zeros)
    terms, values = [], []
    for sample in (params, jax.tree.map(lambda p: p[::-1], params)):
        terms.append((update(gradient, sample) - plain, update(zeros, sample)))
        values.append(np.concatenate([np.ravel(sample[k]) for k in shapes]))
    largest = max(float(np.max(np.abs(term))) for pair in terms for term in pair)
    tiny = 1e-4 * max(largest, float(np.max(np.abs(plain))))
    (with_gradient, alone), (swapped, _) = terms
    if max(np.max(np.abs(with_gradient)), np.max(np.abs(alone))) <= tiny:
        own_decay: Literal["none", "decoupled", "other"] = "none"
    else:
        # A decoupled term is each parameter times a number of its own, whatever the gradient.
        added = np.allclose(with_gradient, alone, atol=tiny)
        diagonal = np.allclose(with_gradient * values[1], swapped * values[0], atol=tiny)
        own_decay = "decoupled" if added and diagonal else "other"
    if family is None:
        family = _family(update, gradient, zeros, plain)
    return OptimizerTraits(family, own_decay)


def _family(
    update: Callable[[Any, Any], np.ndarray],
    gradient: Mapping[str, np.ndarray],
    zeros: Any,
    plain: np.ndarray,
) -> Family:
    scale = float(np.max(np.abs(plain)))

    def same(x: np.ndarray, y: np.ndarray) -> bool:
        return scale > 0 and bool(np.max(np.abs(x - y)) <= 2e-2 * scale)

    doubled = update(jax.tree.map(lambda g: 2 * g, gradient), zeros)
    large = update(jax.tree.map(lambda g: 1000 * g, gradient), zeros)
    # Clipping shortens a large update and keeps its direction; Adagrad only starts out linear.
    parallel = plain @ large > 0.999 * np.linalg.norm(plain) * np.linalg.norm(large)
    if same(doubled, 2 * plain) and parallel:
        return "sgd"
    if same(doubled, plain):
        other = dict(gradient)
        other["kernel"] = gradient["kernel"].copy()
        other["kernel"][0, 0] *= -3
        changed = ~np.isclose(update(other, zeros), plain, rtol=2e-2, atol=1e-12)
        if changed[0] and not changed[1:].any():
            return "adam"
        singular = np.linalg.svd(plain[:24].reshape(6, 4), compute_uv=False)
        if singular[-1] > 0.5 * singular[0]:
            return "spectral"
    raise ValueError(
        "cannot tell how this optimizer's update scales with the gradient (neither like SGD, nor "
        "like Adam, nor spectral like Muon): state optimizer_family='sgd', 'adam' or 'spectral'."
    )


def factory_parameters(factory: OptimizerFactory) -> tuple[set[str], set[str]]:
    """Names an optimizer factory takes, and those it cannot do without.

    Raises:
      TypeError: it is no function, or takes ``*args`` or ``**kwargs``: then no name could be
        checked, and a misspelt hyperparameter would be swept without effect.
    """
    if not callable(factory):
        raise TypeError(
            "the optimizer must be a function of its hyperparameters, such as "
            f"`lambda learning_rate: optax.adam(learning_rate)`, got {type(factory).__name__}."
        )
    parameters = inspect.signature(factory).parameters.values()
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
        raise TypeError(
            "the optimizer factory must name its hyperparameters (no *args, **kwargs or "
            "positional-only), so that a misspelt one cannot be swept without effect."
        )
    return {p.name for p in parameters}, {p.name for p in parameters if p.default is p.empty}


def wsd_schedule(steps: int, warmup: float = 0.04, cooldown: float = 0.2) -> optax.Schedule:
    """Warmup-stable-decay with peak 1: linear warmup, constant, linear cooldown to 0.

    Args:
      steps: T, the number of updates.
      warmup: fraction of the steps spent warming up (the first update already moves).
      cooldown: fraction of the steps spent cooling down (the last update is the smallest).

    Raises:
      ValueError: fractions that are negative or exceed 1 together.
    """
    if steps < 1 or min(warmup, cooldown) < 0 or warmup + cooldown > 1:
        raise ValueError(
            "wsd_schedule needs steps >= 1 and non-negative fractions with warmup + cooldown <= 1, "
            f"got steps={steps}, warmup={warmup}, cooldown={cooldown}."
        )
    rise, fall = round(steps * warmup), round(steps * cooldown)
    rise = min(rise, steps - 1)
    fall = min(fall, steps - 1 - rise) if rise + fall >= steps else fall
    return optax.join_schedules(
        [
            optax.linear_schedule(1 / (rise + 1), 1.0, max(rise, 1)),
            optax.linear_schedule(1.0, 0.0, fall + 1),
        ],
        [steps - fall - 1],
    )


def schedule_values(schedule: optax.Schedule, steps: np.ndarray) -> np.ndarray:
    """A schedule's values at some steps, in one compilation."""
    values = jax.jit(jax.vmap(lambda t: jnp.asarray(schedule(t), jnp.float32)))(steps)
    return np.asarray(values)


def check_schedule(schedule: optax.Schedule, steps: int) -> None:
    """Refuse a schedule whose peak is not 1: it multiplies the learning rate.

    Raises:
      ValueError: the peak differs from 1, or a value is negative or not finite.
    """
    looked_at = np.unique(np.linspace(0, steps - 1, min(steps, 2048)).astype(int))
    values = schedule_values(schedule, looked_at)
    if not np.all(np.isfinite(values)) or values.min() < 0:
        raise ValueError("schedule takes negative or non-finite values; it must lie in [0, 1].")
    if not np.isclose(values.max(), 1.0, rtol=2e-2):
        raise ValueError(
            f"schedule peaks at {values.max():.4g} within {steps} steps, not at 1. It multiplies "
            "every layer's learning rate: give it a unit peak (for example "
            "optax.cosine_decay_schedule(1.0, steps)) and put the rate into learning_rate."
        )
