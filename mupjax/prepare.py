"""A sweep checked and decided, before anything is compiled: from arguments to a ``Plan``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mupjax.adapters import Model, ModelFactory
from mupjax.config import HyperparameterGrid, check_count, check_seeds, check_widths
from mupjax.depth import Depth, DepthFactors, check_branches, with_depth
from mupjax.family import build_models
from mupjax.observe import Observer
from mupjax.optimizers import (
    OptimizerFactory,
    OptimizerTraits,
    check_schedule,
    examine,
    factory_parameters,
    schedule_values,
    stand_ins,
    takes_roles,
    with_roles,
)
from mupjax.parametrization import PRESETS, Family, Parametrization, WeightDecayMode
from mupjax.plan import Device
from mupjax.program import uses_of
from mupjax.resolve import Application, AttentionScale, Resolved, dissect, resolve
from mupjax.roles import Role
from mupjax.setting import Setting, model_inputs
from mupjax.train import ENGINE_HYPERPARAMETERS, ROLE_MULTIPLIERS, Recipe, count_parameters
from mupjax.uses import check_uses

__all__ = ["Plan", "prepare", "with_loss_fingerprint"]

_DIMENSIONS = ("parametrization", "width", "seed", "step", "eval_step")
_VARIABLES = ("loss", "eval_loss", "train_loss", "status", "diverged_step")
# By which optimizers are told apart.
_UPDATES_SEEN = 12


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything checked and decided before compilation."""

    setting: Setting
    models: Mapping[int, Model]
    widths: tuple[int, ...]
    grid: HyperparameterGrid
    seeds: tuple[int, ...]
    steps: int
    marks: np.ndarray
    resolved: tuple[Resolved, ...]
    several: bool
    recipe: Recipe
    devices: tuple[Device, ...]
    optimizer_pads: bool
    configuration: Mapping[str, Any]

    @property
    def points(self) -> list[dict[str, float]]:
        """Every hyperparameter combination."""
        return self.grid.points()

    @property
    def trials_per_width(self) -> int:
        """Trials of one width and seed: parametrizations times combinations."""
        return len(self.resolved) * len(self.points)


def prepare(
    model: ModelFactory,
    setting: Setting,
    optimizer: OptimizerFactory,
    parametrization: Parametrization | str | Sequence[Parametrization | str],
    *,
    widths: Sequence[int],
    hyperparameters: Mapping[str, float | Sequence[float]],
    steps: int = 1,
    seeds: int | Sequence[int] = 1,
    base_width: int | None = None,
    depth: Depth | None = None,
    schedule: optax.Schedule | None = None,
    weight_decay_mode: WeightDecayMode = "coupled",
    roles: Mapping[str, Role] | None = None,
    init_exponents: Mapping[str, float] | None = None,
    attention: AttentionScale | None = None,
    application: Application = "folded",
    optimizer_family: Family | None = None,
    evaluations: int = 10,
    divergence_threshold: float = 100.0,
    common_random_numbers: bool = True,
    observers: Sequence[Observer] = (),
    devices: Sequence[Device] | None = None,
) -> Plan:
    """Check the arguments of :func:`mupjax.sweep` and decide everything but the layout.

    Raises:
      ValueError, TypeError: as :func:`mupjax.sweep` does.
    """
    if not isinstance(setting, Setting):
        raise TypeError(f"setting must be a mupjax.Setting, got {setting!r}.")
    for argument, given in (("roles", roles), ("init_exponents", init_exponents)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"{argument} must map patterns of paths to values, got {given!r}.")
    checked_widths = check_widths(widths)
    checked_seeds = check_seeds(seeds)
    steps = check_count("steps", steps)
    evaluations = check_count("evaluations", evaluations)
    if not isinstance(divergence_threshold, numbers.Real) or not divergence_threshold > 1:
        raise ValueError(f"divergence_threshold must exceed 1, got {divergence_threshold!r}.")
    for argument, value, allowed in (
        ("weight_decay_mode", weight_decay_mode, ("coupled", "l2", "independent")),
        ("application", application, ("folded", "multipliers")),
    ):
        if value not in allowed:
            raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {value!r}.")
    parametrizations, several = _parametrizations(parametrization)
    factory_names, required = factory_parameters(optimizer)
    grid = HyperparameterGrid.of(
        hyperparameters,
        factory_names=factory_names,
        required=required,
        engine_names=tuple(ENGINE_HYPERPARAMETERS),
        reserved=(*_DIMENSIONS, *_VARIABLES),
    )
    if twice := sorted(
        set(grid.names) & factory_names & set(ENGINE_HYPERPARAMETERS) - {"weight_decay"}
    ):
        raise ValueError(
            f"hyperparameter {twice[0]!r} would act twice: the optimizer factory takes it, and the "
            f"engine applies it itself ({ENGINE_HYPERPARAMETERS[twice[0]]}). Leave one out, or "
            "rename the factory's parameter."
        )
    if not isinstance(common_random_numbers, bool | np.bool_):
        raise ValueError(
            f"common_random_numbers must be True or False, got {common_random_numbers!r}."
        )
    if not isinstance(observers, Sequence):
        raise TypeError(f"observers must be a list of observers, got {observers!r}.")
    _check_names(setting, grid, observers)
    handed = tuple(name for name in grid.names if name in factory_names)
    engine_decays = "weight_decay" in grid.names and "weight_decay" not in factory_names
    if schedule is not None:
        check_schedule(schedule, steps)
    # Raises if the loss never calls the model.
    model_inputs(setting)
    given = model
    model = model if depth is None else with_depth(model, depth)
    models = build_models(model, setting, checked_widths, base_width)
    reference = base_width if base_width is not None else checked_widths[0]
    uses = {width: uses_of(models[width], setting) for width in (min(models), max(models))}
    anatomy = dissect(
        models,
        base_width=reference,
        stated_roles=roles,
        stated_init_exponents=init_exponents,
        stacked=uses[max(uses)].stacked,
        summed=uses[max(uses)].summed,
        entrywise=uses[max(uses)].entrywise,
    )
    optimizer_name = getattr(optimizer, "__qualname__", type(optimizer).__name__)
    by_role, optimizer = takes_roles(optimizer), with_roles(optimizer, anatomy.leaves)
    # The largest value of every axis: at zero weight decay an optimizer would not show its decay.
    largest = {n: max(grid.axes[n]) if n in grid.axes else grid.fixed[n] for n in handed}
    abstract = models[reference].abstract_params()
    traits = examine(optimizer, largest, optimizer_family, abstract)
    _check_decay(traits, engine_decays, weight_decay_mode, grid)
    models = {w: dataclasses.replace(m, roles=anatomy.leaves) for w, m in models.items()}
    _check_coordinates(observers, [models[w] for w in checked_widths], grid)
    resolved = tuple(
        resolve(
            p,
            anatomy,
            traits.family,
            application=application,
            weight_decay_mode=weight_decay_mode,
            attention=attention,
            model_options=models[reference].options,
            depth=depth,
        )
        for p in parametrizations
    )
    check_uses(
        *(uses, anatomy, parametrizations, attention),
        scaling=any(r.scales() for r in resolved),
        orthogonalised=traits.family == "spectral",
    )
    for r in resolved:
        _check_resolved(r, base_width, traits, stated=by_role or optimizer_family is not None)
    if depth is not None:
        check_branches(given, depth, setting, min(models))
    plain = {"query": "hidden", "query_vector": "vector", "tied": "input"}
    role_of = {path: plain.get(leaf.role, leaf.role) for path, leaf in anatomy.leaves.items()}
    for name in grid.names:
        role = name.removesuffix("_learning_rate_multiplier")
        needed = "output" if name == "output_multiplier" else role
        if needed in ROLE_MULTIPLIERS and needed not in role_of.values():
            raise ValueError(
                f"hyperparameter {name!r} would do nothing: the model has no parameter of role "
                f"{needed!r}."
            )
    factors = [r.factors(w) for r in resolved for w in checked_widths]
    recipe = Recipe(
        setting=setting,
        optimizer=optimizer,
        optimizer_names=handed,
        schedule=schedule,
        roles=role_of,
        readout=_readout(role_of, uses[max(uses)].outputs),
        weight_decay_mode=weight_decay_mode,
        optimizer_decays=traits.own_decay == "decoupled",
        engine_decays=engine_decays,
        scale_gradients=any(x != 1 for f in factors for x in f.adam_eps.values()),
        use_multipliers=any(x != 1 for f in factors for x in f.multiplier.values()),
        divergence_threshold=float(divergence_threshold),
        common_random_numbers=bool(common_random_numbers),
        observers=tuple(observers),
    )
    marks = np.unique(np.round(np.linspace(0, steps, min(evaluations, steps) + 1)).astype(np.int32))
    configuration = {
        "setting": {"name": setting.name, **setting.configuration},
        "optimizer": {
            "name": optimizer_name,
            "family": traits.family,
            "updates": _optimizer_fingerprint(
                optimizer, largest, stand_ins(abstract) if by_role else None
            ),
        },
        "parametrizations": [p.to_dict() for p in parametrizations],
        "base_width": base_width,
        "widths": list(checked_widths),
        "depth": None if depth is None else depth.to_dict(),
        "hyperparameters": {n: list(v) for n, v in grid.axes.items()} | dict(grid.fixed),
        "seeds": list(checked_seeds),
        "steps": steps,
        "schedule": _schedule_record(schedule, steps),
        "weight_decay_mode": weight_decay_mode,
        "application": application,
        "attention": attention,
        "evaluation_steps": marks.tolist(),
        "divergence_threshold": float(divergence_threshold),
        "common_random_numbers": bool(common_random_numbers),
        "metrics": sorted(setting.metrics),
        "observers": [{"name": o.name, **o.configuration} for o in observers],
        "roles": {path: leaf.role for path, leaf in anatomy.leaves.items()},
        "base_shapes": {p: list(leaf.shapes[reference]) for p, leaf in anatomy.leaves.items()},
        "parameters": {str(w): count_parameters(models[w]) for w in checked_widths},
    }
    return Plan(
        setting=setting,
        models=models,
        widths=checked_widths,
        grid=grid,
        seeds=checked_seeds,
        steps=steps,
        marks=marks,
        resolved=resolved,
        several=several,
        recipe=recipe,
        devices=_devices(devices),
        optimizer_pads=traits.pads,
        configuration=configuration,
    )


def _readout(roles: Mapping[str, str], last: frozenset[str]) -> frozenset[str]:
    """Parameters of role output that make the outputs, and the biases beside them.

    Biases are "fixed", like much that is no readout's. Where no product is seen to make the
    outputs, all of role output.
    """
    kernels = {path for path, role in roles.items() if role == "output"}
    kernels = kernels & last or kernels
    layers: dict[str, set[str]] = {}
    for path, role in roles.items():
        layers.setdefault(path.rpartition("/")[0], set()).add(role)
    own = {path.rpartition("/")[0] for path in kernels}
    own = {layer for layer in own if layers[layer] == {"output", "fixed"}}
    beside = {p for p, role in roles.items() if role == "fixed" and p.rpartition("/")[0] in own}
    return frozenset(kernels | beside)


def _parametrizations(given: Any) -> tuple[list[Parametrization], bool]:
    several = isinstance(given, Sequence) and not isinstance(given, str)
    listed: list[Any] = list(given) if several else [given]
    if not listed:
        raise ValueError("parametrization is an empty sequence: give at least one.")
    found = []
    for p in listed:
        if isinstance(p, str):
            if p not in PRESETS:
                raise ValueError(
                    f"unknown parametrization {p!r}; the presets are {', '.join(PRESETS)}."
                )
            p = PRESETS[p]
        if not isinstance(p, Parametrization):
            raise TypeError(f"parametrization must be a Parametrization or a name, got {p!r}.")
        found.append(p)
    names = [p.name for p in found]
    if len(set(names)) < len(names):
        raise ValueError(f"parametrizations must have distinct names, got {names}.")
    return found, several


def _devices(given: Sequence[Device] | None) -> tuple[Device, ...]:
    listed = given if isinstance(given, Iterable) and not isinstance(given, str) else ()
    devices = tuple(jax.local_devices() if given is None else listed)
    distinct = len(set(map(id, devices))) == len(devices)
    if not devices or not distinct or not all(isinstance(d, jax.Device) for d in devices):
        raise ValueError(
            f"devices must be a non-empty sequence of different jax devices, got {given!r}; leave "
            "it out for all local ones."
        )
    return devices


def _check_names(setting: Setting, grid: HyperparameterGrid, observers: Sequence[Observer]) -> None:
    """No two things that a result holds may have one name."""
    reserved = {*_DIMENSIONS, *_VARIABLES}
    for name in setting.metrics:
        if name in reserved or name in grid.names:
            raise ValueError(
                f"Setting.metrics of {setting.name!r} has a metric {name!r}, the name of another "
                "part of the result: rename it."
            )
    recorded = [o.name for o in observers]
    for observer in observers:
        if not isinstance(observer, Observer):
            raise TypeError(f"observers must hold mupjax.Observer records, got {observer!r}.")
        taken = {*reserved, *setting.metrics, *grid.names}
        clash = [name for name in taken if name.startswith(f"{observer.name}_")]
        if recorded.count(observer.name) > 1 or clash:
            raise ValueError(
                f"observers: the name {observer.name!r} is used twice, or its variables could be "
                f"mistaken for {', '.join(clash) or 'one another'}: rename it."
            )


def _check_coordinates(
    observers: Sequence[Observer], models: Sequence[Model], grid: HyperparameterGrid
) -> None:
    """Coordinates must be of the observer's own dimensions, and agree where those are shared."""
    for model in models:
        taken: dict[str, tuple[str, list[Any]]] = {}
        for observer in observers:
            own = {d for names in observer.dims.values() for d in names}
            own -= {*_DIMENSIONS, *grid.names}
            for name, values in observer.coords(model).items() if observer.coords else ():
                if name not in own:
                    raise ValueError(
                        f"observers: {observer.name!r} gives coordinates of {name!r}, which is "
                        f"none of its own dimensions ({', '.join(sorted(own)) or 'none'})."
                    )
                listed = np.asarray(values).tolist()
                other, theirs = taken.setdefault(name, (observer.name, listed))
                if theirs != listed:
                    raise ValueError(
                        f"observers: {other!r} and {observer.name!r} give different coordinates of "
                        f"the dimension {name!r}: rename one."
                    )


def _check_decay(
    traits: OptimizerTraits, engine_decays: bool, mode: WeightDecayMode, grid: HyperparameterGrid
) -> None:
    if engine_decays and traits.own_decay != "none":
        raise ValueError(
            "the optimizer decays weights by itself, and hyperparameter 'weight_decay' would decay "
            "them once more: give the factory a parameter weight_decay, or an optimizer without "
            "decay (optax.adam instead of optax.adamw)."
        )
    if engine_decays and mode == "coupled" and "learning_rate" not in grid.names:
        raise ValueError(
            "weight_decay_mode='coupled' multiplies the decay by the learning rate, but "
            "hyperparameters has no 'learning_rate': name it so, or use mode 'independent'."
        )
    sgd_l2 = traits.family == "sgd" and mode == "l2"
    if traits.own_decay == "decoupled" and mode != "coupled" and not sgd_l2:
        raise ValueError(
            "the optimizer applies coupled weight decay by itself, but weight_decay_mode is "
            f"{mode!r}: use an optimizer without decay and the engine's hyperparameter "
            "'weight_decay'."
        )


def _check_resolved(
    resolved: Resolved, base_width: int | None, traits: OptimizerTraits, *, stated: bool
) -> None:
    name = resolved.parametrization.name
    deep = resolved.depth_factors
    if not resolved.scales() and deep == DepthFactors():
        return
    if base_width is None and resolved.scales():
        raise ValueError(
            f"base_width must be given: the factors of {name} are relative to it (every factor "
            "is 1 at that width), so another base is another training."
        )
    if traits.family == "spectral" and not stated:
        raise ValueError(
            f"the optimizer orthogonalises updates, and whether {name}'s rules fit cannot be seen: "
            "they assume that hidden matrices alone are orthogonalised, to a spectral norm of "
            "lr * sqrt(fan_out / fan_in), and that the rest is trained by Adam. If so (route the "
            "input and output layers to Adam), say optimizer_family='spectral'."
        )
    scaled_eps = deep.adam_eps != 1 or any(row.adam_eps for row in resolved.rows.values())
    if traits.couples_leaves and scaled_eps:
        raise ValueError(
            f"the optimizer couples parameters (as clip_by_global_norm does), and {name} scales "
            "Adam's epsilon per parameter, which it could not do in front of the clip: leave the "
            "clip out of the optimizer and give hyperparameter 'max_gradient_norm' instead."
        )
    if traits.own_decay == "other":
        raise ValueError(
            "the optimizer uses the parameters in its update otherwise than by decoupled decay (L2 "
            "inside Adam, a trust ratio, or a copy of them in its state), which "
            f"{name} cannot scale per layer. Use an "
            "optimizer without it; for L2 give hyperparameter 'weight_decay' with "
            "weight_decay_mode='l2'."
        )


def with_loss_fingerprint(plan: Plan) -> Plan:
    """The plan with initial losses and metrics in its configuration: these tell models apart.

    They are those of the reference width: a sweep may be resumed with further widths.
    """
    model = plan.models[plan.resolved[0].anatomy.base_width]

    @jax.jit
    def losses(data: Any, validation: Any) -> list[Any]:
        key = jax.random.key(0)
        params = model.init(key)
        setting = dataclasses.replace(plan.setting, data=data, validation=validation)

        def predict(*args: Any, **kwargs: Any) -> Any:
            return model.apply(params, *args, **kwargs)

        scores = setting.evaluate(predict)
        first, later = (setting.sample(data, key, jnp.int32(step)) for step in (0, 1))
        others = [scores[name] for name in sorted(setting.metrics)]
        return [scores["loss"], setting.loss(predict, first), setting.loss(predict, later), *others]

    digits = [f"{float(x):.4g}" for x in losses(plan.setting.data, plan.setting.validation)]
    return dataclasses.replace(plan, configuration={**plan.configuration, "first_losses": digits})


def _optimizer_fingerprint(
    factory: OptimizerFactory, hyperparameters: Mapping[str, float], params: Any
) -> str:
    """Hash of updates on gradients that change: tells optimizers apart whatever their names.

    A first update would show neither momenta nor decay rates.
    """
    if params is None:
        params = {"kernel": np.linspace(-1.0, 1.0, 6, dtype=np.float32).reshape(3, 2)}

    @jax.jit
    def some_updates(params: Any) -> Any:
        transform = factory(**hyperparameters)

        def update(state: Any, phase: jax.Array) -> tuple[Any, Any]:
            gradient = jax.tree.map(lambda w: jnp.cos(w + phase).astype(w.dtype), params)
            updates, state = transform.update(gradient, state, params)
            return state, updates

        phases = jnp.arange(_UPDATES_SEEN, dtype=jnp.float32)
        return jax.lax.scan(update, transform.init(params), phases)[1]

    updates = jax.tree.leaves(some_updates(params))
    # Few digits, which another machine rounds alike.
    digits = [f"{x:.3g}" for leaf in updates for x in np.ravel(leaf)]
    return hashlib.sha256(json.dumps(digits).encode()).hexdigest()[:16]


def _schedule_record(schedule: optax.Schedule | None, steps: int) -> list[float] | None:
    """A schedule by its values at up to nine steps."""
    if schedule is None:
        return None
    looked_at = np.unique(np.linspace(0, steps - 1, min(9, steps)).astype(int))
    return [round(float(x), 6) for x in schedule_values(schedule, looked_at)]
