"""What ``mupjax reproduce mlp-sgd`` trains: two-layer ReLU nets without biases, momentum SGD."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import optax
import xarray as xr
from numpy.typing import NDArray

from mupjax.data import Augmentation, cifar10, digits
from mupjax.models import MLP
from mupjax.optimizers import wsd_schedule
from mupjax.reproduce.sizes import check_data, restricted
from mupjax.reproduce.target import Scale
from mupjax.setting import Setting
from mupjax.sweep import sweep
from theory.decomposition import decomposition_observer
from theory.samplewise import sample_losses_observer, samplewise_observer
from theory.trajectory import GWB_LLAMA, LAPTOP, Averaging

__all__ = ["PARAMETRIZATION", "SIZES", "Sizes", "check_sizes", "train_grid", "train_samplewise"]

PARAMETRIZATION = "muP"
MOMENTUM = 0.9
_INPUTS = {"digits": 64, "cifar10": 3072}
# Beyond, one width takes a CPU days.
_LARGEST_ON_CPU = 256


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is trained, and on what.

    Attributes:
      widths: n, increasing; the first is the base width.
      learning_rates: grid, increasing.
      steps: T.
      seeds: S.
      batch_size: B.
      validation_examples: P.
      averaging: of the iterates.
      times: numbers of updates at which the decomposition is recorded on the way.
      dataset: "digits", or "cifar10" from the folder `data`.
      data: folder with a local copy.
      published_training: data, steps, batch and augmentation are the paper's.
    """

    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    steps: int
    seeds: int
    batch_size: int
    validation_examples: int
    averaging: Averaging
    times: tuple[int, ...]
    dataset: str = "digits"
    data: str | None = None
    published_training: bool = False

    def classes(self) -> NDArray[np.int64]:
        """The class of every validation example."""
        labels = np.asarray(self.setting().validation[1])
        return labels.argmax(axis=-1) if labels.ndim > 1 else labels.astype(np.int64)

    def setting(self) -> Setting:
        """The learning problem."""
        if self.dataset == "digits":
            return digits(self.batch_size, self.validation_examples)
        assert self.data is not None
        return cifar10(
            self.data,
            batch_size=self.batch_size,
            augmentation=Augmentation(),
            validation_examples=self.validation_examples,
        )


def _rates(low: float, high: float, step: float) -> tuple[float, ...]:
    return tuple(2.0**x for x in np.arange(low, high + step / 2, step))


SIZES: Mapping[Scale, Sizes] = MappingProxyType(
    {
        "tiny": Sizes(
            widths=(8, 16),
            learning_rates=_rates(-6, -2, 2),
            steps=24,
            seeds=2,
            batch_size=16,
            validation_examples=60,
            averaging=Averaging(0.5, 0.8, 2, 4, 8),
            times=(8, 24),
        ),
        "laptop": Sizes(
            widths=(16, 32, 64, 128, 256, 512),
            learning_rates=_rates(-9, 0, 0.75),
            steps=600,
            seeds=3,
            batch_size=128,
            validation_examples=900,
            averaging=LAPTOP,
            times=(10, 20, 40, 60, 100, 150, 200, 300, 400, 500, 600),
        ),
        "paper": Sizes(
            widths=tuple(2**k for k in range(7, 14)),
            learning_rates=(
                1e-3,
                2e-3,
                4e-3,
                5.7e-3,
                8e-3,
                1.13e-2,
                1.6e-2,
                2.26e-2,
                3.2e-2,
                4.5e-2,
            ),
            steps=100 * 50_000 // 512,
            seeds=3,
            batch_size=512,
            validation_examples=10_000,
            averaging=GWB_LLAMA,
            times=(100, 300, 1000, 3000, 5000, 7000, 9000, 9760),
            dataset="cifar10",
            published_training=True,
        ),
    }
)


def check_sizes(
    scale: Scale,
    *,
    seeds: int | None = None,
    max_width: int | None = None,
    data: str | None = None,
) -> Sizes:
    """The sizes of a scale, with the options of the command line.

    Raises:
      ValueError: an option out of range; ``data`` where it is not used, or not where it is needed.
      FileNotFoundError: no such folder.
    """
    sizes = SIZES[scale]
    check_data("mlp-sgd", scale, "CIFAR-10" if sizes.dataset == "cifar10" else None, data)
    sizes = dataclasses.replace(sizes, data=data)
    return restricted(
        sizes, scale, seeds=seeds, max_width=max_width, largest_on_cpu=_LARGEST_ON_CPU
    )


def train_grid(sizes: Sizes, folder: Path, progress: bool | None) -> xr.Dataset:
    """All learning rates, with the decomposition and every example's final loss."""
    observers = [
        decomposition_observer(sizes.averaging, times=sizes.times),
        sample_losses_observer(sizes.averaging),
    ]
    return _train(sizes, sizes.learning_rates, observers, folder / "grid.nc", progress)


def train_samplewise(
    sizes: Sizes, learning_rate: float, folder: Path, progress: bool | None
) -> xr.Dataset:
    """One learning rate, with the sample-wise decomposition."""
    observers = [samplewise_observer(sizes.averaging, rank_one=True)]
    return _train(sizes, (learning_rate,), observers, folder / "samplewise.nc", progress)


def _train(
    sizes: Sizes,
    learning_rates: tuple[float, ...],
    observers: list,
    out: Path,
    progress: bool | None,
) -> xr.Dataset:
    inputs = _INPUTS[sizes.dataset]
    return sweep(
        lambda width, rngs: MLP(inputs, width, 10, use_bias=False, rngs=rngs),
        sizes.setting(),
        lambda learning_rate, momentum: optax.sgd(learning_rate, momentum=momentum),
        [PARAMETRIZATION],
        widths=sizes.widths,
        base_width=sizes.widths[0],
        hyperparameters={"learning_rate": learning_rates, "momentum": MOMENTUM},
        steps=sizes.steps,
        seeds=sizes.seeds,
        schedule=wsd_schedule(sizes.steps),
        observers=observers,
        out=out,
        existing="resume",
        progress=progress,
    )
