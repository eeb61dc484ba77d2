"""The linearized loss and its top-k parts, accumulated along training for every trial of a sweep.

Along the averaged, subsampled trajectory of `theory.trajectory`, with `g_s` the gradient of the
validation loss at `w̄_s` and `δw_s` the step to the next mark (Ghosh, Wu and Bietti, arXiv
2512.22768, section 4):

    φ(ω) = Σ_s ⟨g_s, δw_s⟩ ≈ L(w̄_end) − L(w_0),

and of every matrix layer the eigenvalues λ_1, λ_2, … of its alignment matrix
`½ (Gᵀ δW + δWᵀ G)`, by decreasing magnitude, split its share:

    φ^k(ω) = Σ_s Σ_layers Σ_{i ≤ k} λ_i  +  what vectors contribute, whole.

k runs over the dimension of the width (`theory.layers`). With the trapezoid rule, `g_s` is the mean
of the gradients at both ends of the step: the sum is then of second order in the step, and all the
above holds with it in place of the gradient.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mupjax.observe import Model, Observer, Setting
from theory.alignment import alignment_eigenvalues
from theory.faithfulness import faithfulness_warnings
from theory.krylov import top_alignment_eigenvalues
from theory.layers import Layer, Side, layers_with_components
from theory.trajectory import Averaging, Rule, Segment, Summary, check_rule, trajectory_observer

__all__ = ["Spectrum", "decomposition_observer"]

Spectrum = Literal["exact", "lanczos"]
"""All eigenvalues, by the thin 2m × 2m problem or the dense one; or, of layers wide in both
directions, the first few by `theory.krylov`."""

# A Lanczos iteration keeps some 2k vectors: below this many dimensions per eigenvalue it does not
# pay (k = 32, width 2048: 2.5 times faster than dense; 4096: 5 times).
_LANCZOS_FROM = 16


class _State(NamedTuple):
    """K components, P parameters, R recorded times."""

    layer_top: jax.Array  # (P, K)
    layer_total: jax.Array  # (P,)
    error: jax.Array
    time_top: jax.Array  # (R, K)
    time_loss: jax.Array  # (R,)


def decomposition_observer(
    averaging: Averaging,
    *,
    rule: Rule = "trapezoid",
    components: int | None = None,
    spectrum: Spectrum = "exact",
    times: Sequence[int] | None = None,
    sides: Mapping[str, Side] | None = None,
    validation_examples: int | None = None,
    name: str = "decomposition",
) -> Observer:
    """An observer that decomposes the change of the validation loss.

    Recorded, with the sweep's dimensions in front (prefix: `name`):

    - ``top`` (component): φ^k for k = 1 … K, K the largest number of components of any layer (the
      width); nan for k beyond the width of a smaller network.
    - ``layer_top`` (layer, component) and ``layer_total`` (layer): the same by parameter; a
      parameter that counts whole has its total at every k.
    - ``total``: φ by the chosen rule; ``forward_total``, ``trapezoid_total``: by either.
    - ``initial_loss``, ``final_loss``: at the trajectory's ends; ``faithfulness``:
      `|φ − ΔL| / |ΔL|`.
    - ``variation``: `Σ |ΔL|` over steps; ``straightness``: length of the steps over that of the
      averaged path, at most 1; ``updates``: number of updates up to the last mark.
    - ``spectrum_error``: bound on the error of every φ^k that an iterative spectrum leaves open,
      the sum of all residuals (0 for an exact one).
    - ``time_top`` (time, component), ``time_loss`` (time): φ^k and the loss on the way.

    Args:
      averaging: the average and its marks; see `theory.trajectory` for presets.
      rule: ``"trapezoid"``, or ``"forward"`` to compute what the paper does.
      components: record φ^k for k up to this number only.
      spectrum: ``"exact"``, or ``"lanczos"`` (needs `components`) for hidden layers so wide that a
        dense eigenvalue problem per mark costs too much (n of 2048 and more).
      times: numbers of updates at which to record ``time_top`` and ``time_loss``; each stands for
        the last mark up to there. Times after the end of training stay nan.
      sides: which axes count as the width, by path pattern, instead of `theory.layers`' rule.
      validation_examples: use only the first so many examples of the validation batch.
      name: prefix of the recorded variables.

    Raises:
      ValueError: an argument out of range; and, when a sweep starts, what
        `theory.layers.layers_of` refuses.
    """
    check_rule(rule)
    if components is not None and (
        isinstance(components, bool)
        or not isinstance(components, numbers.Integral)
        or components < 1
    ):
        raise ValueError(f"components must be whole and at least 1, got {components!r}.")
    if spectrum not in get_args(Spectrum):
        raise ValueError(
            f"spectrum must be one of {', '.join(get_args(Spectrum))}, got {spectrum!r}."
        )
    if spectrum == "lanczos" and components is None:
        raise ValueError(
            "spectrum='lanczos' computes the first few eigenvalues: say how many by components."
        )
    recorded = _times(averaging, times)

    def shape(model: Model) -> tuple[tuple[Layer, ...], int]:
        layers, largest = layers_with_components(model, sides)
        return layers, largest if components is None else min(components, largest)

    def init(params: Any, model: Model, setting: Setting) -> _State:
        layers, count = shape(model)
        time_top = jnp.full((len(recorded), count), jnp.nan)
        return _State(
            layer_top=jnp.zeros((len(layers), count)),
            layer_total=jnp.zeros(len(layers)),
            error=jnp.zeros(()),
            time_top=jnp.where(recorded[:, None] == 0, 0.0, time_top),
            time_loss=jnp.full(len(recorded), jnp.nan),
        )

    def visit(state: _State, segment: Segment) -> _State:
        layers, count = shape(segment.model)
        few = components if spectrum == "lanczos" else None
        gradients = jax.tree.leaves(segment.gradient(rule))
        changes = jax.tree.leaves(segment.change)
        totals, tops, error = [], [], state.error
        for layer, gradient, change in zip(layers, gradients, changes, strict=True):
            total = jnp.vdot(gradient, change, precision="highest")
            totals.append(total)
            if not layer.size:
                tops.append(jnp.broadcast_to(total, (count,)))
                continue
            values, residual = _eigenvalues(layer.matrix(gradient), layer.matrix(change), few)
            tops.append(_partial_sums(values, count))
            error = (error + residual).astype(error.dtype)
        layer_top = state.layer_top + jnp.stack(tops).astype(state.layer_top.dtype)
        layer_total = state.layer_total + jnp.stack(totals).astype(state.layer_total.dtype)
        now = recorded == segment.step
        top, loss = jnp.sum(layer_top, axis=0), segment.end_loss.astype(state.time_loss.dtype)
        return _State(
            layer_top=layer_top,
            layer_total=layer_total,
            error=error,
            time_top=jnp.where(now[:, None], top[None, :], state.time_top),
            time_loss=jnp.where(now, loss, state.time_loss),
        )

    def result(state: _State, summary: Summary) -> dict[str, jax.Array]:
        found = {
            "top": jnp.sum(state.layer_top, axis=0),
            "layer_top": state.layer_top,
            "layer_total": state.layer_total,
            "total": summary.total(rule),
            "forward_total": summary.forward,
            "trapezoid_total": summary.trapezoid,
            "initial_loss": summary.initial_loss,
            "final_loss": summary.final_loss,
            "faithfulness": summary.faithfulness(rule),
            "variation": summary.variation,
            "straightness": summary.chords / summary.path,
            "updates": summary.updates,
            "spectrum_error": state.error,
        }
        if times is not None:
            losses = jnp.where(recorded == 0, summary.initial_loss, state.time_loss)
            found |= {"time_top": state.time_top, "time_loss": losses}
        return found

    def coords(model: Model) -> dict[str, Any]:
        layers, count = shape(model)
        along = {"layer": [layer.path for layer in layers], "component": np.arange(1, count + 1)}
        return along | ({} if times is None else {"time": recorded})

    return trajectory_observer(
        name,
        averaging=averaging,
        init=init,
        visit=visit,
        result=result,
        dims={
            "top": ("component",),
            "layer_top": ("layer", "component"),
            "layer_total": ("layer",),
            "time_top": ("time", "component"),
            "time_loss": ("time",),
        },
        validation_examples=validation_examples,
        configuration={
            "rule": rule,
            "components": components,
            "spectrum": spectrum,
            "times": recorded.tolist(),
            "sides": dict(sides or {}),
        },
        coords=coords,
        check=lambda dataset: faithfulness_warnings(dataset, name=name),
    )


def _times(averaging: Averaging, times: Sequence[int] | None) -> np.ndarray:
    """The last marks up to the given numbers of updates, without duplicates."""
    if times is None:
        return np.zeros(0, int)
    given = np.asarray(times)
    if given.ndim != 1 or not given.size or given.dtype.kind not in "iu" or given.min() < 0:
        raise ValueError(
            f"times must be whole numbers of updates, not negative, such as [0, 100, 200], got "
            f"{times!r}."
        )
    marks = np.array(averaging.marks(int(given.max())))
    return np.unique(marks[np.searchsorted(marks, given, side="right") - 1])


def _eigenvalues(
    gradient: jax.Array, change: jax.Array, few: int | None
) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues by decreasing magnitude, and what their errors add up to at most."""
    m, n = gradient.shape[-2:]
    if few is None or min(n, 2 * m) < _LANCZOS_FROM * few:
        return alignment_eigenvalues(gradient, change), jnp.zeros((), gradient.dtype)
    values, residuals = top_alignment_eigenvalues(gradient, change, few)
    return values, jnp.sum(residuals)


def _partial_sums(values: jax.Array, count: int) -> jax.Array:
    """Sums of the first 1, …, count values (those not given are zero), over all matrices."""
    sums = jnp.cumsum(values, axis=-1)[..., :count]
    sums = sums.sum(axis=tuple(range(sums.ndim - 1)))
    return jnp.pad(sums, (0, count - len(sums)), mode="edge")
