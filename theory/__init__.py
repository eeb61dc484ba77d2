"""What sweeps say, in numbers: arrays in, numbers out; nothing here trains or draws.

| module | answers |
|---|---|
| `curves` | Where, between the grid's points, is a loss curve's minimum over a hyperparameter? |
| `curves_quartic` | The same by the quartic through five points. |
| `midpoints` | The same by the middle of the interval of values that are good enough. |
| `drift` | Does the best learning rate stay as the network widens, and how sure is that? |
| `drift_summary`, `drift_judgement` | Its record, and its answer in words. |
| `losses` | Tables of losses, checked, and their bootstrap draws. |
| `readings` | Every width's optimum, with what seeds and the grid leave open. |
| `rates` | Which power law with a limit do these numbers follow, if any, and how sure is that? |
| `rates_resampling` | How much do its exponents hang on single seeds and widths? |
| `gaps` | How far are a width's loss and optimum from those of infinite width? |
| `verdict`, `judgement` | Does a hyperparameter transfer fast, weakly or not at all? |
| `diagnosis` | The record of that: attributes, JSON, table. |
| `forecast` | What will the optimum and the loss be at a width not yet run? |
| `forecast_models`, `forecast_choice` | By which models, or which naive forecast, and why? |
| `suspicions` | What is odd about a table of losses? |
| `propositions` | Which rates of loss, optimum and penalty go together, on functions known. |
| `grid_search`, `planner` | At which width should a budget tune, and at which should it train? |
| `trajectory` | Along which averaged, subsampled trajectory is the loss linearized? |
| `decomposition`, `layers` | Which share of the change of the loss do the top k directions make? |
| `faithfulness` | Do the shares add up, and if not, what is to blame? |
| `alignment`, `truncation` | Which directions of an update lower the loss, and how few suffice? |
| `mechanism`, `mechanism_report` | Does transfer rest on a top part that all widths share? |
| `samplewise`, `sample_groups` | Which examples do the top directions learn? |
| `profiles` | Up to which k do the top-k parts of two widths agree? |
| `krylov` | The first eigenvalues of wide layers. |
| `ntk` | What does a network do whose tangent kernel stays? |
"""

from theory.curves import Optima, Optimum, interpolate_loss, locate_optima, locate_optimum
from theory.drift import TransferSummary, transfer_summary
from theory.forecast import Forecast
from theory.gaps import Gaps, transfer_gaps
from theory.midpoints import locate_midpoints
from theory.rates import PowerLaw, fit_power_law
from theory.verdict import TransferDiagnosis, diagnose_transfer

__all__ = [
    "Forecast",
    "Gaps",
    "Optima",
    "Optimum",
    "PowerLaw",
    "TransferDiagnosis",
    "TransferSummary",
    "diagnose_transfer",
    "fit_power_law",
    "interpolate_loss",
    "locate_midpoints",
    "locate_optima",
    "locate_optimum",
    "transfer_gaps",
    "transfer_summary",
]
