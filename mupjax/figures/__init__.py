"""Figures. Each reads saved results and draws; none trains, and none touches pyplot's global state.

| function | draws |
|---|---|
| `learning_rate_figure` | final loss against learning rate, one curve a width, optima starred |
| `save` | the figure as PNG, SVG and PDF, the same bytes each time |

Labels, colours and markers live in `mupjax.figures.style`.
"""

from mupjax.figures.learning_rate import learning_rate_figure
from mupjax.figures.style import save

__all__ = ["learning_rate_figure", "save"]
