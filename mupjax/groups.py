"""Which trials share a program, and in which chunks it runs them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

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
from mupjax.train import Grid, Trial

__all__ = [
    "Group",
    "candidate_groups",
    "cautious_seconds",
    "group_arguments",
    "group_widths",
    "halved",
]

# Below this predicted time per width (at a cautious rate), measuring the chunking never pays.
_MEASURE_FROM_SECONDS, _CAUTIOUS_FLOPS = 30.0, 5e10


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
        measured = chunk_size == "measure" or (
            plan.devices[0].platform == "cpu"
            and cautious_seconds(plan, widths, costs) > _MEASURE_FROM_SECONDS
        )
        options = (
            alternatives(chosen, trials, seeds, plan.devices[0], shards) if measured else [chosen]
        )
    return [Group(widths, inner, plan.seeds, option, shards) for option in options]


def cautious_seconds(plan: Plan, widths: tuple[int, ...], costs: Mapping[int, Cost]) -> float:
    """What a CPU should need at most to train all trials of these widths in one program."""
    trials = len(plan.resolved) * len(widths) * len(plan.points) * len(plan.seeds)
    return plan.steps * trials * costs[widths[-1]].flops / _CAUTIOUS_FLOPS


def group_arguments(plan: Plan, group: Group) -> tuple[Any, Any, Any, np.ndarray]:
    """The arguments of a group's program but for the bounds on chunks and segments."""
    return group.arrange(plan), plan.setting.data, plan.setting.validation, plan.marks


def halved(group: Group) -> Group | None:
    """The group with half as many trials at once, or None if it is one already."""
    now = group.chunking
    if now.trials * now.seeds == 1:
        return None
    fewer = (
        dataclasses.replace(now, seeds=math.ceil(now.seeds / 2))
        if now.seeds > 1
        else dataclasses.replace(now, trials=math.ceil(now.trials / 2))
    )
    return dataclasses.replace(group, chunking=fewer)
