"""Finding the fastest of several programs, on programs whose times are made up."""

import numpy as np
import pytest

from mupjax.fastest import fastest, pace


class Program:
    """Takes so many seconds a step and `fixed` ones beside; a busy machine stretches some runs."""

    def __init__(self, per_step, *, fixed=0.3, busy=(), clock=None):
        self.per_step, self.fixed, self.busy = per_step, fixed, set(busy)
        self.lengths, self.clock = [], clock if clock is not None else []

    def __call__(self, steps):
        assert steps >= 1
        stretched = 3.0 if len(self.clock) in self.busy else 1.0
        self.lengths.append(steps)
        self.clock.append((self.per_step * steps + self.fixed) * stretched)
        return self.clock[-1]

    @property
    def spent(self):
        return sum(self.clock)


@pytest.mark.parametrize("per_step", [1e-5, 2e-3, 0.1, 3.0])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 1000])
def test_a_step_is_timed_without_what_is_fixed(per_step, most) -> None:
    fixed = 0.3 if most > 1 else 0.0  # of a single step nothing can be told apart
    program = Program(per_step, fixed=fixed)
    seconds, steps = pace(program, most)
    assert seconds == pytest.approx(per_step)
    assert max(program.lengths) == steps <= most
    # Long enough to be timed, or all there are; no longer than it takes.
    assert steps == most or 0.75 * per_step * steps >= 0.2
    assert steps <= 4 or 0.75 * per_step * steps / 2 < 0.2


def test_slow_programs_are_timed_in_few_steps() -> None:
    program = Program(0.5, fixed=0.5)
    assert pace(program, 1000) == (pytest.approx(0.5), 4)
    assert sum(program.lengths) <= 6


@pytest.mark.parametrize("where", range(5))
def test_the_fastest_of_all_trials_is_found(where) -> None:
    times = [1.0, 1.3, 1.06, 2.0, 1.2]
    times[where] = 0.95
    programs = [Program(t) for t in times]
    assert fastest(programs, [1] * 5, 8, budget=1e9) == where
    # Twice as many trials at once make half as many chunks.
    programs = [Program(2 * t if i % 2 else t) for i, t in enumerate(times)]
    assert fastest(programs, [2 - i % 2 for i in range(5)], 8, budget=1e9) == where


@pytest.mark.parametrize("seed", range(20))
def test_a_busy_machine_does_not_mislead(seed) -> None:
    """Every run has one chance in ten to take three times as long."""
    busy = np.flatnonzero(np.random.default_rng(seed).random(400) < 0.1)
    clock: list[float] = []
    programs = [Program(t, fixed=0.0, busy=busy, clock=clock) for t in (1.0, 1.04, 1.15, 0.8, 2.5)]
    assert fastest(programs, [1] * 5, 8, budget=1e9) == 3


def test_what_falls_behind_is_not_measured_again() -> None:
    programs = [Program(t) for t in (1.0, 1.02, 1.15, 1.3, 4.0)]
    assert fastest(programs, [1] * 5, 8, budget=1e9) == 0
    rounds = [p.lengths.count(8) for p in programs]
    assert rounds == [5, 5, 3, 2, 1]


def test_measuring_ends_with_its_budget() -> None:
    clock: list[float] = []
    programs = [Program(1.0 + i / 100, clock=clock) for i in range(4)]
    assert fastest(programs, [1] * 4, 4, budget=0.0) == 0
    assert [p.lengths.count(4) for p in programs] == [1] * 4
    one_round = sum(clock)
    assert fastest(programs, [1] * 4, 4, budget=1.5 * one_round) == 0
    assert one_round < sum(clock) - one_round < 3 * one_round


def test_one_program_in_one_step() -> None:
    assert fastest([Program(1.0)], [3], 1, budget=1.0) == 0
    assert fastest([Program(1.0), Program(0.5)], [1, 1], 1, budget=1.0) == 1
