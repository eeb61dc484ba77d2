"""Neural tangent kernels, and training linearized around the initial weights, in closed form.

| module | answers |
|---|---|
| `analytic` | Which kernels do fully-connected networks have at infinite width? |
| `empirical` | Which tangent kernel does this model have, at these parameters? |
| `spectrum` | What are its largest eigenvalues, if it is too large to form? |
| `linearized` | What does gradient descent with a frozen kernel do to the squared loss, by mode? |
| `ensemble` | Does the learning rate of that transfer from finite to infinite width? |
| `modes` | How does any update change the loss, by modes of a kernel? |
| `observer` | The same, recorded in training. |

Notation: P examples, C outputs, the outputs of all examples stacked to R^{PC}, their Jacobian `J`
(PC × parameters), `K = J Jᵀ = U diag(κ) Uᵀ`.
"""

from theory.ntk.analytic import InfiniteWidthKernels, infinite_width_kernels
from theory.ntk.empirical import empirical_ntk, ntk_vector_product
from theory.ntk.ensemble import EnsembleGaps, LinearizedEnsemble, linearized_ensemble
from theory.ntk.linearized import LinearizedOptimum, LinearizedTraining, linearized_training
from theory.ntk.modes import UpdateModes, decompose_update, kernel_modes, mode_contributions
from theory.ntk.observer import ntk_observer
from theory.ntk.spectrum import Eigenpairs, ntk_operator, top_eigenpairs

__all__ = [
    "Eigenpairs",
    "EnsembleGaps",
    "InfiniteWidthKernels",
    "LinearizedEnsemble",
    "LinearizedOptimum",
    "LinearizedTraining",
    "UpdateModes",
    "decompose_update",
    "empirical_ntk",
    "infinite_width_kernels",
    "kernel_modes",
    "linearized_ensemble",
    "linearized_training",
    "mode_contributions",
    "ntk_observer",
    "ntk_operator",
    "ntk_vector_product",
    "top_eigenpairs",
]
