"""Which of several programs is the fastest, found at a small part of what running them costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["Pace", "fastest", "pace"]

# Below so many seconds the machine's noise is not small beside the steps timed.
_LONG_ENOUGH, _AT_LEAST = 0.2, 4
# Programs that take up to so many times as long as the best are measured again, in the next round.
_KEPT = (3.0, 1.2, 1.1, 1.05, 1.05)

Run = Callable[[int], float]
Pace = tuple[float, int]


def pace(run: Run, most: int) -> Pace:
    """Seconds that one step of a program takes, and how many steps are enough to time it.

    Args:
      run: seconds that so many steps took, and something fixed beside them.
      most: steps that it can make at most.
    """
    run(1)  # touches the memory
    steps = min(most, _AT_LEAST)
    while True:
        few = steps // _AT_LEAST if steps >= _AT_LEAST else steps - 1
        took = run(steps) - (run(few) if few else 0.0)
        if took >= _LONG_ENOUGH or steps == most:
            return max(took, 1e-9) / (steps - few), steps
        steps = min(most, 2 * steps)


def fastest(runs: Sequence[Run], weights: Sequence[float], steps: int, budget: float) -> int:
    """The index of the program with the least time, times its weight.

    Measured in turns, so that a busy machine slows all of them; each counts by its shortest run,
    and those that fall behind drop out.

    Args:
      runs: seconds that so many steps took, and something fixed beside them. Each has run before.
      weights: how many runs all trials need with each.
      steps: to measure in (see `pace`).
      budget: seconds; with these spent no new round begins. The first one is made in any case.
    """
    left, took, spent = list(range(len(runs))), [math.inf] * len(runs), 0.0
    for kept in _KEPT:
        for i in left:
            seconds = runs[i](steps)
            took[i] = min(took[i], seconds * weights[i])
            spent += seconds
        least = min(took[i] for i in left)
        left = [i for i in left if took[i] <= kept * least]
        if len(left) == 1 or spent > budget:
            break
    return min(left, key=lambda i: took[i])
