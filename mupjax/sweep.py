"""Grids of widths x hyperparameters x seeds, trained in one compiled program per width."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from tqdm import tqdm

from mupjax import results
from mupjax.adapters import Model, ModelFactory, as_model
from mupjax.config import HyperparameterGrid, check_count, check_seeds, check_widths
from mupjax.observe import Observer
from mupjax.optimizers import (
    OptimizerFactory,
    OptimizerTraits,
    check_schedule,
    examine,
    factory_parameters,
)
from mupjax.parametrization import PRESETS, Family, Parametrization, WeightDecayMode
from mupjax.plan import (
    Chunking,
    Cost,
    Strategy,
    alternatives,
    choose_chunking,
    choose_strategy,
    chunking_of_size,
    estimate_cost,
)
from mupjax.resolve import Application, AttentionScale, Factors, Resolved, dissect, resolve
from mupjax.roles import Role, leaf_paths
from mupjax.setting import Setting
from mupjax.train import (
    ENGINE_HYPERPARAMETERS,
    ROLE_MULTIPLIERS,
    STATUS,
    Grid,
    Program,
    Recipe,
    Trial,
    build_program,
    count_parameters,
)

__all__ = ["resolve_sweep", "sweep"]

logger = logging.getLogger("mupjax")

_DIMENSIONS = ("parametrization", "width", "seed", "step", "eval_step")
# Above this predicted time per width (at a cautious rate), measuring the chunking pays for itself.
_MEASURE_FROM_SECONDS, _CAUTIOUS_FLOPS = 30.0, 5e10


@dataclasses.dataclass(frozen=True)
class _Plan:
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
    devices: tuple[jax.Device, ...]
    configuration: Mapping[str, Any]

    @property
    def points(self) -> list[dict[str, float]]:
        return self.grid.points()

    @property
    def trials_per_width(self) -> int:
        return len(self.resolved) * len(self.points)


def sweep(
    model: ModelFactory,
    setting: Setting,
    optimizer: OptimizerFactory,
    parametrization: Parametrization | str | Sequence[Parametrization | str],
    *,
    widths: Sequence[int],
    hyperparameters: Mapping[str, float | Sequence[float]],
    steps: int,
    seeds: int | Sequence[int] = 1,
    base_width: int | None = None,
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
    strategy: Strategy = "auto",
    chunk_size: int | Literal["auto", "measure"] = "auto",
    devices: Sequence[jax.Device] | None = None,
    out: str | os.PathLike[str] | None = None,
    existing: results.Existing = "error",
    progress: bool | None = None,
) -> xr.Dataset:
    """Train a model at every width, hyperparameter combination and seed.

    Per width one program is compiled: a scan over steps of a ``vmap`` over trials, in chunks that
    suit cache and memory, sharded over all local devices. Several parametrizations share it.

    Args:
      model: ``factory(width, rngs)`` giving an ``nnx.Module``, or ``factory(width)`` giving a linen
        module or a :class:`mupjax.Model`.
      setting: batches, loss and evaluation.
      optimizer: factory of named hyperparameters, called with traced scalars, such as
        ``lambda learning_rate, b2=0.999: optax.adam(learning_rate, b2=b2)``.
      parametrization: one, or a sequence (a leading dimension ``parametrization``); preset names do.
      widths: increasing.
      hyperparameters: a number (fixed) or increasing numbers (an axis) for each of the optimizer
        factory's parameters, and for the engine's own: ``weight_decay``, ``init_scale``,
        ``output_multiplier``, ``input_learning_rate_multiplier`` and likewise for hidden, output
        and vector parameters. Learning rates are those of the base width.
      steps: T, number of updates.
      seeds: a count S (seeds 0, ..., S-1) or distinct numbers. A seed fixes the initial values at
        each width and, shared by all widths and hyperparameters, the batches.
      base_width: width at which all factors are 1. Needed unless nothing scales.
      schedule: factor on every update by step, with peak 1.
      weight_decay_mode: see :data:`mupjax.WeightDecayMode`.
      roles: roles by path pattern where they cannot be inferred, e.g. ``{"*pos_embed": "input"}``.
      init_exponents: by path pattern, b where the model's own initial std goes as ``width**-b``;
        measured otherwise.
      attention: the scale on ``q @ k`` that the model applies itself; asked for where it matters.
      application: ``"folded"`` or ``"multipliers"``: the same training in other coordinates.
      optimizer_family: how the update scales with the gradient, where that cannot be told.
      evaluations: number of evaluations after the initial one, evenly spaced, the last at the end.
      divergence_threshold: a trial has diverged once its loss exceeds this many times its first.
      common_random_numbers: share batches between all trials of a seed.
      observers: further quantities to record along every trajectory.
      strategy: ``"bucketed"``: one program per width; ``"padded"``: one program for all, zero-padded
        to the largest (for models that take ``width``); ``"auto"``: by predicted time.
      chunk_size: trials advanced together: a number, ``"auto"`` (by rule; measured for long runs)
        or ``"measure"``.
      devices: all local devices by default.
      out: where to write (``.zarr`` or ``.nc``); every width is kept as it ends, in a folder beside.
      existing: what to do if ``out`` holds a sweep: ``"error"``, ``"replace"``, or ``"resume"``
        (widths that ended before an interruption are not run again).
      progress: show a bar; by default on a terminal only.

    Returns:
      dataset with dimensions [parametrization,] width, each swept hyperparameter, seed, and for the
      curves step or eval_step. Variables: ``loss`` (final validation loss; nan for trials that
      diverged on the way), ``train_loss``, ``eval_loss``, the setting's metrics, ``status`` (see
      ``mupjax.train.STATUS``), ``diverged_step`` (-1: never), and what observers record.

    Raises:
      ValueError, TypeError: bad input, named with its value and the remedy, before compilation.
      FileExistsError: ``out`` holds something else.
    """
    target = None if out is None else results.check_output(out, existing)
    plan = _prepare(
        model,
        setting,
        optimizer,
        parametrization,
        widths=widths,
        hyperparameters=hyperparameters,
        steps=steps,
        seeds=seeds,
        base_width=base_width,
        schedule=schedule,
        weight_decay_mode=weight_decay_mode,
        roles=roles,
        init_exponents=init_exponents,
        attention=attention,
        application=application,
        optimizer_family=optimizer_family,
        evaluations=evaluations,
        divergence_threshold=divergence_threshold,
        common_random_numbers=common_random_numbers,
        observers=observers,
        devices=devices,
    )
    if not (chunk_size in ("auto", "measure") or isinstance(chunk_size, int)):
        raise ValueError(f"chunk_size must be a number, 'auto' or 'measure', got {chunk_size!r}.")
    if isinstance(chunk_size, int):
        check_count("chunk_size", chunk_size)
    costs = {width: estimate_cost(plan.models[width], setting) for width in plan.widths}
    groups = _groups(plan, costs, strategy)
    done: dict[int, xr.Dataset] = {}
    if target is not None:
        if existing == "replace":
            results._remove(results.parts_folder(target))
        done = {
            width: part
            for width in plan.widths
            if (part := results.load_part(target, width, plan.configuration)) is not None
        }
        groups = [group for group in groups if not set(group) <= set(done)]
    timing: dict[str, Any] = {"compilations": 0, "programs": []}
    with _progress(plan, groups, costs, progress) as tick:
        for group, parts in _run_groups(plan, groups, costs, chunk_size, timing, tick):
            for width, part in zip(group, parts, strict=True):
                done[width] = part
                if target is not None:
                    results.save(part, results.part_path(target, width))
    dataset = xr.concat(
        [done[width] for width in plan.widths],
        dim="width",
        data_vars="minimal",
        combine_attrs="override",
    )
    order = [d for d in ("parametrization", "width", *plan.grid.axes, "seed") if d in dataset.dims]
    dataset = dataset.transpose(*order, ...)
    dataset.attrs["timing"] = json.dumps(timing)
    if target is not None:
        results.save(dataset, target)
        results._remove(results.parts_folder(target))
    return dataset


def resolve_sweep(
    model: ModelFactory,
    setting: Setting,
    optimizer: OptimizerFactory,
    parametrization: Parametrization | str,
    **kwargs: Any,
) -> Resolved:
    """The parametrization as :func:`sweep` would apply it: roles and factors of every parameter.

    Takes the arguments of :func:`sweep` (nothing is trained); print ``.table(width)`` of the result.
    """
    return _prepare(model, setting, optimizer, parametrization, **kwargs).resolved[0]


def _prepare(
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
    devices: Sequence[jax.Device] | None = None,
) -> _Plan:
    checked_widths = check_widths(widths)
    checked_seeds = check_seeds(seeds)
    steps = check_count("steps", steps)
    evaluations = check_count("evaluations", evaluations)
    if not divergence_threshold > 1:
        raise ValueError(f"divergence_threshold must exceed 1, got {divergence_threshold}.")
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
        reserved=_DIMENSIONS,
    )
    handed = tuple(name for name in grid.names if name in factory_names)
    first = grid.points()[0]
    traits = examine(optimizer, {n: first[n] for n in handed}, optimizer_family)
    engine_decays = "weight_decay" in grid.names and "weight_decay" not in factory_names
    _check_decay(traits, engine_decays, weight_decay_mode, grid)
    if schedule is not None:
        check_schedule(schedule, steps)
    models = _build_models(model, setting, checked_widths, base_width)
    reference = base_width if base_width is not None else checked_widths[0]
    anatomy = dissect(
        models, base_width=reference, stated_roles=roles, stated_init_exponents=init_exponents
    )
    resolved = tuple(
        resolve(
            p,
            anatomy,
            traits.family,
            application=application,
            weight_decay_mode=weight_decay_mode,
            attention=attention,
            model_options=models[reference].options,
        )
        for p in parametrizations
    )
    for r in resolved:
        _check_resolved(r, base_width, traits)
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
        weight_decay_mode=weight_decay_mode,
        optimizer_decays=traits.own_decay == "decoupled",
        engine_decays=engine_decays,
        scale_gradients=any(x != 1 for f in factors for x in f.adam_eps.values()),
        use_multipliers=any(x != 1 for f in factors for x in f.multiplier.values()),
        divergence_threshold=float(divergence_threshold),
        common_random_numbers=common_random_numbers,
        observers=tuple(observers),
    )
    marks = np.unique(np.round(np.linspace(0, steps, min(evaluations, steps) + 1)).astype(np.int32))
    configuration = {
        "setting": {"name": setting.name, **setting.configuration},
        "optimizer": {
            "name": getattr(optimizer, "__qualname__", type(optimizer).__name__),
            "family": traits.family,
            "first_update": _optimizer_fingerprint(optimizer, {n: first[n] for n in handed}),
        },
        "parametrizations": [p.to_dict() for p in parametrizations],
        "base_width": base_width,
        "widths": list(checked_widths),
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
        "observers": [o.name for o in observers],
        "roles": {path: leaf.role for path, leaf in anatomy.leaves.items()},
        "base_shapes": {p: list(leaf.shapes[reference]) for p, leaf in anatomy.leaves.items()},
        "parameters": {str(w): count_parameters(models[w]) for w in checked_widths},
    }
    return _Plan(
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
        devices=tuple(devices) if devices is not None else tuple(jax.local_devices()),
        configuration=configuration,
    )


def _parametrizations(given: Any) -> tuple[list[Parametrization], bool]:
    several = not isinstance(given, str | Parametrization)
    listed = list(given) if several else [given]
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
            f"the optimizer applies coupled weight decay by itself, but weight_decay_mode is {mode!r}: "
            "use an optimizer without decay and the engine's hyperparameter 'weight_decay'."
        )


def _check_resolved(resolved: Resolved, base_width: int | None, traits: OptimizerTraits) -> None:
    name = resolved.parametrization.name
    if not resolved.scales():
        return
    if base_width is None:
        raise ValueError(
            f"base_width must be given: the factors of {name} are relative to it (every factor is 1 "
            "at that width), so another base is another training."
        )
    if traits.own_decay == "other":
        raise ValueError(
            "the optimizer uses the parameters in its update otherwise than by decoupled decay (L2 "
            f"inside Adam, or a trust ratio), which {name} cannot scale per layer. Use an optimizer "
            "without it; for L2 give hyperparameter 'weight_decay' with weight_decay_mode='l2'."
        )


def _build_models(
    factory: ModelFactory, setting: Setting, widths: Sequence[int], base_width: int | None
) -> dict[int, Model]:
    wanted = set(widths)
    if base_width is not None:
        wanted.add(check_count("base_width", base_width))
    if len(wanted) == 1:
        # Growth can only be seen between two widths.
        wanted.add(2 * next(iter(wanted)))
    models = {width: as_model(factory, width, setting) for width in sorted(wanted)}
    for width, built in models.items():
        _check_fit(built, width, setting)
    return models


def _check_fit(model: Model, width: int, setting: Setting) -> None:
    """The loss must accept the model's outputs, on training and validation batches alike."""
    params = model.abstract_params()
    if not leaf_paths(params):
        raise ValueError(f"the model of width {width} has no parameters.")

    def loss(params: Any, batch: Any) -> dict[str, jax.Array]:
        problem = dataclasses.replace(setting, validation=batch)
        return problem.evaluate(lambda *a, **k: model.apply(params, *a, **k))

    for kind, batch in (("training", setting.abstract_batch()), ("validation", setting.validation)):
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), batch
        )
        try:
            values = jax.eval_shape(loss, params, abstract)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"setting {setting.name!r} and the model disagree at width {width} on a {kind} "
                f"batch: {reason[0]}"
            ) from error
        for name, value in values.items():
            if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
                raise ValueError(
                    f"{name!r} of setting {setting.name!r} must be a real scalar, got shape "
                    f"{value.shape} of {value.dtype} (take the mean over the batch)."
                )


def _optimizer_fingerprint(factory: OptimizerFactory, hyperparameters: Mapping[str, float]) -> str:
    """Hash of a first update on a fixed gradient: tells optimizers apart whatever their names."""
    transform = factory(**hyperparameters)
    params = {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)}
    updates, _ = transform.update(jax.tree.map(jnp.cos, params), transform.init(params), params)
    digits = [f"{x:.4g}" for x in np.ravel(updates["kernel"])]
    return hashlib.sha256(json.dumps(digits).encode()).hexdigest()[:16]


def _schedule_record(schedule: optax.Schedule | None, steps: int) -> list[float] | None:
    """A schedule by its values at up to nine steps."""
    if schedule is None:
        return None
    looked_at = np.unique(np.linspace(0, steps - 1, min(9, steps)).astype(int))
    return [round(float(schedule(int(t))), 6) for t in looked_at]


def _groups(plan: _Plan, costs: Mapping[int, Cost], strategy: Strategy) -> list[tuple[int, ...]]:
    if strategy not in ("auto", "bucketed", "padded"):
        raise ValueError(f"strategy must be 'auto', 'bucketed' or 'padded', got {strategy!r}.")
    paddable = all("width" in plan.models[w].options for w in plan.widths)
    if strategy == "padded" and not paddable:
        raise ValueError(
            "strategy='padded' needs a model whose __call__ takes `width`, the true width, and is "
            "exact under zero-padding (norms divide by it): use 'bucketed', or add the argument."
        )
    if strategy == "padded" and plan.recipe.observers:
        raise ValueError("observers need unpadded parameters: use strategy='bucketed'.")
    if strategy == "auto":
        listed = [costs[w] for w in plan.widths]
        trials = plan.trials_per_width * len(plan.seeds)
        best = choose_strategy(listed, trials, plan.steps, plan.devices[0])
        usable = paddable and not plan.recipe.observers and len(plan.widths) > 1
        strategy = best if usable else "bucketed"
    return [plan.widths] if strategy == "padded" else [(w,) for w in plan.widths]


@dataclasses.dataclass(frozen=True)
class _Group:
    """A program's trials: widths, the inner axis (parametrization, width, point), and its layout."""

    widths: tuple[int, ...]
    inner: list[tuple[int, int, int]]
    seeds: tuple[int, ...]
    chunking: Chunking
    shards: int

    @property
    def blocks(self) -> tuple[int, int]:
        """Chunks along seeds and along trials."""
        return (
            math.ceil(len(self.seeds) / self.chunking.seeds),
            math.ceil(len(self.inner) / self.chunking.trials),
        )

    @property
    def chunks(self) -> int:
        """Chunks to run, padded so that every device has equally many."""
        needed = self.blocks[0] * self.blocks[1]
        return math.ceil(needed / self.shards) * self.shards

    def arrange(self, plan: _Plan) -> Grid:
        """Arrays for the program: leaves (C, I) and seeds (C, S); the tail repeats the last entry."""
        rows, columns = self.blocks
        inner = [
            *self.inner,
            *[self.inner[-1]] * (columns * self.chunking.trials - len(self.inner)),
        ]
        seeds = [*self.seeds, *[self.seeds[-1]] * (rows * self.chunking.seeds - len(self.seeds))]
        trial = _trial_arrays(plan, self.widths, inner)
        by_column = jax.tree.map(lambda a: a.reshape(columns, self.chunking.trials), trial)
        by_row = np.asarray(seeds, np.int32).reshape(rows, self.chunking.seeds)
        order = [(r, c) for r in range(rows) for c in range(columns)]
        order += [order[-1]] * (self.chunks - len(order))
        r, c = np.array(order).T
        return Grid(jax.tree.map(lambda a: a[c], by_column), by_row[r])

    def unpack(self, array: np.ndarray) -> np.ndarray:
        """Outputs (C, S, I, ...) as (trial, seed, ...)."""
        rows, columns = self.blocks
        tail = array.shape[3:]
        array = array[: rows * columns].reshape(
            rows, columns, self.chunking.seeds, self.chunking.trials, *tail
        )
        array = np.moveaxis(array, (1, 3), (0, 1))
        array = array.reshape(columns * self.chunking.trials, rows * self.chunking.seeds, *tail)
        return array[: len(self.inner), : len(self.seeds)]


def _trial_arrays(
    plan: _Plan, widths: Sequence[int], inner: Sequence[tuple[int, int, int]]
) -> Trial:
    points = plan.points
    factors: dict[tuple[int, int], Factors] = {
        (p, w): plan.resolved[p].factors(widths[w]) for p, w, _ in inner
    }

    def column(values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, np.float32)

    def by_path(kind: str) -> dict[str, np.ndarray]:
        return {
            path: column([getattr(factors[p, w], kind)[path] for p, w, _ in inner])
            for path in plan.recipe.roles
        }

    return Trial(
        hyperparameters={
            name: column([points[i][name] for _, _, i in inner]) for name in plan.grid.names
        },
        multiplier=by_path("multiplier"),
        init=by_path("init"),
        learning_rate=by_path("learning_rate"),
        weight_decay=by_path("weight_decay"),
        adam_eps=by_path("adam_eps"),
        readout_multiplier=column([factors[p, w].readout_multiplier for p, w, _ in inner]),
        width=column([widths[w] for _, w, _ in inner]),
        width_index=np.asarray([w for _, w, _ in inner], np.int32),
        # Distinct over all widths, so that separate batches stay separate.
        trial_index=np.asarray(
            [(widths[w] * len(plan.resolved) + p) * len(points) + i for p, w, i in inner], np.int32
        ),
    )


def _run_groups(
    plan: _Plan,
    groups: Sequence[tuple[int, ...]],
    costs: Mapping[int, Cost],
    chunk_size: int | str,
    timing: dict[str, Any],
    tick: Any,
) -> Iterator[tuple[tuple[int, ...], list[xr.Dataset]]]:
    """Compile all groups concurrently; run and yield each as it is ready, in order."""
    workers = max(1, min(len(groups), os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [
            (
                group,
                [
                    pool.submit(_compile, plan, g, tick)
                    for g in _candidates(plan, group, costs, chunk_size)
                ],
            )
            for group in groups
        ]
        try:
            for widths, pending in futures:
                compiled = [future.result() for future in pending]
                timing["compilations"] += len(compiled)
                group, function, compile_seconds = _fastest(plan, compiled)
                start = time.perf_counter()
                raw = function(
                    *_arguments(plan, group), np.int32(group.chunks), np.int32(len(plan.marks) - 1)
                )
                raw = jax.tree.map(np.asarray, jax.block_until_ready(raw))
                seconds = time.perf_counter() - start
                timing["programs"].append(
                    {
                        "widths": list(widths),
                        "chunking": dataclasses.asdict(group.chunking),
                        "chunks": group.chunks,
                        "compile_seconds": round(compile_seconds, 3),
                        "run_seconds": round(seconds, 3),
                    }
                )
                logger.info("widths %s: %.1f s in %d chunks", widths, seconds, group.chunks)
                yield widths, [_to_dataset(plan, group, raw, w) for w in range(len(widths))]
        finally:
            for _, pending in futures:
                for future in pending:
                    future.cancel()


def _candidates(
    plan: _Plan, widths: tuple[int, ...], costs: Mapping[int, Cost], chunk_size: int | str
) -> list[_Group]:
    inner = [
        (p, w, i)
        for p in range(len(plan.resolved))
        for w in range(len(widths))
        for i in range(len(plan.points))
    ]
    cost = costs[widths[-1]]
    shards = len(plan.devices)
    trials, seeds = len(inner), len(plan.seeds)
    if isinstance(chunk_size, int):
        options = [chunking_of_size(chunk_size, cost, trials, seeds, shards)]
    else:
        chosen = choose_chunking(cost, trials, seeds, plan.devices[0], shards)
        predicted = plan.steps * trials * seeds * cost.flops / _CAUTIOUS_FLOPS
        measured = chunk_size == "measure" or (
            plan.devices[0].platform == "cpu" and predicted > _MEASURE_FROM_SECONDS
        )
        options = alternatives(chosen, trials, seeds, shards) if measured else [chosen]
    return [_Group(widths, inner, plan.seeds, option, shards) for option in options]


def _arguments(plan: _Plan, group: _Group) -> tuple[Any, Any, Any, np.ndarray]:
    return group.arrange(plan), plan.setting.data, plan.setting.validation, plan.marks


def _compile(plan: _Plan, group: _Group, tick: Any) -> tuple[_Group, Any, float]:
    start = time.perf_counter()
    models = [plan.models[w] for w in group.widths]
    steps, evaluations = plan.steps, len(plan.marks)
    callback = None if tick is None else tick(group.widths, group.chunks)
    program: Program = build_program(
        plan.recipe,
        models,
        group.chunking,
        group.chunks,
        steps,
        evaluations,
        plan.devices,
        callback,
    )
    device = None if len(plan.devices) > 1 else plan.devices[0]
    with jax.default_device(device):
        compiled = program.compile(*_arguments(plan, group), np.int32(0), np.int32(0))
    return group, compiled, time.perf_counter() - start


def _fastest(
    plan: _Plan, compiled: Sequence[tuple[_Group, Any, float]]
) -> tuple[_Group, Any, float]:
    """The candidate with the least time per trial and step, measured on a few steps of one chunk."""
    total = sum(seconds for _, _, seconds in compiled)
    if len(compiled) == 1:
        return compiled[0]
    rates = []
    for group, function, _ in compiled:
        grid, data, validation, marks = _arguments(plan, group)
        few = np.minimum(marks, min(int(marks[1]), 20)).astype(np.int32)
        arguments = (grid, data, validation, few, np.int32(1), np.int32(1))
        best = math.inf
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            best = min(best, time.perf_counter() - start)
        rates.append(best / (group.chunking.trials * group.chunking.seeds))
    group, function, _ = compiled[int(np.argmin(rates))]
    logger.info("widths %s: measured chunking %s", group.widths, group.chunking)
    return group, function, total


def _to_dataset(plan: _Plan, group: _Group, raw: Mapping[str, Any], w: int) -> xr.Dataset:
    """The part of one width, with all its dimensions."""
    count, points = len(plan.resolved), plan.grid.shape
    rows = [i for i, (_, index, _) in enumerate(group.inner) if index == w]
    lead = (count, 1, *points, len(plan.seeds))
    names: tuple[str, ...] = ("parametrization", "width", *plan.grid.axes, "seed")
    if not plan.several:
        lead, names = lead[1:], names[1:]

    def shaped(array: np.ndarray) -> np.ndarray:
        array = group.unpack(array)[rows]
        return array.reshape(*lead, *array.shape[2:])

    curves = {k: shaped(v) for k, v in raw["evaluation"].items()}
    status, step = shaped(raw["status"]), shaped(raw["diverged_step"])
    final = curves["loss"][..., -1]
    bad_end = (status == STATUS["ok"]) & ~np.isfinite(final)
    risen = (status == STATUS["ok"]) & (final > curves["loss"][..., 0])
    status = np.where(bad_end, STATUS["non_finite"], status)
    status = np.where(risen & ~bad_end, STATUS["ended_above_start"], status).astype(np.int8)
    step = np.where(bad_end | risen, plan.steps, step).astype(np.int32)
    cut = (status == STATUS["non_finite"]) | (status == STATUS["above_threshold"])
    values: dict[str, np.ndarray] = {"loss": np.where(cut, np.nan, final).astype(np.float32)}
    dims: dict[str, tuple[str, ...]] = {"loss": names}
    attrs: dict[str, dict[str, Any]] = {
        "loss": {"long_name": "final validation loss", "comment": "nan where the trial diverged"}
    }
    for metric, curve in curves.items():
        if metric != "loss":
            values[metric], dims[metric] = np.where(cut, np.nan, curve[..., -1]), names
            attrs[metric] = {"long_name": f"final validation {metric}"}
    values |= {"eval_loss": curves["loss"], "train_loss": shaped(raw["train_loss"])}
    values |= {"status": status, "diverged_step": step}
    dims |= {"eval_loss": (*names, "eval_step"), "train_loss": (*names, "step")}
    dims |= {"status": names, "diverged_step": names}
    attrs |= {
        "eval_loss": {"long_name": "validation loss"},
        "train_loss": {"long_name": "training loss before each update"},
        "status": {
            "long_name": "how the trial ended",
            "flag_values": list(STATUS.values()),
            "flag_meanings": " ".join(STATUS),
        },
        "diverged_step": {"long_name": "step at which the trial diverged", "comment": "-1: never"},
    }
    for observer, recorded in zip(plan.recipe.observers, raw["observed"], strict=True):
        for name, array in recorded.items():
            full = f"{observer.name}_{name}"
            values[full] = shaped(array)
            own = observer.dims.get(name, ())
            dims[full] = (*names, *own)
            attrs[full] = {"long_name": f"{name} ({observer.name})"}
    coords: dict[str, tuple[Any, dict[str, str]]] = {
        "parametrization": ([r.parametrization.name for r in plan.resolved], {}),
        "width": ([group.widths[w]], {"long_name": "width n", "units": "units per hidden layer"}),
        "seed": (list(plan.seeds), {"long_name": "seed"}),
        "step": (np.arange(plan.steps), {"long_name": "step", "units": "updates"}),
        "eval_step": (plan.marks, {"long_name": "step of evaluation", "units": "updates"}),
    }
    for name, grid in plan.grid.axes.items():
        note = "value at the base width" if name == "learning_rate" else ""
        coords[name] = (np.asarray(grid), {"long_name": name.replace("_", " "), "comment": note})
    record = dict(plan.configuration)
    global_attrs = {
        "format": results.FORMAT,
        "configuration": json.dumps(record),
        "parametrization_fingerprint": ", ".join(
            r.parametrization.fingerprint() for r in plan.resolved
        ),
        "versions": json.dumps(results.versions()),
        "device": f"{len(plan.devices)} x {plan.devices[0].device_kind} ({plan.devices[0].platform})",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return results.assemble(values, dims, coords, attrs, global_attrs)


@contextmanager
def _progress(
    plan: _Plan,
    groups: Sequence[tuple[int, ...]],
    costs: Mapping[int, Cost],
    wanted: bool | None,
) -> Iterator[Any]:
    """A bar in units of predicted flops, advanced from inside the compiled loops."""
    total = sum(costs[group[-1]].flops * len(group) for group in groups) or 1.0
    with tqdm(
        total=100.0,
        disable=None if wanted is None else not wanted,
        bar_format="{l_bar}{bar}| {elapsed} elapsed, {remaining} left",
        desc="sweep",
    ) as bar:
        if bar.disable:
            yield None
            return
        lock = threading.Lock()

        def tick(group: tuple[int, ...], chunks: int) -> Any:
            share = 100.0 * costs[group[-1]].flops * len(group) / total
            share /= chunks * max(1, len(plan.marks) - 1)

            def advance() -> None:
                with lock:
                    bar.update(min(share, bar.total - bar.n))

            return advance

        yield tick
        bar.update(bar.total - bar.n)
