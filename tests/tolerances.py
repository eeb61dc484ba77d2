"""How far two numbers may lie apart: the one place that says so.

Exact tests compare with `float_tolerance`, statistical ones with `standard_error_band`. A test that
needs more room than either says why, next to its number.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import ArrayLike
from scipy.special import ndtr, stdtrit

# Rounding errors behave as independent steps of at most half an epsilon, so `operations` of them
# add up to a small multiple of sqrt(operations) epsilons but for a tiny probability (Higham and
# Mary, "A new approach to probabilistic rounding error analysis", 2019). The multiple is a guess,
# with room for another order of summation, fused or not.
SAFETY = 8.0


def float_tolerance(dtype: DTypeLike, operations: int = 1) -> float:
    """Relative tolerance between two orders of the same computation: 8 eps sqrt(operations).

    Args:
        dtype: the least precise floating type on the way, `bfloat16` included.
        operations: how many roundings follow one another on the way to a number: terms of a sum,
            times steps of a run.

    Returns:
        A tolerance relative to the largest number on the way. Where the result is much smaller than
        that (cancellation), pass `atol=float_tolerance(...) * largest`.
    """
    if operations < 1:
        raise ValueError(f"operations is {operations}; expected at least 1 rounding.")
    return SAFETY * _epsilon(dtype) * float(np.sqrt(operations))


def standard_error_band(samples: ArrayLike, z: float = 4.0) -> np.ndarray:
    """How far the mean over the first axis may lie from the truth: t s / sqrt(S), for S samples.

    s is the sample standard deviation; t the Student quantile with S - 1 degrees of freedom whose
    tail is the normal tail beyond z. So, if the samples are about normal, a correct program fails
    as rarely with 5 seeds as with 500 (z = 4: once in 16,000 comparisons). A small S pays with a
    wide band (t is 4.1 at S = 200, 5.1 at 20, 17 at 5), not with false alarms.

    Args:
        samples: shape (S, ...), independent along the first axis.
        z: width of the band in normal standard errors.

    Returns:
        Half width of the band, shape (...).
    """
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim == 0 or samples.shape[0] < 2:
        raise ValueError(
            f"samples has shape {samples.shape}; expected at least 2 along the first axis: "
            "one sample has no standard error."
        )
    if not np.isfinite(samples).all():
        raise ValueError("samples holds a number that is not finite: take out diverged runs first.")
    count = samples.shape[0]
    # The lower tail: 1 - ndtr(z) would round away the digits that matter.
    quantile = -stdtrit(count - 1, ndtr(-z))
    return np.asarray(quantile * samples.std(axis=0, ddof=1) / np.sqrt(count))


def _epsilon(dtype: DTypeLike) -> float:
    # jnp rather than np: it knows bfloat16 and the eight-bit types.
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"dtype is {dtype}; expected a floating type: integers have no rounding.")
    return float(jnp.finfo(dtype).eps)
