"""Grids of widths x hyperparameters x seeds, trained in one compiled program per width."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optax
import xarray as xr

from mupjax import results
from mupjax.adapters import ModelFactory
from mupjax.config import check_count
from mupjax.depth import Depth
from mupjax.execute import progress_bar, run_groups
from mupjax.groups import group_widths
from mupjax.observe import Observer
from mupjax.optimizers import OptimizerFactory
from mupjax.parametrization import Family, Parametrization, WeightDecayMode
from mupjax.plan import Device, Strategy, estimate_cost
from mupjax.prepare import prepare, with_loss_fingerprint
from mupjax.resolve import Application, AttentionScale, Resolved
from mupjax.roles import Role
from mupjax.setting import Setting

__all__ = ["resolve_sweep", "sweep"]

logger = logging.getLogger("mupjax")


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
    strategy: Strategy = "auto",
    chunk_size: int | Literal["auto", "measure"] = "auto",
    devices: Sequence[Device] | None = None,
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
      parametrization: one, or a sequence (gives a dimension ``parametrization``); preset names do.
      widths: increasing.
      hyperparameters: a number (fixed) or increasing numbers (an axis) for each of the optimizer
        factory's parameters, and for the engine's own: ``weight_decay``, ``init_scale``,
        ``output_multiplier``, ``input_learning_rate_multiplier`` and likewise for hidden, output
        and vector parameters. Learning rates are those of the base width.
      steps: T, number of updates.
      seeds: a count S (seeds 0, ..., S-1) or distinct numbers. A seed fixes the initial values at
        each width and, shared by all widths and hyperparameters, the batches.
      base_width: width at which all factors are 1. Needed unless nothing scales.
      depth: how deep the models are and what scales with it, such as
        ``mupjax.completep(layers=16, base_layers=4)``; it is handed to the factory's parameter
        ``depth``. Without it nothing scales with depth.
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
      common_random_numbers: share batches between all trials of a seed; if not, a trial's depend on
        its seed, width, and place in the grid.
      observers: further quantities to record along every trajectory.
      strategy: ``"bucketed"``: one program per width; ``"padded"``: one for all, zero-padded to
        the largest (for models that take ``width``); ``"auto"``: by predicted time.
      chunk_size: trials advanced together: a number, ``"auto"`` (by rule; measured for long runs)
        or ``"measure"``.
      devices: all local devices by default.
      out: where to write (``.zarr`` or ``.nc``); each width is kept as it ends, in a folder beside.
      existing: what to do if ``out`` holds a sweep: ``"error"``, ``"replace"``, or ``"resume"``
        (widths that ended before an interruption, or in a finished sweep of fewer widths, are not
        run again).
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
    done: dict[int, xr.Dataset] = {}
    plan = prepare(
        model,
        setting,
        optimizer,
        parametrization,
        widths=widths,
        hyperparameters=hyperparameters,
        steps=steps,
        seeds=seeds,
        base_width=base_width,
        depth=depth,
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
    if isinstance(chunk_size, str) and chunk_size not in ("auto", "measure"):
        raise ValueError(f"chunk_size must be a number, 'auto' or 'measure', got {chunk_size!r}.")
    if not isinstance(chunk_size, str):
        chunk_size = check_count("chunk_size", chunk_size)
    if target is not None:
        plan = with_loss_fingerprint(plan)
        if existing == "resume" and target.exists():
            done = results.finished_widths(target, plan.configuration)
            if len(done) == len(plan.widths):
                return results.load(target)
    costs = {
        width: estimate_cost(plan.models[width], setting, observed=bool(observers))
        for width in plan.widths
    }
    groups = group_widths(plan, costs, strategy)
    if target is not None:
        if existing == "replace":
            results.remove(results.parts_folder(target))
        done |= {
            width: part
            for width in plan.widths
            if (part := results.load_part(target, width, plan.configuration)) is not None
        }
    groups = [group for group in groups if not set(group) <= set(done)]
    timing: dict[str, Any] = {"compilations": 0, "programs": []}
    with progress_bar(plan, groups, costs, progress) as tick:
        for group, parts in run_groups(plan, groups, costs, chunk_size, timing, tick):
            for width, part in zip(group, parts, strict=True):
                done[width] = part
                if target is not None:
                    results.save(part, results.part_path(target, width))
    dataset = xr.concat(
        [done[width] for width in plan.widths],
        dim="width",
        data_vars="minimal",
        # Observers may record more at one width than at another.
        join="outer",
        combine_attrs="override",
    )
    order = [d for d in ("parametrization", "width", *plan.grid.axes, "seed") if d in dataset.dims]
    dataset = dataset.transpose(*order, ...)
    dataset.attrs["timing"] = json.dumps(timing)
    # Widths that ended earlier may have been asked for without the others.
    dataset.attrs["configuration"] = json.dumps(plan.configuration)
    if target is not None:
        free = results.free_path(target) if existing == "error" and target.exists() else target
        results.save(dataset, free)
        results.remove(results.parts_folder(target))
        if free != target:
            logger.warning("%s was written by another sweep meanwhile; kept as %s", target, free)
    # Last, so that whatever a check does, the results are kept.
    for observer in plan.recipe.observers:
        for text in observer.check(dataset) if observer.check else ():
            logger.warning(text)
    return dataset


def resolve_sweep(
    model: ModelFactory,
    setting: Setting,
    optimizer: OptimizerFactory,
    parametrization: Parametrization | str,
    **kwargs: Any,
) -> Resolved:
    """The parametrization as :func:`sweep` would apply it: roles and factors of every parameter.

    Takes the arguments of :func:`sweep`, trains nothing; print ``.table(width)`` of the result.
    """
    running = ("strategy", "chunk_size", "out", "existing", "progress")
    checked = {name: value for name, value in kwargs.items() if name not in running}
    return prepare(model, setting, optimizer, parametrization, **checked).resolved[0]
