"""What sweeps say, in numbers: arrays in, numbers out; nothing here trains or draws.

| module | answers |
|---|---|
| `curves` | Where, between the grid's points, is a loss curve's minimum over a hyperparameter? |
| `drift` | Does the best learning rate stay as the network widens, and how sure is that? |
"""

from theory.curves import Optima, Optimum, interpolate_loss, locate_optima, locate_optimum
from theory.drift import TransferSummary, transfer_summary

__all__ = [
    "Optima",
    "Optimum",
    "TransferSummary",
    "interpolate_loss",
    "locate_optima",
    "locate_optimum",
    "transfer_summary",
]
