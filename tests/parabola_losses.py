"""Losses that are parabolas in the logarithm of the learning rate, with and without noise."""

import numpy as np

from theory import TransferSummary, transfer_summary
from tolerances import float_tolerance

WIDTHS = np.array([64, 128, 256, 512])
LOG_WIDTHS = np.log2(WIDTHS)
X = np.arange(-10.0, 3.0)
EPS = float_tolerance(np.float64, operations=64)


def parabolas(power=0.0, at=-4.0, curvature=0.4, floor=2.0, x=X, log_widths=LOG_WIDTHS):
    """Losses (width, learning rate) whose optimum is at 2^at (n / 64)^-power."""
    optimum = at - power * (log_widths - log_widths[0])
    return floor + 0.5 * curvature * (x - optimum[:, None]) ** 2


def summarise(losses, *, diverged=None, x=X, widths=WIDTHS, **options) -> TransferSummary:
    losses = np.asarray(losses)
    bad = np.zeros(losses.shape, dtype=bool) if diverged is None else diverged
    return transfer_summary(widths, 2.0**x, losses, bad, **options)


def with_seeds(curves, seeds=4, rng=None, shared=0.0, cells=0.0):
    """Add noise: `shared` by all cells of one seed, and independent in each cell."""
    rng = rng or np.random.default_rng(0)
    noise = shared * rng.normal(size=(1, 1, seeds)) + cells * rng.normal(
        size=(*curves.shape, seeds)
    )
    return curves[..., None] + noise
