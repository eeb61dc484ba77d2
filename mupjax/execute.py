"""Running a prepared sweep: groups of widths, chunks of trials, compilation, measurement."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import xarray as xr
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from mupjax import results
from mupjax.plan import (
    Chunking,
    Cost,
    Strategy,
    alternatives,
    choose_chunking,
    choose_strategy,
    chunking_of_size,
    pads_exactly,
)
from mupjax.prepare import Plan
from mupjax.resolve import Factors
from mupjax.train import STATUS, Grid, Trial, build_program

__all__ = [
    "Group",
    "candidate_groups",
    "compile_lowered",
    "fastest_group",
    "group_arguments",
    "group_widths",
    "lower_group",
    "progress_bar",
    "run_groups",
]

logger = logging.getLogger("mupjax")

# Above this predicted time per width (at a cautious rate), measuring the chunking pays for itself.
_MEASURE_FROM_SECONDS, _CAUTIOUS_FLOPS = 30.0, 5e10
_MEASURED_STEPS = 24
# Relative rise of a loss (a mean over many examples, in single precision) that is no rise.
_ROUNDING = 1e-5


def group_widths(
    plan: Plan, costs: Mapping[int, Cost], strategy: Strategy
) -> list[tuple[int, ...]]:
    """Which widths share a program: each its own, or all of them, zero-padded.

    Raises:
      ValueError: unknown strategy, or a model or an observer that cannot be padded.
    """
    if strategy not in ("auto", "bucketed", "padded"):
        raise ValueError(f"strategy must be 'auto', 'bucketed' or 'padded', got {strategy!r}.")
    paddable = all("width" in plan.models[w].options for w in plan.widths)
    if strategy == "padded" and not plan.optimizer_pads:
        raise ValueError(
            "strategy='padded' would be wrong for this optimizer, whose updates depend on a "
            "parameter's shape (or which cannot be shown not to): use strategy='bucketed'."
        )
    if strategy == "padded" and not paddable:
        raise ValueError(
            "strategy='padded' needs a model whose __call__ takes `width`, the true width, and is "
            "exact under zero-padding (norms divide by it): use 'bucketed', or add the argument."
        )
    if strategy == "padded" and plan.recipe.observers:
        raise ValueError("observers need unpadded parameters: use strategy='bucketed'.")
    if strategy == "padded" and not _pads_exactly(plan):
        raise ValueError(
            f"strategy='padded' would be wrong for this model: at width {plan.widths[0]}, "
            f"zero-padded to {plan.widths[-1]}, it has another loss than alone, though its "
            "__call__ takes `width` (a norm must divide by it, and count no padded unit): use "
            "strategy='bucketed'."
        )
    if strategy == "auto":
        listed = [costs[w] for w in plan.widths]
        trials = plan.trials_per_width * len(plan.seeds)
        best = choose_strategy(listed, trials, plan.steps, plan.devices[0])
        usable = paddable and plan.optimizer_pads and len(plan.widths) > 1
        usable = usable and not plan.recipe.observers and best == "padded"
        strategy = "padded" if usable and _pads_exactly(plan) else "bucketed"
    return [plan.widths] if strategy == "padded" else [(w,) for w in plan.widths]


def _pads_exactly(plan: Plan) -> bool:
    narrow, wide = plan.widths[0], plan.widths[-1]
    return pads_exactly(plan.models[narrow], plan.models[wide], narrow, plan.setting)


@dataclasses.dataclass(frozen=True)
class Group:
    """A program's trials: widths, inner axis of (parametrization, width, point), and layout."""

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

    def arrange(self, plan: Plan) -> Grid:
        """Arrays for the program: leaves (C, I) and seeds (C, S); tails repeat the last entry."""
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
    plan: Plan, widths: Sequence[int], inner: Sequence[tuple[int, int, int]]
) -> Trial:
    points = plan.points
    factors: dict[tuple[int, int], Factors] = {
        (p, w): plan.resolved[p].factors(widths[w]) for p, w, _ in inner
    }

    def column(values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, jax.dtypes.canonicalize_dtype(float))

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
    workers = max(1, min(len(groups), os.cpu_count() or 1))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [
            (
                group,
                [
                    _submit(pool, plan, g, tick)
                    for g in candidate_groups(plan, group, costs, chunk_size)
                ],
            )
            for group in groups
        ]
        try:
            for widths, pending in futures:
                compiled = [future.result() for future in pending]
                timing["compilations"] += len(compiled)
                group, function, compile_seconds = fastest_group(plan, compiled)
                start = time.perf_counter()
                raw = _run(
                    function,
                    *group_arguments(plan, group),
                    np.int32(group.chunks),
                    np.int32(len(plan.marks) - 1),
                )
                raw = jax.tree.map(np.asarray, raw)
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


def _run(function: Any, *arguments: Any) -> Any:
    """A program's outputs, ready.

    Decompositions in it (of observers) run in LAPACK, whose own threads would fight XLA's for the
    cores: the QR decomposition of 1024 x 128 took 24 ms inside a training loop with them and 2 ms
    without, on two cores.
    """
    with threadpool_limits(1, user_api="blas"):
        return jax.block_until_ready(function(*arguments))


def _submit(
    pool: concurrent.futures.Executor, plan: Plan, group: Group, tick: Any
) -> concurrent.futures.Future[tuple[Group, Any, float]]:
    """Trace here, compile in the pool; a failure is raised when the group's turn comes."""
    try:
        lowered = lower_group(plan, group, tick)
    except Exception as error:
        failed: concurrent.futures.Future[tuple[Group, Any, float]] = concurrent.futures.Future()
        failed.set_exception(error)
        return failed
    return pool.submit(compile_lowered, group, lowered)


def candidate_groups(
    plan: Plan, widths: tuple[int, ...], costs: Mapping[int, Cost], chunk_size: int | str
) -> list[Group]:
    """Layouts of one group worth compiling: one by rule or by size, or several to be measured."""
    inner = [
        (p, w, i)
        for p in range(len(plan.resolved))
        for w in range(len(widths))
        for i in range(len(plan.points))
    ]
    cost = costs[widths[-1]]
    shards = len(plan.devices)
    trials, seeds = len(inner), len(plan.seeds)
    if not isinstance(chunk_size, str):
        options = [chunking_of_size(chunk_size, cost, trials, seeds, plan.devices[0], shards)]
    else:
        chosen = choose_chunking(cost, trials, seeds, plan.devices[0], shards)
        predicted = plan.steps * trials * seeds * cost.flops / _CAUTIOUS_FLOPS
        measured = chunk_size == "measure" or (
            plan.devices[0].platform == "cpu" and predicted > _MEASURE_FROM_SECONDS
        )
        options = (
            alternatives(chosen, trials, seeds, plan.devices[0], shards) if measured else [chosen]
        )
    return [Group(widths, inner, plan.seeds, option, shards) for option in options]


def group_arguments(plan: Plan, group: Group) -> tuple[Any, Any, Any, np.ndarray]:
    """The arguments of a group's program but for the bounds on chunks and segments."""
    return group.arrange(plan), plan.setting.data, plan.setting.validation, plan.marks


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
    try:
        executable = lowered.compile(compiler_options=group.chunking.compiler_options)
    except jax.errors.JaxRuntimeError:
        if group.chunking.compiler_options is None:
            raise
        # Another version of XLA may not know the option; without it everything still works.
        executable = lowered.compile()
    return group, executable, time.perf_counter() - start


def fastest_group(
    plan: Plan, compiled: Sequence[tuple[Group, Any, float]]
) -> tuple[Group, Any, float]:
    """The candidate with the least time for all trials, by the time per step of one chunk."""
    total = sum(seconds for _, _, seconds in compiled)
    if len(compiled) == 1:
        return compiled[0]
    times = []
    for group, function, _ in compiled:
        grid, data, validation, marks = group_arguments(plan, group)

        def run(steps: int) -> float:
            few = np.minimum(marks, steps).astype(np.int32)  # noqa: B023 - called in this turn
            start = time.perf_counter()
            _run(function, grid, data, validation, few, np.int32(1), np.int32(1))  # noqa: B023
            return time.perf_counter() - start

        # The difference of two lengths leaves out initialisation and evaluation.
        most = min(int(marks[1]), _MEASURED_STEPS)
        run(1)
        longer = min(run(most) for _ in range(3))
        shorter = min(run(max(1, most // 4)) for _ in range(3)) if most > 1 else 0.0
        times.append(max(longer - shorter, 1e-9) * group.chunks)
    group, function, _ = compiled[int(np.argmin(times))]
    logger.info("widths %s: measured chunking %s", group.widths, group.chunking)
    return group, function, total


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
