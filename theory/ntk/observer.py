"""The change of the validation loss by modes of a tangent kernel, recorded in training.

An observer for `mupjax.sweep`: along the averaged trajectory of `theory.trajectory`, whatever the
optimizer, every segment δw adds to each mode, by the trapezoid rule or by the forward one,

    δφ_i = ½ Σ_{end ∈ {start, end}} (u_iᵀ ∇_f L)(u_iᵀ J δw)      or the start's term alone,

with the Jacobian and the gradient in the outputs at that end, and U that of the kernel at the
start of the run, at the start of the segment, or given (such as that of infinite width). Over all
modes this is `⟨½ (g_start + g_end), δw⟩`, the linearized change, to rounding.

Where the kernel is frozen and the loss is squared, the trapezoid rule is exact, mode by mode.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mupjax.observe import Model, Observer, Setting
from theory.ntk.modes import check_kernel, kernel_modes, mode_contributions
from theory.trajectory import Averaging, Rule, Segment, Summary, check_rule, trajectory_observer

__all__ = ["ntk_observer"]

# A kernel and its eigenvectors of one trial: 128 MB each at 5800 outputs in single precision.
_LARGEST_KERNEL_BYTES = 128 * 2**20


class _Modes(NamedTuple):
    eigenvalues: jax.Array
    vectors: jax.Array
    contributions: jax.Array


def ntk_observer(
    averaging: Averaging,
    *,
    kernel: Literal["initial", "trajectory"] | ArrayLike = "initial",
    rule: Rule = "trapezoid",
    validation_examples: int | None = None,
    columns: int = 32,
    name: str = "ntk",
) -> Observer:
    """An observer of the loss change by modes, on the setting's validation batch.

    It records `{name}_modes` (mode,): `φ_i`, in order of decreasing eigenvalue, so that a
    cumulative sum gives `φ^k`; `{name}_eigenvalues` (mode,): κ (with `"trajectory"`, at the last
    segment's start); `{name}_total`: `φ`, by parameters instead of outputs; `{name}_initial_loss`,
    `{name}_final_loss` and `{name}_faithfulness`: `|φ − ΔL| / |ΔL|`.

    Args:
      averaging: the trajectory that is followed.
      kernel: whose modes: `"initial"`: the empirical kernel at the initial weights; `"trajectory"`:
        at the start of every segment, which costs as many gradients as there are outputs, each
        time; or a matrix, (PC, PC) with output c of example i at row i·C + c, or (P, P) shared by
        all outputs.
      rule: `"trapezoid"` or `"forward"`.
      validation_examples: the first P examples of the validation batch instead of all; memory
        grows as (PC)² per trial.
      columns: columns of the kernel that are computed at a time: so many gradients are held.
      name: prefix of the variables.

    Raises:
      ValueError: arguments that are not as described; when the sweep starts: a loss that calls the
        model more or less than once, more outputs than memory allows, a kernel of another size.
    """
    check_rule(rule)
    if not isinstance(columns, int) or isinstance(columns, bool) or columns < 1:
        raise ValueError(f"columns={columns!r}; expected a whole number, at least 1")
    given = None
    if isinstance(kernel, str):
        if kernel not in ("initial", "trajectory"):
            raise ValueError(f"kernel={kernel!r}; use 'initial', 'trajectory' or a matrix")
    else:
        given = _decomposed(np.asarray(kernel))

    def init(params: Any, model: Model, setting: Setting) -> _Modes:
        problem = _Problem(model, setting)
        size = problem.size(params)
        if given is None:
            eigenvalues, vectors = problem.kernel_modes(params, columns)
        else:
            eigenvalues, vectors = (jnp.asarray(a, problem.dtype(params)) for a in given)
            shape = problem.shape(params)
            if len(vectors) not in (size, shape[0]):
                raise ValueError(
                    f"kernel is of {len(vectors)} rows; expected {size} or {shape[0]} for outputs "
                    f"of shape {shape}"
                )
        return _Modes(eigenvalues, vectors, jnp.zeros_like(eigenvalues))

    def visit(state: _Modes, segment: Segment) -> _Modes:
        problem = _Problem(segment.model, segment.setting)
        eigenvalues, vectors = state.eigenvalues, state.vectors
        if isinstance(kernel, str) and kernel == "trajectory":
            eigenvalues, vectors = problem.kernel_modes(segment.start, columns)
        ends = (segment.start,) if rule == "forward" else (segment.start, segment.end)
        parts = [problem.contributions(vectors, end, segment.change) for end in ends]
        added = sum(parts, jnp.zeros_like(state.contributions)) / len(ends)
        return _Modes(eigenvalues, vectors, state.contributions + added)

    def result(state: _Modes, summary: Summary) -> Mapping[str, jax.Array]:
        return {
            "modes": state.contributions,
            "eigenvalues": state.eigenvalues,
            "total": summary.total(rule),
            "initial_loss": summary.initial_loss,
            "final_loss": summary.final_loss,
            "faithfulness": summary.faithfulness(rule),
        }

    return trajectory_observer(
        name,
        averaging=averaging,
        init=init,
        visit=visit,
        result=result,
        dims={"modes": ("mode",), "eigenvalues": ("mode",)},
        validation_examples=validation_examples,
        configuration={"kernel": _fact(kernel), "rule": rule},
    )


def _fact(kernel: Any) -> str:
    """What is stored of a kernel: its kind, or a fingerprint that tells matrices apart."""
    if isinstance(kernel, str):
        return kernel
    digits = np.ascontiguousarray(kernel, np.float64)
    return f"given, sha256 {hashlib.sha256(digits.tobytes()).hexdigest()[:16]}"


class _Problem:
    """The outputs of a model inside a setting's loss, and the loss as a function of them."""

    def __init__(self, model: Model, setting: Setting) -> None:
        self.model, self.setting = model, setting

    def outputs(self, params: Any) -> jax.Array:
        """What the model gives when the loss calls it on the validation batch, (P, ...)."""
        seen: list[Any] = []

        def predict(*inputs: Any, **options: Any) -> Any:
            seen.append(self.model.apply(params, *inputs, **options))
            return seen[-1]

        self.setting.loss(predict, self.setting.validation)
        if len(seen) != 1 or not isinstance(seen[0], jax.Array) or seen[0].ndim == 0:
            raise ValueError(
                f"the loss of setting {self.setting.name!r} must call the model once and get one "
                f"array (P, ...), for its tangent kernel; it called it {len(seen)} times"
            )
        return seen[0]

    def loss(self, outputs: jax.Array) -> jax.Array:
        """L as a function of the outputs."""
        return self.setting.loss(lambda *_, **__: outputs, self.setting.validation)

    def shape(self, params: Any) -> tuple[int, ...]:
        return jax.eval_shape(self.outputs, params).shape

    def dtype(self, params: Any) -> Any:
        return jax.eval_shape(self.outputs, params).dtype

    def size(self, params: Any) -> int:
        """PC, if its square fits."""
        found = jax.eval_shape(self.outputs, params)
        largest = math.isqrt(_LARGEST_KERNEL_BYTES // found.dtype.itemsize)
        if found.size > largest:
            raise ValueError(
                f"the model has {found.size} outputs on the validation batch; a kernel of so many "
                f"takes {found.size**2 * found.dtype.itemsize / 2**20:.0f} MB per trial (the most "
                f"is {largest} outputs): set validation_examples"
            )
        return found.size

    def kernel_modes(self, params: Any, columns: int) -> tuple[jax.Array, jax.Array]:
        """Eigenvalues and eigenvectors of `J Jᵀ`, whose columns are `J (Jᵀ e)`."""
        outputs, push = jax.linearize(self.outputs, params)
        pull = jax.linear_transpose(push, params)

        def column(unit: jax.Array) -> jax.Array:
            (direction,) = pull(unit.reshape(outputs.shape))
            return push(direction).reshape(-1)

        units = jnp.eye(outputs.size, dtype=outputs.dtype)
        with jax.default_matmul_precision("highest"):
            kernel = jax.lax.map(column, units, batch_size=min(columns, outputs.size))
        return kernel_modes(kernel)

    def contributions(self, vectors: jax.Array, params: Any, change: Any) -> jax.Array:
        """`(u_iᵀ ∇_f L)(u_iᵀ J δw)` at these parameters."""
        outputs, moved = jax.jvp(self.outputs, (params,), (change,))
        gradient = jax.grad(self.loss)(outputs)
        flat: Callable[[jax.Array], jax.Array] = functools.partial(
            jnp.reshape, shape=(outputs.shape[0], -1)
        )
        return mode_contributions(vectors, flat(gradient), flat(moved))


def _decomposed(kernel: Any) -> tuple[Any, Any]:
    kernel = check_kernel(kernel)
    values, vectors = np.linalg.eigh((kernel + kernel.T) / 2)
    return values[::-1], vectors[:, ::-1]
