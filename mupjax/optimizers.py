"""What the engine must know of an optax optimizer, and schedules with unit peak."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mupjax.parametrization import Family
from mupjax.roles import LeafRole, leaf_paths

__all__ = [
    "OptimizerFactory",
    "OptimizerTraits",
    "check_schedule",
    "examine",
    "factory_parameters",
    "stand_ins",
    "takes_roles",
    "with_roles",
    "wsd_schedule",
]

logger = logging.getLogger("mupjax")

OptimizerFactory = Callable[..., optax.GradientTransformation]
"""A function of named hyperparameters, such as ``lambda learning_rate, b2: optax.adam(...)``. It
is called with traced scalars. A parameter called ``roles`` is no hyperparameter: it is given the
role and layout of every parameter of the model (``{path: mupjax.roles.LeafRole}``)."""

_ROLES = "roles"


@dataclasses.dataclass(frozen=True)
class OptimizerTraits:
    """Facts about an optimizer, found by feeding it small known gradients.

    Attributes:
      family: which exponents of a parametrization apply to it.
      own_decay: ``none``: parameters do not enter the update; ``decoupled``: they enter through an
        added term proportional to them (``optax.adamw``); ``other``: in another way (LAMB), or the
        state holds a copy of them.
      couples_leaves: the update of one parameter depends on another's gradient (global-norm clip).
      pads: zero-padding the parameters leaves the update of the true coordinates as it is.
    """

    family: Family
    own_decay: Literal["none", "decoupled", "other"]
    couples_leaves: bool = False
    pads: bool = True


# RAdam is momentum for its first five updates, Adagrad starts out linear: look at a later one. With
# optax.MultiSteps only every k-th update moves: the twelfth for k = 2, 3, 4, 6 and 12.
_UPDATES = 12
# Axes of the small stand-ins for parameters: unequal, so that a matrix has a shape.
_AXES = (6, 4, 3, 2, 2)
_STAND_INS = {"bias": (4,), "kernel": (6, 4)}


def examine(
    factory: OptimizerFactory,
    hyperparameters: Mapping[str, float],
    family: Family | None = None,
    params: Any = None,
) -> OptimizerTraits:
    """Determine an optimizer's family and what its updates depend on.

    After a few updates with one gradient, that of a linear optimizer doubles with the gradient
    (``sgd``); that of an Adam-like one does not change with its scale and treats entries one by one
    (``adam``); that of a spectral one does not change with its scale, and some matrix's update has
    equal singular values (``spectral``). All parameters must agree: of a mixture of SGD and Adam
    the family has to be stated.

    Args:
      factory: the optimizer factory.
      hyperparameters: one value for each of its parameters.
      family: stated by the user, whose word counts: if it looks otherwise, a warning is logged.
      params: parameter tree (arrays or shapes) whose paths and numbers of axes are used, for
        optimizers that treat parameters differently; by default one matrix and one vector.

    Raises:
      TypeError: the factory gives no optax transformation.
      ValueError: the family cannot be told and is not stated, or is stated and unknown; or the
        optimizer does not move, or cannot be run.
    """
    if family is not None and family not in get_args(Family):
        raise ValueError(
            f"optimizer_family must be one of {', '.join(get_args(Family))}, got {family!r}."
        )
    transform = factory(**hyperparameters)
    if not isinstance(transform, optax.GradientTransformation):
        raise TypeError(
            "the optimizer factory must return an optax.GradientTransformation, "
            f"got {type(transform).__name__}."
        )
    probe = _Probe(transform, params if params is not None else _STAND_INS)
    _check_traced(factory, hyperparameters, probe)
    gradient = probe.gradient
    try:
        plain = probe.run(gradient)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            "the optimizer cannot be run as update(gradients, state, params), on the tree of the "
            f"model's parameters: {reason[0]}"
        ) from error
    if not np.any(plain):
        raise ValueError(
            f"the optimizer moves nothing in its update number {_UPDATES}, so that neither its "
            "family nor its weight decay can be found out: if it accumulates gradients, let it do "
            "so over 2, 3, 4, 6 or 12 updates; if it warms up, leave that to the schedule."
        )
    own_decay, scalings = _own_decay(probe, plain), _scalings(probe, plain)
    leaves, structure = jax.tree.flatten(gradient)
    pushed = structure.unflatten([1000 * leaves[0], *leaves[1:]])
    others = slice(leaves[0].size, None)
    push = probe.run(gradient, last=pushed)
    return OptimizerTraits(
        family=_family(probe, plain, scalings) if family is None else _stated(family, scalings),
        own_decay=own_decay,
        couples_leaves=not np.allclose(push[others], plain[others], rtol=1e-3, atol=1e-12),
        pads=_pads(transform),
    )


def _check_traced(
    factory: OptimizerFactory, hyperparameters: Mapping[str, float], probe: _Probe
) -> None:
    """Refuse an optimizer that needs a hyperparameter as a number: one program serves all."""
    for name in hyperparameters:

        def update(value: jax.Array) -> Any:
            transform = factory(**{**hyperparameters, name: value})  # noqa: B023 - called here
            return transform.update(probe.gradient, transform.init(probe.params), probe.params)

        try:
            jax.eval_shape(update, jax.ShapeDtypeStruct((), jnp.float32))
        except jax.errors.ConcretizationTypeError as error:
            raise ValueError(
                f"the optimizer factory needs {name!r} as a number, and a sweep gives it a traced "
                "scalar, which stands for all values at once: close over a value in the factory "
                "(then it cannot be swept). If it is the peak of a schedule, of which optax asks "
                "whether it is above 0, multiply one of peak 1 by it, `lambda t: learning_rate * "
                "unit(t)`, or give the schedule to the sweep, schedule=..."
            ) from error
        except Exception:
            return  # What else is wrong is said of the numbers.


def stand_ins(params: Any) -> Any:
    """Small arrays in the place of parameters (arrays or shapes), with their paths and axes."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=_small(leaf)).astype(np.float32), params, is_leaf=_is_shape
    )


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def _small(leaf: Any) -> tuple[int, ...]:
    full = leaf if isinstance(leaf, tuple) else leaf.shape
    return tuple(min(n, _AXES[min(i, 4)]) for i, n in enumerate(full))


class _Probe:
    """Runs an optimizer on small stand-ins for the parameters."""

    def __init__(self, transform: optax.GradientTransformation, params: Any) -> None:
        rng = np.random.default_rng(0)
        shapes = jax.tree.map(_small, params, is_leaf=_is_shape)

        def gradient(shape: tuple[int, ...]) -> np.ndarray:
            # Small, so that a clipped optimizer shows its unclipped rule, but no entry near zero,
            # where Adam's epsilon would show.
            sizes = 0.05 * rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape)
            return np.asarray(sizes, np.float32)

        def value(shape: tuple[int, ...]) -> np.ndarray:
            return np.asarray(rng.normal(size=shape), np.float32)

        self.gradient = jax.tree.map(gradient, shapes, is_leaf=_is_shape)
        self.params = jax.tree.map(value, shapes, is_leaf=_is_shape)
        self.zeros = jax.tree.map(np.zeros_like, self.params)
        self.paths = list(leaf_paths(self.params))
        self._transform = transform
        self._update = jax.jit(lambda g, state, p: transform.update(g, state, p))

    def run(
        self,
        gradient: Any,
        params: Any = None,
        *,
        last: Any = None,
        start: Any = None,
        padded: bool = False,
    ) -> np.ndarray:
        """The last of several updates, flattened; ``last`` is the gradient of the last one.

        The state is initialised with the parameters ``start`` (by default those of the updates).
        """
        params = self.zeros if params is None else params
        last = gradient if last is None else last
        if padded:
            gradient, params, last = jax.tree.map(_padding, (gradient, params, last))
        state, updates = self._transform.init(params if start is None else start), None
        for step in range(_UPDATES):
            updates, state = self._update(last if step == _UPDATES - 1 else gradient, state, params)
        leaves = [np.asarray(u) for u in jax.tree.leaves(updates)]
        if padded:
            true = jax.tree.leaves(self.params)
            leaves = [
                u[tuple(slice(n) for n in t.shape)] for u, t in zip(leaves, true, strict=True)
            ]
        return np.concatenate([u.ravel() for u in leaves])

    def split(self, updates: np.ndarray) -> list[np.ndarray]:
        """The update of each parameter, flattened, in the order of `paths`."""
        ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(self.params)])
        return np.split(updates, ends[:-1])


def _pads(transform: optax.GradientTransformation) -> bool:
    """Whether zero-padding leaves the updates of true coordinates alone; False if in doubt."""
    try:
        probe = _Probe(transform, _STAND_INS)
        plain, padded = probe.run(probe.gradient), probe.run(probe.gradient, padded=True)
    except Exception:
        # The optimizer wants the model's own parameters; then this cannot be shown.
        return False
    return bool(np.allclose(padded, plain, rtol=1e-3, atol=1e-9))


def _padding(array: np.ndarray) -> np.ndarray:
    # Unequal, so that a matrix changes its ratio; and beyond the size that Adafactor factors.
    return np.pad(array, [(0, 130 * (axis + 1)) for axis in range(array.ndim)])


def _own_decay(probe: _Probe, plain: np.ndarray) -> Literal["none", "decoupled", "other"]:
    values, with_gradient, alone = [], [], []
    for sample in (probe.params, jax.tree.map(lambda p: np.flip(p) + 0.5, probe.params)):
        values.append(np.concatenate([p.ravel() for p in jax.tree.leaves(sample)]))
        with_gradient.append(probe.run(probe.gradient, sample) - plain)
        alone.append(probe.run(probe.zeros, sample))
        if not np.allclose(
            probe.run(probe.gradient, sample, start=probe.zeros) - plain, with_gradient[-1]
        ):
            # It keeps parameters of its own (as schedule-free optimizers do).
            return "other"
    largest = float(np.max(np.abs([with_gradient, alone])))
    tiny = 1e-4 * max(largest, float(np.max(np.abs(plain))))
    if largest <= tiny:
        return "none"
    # A decoupled term is each parameter times a number of its own, whatever the gradient.
    added = np.allclose(with_gradient[0], alone[0], atol=tiny)
    diagonal = np.allclose(with_gradient[0] * values[1], with_gradient[1] * values[0], atol=tiny)
    return "decoupled" if added and diagonal else "other"


def _stated(family: Family, scalings: Mapping[str, str]) -> Family:
    found = set(scalings.values())
    # Adam whose epsilon is far above every gradient does look like SGD: no error.
    if family == "sgd" and "none" in found:
        where = "" if found == {"none"} else f" (of {_some(scalings, 'none')})"
        does = f"ignores the gradient's scale{where}, as SGD's does not"
    elif family != "sgd" and found == {"linear"}:
        does = "doubles with the gradient, as SGD's does"
    else:
        return family
    logger.warning(
        "optimizer_family=%r is stated, but this optimizer's update %s; with the rows of the "
        "wrong family, learning rates scale wrongly with the width",
        family,
        does,
    )
    return family


def _scalings(probe: _Probe, plain: np.ndarray) -> dict[str, str]:
    """How the update of each parameter that moves scales with the gradient."""

    def times(factor: float) -> np.ndarray:
        return probe.run(jax.tree.map(lambda g: factor * g, probe.gradient))

    # Each by its own size: beside large updates small ones would not show.
    parts = map(probe.split, (plain, times(2.0), times(1000.0)))
    return {
        path: _scaling(*updates)
        for path, *updates in zip(probe.paths, *parts, strict=True)
        if np.any(updates[0])
    }


def _family(probe: _Probe, plain: np.ndarray, scalings: Mapping[str, str]) -> Family:
    found = set(scalings.values())
    if found == {"linear"}:
        return "sgd"
    if found == {"none"}:
        kinds = _leaf_kinds(probe, plain)
        if kinds == {"entrywise"}:
            return "adam"
        if kinds <= {"entrywise", "orthogonal"}:
            return "spectral"
    if found == {"linear", "none"}:
        raise ValueError(
            f"this optimizer updates {_some(scalings, 'linear')} like SGD and "
            f"{_some(scalings, 'none')} without regard to the gradient's scale, like Adam: state "
            "optimizer_family='adam' (or 'spectral', where hidden matrices are orthogonalised). "
            "Then gradients are divided by what the table gives Adam's epsilon, which gives those "
            "that are updated like SGD their own row, too; with 'sgd' the others would be wrong."
        )
    raise ValueError(
        "cannot tell how this optimizer's update scales with the gradient (neither like SGD, nor "
        "like Adam, nor spectral like Muon): state optimizer_family='sgd', 'adam' or 'spectral'."
    )


def _scaling(plain: np.ndarray, doubled: np.ndarray, large: np.ndarray) -> str:
    """How one parameter's update scales with the gradient: ``linear``, ``none`` or ``other``."""
    tolerance = 2e-2 * float(np.max(np.abs(plain)))
    # Clipping shortens a large update and keeps its direction; Adagrad only starts out linear.
    x, y = (u / (np.max(np.abs(u)) or 1.0) for u in (plain, large))
    parallel = x @ y > 0.999 * np.linalg.norm(x) * np.linalg.norm(y)
    if np.max(np.abs(doubled - 2 * plain)) <= tolerance and parallel:
        return "linear"
    return "none" if np.max(np.abs(doubled - plain)) <= tolerance else "other"


def _some(scalings: Mapping[str, str], scaling: str) -> str:
    paths = [path for path, found in scalings.items() if found == scaling]
    return ", ".join(map(repr, paths[:2])) + (f" and {len(paths) - 2} more" if paths[2:] else "")


def _leaf_kinds(probe: _Probe, plain: np.ndarray) -> set[str]:
    """How each parameter is treated: entry by entry, orthogonalised as a matrix, or otherwise."""
    leaves, structure = jax.tree.flatten(probe.gradient)
    kinds, start = set(), 0
    for i, leaf in enumerate(leaves):
        own = slice(start, start + leaf.size)
        start += leaf.size
        turned = leaf.copy()
        turned.ravel()[0] *= -3
        gradient = structure.unflatten([*leaves[:i], turned, *leaves[i + 1 :]])
        changed = ~np.isclose(probe.run(gradient)[own], plain[own], rtol=2e-2, atol=1e-12)
        if not changed[1:].any():
            kinds.add("entrywise")
            continue
        # Of a kernel with several axes, the first ones may be summed over.
        update = plain[own]
        rows = [math.prod(leaf.shape[:k]) for k in range(1, max(leaf.ndim, 2))]
        spectra = [np.linalg.svd(update.reshape(r, -1), compute_uv=False) for r in rows]
        kinds.add("orthogonal" if any(map(_is_flat, spectra)) else "other")
    return kinds


def _is_flat(singular: np.ndarray) -> bool:
    """Whether those singular values that are not zero are about equal (Dion's rank is limited)."""
    return bool(singular[singular > 1e-3 * singular[0]][-1] > 0.5 * singular[0])


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
    named = [p for p in parameters if p.name != _ROLES]
    return {p.name for p in named}, {p.name for p in named if p.default is p.empty}


def takes_roles(factory: OptimizerFactory) -> bool:
    """Whether a factory treats parameters by their role."""
    return _ROLES in inspect.signature(factory).parameters


def with_roles(factory: OptimizerFactory, roles: Mapping[str, LeafRole]) -> OptimizerFactory:
    """The factory as a function of hyperparameters alone."""
    return functools.partial(factory, **{_ROLES: roles}) if takes_roles(factory) else factory


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
    if not callable(schedule):
        raise TypeError(
            f"schedule must be a function of the step with peak 1, got {schedule!r}: for a "
            "constant rate leave it out."
        )
    looked_at = np.unique(np.linspace(0, steps - 1, min(steps, 2048)).astype(int))
    try:
        values = schedule_values(schedule, looked_at)
        if values.ndim > 1:
            raise ValueError(f"it gives arrays of shape {values.shape[1:]}")
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            "schedule must take the step, an int32 that JAX traces (so no `if` on it: jnp.where), "
            f"and give one number: {reason[0]}"
        ) from error
    if not np.all(np.isfinite(values)) or values.min() < 0:
        raise ValueError("schedule takes negative or non-finite values; it must lie in [0, 1].")
    if not np.isclose(values.max(), 1.0, rtol=2e-2):
        raise ValueError(
            f"schedule peaks at {values.max():.4g} within {steps} steps, not at 1. It multiplies "
            "every layer's learning rate: give it a unit peak (for example "
            "optax.cosine_decay_schedule(1.0, steps)) and put the rate into learning_rate."
        )
