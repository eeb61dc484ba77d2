"""From what a user states (ψ1, ψ2, noise, two activations) to the numbers the equations hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike, NDArray

from synthetic.random_features.activations import ActivationLike, Moments, as_activation, moments
from synthetic.random_features.fixed_point import Problem

__all__ = ["Real", "checked", "in_float64", "make_problem", "student_moments", "teacher_moments"]

Real: TypeAlias = "ArrayLike | jax.Array"
"""A real number or an array of them; NumPy, JAX, or a JAX tracer."""

# Rounding of the quadrature; an even part of this weight moves no digit that is promised.
_EVEN_AT_MOST = 1e-10
# Least length of a padded row: short ones share one program.
_SHORTEST = 16


def student_moments(student: ActivationLike) -> Moments:
    """The student's moments.

    Raises:
      ValueError: the centred student is not odd. The theory leaves out the even part: its second
        Hermite component follows ‖x‖², which no Gaussian equivalent of the features has.
    """
    activation = as_activation(student, "student")
    values = moments(activation)
    if values.even2 > _EVEN_AT_MOST:
        kind = "even" if values.even2 > 1 - _EVEN_AT_MOST else "not odd"
        raise ValueError(
            f"student {activation.name!r} is {kind} ({100 * values.even2:.3g} % of its variance is "
            "even): the theory covers odd students only. Take its odd part, "
            "lambda z: (f(z) - f(-z)) / 2, or an odd one such as 'tanh' or 'erf'."
        )
    return values


def teacher_moments(teacher: ActivationLike) -> Moments:
    """The teacher's moments; every function with a variance will do."""
    return moments(as_activation(teacher, "teacher"))


def checked(name: str, value: Real, *, infinite: bool = False, zero: bool = False) -> Any:
    """`value`, in float64 unless JAX traces it.

    Raises:
      TypeError: no real number.
      ValueError: not positive (or, with `zero`, negative), not finite (unless `infinite`).
    """
    if isinstance(value, Tracer):
        return value
    try:
        array = np.asarray(value)
        if array.dtype.kind == "c":
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; expected real numbers.") from None
    good = (array >= 0) if zero else (array > 0)
    good &= (array <= np.inf) if infinite else (array < np.inf)
    if not good.all():
        bad = array if array.ndim == 0 else array[~good][0]
        bound = "at least 0" if zero else "above 0"
        raise ValueError(
            f"{name} is {bad}; expected a number {bound}"
            + (" (math.inf is allowed)." if infinite else ", and finite.")
        )
    return array


def make_problem(
    *,
    psi1: Any,
    psi2: Any,
    noise_std: Any,
    student: Moments,
    teacher: Moments,
) -> Problem:
    """The coefficients of the fixed point; `psi2` may be infinite."""
    return Problem(
        psi1=psi1,
        eta=psi1 / psi2,
        linear2=jnp.asarray(student.linear2),
        nonlinear2=jnp.asarray(student.nonlinear2),
        A=teacher.nonlinear2 + noise_std**2,
        B=jnp.asarray(teacher.linear2),
    )


def in_float64(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), element by element, in float64 whatever JAX's global precision.

    Concrete arguments give NumPy float64; they are laid out in a row and padded to a power of two,
    so that a few compiled programs serve all shapes. Traced ones (`jax.grad`, `jit`, `vmap`) give a
    traced result in their own type, rounded at the end only: full precision under
    `jax.enable_x64(True)`.
    """
    traced = [a for a in arguments if isinstance(a, Tracer)]
    if traced:
        dtype = jnp.result_type(*traced)
        if not jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.result_type(float)
        with jax.enable_x64(True):
            wide = [
                jax.lax.convert_element_type(a, jnp.float64)
                if isinstance(a, Tracer)
                else jnp.asarray(a, dtype=jnp.float64)
                for a in arguments
            ]
            result = function(*jnp.broadcast_arrays(*wide))
        return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, dtype), result)
    arrays = np.broadcast_arrays(*arguments)
    shape, size = arrays[0].shape, arrays[0].size
    length = max(_SHORTEST, 1 << (size - 1).bit_length()) if size else 0
    with jax.enable_x64(True):
        rows = [
            jnp.asarray(np.resize(a.ravel(), length) if size else a.ravel(), dtype=jnp.float64)
            for a in arrays
        ]
        result = function(*rows)
    # [()] turns an array without axes into a number.
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:size].reshape(shape)[()], result)


def broadcast_shape(**arrays: NDArray[np.float64]) -> tuple[int, ...]:
    """The common shape.

    Raises:
      ValueError: there is none.
    """
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"the shapes do not broadcast: {listed}; add axes of length 1, such as ridge[:, None]."
        ) from None
