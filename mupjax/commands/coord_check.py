"""``mupjax coord-check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from mupjax.commands.devices import one_device_per_core

__all__ = ["coord_check"]


def coord_check(
    config: Annotated[Path | None, tyro.conf.Positional] = None,
    out: Path = Path("runs/coord-check"),
    steps: int = 5,
    seeds: int = 5,
    learning_rate: float | None = None,
) -> None:
    """Check how activations and their change scale with width, for a few steps.

    Args:
      config: a sweep's TOML file; without one, the quickstart's MLP with one more hidden layer.
      out: folder to write to.
      steps: number of updates.
      seeds: number of seeds.
      learning_rate: default 2^-8, or the geometric middle of the file's grid.
    """
    one_device_per_core()
    import optax

    from mupjax import results
    from mupjax.coord_check import coord_check as check
    from mupjax.coord_check import slope_table
    from mupjax.data import digits
    from mupjax.figures import save
    from mupjax.figures.coordinates import coordinate_figure
    from mupjax.quickstart import digits_mlp

    dataset_path = out / "coordinates.nc"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not dataset_path.exists())):
        raise FileExistsError(
            f"{str(out)!r} holds something else: choose another folder with --out."
        )
    if config is None:
        dataset = check(
            digits_mlp(2),
            digits(),
            lambda learning_rate: optax.adam(learning_rate),
            ["SP", "NTP", "muP"],
            widths=(64, 128, 256, 512, 1024),
            hyperparameters={"learning_rate": learning_rate or 2.0**-8},
            base_width=64,
            steps=steps,
            seeds=seeds,
        )
    else:
        from mupjax.config_file import read_sweep_file

        file = read_sweep_file(config)
        fixed = {k: _middle(v) for k, v in file.arguments["hyperparameters"].items()}
        if learning_rate is not None:
            fixed["learning_rate"] = learning_rate
        taken = ("hyperparameters", "steps", "seeds", "evaluations", "schedule", "strategy")
        options = {k: v for k, v in file.arguments.items() if k not in taken}
        dataset = check(
            file.model,
            file.setting,
            file.optimizer,
            file.parametrizations,
            hyperparameters=fixed,
            steps=steps,
            seeds=seeds,
            **options,
        )
    results.save(dataset, dataset_path)
    written = save(coordinate_figure(dataset), out / "coordinates", formats=("png", "svg"))
    print(slope_table(dataset))
    print(
        "about 0: stable; positive: blows up with width; negative: vanishes. Under muP the readout "
        "may start as width^-0.5."
    )
    print(f"\nwrote {', '.join(map(str, [dataset_path, *written]))}")


def _middle(values: object) -> float:
    import numpy as np

    grid = np.atleast_1d(np.asarray(values, float))
    if grid.size == 0:
        raise ValueError("a hyperparameter's grid is empty.")
    return float(grid[len(grid) // 2])
