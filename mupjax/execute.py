"""Running a prepared sweep: compilation, measurement, and what comes back as a dataset."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import functools
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import xarray as xr
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mupjax import results
from mupjax.fastest import Pace, fastest, pace
from mupjax.groups import Group, candidate_groups, cautious_seconds, group_arguments, halved
from mupjax.plan import Cost
from mupjax.prepare import Plan
from mupjax.train import STATUS, build_program

__all__ = ["compile_lowered", "fastest_group", "lower_group", "progress_bar", "run_groups"]

logger = logging.getLogger("mupjax")

# What measuring layouts may take, and what the best of them may be expected to save, as parts of
# the time of a training laid out by rule.
_BUDGET, _SAVING = 0.03, 0.1
# Seconds in which short steps can be timed several times.
_LEAST_BUDGET = 2.0
# Steps of each layout in the first round of measuring, where a step takes long.
_FIRST_ROUND = 8
# How XLA's errors say that memory ran out.
_EXHAUSTED = "RESOURCE_EXHAUSTED"
# Relative rise of a loss (a mean over many examples, in single precision) that is no rise.
_ROUNDING = 1e-5

_Pending = concurrent.futures.Future[tuple[Group, Any, float]]


def run_groups(
    plan: Plan,
    groups: Sequence[tuple[int, ...]],
    costs: Mapping[int, Cost],
    chunk_size: int | str,
    timing: dict[str, Any],
    tick: Any,
) -> Iterator[tuple[tuple[int, ...], list[xr.Dataset]]]:
    """Compile all groups concurrently; run and yield each as it is ready, in order.

    Tracing stays in the calling thread, where the caller's JAX settings hold; XLA's compilation,
    which frees the interpreter lock, goes to a pool.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        submit = functools.partial(_submit, pool, plan, tick=tick)
        listed = {group: candidate_groups(plan, group, costs, chunk_size) for group in groups}
        # All layouts, or the one by rule, whose pace says whether to measure others.
        sure = slice(None) if chunk_size == "measure" else slice(1)
        futures = {group: [submit(g) for g in c[sure]] for group, c in listed.items()}
        try:
            for widths, pending in futures.items():
                group, compile_seconds, raw, seconds = _run_candidates(
                    plan,
                    listed[widths],
                    pending,
                    submit,
                    timing,
                    cautious_seconds(plan, widths, costs),
                )
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
            for pending in futures.values():
                for future in pending:
                    future.cancel()


def _run_candidates(
    plan: Plan,
    candidates: Sequence[Group],
    pending: list[_Pending],
    submit: Callable[[Group], _Pending],
    timing: dict[str, Any],
    at_most: float,
) -> tuple[Group, float, Any, float]:
    """Run the fastest layout; where the device's memory does not hold it, one of fewer trials.

    Layouts not yet compiled are compiled and measured where that pays in a training that takes
    `at_most` so many seconds.

    Returns:
      the group that ran, seconds to compile, outputs as NumPy arrays, seconds to run.
    """
    group = candidates[0]
    timing["compilations"] += len(pending)
    try:
        ruled, first = pending[0].result(), None
        if len(pending) < len(candidates):
            first = _pace(plan, ruled)
            if _pays(plan, ruled, first, candidates, at_most):
                pending += [submit(other) for other in candidates[1:]]
                timing["compilations"] += len(candidates) - 1
        group, function, compiling = fastest_group(plan, [ruled, *_others(pending[1:])], first)
        return group, compiling, *_timed_run(plan, group, function)
    except jax.errors.JaxRuntimeError as error:
        if _EXHAUSTED not in str(error):
            raise
        smaller = halved(group)
        if smaller is None:
            raise MemoryError(
                f"one trial at width {group.widths[-1]} does not fit the memory of "
                f"{plan.devices[0].device_kind}: leave this width out, or make the batch or the "
                "validation batch smaller."
            ) from error
    logger.warning(
        "widths %s: %d trials at once do not fit the device's memory; trying half as many",
        group.widths,
        group.chunking.trials * group.chunking.seeds,
    )
    return _run_candidates(plan, [smaller], [submit(smaller)], submit, timing, at_most)


def _others(pending: Sequence[_Pending]) -> Iterator[tuple[Group, Any, float]]:
    """Layouts that only might be faster: one that XLA cannot compile is left out."""
    for future in pending:
        try:
            yield future.result()
        except jax.errors.JaxRuntimeError as error:
            logger.info("a layout to measure cannot be compiled, left out: %s", error)


def _pays(
    plan: Plan,
    compiled: tuple[Group, Any, float],
    first: Pace,
    candidates: Sequence[Group],
    at_most: float,
) -> bool:
    """Whether measuring the other layouts should save more than compiling and timing them takes."""
    group, _, compiling = compiled
    others = len(candidates) - 1
    measuring = _FIRST_ROUND * len(candidates) * first[0]
    # Observers may look at first steps more often than at later ones.
    saving = _SAVING * min(first[0] * plan.steps * group.chunks, at_most)
    return saving > compiling * math.ceil(others / (os.cpu_count() or 1)) + measuring


def _timed_run(plan: Plan, group: Group, function: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    chunks, segments = np.int32(group.chunks), np.int32(len(plan.marks) - 1)
    raw = _run(function, *group_arguments(plan, group), chunks, segments)
    return jax.tree.map(np.asarray, raw), time.perf_counter() - start


def _run(function: Any, *arguments: Any) -> Any:
    """A program's outputs, ready.

    Decompositions in it (of observers) run in LAPACK, whose own threads would fight XLA's for the
    cores: the QR decomposition of 1024 x 128 took 24 ms inside a training loop with them and 2 ms
    without, on two cores.
    """
    with threadpool_limits(1, user_api="blas"):
        return jax.block_until_ready(function(*arguments))


def _submit(pool: concurrent.futures.Executor, plan: Plan, group: Group, tick: Any) -> _Pending:
    """Trace here, compile in the pool; a failure is raised when the group's turn comes."""
    try:
        lowered = lower_group(plan, group, tick)
    except Exception as error:
        failed: _Pending = concurrent.futures.Future()
        failed.set_exception(error)
        return failed
    return pool.submit(compile_lowered, group, lowered)


def lower_group(plan: Plan, group: Group, tick: Any) -> Any:
    """Trace a group's program."""
    program = build_program(
        plan.recipe,
        [plan.models[w] for w in group.widths],
        group.chunking,
        group.chunks,
        plan.steps,
        len(plan.marks),
        plan.devices,
        None if tick is None else tick(group.widths, group.chunks),
    )
    first, *others = plan.devices
    with jax.default_device(None if others else first):
        return program.function.lower(*group_arguments(plan, group), np.int32(0), np.int32(0))


def compile_lowered(group: Group, lowered: Any) -> tuple[Group, Any, float]:
    """Compile a traced program; returns the group, the executable and the seconds it took."""
    start = time.perf_counter()
    options = group.chunking.compiler_options
    while True:
        try:
            executable = lowered.compile(compiler_options=options)
            break
        except jax.errors.JaxRuntimeError as error:
            # Another version of XLA may not know an option; without it everything still works.
            known = {name: value for name, value in options.items() if name not in str(error)}
            if len(known) == len(options):
                raise
            left = ", ".join(sorted(options.keys() - known.keys()))
            logger.info("XLA does not take these options, left out: %s", left)
            options = known
    return group, executable, time.perf_counter() - start


def fastest_group(
    plan: Plan, compiled: Sequence[tuple[Group, Any, float]], first: Pace | None = None
) -> tuple[Group, Any, float]:
    """The candidate with the least time for all trials, with the seconds to compile all of them.

    Args:
      plan: of the sweep.
      compiled: groups, their programs and seconds to compile. The first must run; another that does
        not, for lack of memory, is left out.
      first: pace of the first of them, where it is known.
    """
    total = sum(seconds for _, _, seconds in compiled)
    if len(compiled) == 1:
        return compiled[0]
    seconds, steps = first or _pace(plan, compiled[0])
    budget = max(_LEAST_BUDGET, _BUDGET * seconds * plan.steps * compiled[0][0].chunks)
    running, runs = [], []
    for group, function, _ in compiled:
        run = _stopwatch(plan, group, function)
        try:
            budget -= run(1)  # touches the memory
        except jax.errors.JaxRuntimeError as error:
            if not running:
                raise
            logger.info("a layout to measure does not run, left out: %s", error)
            continue
        running.append((group, function))
        runs.append(run)
    group, function = running[fastest(runs, [g.chunks for g, _ in running], steps, budget)]
    logger.info("widths %s: measured chunking %s", group.widths, group.chunking)
    return group, function, total


def _pace(plan: Plan, compiled: tuple[Group, Any, float]) -> Pace:
    return pace(_stopwatch(plan, *compiled[:2]), int(plan.marks[1]))


def _stopwatch(plan: Plan, group: Group, function: Any) -> Callable[[int], float]:
    """Seconds of one chunk of trials, by steps; initialisation and evaluation are in it."""
    grid, data, validation, marks = group_arguments(plan, group)

    def run(steps: int) -> float:
        few = np.minimum(marks, steps).astype(np.int32)
        start = time.perf_counter()
        _run(function, grid, data, validation, few, np.int32(1), np.int32(1))
        return time.perf_counter() - start

    return run


def _to_dataset(plan: Plan, group: Group, raw: Mapping[str, Any], w: int) -> xr.Dataset:
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
    # At a tiny rate the loss stays where it was but for rounding.
    start = curves["loss"][..., 0]
    risen = (status == STATUS["ok"]) & (final > start + _ROUNDING * np.abs(start))
    status = np.where(bad_end, STATUS["non_finite"], status)
    status = np.where(risen & ~bad_end, STATUS["ended_above_start"], status).astype(np.int8)
    step = np.where(bad_end | risen, plan.steps, step).astype(np.int32)
    cut = (status == STATUS["non_finite"]) | (status == STATUS["above_threshold"])
    values: dict[str, np.ndarray] = {"loss": np.where(cut, np.nan, final)}
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
    for observer in plan.recipe.observers:
        if observer.coords is not None:
            for name, own in observer.coords(plan.models[group.widths[w]]).items():
                coords[name] = (np.asarray(own), {"long_name": name.replace("_", " ")})
    record, first = dict(plan.configuration), plan.devices[0]
    global_attrs = {
        "format": results.FORMAT,
        "configuration": json.dumps(record),
        "parametrization_fingerprint": ", ".join(
            r.parametrization.fingerprint() for r in plan.resolved
        ),
        "versions": json.dumps(results.versions()),
        "device": f"{len(plan.devices)} x {first.device_kind} ({first.platform})",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return results.assemble(values, dims, coords, attrs, global_attrs)


@contextmanager
def progress_bar(
    plan: Plan,
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
