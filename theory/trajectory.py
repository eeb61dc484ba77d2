"""The averaged, subsampled trajectory of a training run, followed inside the compiled loop.

Ghosh, Wu and Bietti (arXiv 2512.22768) decompose the loss along an exponential moving average of
the iterates (the raw ones are too rough for a linearization), of which they keep every τ-th. With
`w_t` the parameters after t updates and `L` the validation loss:

    w̄_0 = w_0,   w̄_t = α w̄_{t−1} + (1 − α) w_t,   window 1/(1 − α) growing linearly in t,
    marks s_0 = 0, s_{j+1} = s_j + τ(s_j),        τ growing linearly over the same steps.

`trajectory_observer` hands every segment from one mark to the next to a `visit` function, with the
gradients of `L` at both ends. Between marks it costs one pass over the parameters. The trajectory
begins at the initial parameters and ends at the last mark; so do the losses it is compared with.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mupjax.observe import Model, Observation, Observer, Setting
from mupjax.turns import in_turn

__all__ = [
    "GWB_GPT2",
    "GWB_LLAMA",
    "LAPTOP",
    "Averaging",
    "Rule",
    "Segment",
    "Summary",
    "trajectory_observer",
]

Rule = Literal["forward", "trapezoid"]
"""How a segment is linearized: with the gradient at its start (the paper's; first order in the
length of a segment), or with the mean of the gradients at both ends (second order)."""


@dataclasses.dataclass(frozen=True)
class Averaging:
    """Which average of the iterates is followed, and at which steps it is looked at.

    After update t (counted from 0), `α_t = 1 − 1/window(t)`, where the window grows linearly from
    `1/(1 − first_coefficient)` at t = 0 to `1/(1 − last_coefficient)` at t = warmup_steps, where it
    stays. The stride grows likewise: from a mark s the next one lies τ(s) updates further, where
    τ(s), linear from `first_stride` to `last_stride`, is rounded to the nearest whole number
    (halves up).

    Attributes:
      first_coefficient, last_coefficient: α in [0, 1); 0 follows the iterates themselves.
      first_stride, last_stride: whole numbers of updates.
      warmup_steps: over how many updates both grow; 0: the last values hold from the start.

    Raises:
      ValueError: a number out of range.
    """

    first_coefficient: float
    last_coefficient: float
    first_stride: int
    last_stride: int
    warmup_steps: int

    def __post_init__(self) -> None:
        for name in ("first_coefficient", "last_coefficient"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not 0 <= float(value) < 1:
                raise ValueError(
                    f"{name} must lie in [0, 1), got {value!r}: the window is 1/(1 - {name}), and "
                    "0 means no averaging."
                )
        for name, least in (("first_stride", 1), ("last_stride", 1), ("warmup_steps", 0)):
            value = getattr(self, name)
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if not whole or value < least:
                raise ValueError(f"{name} must be whole and at least {least}, got {value!r}.")

    def rate(self, step: jax.Array) -> jax.Array:
        """`1 − α_t` after update t = `step`, any shape."""
        first, last = 1 / (1 - self.first_coefficient), 1 / (1 - self.last_coefficient)
        if not self.warmup_steps:
            return jnp.full(jnp.shape(step), 1 / last)
        share = jnp.clip(jnp.asarray(step, float) / self.warmup_steps, 0, 1)
        return 1 / (first + (last - first) * share)

    def marks(self, updates: int) -> tuple[int, ...]:
        """The marks up to `updates` updates, 0 first."""
        return tuple(itertools.takewhile(lambda mark: mark <= updates, self._all_marks()))

    def is_mark(self, updates: jax.Array) -> jax.Array:
        """Whether the state after so many updates is looked at: bool of the same shape."""
        early, anchor = self._warmup_marks
        late = (updates - anchor) % self.last_stride == 0
        return jnp.where(updates < anchor, jnp.asarray(early)[jnp.minimum(updates, anchor)], late)

    @functools.cached_property
    def _warmup_marks(self) -> tuple[np.ndarray, int]:
        """Which update counts up to the first mark with the last stride are marks; that mark."""
        early = list(itertools.takewhile(lambda m: m < self.warmup_steps, self._all_marks()))
        anchor = next(m for m in self._all_marks() if m >= self.warmup_steps)
        table = np.zeros(anchor + 1, bool)
        table[[*early, anchor]] = True
        return table, anchor

    def _all_marks(self) -> Iterator[int]:
        mark = 0
        while True:
            yield mark
            mark += self._stride(mark)

    def _stride(self, mark: int) -> int:
        if mark >= self.warmup_steps:
            return self.last_stride
        # In whole numbers, so that no rounding decides on a half.
        twice = 2 * self.first_stride * (self.warmup_steps - mark) + 2 * self.last_stride * mark
        return (twice + self.warmup_steps) // (2 * self.warmup_steps)


GWB_LLAMA = Averaging(0.98, 0.9995, first_stride=2, last_stride=10, warmup_steps=2000)
"""The paper's for Llama (7185 updates) and its two-layer network on CIFAR-10."""

GWB_GPT2 = Averaging(0.995, 0.996, first_stride=1, last_stride=2, warmup_steps=2000)
"""The paper's for GPT-2."""

LAPTOP = Averaging(0.98, 0.995, first_stride=2, last_stride=10, warmup_steps=500)
"""For one to a few thousand updates: chosen on the digits, see docs/decomposition.md."""


class Segment(NamedTuple):
    """One step of the subsampled trajectory of one trial, from a mark to the next.

    Attributes:
      step: number of updates made at its end (int32 scalar).
      start, end: averaged parameters `w̄` at both ends, as the model uses them.
      start_gradient, end_gradient: of the validation loss there.
      start_loss, end_loss: the validation loss there (scalars).
      model: the model, with the trial's options filled in.
      setting: the setting; its ``validation`` is the batch that the gradients are of.
      width: the trial's width (scalar).
    """

    step: jax.Array
    start: Any
    end: Any
    start_gradient: Any
    end_gradient: Any
    start_loss: jax.Array
    end_loss: jax.Array
    model: Model
    setting: Setting
    width: jax.Array

    @property
    def change(self) -> Any:
        """`δw`: end − start, a tree like the parameters."""
        return jax.tree.map(jnp.subtract, self.end, self.start)

    def gradient(self, rule: Rule) -> Any:
        """The gradient that a rule multiplies with `change`, a tree like the parameters."""
        check_rule(rule)
        if rule == "forward":
            return self.start_gradient
        return jax.tree.map(lambda a, b: (a + b) / 2, self.start_gradient, self.end_gradient)


class Summary(NamedTuple):
    """A whole trajectory in numbers, each a scalar per trial.

    Attributes:
      initial_loss, final_loss: validation loss at its first point, `w_0`, and at the last mark.
      updates: number of updates made at the last mark (int32).
      forward: `Σ ⟨g_s, δw_s⟩` over segments, all parameters.
      trapezoid: the same with the mean of the gradients at both ends.
      variation: `Σ |L_end − L_start|` over segments; the larger it is beside the change of the
        loss, the more the loss went up and down.
      chords: `Σ ‖w̄_end − w̄_start‖` over segments.
      path: `Σ ‖w̄_t − w̄_{t−1}‖` over updates up to the last mark: chords / path is 1 where the
        trajectory is straight between marks, and small where it is rough.
    """

    initial_loss: jax.Array
    final_loss: jax.Array
    updates: jax.Array
    forward: jax.Array
    trapezoid: jax.Array
    variation: jax.Array
    chords: jax.Array
    path: jax.Array

    def total(self, rule: Rule) -> jax.Array:
        """`φ(ω)`, the linearized change of the loss, by a rule."""
        check_rule(rule)
        return self.forward if rule == "forward" else self.trapezoid

    def faithfulness(self, rule: Rule) -> jax.Array:
        """`|φ − ΔL| / |ΔL|`: how far the linearized change is off, relative to the true one."""
        change = self.final_loss - self.initial_loss
        return jnp.abs(self.total(rule) - change) / jnp.abs(change)


class _Kept(NamedTuple):
    """What changes at marks only."""

    start: Any
    gradient: Any
    loss: jax.Array
    summary: Summary
    inner: Any


class _State(NamedTuple):
    average: Any
    path: jax.Array
    kept: _Kept


def trajectory_observer(
    name: str,
    *,
    averaging: Averaging,
    init: Callable[[Any, Model, Setting], Any],
    visit: Callable[[Any, Segment], Any],
    result: Callable[[Any, Summary], Mapping[str, jax.Array]],
    dims: Mapping[str, tuple[str, ...]] | None = None,
    validation_examples: int | None = None,
    configuration: Mapping[str, Any] | None = None,
    **observer: Any,
) -> Observer:
    """An observer that follows the averaged trajectory and sees one segment at a time.

    All three functions are of one trial: the engine vectorises them. The gradient of the validation
    loss is computed once per mark, and nothing of the size steps × parameters is ever held.

    Args:
      name: prefix of the recorded variables.
      averaging: the average and the marks.
      init: ``init(params, model, setting) -> state``, a pytree of arrays of fixed shapes.
      visit: ``visit(state, segment) -> state``, run at marks only, inside
        `jax.lax.fori_loop`: shapes and types of the state must not change.
      result: ``result(state, summary) -> {variable: array}``.
      dims: names of the arrays' own dimensions, by variable.
      validation_examples: use the first so many examples of the setting's validation batch (the
        leading axis of each of its arrays) instead of all; the losses are of the same ones.
      configuration: further facts to store with results, beside the averaging.
      **observer: further fields of :class:`mupjax.Observer` (``coords``, ``check``).

    Raises:
      TypeError: `averaging` is no `Averaging`.
      ValueError: `validation_examples` is not positive, or (when the sweep starts) more than there
        are.
    """
    if not isinstance(averaging, Averaging):
        raise TypeError(f"averaging must be a theory.trajectory.Averaging, got {averaging!r}.")
    if validation_examples is not None and (
        not isinstance(validation_examples, numbers.Integral)
        or isinstance(validation_examples, bool)
        or validation_examples < 1
    ):
        raise ValueError(
            f"validation_examples must be whole and at least 1, got {validation_examples!r}; leave "
            "it out for all of them."
        )

    def problem(setting: Setting) -> Setting:
        if validation_examples is None:
            return setting
        return dataclasses.replace(
            setting, validation=_first(setting.validation, validation_examples)
        )

    def start(params: Any, model: Model, setting: Setting) -> _State:
        setting = problem(setting)
        average = jax.tree.map(_averaged_copy, params)
        loss, gradient = _loss_and_gradient(average, model, setting)
        zero = jnp.zeros_like(loss)
        summary = Summary(loss, loss, jnp.int32(0), zero, zero, zero, zero, zero)
        return _State(
            average, zero, _Kept(average, gradient, loss, summary, init(params, model, setting))
        )

    def update(state: _State, seen: Observation) -> _State:
        setting = problem(seen.setting)
        updates = seen.step + 1
        rate = averaging.rate(seen.step)
        # Not optax.incremental_update, `rate * new + (1 - rate) * old`: it moves the average of
        # iterates that stand still, by rounding, as much as small learning rates do.
        moves = jax.tree.map(
            lambda old, new: (rate * (new - old)).astype(old.dtype), state.average, seen.updated
        )
        average = jax.tree.map(jnp.add, state.average, moves)
        path = state.path + jnp.asarray(_norm(moves), state.path.dtype)

        def look(turn: jax.Array, kept: _Kept) -> _Kept:
            # Behind a barrier with the turn's number, or XLA would do this before the loop, and so
            # in every step.
            here, _ = jax.lax.optimization_barrier((average, turn))
            loss, gradient = _loss_and_gradient(here, seen.model, setting)
            segment = Segment(
                step=updates,
                start=kept.start,
                end=here,
                start_gradient=kept.gradient,
                end_gradient=gradient,
                start_loss=kept.loss,
                end_loss=loss,
                model=seen.model,
                setting=setting,
                width=seen.width,
            )
            summary = _extended(kept.summary, segment, path)
            return _Kept(here, gradient, loss, summary, visit(kept.inner, segment))

        # A loop of at most one turn, not `jax.lax.cond`, for which XLA copies all that is kept in
        # every step. The step is the same for all trials, so that vectorised over them the number
        # of turns stays one number.
        turns = averaging.is_mark(updates).astype(jnp.int32)
        kept = jax.lax.fori_loop(0, turns, look, state.kept)
        return _State(average, path, kept)

    def finish(state: _State) -> Mapping[str, jax.Array]:
        return result(state.kept.inner, state.kept.summary)

    facts = {
        "averaging": dataclasses.asdict(averaging),
        "validation_examples": validation_examples,
        **(configuration or {}),
    }
    return Observer(name, start, update, finish, dims or {}, configuration=facts, **observer)


def check_rule(rule: Any) -> None:
    """Refuse anything that is no `Rule`.

    Raises:
      ValueError: it names the argument, the value and the choice.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}.")


def _extended(summary: Summary, segment: Segment, path: jax.Array) -> Summary:
    """The summary of a trajectory with one more segment."""
    change = segment.change

    def along(gradient: Any) -> jax.Array:
        return jnp.asarray(optax.tree.vdot(gradient, change), summary.forward.dtype)

    forward, backward = along(segment.start_gradient), along(segment.end_gradient)
    return Summary(
        initial_loss=summary.initial_loss,
        final_loss=segment.end_loss,
        updates=segment.step.astype(jnp.int32),
        forward=summary.forward + forward,
        trapezoid=summary.trapezoid + (forward + backward) / 2,
        variation=summary.variation + jnp.abs(segment.end_loss - segment.start_loss),
        chords=summary.chords + jnp.asarray(_norm(change), summary.chords.dtype),
        path=path,
    )


def _loss_and_gradient(params: Any, model: Model, setting: Setting) -> tuple[jax.Array, Any]:
    def loss(params: Any) -> jax.Array:
        value = setting.loss(functools.partial(model.apply, params), setting.validation)
        return jnp.asarray(value, jnp.promote_types(value.dtype, jnp.float32))

    # Vectorised over trials, its activations would not fit a CPU's cache.
    return in_turn(jax.value_and_grad(loss))(params)


def _norm(tree: Any) -> jax.Array:
    # As a product, unlike optax.tree.norm: on CPUs XLA's own reductions may take 1.5 times as long.
    return jnp.sqrt(optax.tree.vdot(tree, tree))


def _averaged_copy(leaf: jax.Array) -> jax.Array:
    # An average moves by less than half precision resolves.
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _first(batch: Any, examples: int) -> Any:
    held = min(len(leaf) if jnp.ndim(leaf) else 0 for leaf in jax.tree.leaves(batch))
    if examples > held:
        raise ValueError(
            f"validation_examples is {examples}, but the setting's validation batch holds {held}: "
            "ask for fewer."
        )
    return jax.tree.map(lambda leaf: leaf[:examples], batch)
