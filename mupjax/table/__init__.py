"""Tables of anybody's sweeps, in tidy form, as arrays that `theory` can judge.

| module | does |
|---|---|
| `records` | a file (CSV, Parquet, JSON lines, Zarr, netCDF) to columns whose rows have places |
| `cells` | which column is what, and cells to checked values |
| `runs` | rows to runs: repeats, last steps, further hyperparameters |
| `sweeps` | runs to losses over width × hyperparameter × seed, for each parametrization |
"""

from mupjax.table.cells import Columns, Scale
from mupjax.table.records import Records, read_records
from mupjax.table.sweeps import SweepTable, arrange_sweeps

__all__ = ["Columns", "Records", "Scale", "SweepTable", "arrange_sweeps", "read_records"]
