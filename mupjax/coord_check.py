"""Coordinate check: how activations, and their change in training, scale with width.

A parametrization is right for feature learning if, over the first steps, every layer's coordinates
and their change neither grow nor vanish with width (Yang et al., arXiv 2203.03466, Appendix D.1).
It says nothing of whether hyperparameters transfer: sweep them for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from scipy.special import stdtrit

from mupjax.adapters import Model, ModelFactory
from mupjax.config import check_count
from mupjax.observe import Observation, Observer
from mupjax.optimizers import OptimizerFactory
from mupjax.parametrization import Parametrization
from mupjax.prepare import prepare
from mupjax.results import with_parametrizations
from mupjax.setting import Setting
from mupjax.sweep import sweep

__all__ = ["CoordinateSlope", "coord_check", "coordinate_observer", "slope_table", "slopes"]

_NAME = "coordinate"


@dataclasses.dataclass(frozen=True)
class CoordinateSlope:
    """Power of the width (or depth) with which one layer's coordinates scale.

    Attributes:
      parametrization: its name ("" if the check had one only and did not name it).
      layer: path of the layer (``output``: the whole model's).
      quantity: ``activation`` (mean |h_t|) or ``change`` (mean |h_t - h_0|).
      update: t, number of updates made.
      slope: least-squares slope of log2(quantity) on log2(width), or of the number of layers,
        averaged over seeds.
      interval: Student interval of the slope from the spread over seeds; (nan, nan) for one seed.
    """

    parametrization: str
    layer: str
    quantity: str
    update: int
    slope: float
    interval: tuple[float, float]


def coordinate_observer(updates: int) -> Observer:
    """Observer of mean |h| and mean |h - h_0| of every layer's output on the validation batch.

    Records ``coordinate_activation`` and ``coordinate_change`` with dimensions (layer, update),
    where update runs from 0 to ``updates``.
    """

    def outputs(params: Any, model: Model, setting: Setting) -> Mapping[str, jax.Array]:
        seen: list[Mapping[str, jax.Array]] = []

        def predict(*inputs: Any, **kwargs: Any) -> Any:
            assert model.intermediates is not None
            seen.append(model.intermediates(params, *inputs, **kwargs))
            return model.apply(params, *inputs, **kwargs)

        setting.loss(predict, setting.validation)
        return seen[0]

    def size(h: jax.Array) -> jax.Array:
        return jnp.mean(jnp.abs(h)).astype(jnp.float32)

    def stacked(values: Mapping[str, jax.Array]) -> jax.Array:
        return jnp.stack([values[layer] for layer in sorted(values)])

    def init(params: Any, model: Model, setting: Setting) -> Any:
        first = outputs(params, model, setting)
        blank = jnp.full((len(first), updates + 1), jnp.nan, jnp.float32)
        sizes = stacked({k: size(h) for k, h in first.items()})
        return first, blank.at[:, 0].set(sizes), blank.at[:, 0].set(0.0)

    def update(state: Any, seen: Observation) -> Any:
        first, activation, change = state
        now = outputs(seen.updated, seen.model, seen.setting)
        sizes = stacked({k: size(h) for k, h in now.items()})
        moved = stacked({k: size(now[k] - first[k]) for k in now})
        t = seen.step + 1
        return first, activation.at[:, t].set(sizes), change.at[:, t].set(moved)

    dims = {"activation": ("layer", "update"), "change": ("layer", "update")}
    return Observer(
        _NAME, init, update, lambda state: {"activation": state[1], "change": state[2]}, dims
    )


def coord_check(
    model: ModelFactory,
    setting: Setting,
    optimizer: OptimizerFactory,
    parametrization: Parametrization | str | Sequence[Parametrization | str],
    *,
    widths: Sequence[int],
    hyperparameters: Mapping[str, float],
    base_width: int | None = None,
    steps: int = 5,
    seeds: int | Sequence[int] = 5,
    **options: Any,
) -> xr.Dataset:
    """Train for a few steps at every width and record every layer's coordinates.

    Args:
      model, setting, optimizer, parametrization, widths, base_width, seeds: as for
        :func:`mupjax.sweep`.
      hyperparameters: one number each; choose a learning rate at which the loss moves.
      steps: number of updates.
      **options: further arguments of :func:`mupjax.sweep`.

    Returns:
      the sweep's dataset with ``coordinate_activation`` and ``coordinate_change`` over
      ([parametrization,] width, seed, layer, update).

    Raises:
      ValueError: a grid instead of a number, fewer than two widths, or a model that cannot tell its
        layers' outputs (a pure-function model without ``intermediates``).
    """
    steps = check_count("steps", steps)
    refuse_grids("coord_check", hyperparameters)
    if len(widths) < 2:
        raise ValueError(
            f"coord_check needs at least two widths to fit slopes, got {list(widths)}."
        )
    arguments: dict[str, Any] = {
        "widths": widths,
        "hyperparameters": hyperparameters,
        "base_width": base_width,
        "steps": steps,
        "seeds": seeds,
        **options,
    }
    plan = prepare(
        model,
        setting,
        optimizer,
        parametrization,
        **{k: v for k, v in arguments.items() if k not in _RUNTIME_OPTIONS},
    )
    first = plan.models[plan.widths[0]]
    return record_coordinates(first, model, setting, optimizer, parametrization, **arguments)


_RUNTIME_OPTIONS = ("chunk_size", "out", "existing", "progress")


def refuse_grids(check: str, hyperparameters: Mapping[str, Any]) -> None:
    """Raise a ValueError if a hyperparameter of a coordinate check has several values."""
    gridded = [name for name, value in hyperparameters.items() if np.ndim(value) > 0]
    if gridded:
        raise ValueError(
            f"{check} takes one value for each hyperparameter; {', '.join(gridded)} has a grid."
        )


def record_coordinates(
    first: Model,
    model: ModelFactory,
    setting: Setting,
    optimizer: OptimizerFactory,
    parametrization: Parametrization | str | Sequence[Parametrization | str],
    *,
    steps: int,
    **arguments: Any,
) -> xr.Dataset:
    """A sweep with a :func:`coordinate_observer`, and the names of the layers.

    Args:
      first: the model at one of the widths, which tells its layers.
      model, setting, optimizer, parametrization, steps, **arguments: of :func:`mupjax.sweep`.

    Raises:
      ValueError: the model cannot tell its layers' outputs.
    """
    if first.intermediates is None:
        raise ValueError(
            "this mupjax.Model has no `intermediates`: give a function (params, *inputs) -> "
            "{layer: activations}, or use a flax model."
        )
    observer = coordinate_observer(steps)
    dataset = sweep(
        model,
        setting,
        optimizer,
        parametrization,
        observers=[observer],
        evaluations=1,
        strategy="bucketed",
        steps=steps,
        **arguments,
    )
    abstract = jax.eval_shape(
        lambda params: observer.init(params, first, setting)[0], first.abstract_params()
    )
    return dataset.assign_coords(layer=sorted(abstract), update=np.arange(steps + 1))


def checked_size(dataset: xr.Dataset) -> str:
    """The dimension along which a coordinate check goes: ``width``, or ``layers``."""
    return "layers" if "layers" in dataset.dims else "width"


def slopes(dataset: xr.Dataset, confidence: float = 0.9) -> list[CoordinateSlope]:
    """Fitted powers of the width (or depth) by parametrization, layer, quantity and update.

    Args:
      dataset: of :func:`coord_check` or :func:`mupjax.depth_check.depth_check`.
      confidence: of the intervals.

    Raises:
      ValueError: a dataset without coordinates.
    """
    if f"{_NAME}_activation" not in dataset:
        raise ValueError("this dataset holds no coordinates: it was not made by coord_check.")
    dataset = with_parametrizations(dataset)
    size = checked_size(dataset)
    log_size = np.log2(dataset[size].values.astype(float))
    centred = log_size - log_size.mean()
    found = []
    for quantity in ("activation", "change"):
        array = dataset[f"{_NAME}_{quantity}"].transpose(
            "parametrization", "layer", "update", "seed", size
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log2(array.values.astype(float))
            per_seed = (logs * centred).sum(axis=-1) / (centred**2).sum()
        for p, name in enumerate(dataset["parametrization"].values):
            for i, layer in enumerate(dataset["layer"].values):
                for t in dataset["update"].values:
                    values = per_seed[p, i, int(t)]
                    if quantity == "change" and t == 0:
                        continue
                    half = np.nan
                    if len(values) > 1:
                        quantile = stdtrit(len(values) - 1, 0.5 + confidence / 2)
                        half = quantile * values.std(ddof=1) / np.sqrt(len(values))
                    mean = float(values.mean())
                    found.append(
                        CoordinateSlope(
                            str(name),
                            str(layer),
                            quantity,
                            int(t),
                            mean,
                            (mean - half, mean + half),
                        )
                    )
    return found


def slope_table(dataset: xr.Dataset, confidence: float = 0.9) -> str:
    """The slopes as a table: at the start, and after the last update.

    About 0 is right for feature learning (the readout's activation at the start may fall as
    width**-1/2 under muP); positive slopes blow up with width (or depth), negative ones vanish.
    """
    last = int(dataset["update"].values[-1])
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for s in slopes(dataset, confidence):
        if s.update in (0, last):
            column = f"{s.quantity} t={s.update}"
            text = f"{s.slope:+.2f} [{s.interval[0]:+.2f}, {s.interval[1]:+.2f}]"
            rows.setdefault((s.parametrization, s.layer), {})[column] = text
    columns = ["activation t=0", f"activation t={last}", f"change t={last}"]
    head = ["parametrization", "layer", *columns]
    body = [[*key, *(row.get(c, "") for c in columns)] for key, row in rows.items()]
    sizes = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(n) for c, n in zip(line, sizes, strict=True)).rstrip()
        for line in [head, *body]
    ]
    of = "width" if checked_size(dataset) == "width" else "number of layers"
    title = f"powers of the {of}, with {confidence:.0%} intervals over seeds"
    return "\n".join([title, *lines])
