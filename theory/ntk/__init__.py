"""Neural tangent kernels, and training linearized around the initial weights, in closed form.

| module | answers |
|---|---|
| `analytic` | Which kernels do fully-connected networks have at infinite width? |
| `empirical` | Which tangent kernel does this model have, at these parameters? |
| `spectrum` | What are its largest eigenvalues, if it is too large to form? |
| `linearized` | What does gradient descent with a frozen kernel do to the squared loss, by mode? |

Notation: P examples, C outputs, the outputs of all examples stacked to R^{PC}, their Jacobian `J`
(PC × parameters), `K = J Jᵀ = U diag(κ) Uᵀ`.
"""

from theory.ntk.analytic import InfiniteWidthKernels, infinite_width_kernels
from theory.ntk.empirical import empirical_ntk, ntk_vector_product
from theory.ntk.linearized import LinearizedOptimum, LinearizedTraining, linearized_training
from theory.ntk.spectrum import Eigenpairs, ntk_operator, top_eigenpairs

__all__ = [
    "Eigenpairs",
    "InfiniteWidthKernels",
    "LinearizedOptimum",
    "LinearizedTraining",
    "empirical_ntk",
    "infinite_width_kernels",
    "linearized_training",
    "ntk_operator",
    "ntk_vector_product",
    "top_eigenpairs",
]
