"""The main path in a minute: does the best learning rate of an MLP on real digits stay put?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import optax
import xarray as xr
from flax import nnx

from mupjax.adapters import ModelFactory
from mupjax.config import check_count
from mupjax.data import digits
from mupjax.models import MLP
from mupjax.optimizers import wsd_schedule
from mupjax.results import load
from mupjax.sweep import sweep

__all__ = ["Quickstart", "check_folder", "digits_mlp", "run_quickstart"]

DATASET = "sweep.nc"


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """What ``mupjax quickstart`` trains; the defaults take about a minute on two cores."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    learning_rates: tuple[float, ...] = tuple(2.0**k for k in range(-12, 1))
    base_width: int = 64
    seeds: int = 3
    steps: int = 100
    batch_size: int = 256
    validation_examples: int = 797
    depth: int = 1


def digits_mlp(depth: int) -> ModelFactory:
    """Factory of ReLU MLPs for the digits: 64 pixels in, 10 classes out."""

    def factory(width: int, rngs: nnx.Rngs) -> MLP:
        return MLP(64, width, 10, depth=depth, rngs=rngs)

    return factory


def check_folder(folder: Path) -> bool:
    """Whether a run's folder holds an earlier run, to be replaced.

    Raises:
      FileExistsError: it is a file, or a folder that holds something else.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise FileExistsError(f"{str(folder)!r} is a file: choose another folder with --out.")
    if not any(folder.iterdir()):
        return False
    dataset, parts = folder / DATASET, folder / (DATASET + ".parts")
    if dataset.exists():
        try:
            load(dataset)
        except (ValueError, OSError) as error:
            raise FileExistsError(
                f"{str(dataset)!r} is no result of a sweep, so {str(folder)!r} is left alone: "
                "choose another folder with --out."
            ) from error
        return True
    if parts.is_dir():
        return True
    raise FileExistsError(
        f"{str(folder)!r} is not empty and holds no earlier run: choose another folder with --out."
    )


def run_quickstart(options: Quickstart, folder: Path, progress: bool | None = None) -> xr.Dataset:
    """Sweep SP and muP with Adam over widths, learning rates and seeds; writes the dataset.

    Args:
      options: what to train.
      folder: receives ``sweep.nc``.
      progress: as for :func:`mupjax.sweep`.
    """
    steps = check_count("steps", options.steps)
    return sweep(
        digits_mlp(options.depth),
        digits(options.batch_size, options.validation_examples),
        lambda learning_rate: optax.adam(learning_rate),
        ["SP", "muP"],
        widths=options.widths,
        hyperparameters={"learning_rate": options.learning_rates},
        steps=steps,
        seeds=options.seeds,
        base_width=options.base_width,
        schedule=wsd_schedule(steps),
        out=folder / DATASET,
        existing="replace",
        progress=progress,
    )
