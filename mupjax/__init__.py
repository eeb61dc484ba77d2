"""mupjax: when do hyperparameters transfer across width, how fast, and why.

The engine: a :class:`Setting` and a model factory go in, a labelled dataset comes out of
:func:`sweep`. Closed-form settings live in ``synthetic``, the analysis in ``theory``, figures,
reports and the command line at the top of this package.
"""

from mupjax.adapters import Model
from mupjax.cores import use_all_cores
from mupjax.depth import Depth, completep, depth_mup, unscaled
from mupjax.observe import Observation, Observer
from mupjax.optimizers import wsd_schedule
from mupjax.parametrization import (
    NTP,
    PRESETS,
    SP,
    Exponents,
    Parametrization,
    WeightDecayMode,
    adaptive_transfer,
    mean_field,
    muP,
)
from mupjax.results import load, save
from mupjax.setting import Setting
from mupjax.sweep import resolve_sweep, sweep

__all__ = [
    "NTP",
    "PRESETS",
    "SP",
    "Depth",
    "Exponents",
    "Model",
    "Observation",
    "Observer",
    "Parametrization",
    "Setting",
    "WeightDecayMode",
    "adaptive_transfer",
    "completep",
    "depth_mup",
    "load",
    "mean_field",
    "muP",
    "resolve_sweep",
    "save",
    "sweep",
    "unscaled",
    "use_all_cores",
    "wsd_schedule",
]
