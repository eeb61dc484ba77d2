"""A sweep's arguments, checked once, before anything is compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["HyperparameterGrid", "check_count", "check_seeds", "check_widths"]

_POSITIVE = ("learning_rate", "init_scale", "output_multiplier", "max_gradient_norm", "eps")
_NON_NEGATIVE = ("weight_decay", "momentum", "b1", "b2")
_BELOW_ONE = ("b1", "b2", "momentum")


@dataclasses.dataclass(frozen=True)
class HyperparameterGrid:
    """The product grid of hyperparameters.

    Attributes:
      axes: swept hyperparameters with their values, in the given order.
      fixed: hyperparameters with one value.
    """

    axes: Mapping[str, tuple[float, ...]]
    fixed: Mapping[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """All hyperparameters, swept ones first."""
        return (*self.axes, *self.fixed)

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return tuple(len(values) for values in self.axes.values())

    def points(self) -> list[dict[str, float]]:
        """Every combination, the last axis fastest."""
        return [
            dict(zip(self.axes, values, strict=True)) | dict(self.fixed)
            for values in itertools.product(*self.axes.values())
        ]

    @classmethod
    def of(
        cls,
        hyperparameters: Mapping[str, Any],
        *,
        factory_names: set[str],
        required: set[str],
        engine_names: Sequence[str],
        reserved: Sequence[str],
    ) -> HyperparameterGrid:
        """Check and sort hyperparameters: scalars are fixed, sequences are axes.

        Raises:
          ValueError: unknown, missing or reserved names, empty axes, values out of range.
        """
        if not isinstance(hyperparameters, Mapping):
            raise TypeError(
                "hyperparameters must map names to a number or numbers, such as "
                f"{{'learning_rate': [0.001, 0.002]}}, got {hyperparameters!r}."
            )
        axes: dict[str, tuple[float, ...]] = {}
        fixed: dict[str, float] = {}
        for name, given in hyperparameters.items():
            if name in reserved:
                raise ValueError(f"hyperparameter {name!r} has the name of a result's dimension.")
            if name not in factory_names and name not in engine_names:
                raise ValueError(
                    f"unknown hyperparameter {name!r}: the optimizer factory takes "
                    f"{_listed(factory_names)}, and the engine knows {_listed(engine_names)}."
                )
            if isinstance(given, str | bytes) or given is None:
                raise ValueError(
                    f"hyperparameter {name!r} must be a number or numbers, got {given!r}."
                )
            if not isinstance(given, Sequence) and np.ndim(given) == 0:
                fixed[name] = _checked(name, given)
                continue
            values = tuple(_checked(name, v) for v in given)
            if not values:
                raise ValueError(
                    f"hyperparameter {name!r} has an empty grid: give at least one value."
                )
            # As trials get them: two that are one number in float32 would be one trial twice.
            kind = jax.dtypes.canonicalize_dtype(float)
            if (np.diff(np.asarray(values, kind)) <= 0).any():
                raise ValueError(
                    f"the values of hyperparameter {name!r} must increase without duplicates (in "
                    f"{kind}), got {list(values)}."
                )
            axes[name] = values
        if missing := sorted(required - set(hyperparameters)):
            raise ValueError(
                f"the optimizer factory needs {_listed(missing)}: give a value or a grid in "
                "hyperparameters."
            )
        return cls(axes, fixed)


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"


def _checked(name: str, value: Any) -> float:
    array = np.asarray(value) if np.ndim(value) == 0 else None
    # JAX's, not NumPy's, which does not know bfloat16.
    if array is None or not (
        jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    ):
        raise ValueError(f"hyperparameter {name!r} must be a number, got {value!r}.")
    number = float(array)
    if not math.isfinite(number):
        raise ValueError(f"hyperparameter {name!r} must be finite, got {number}.")
    if number and not 1e-45 < abs(number) < float(np.finfo(np.float32).max):
        raise ValueError(f"hyperparameter {name!r} = {number} is no number in float32.")
    positive = name in _POSITIVE or name.endswith("_learning_rate_multiplier")
    if positive and number <= 0:
        raise ValueError(f"hyperparameter {name!r} must be positive, got {number}.")
    if name in _NON_NEGATIVE and number < 0:
        raise ValueError(f"hyperparameter {name!r} must not be negative, got {number}.")
    if name in _BELOW_ONE and number >= 1:
        raise ValueError(f"hyperparameter {name!r} must be below 1, got {number}.")
    return number


def check_widths(widths: Sequence[int], name: str = "widths") -> tuple[int, ...]:
    """The widths (or other sizes, under their name) as integers.

    Raises:
      ValueError: none, not whole, not positive, duplicated or unsorted.
    """
    given = list(np.atleast_1d(np.asarray(widths, dtype=object)))
    if not given:
        raise ValueError(f"{name} is empty: give at least one.")
    checked = tuple(check_count(name, w) for w in given)
    if any(b <= a for a, b in itertools.pairwise(checked)):
        raise ValueError(f"{name} must increase without duplicates, got {list(checked)}.")
    return checked


def check_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Seeds as a tuple; a number S means 0, ..., S-1.

    Raises:
      ValueError: none, negative or duplicated.
    """
    if not isinstance(seeds, Sequence | np.ndarray) or isinstance(seeds, str):
        return tuple(range(check_count("seeds", seeds)))
    checked = tuple(check_count("seeds", s, minimum=0) for s in cast("Sequence[int]", seeds))
    if not checked or len(set(checked)) != len(checked) or max(checked) >= 2**31:
        raise ValueError(
            f"seeds must be a count or distinct numbers below 2**31, got {list(checked)}."
        )
    return checked


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """A whole number not below ``minimum``.

    Raises:
      ValueError: otherwise.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or int(value) < minimum:
        raise ValueError(f"{name} must be whole and at least {minimum}, got {value!r}.")
    return int(value)
