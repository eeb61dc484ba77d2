"""Random-features ridge regression: fast transfer of the ridge, provably (GWB, Theorem 3).

| module | holds |
|---|---|
| `activations` | Gaussian moments and Hermite coefficients of any activation |
| `fixed_point` | the coupled equations as one monotone equation; the risk without cancellation |
| `asymptotics` | risk at every ridge and width; infinite width in closed form |
| `optimum` | best ridge against width; loss gap, HP gap, transfer suboptimality |
| `constants` | first-order constants of the optimum, and an erratum to the published ones |
| `simulation` | networks of finite size, one decomposition for all ridges |
"""

from synthetic.random_features.activations import (
    ACTIVATIONS,
    Activation,
    Moments,
    hermite_coefficients,
    moments,
)
from synthetic.random_features.asymptotics import InfiniteWidth, asymptotic_risk, infinite_width
from synthetic.random_features.constants import FirstOrderConstants, first_order_constants
from synthetic.random_features.optimum import (
    OptimalRidge,
    TransferGaps,
    optimal_ridge,
    transfer_gaps,
)
from synthetic.random_features.simulation import SimulatedRisk, simulate_risk

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "FirstOrderConstants",
    "InfiniteWidth",
    "Moments",
    "OptimalRidge",
    "SimulatedRisk",
    "TransferGaps",
    "asymptotic_risk",
    "first_order_constants",
    "hermite_coefficients",
    "infinite_width",
    "moments",
    "optimal_ridge",
    "simulate_risk",
    "transfer_gaps",
]
