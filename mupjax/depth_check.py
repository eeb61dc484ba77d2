"""Coordinate check over depth: how activations, and their change, scale with the number of layers.

The width is the same at all depths. Under rules that fit, the last residual stream and its change
in training neither grow nor vanish with depth (Yang et al., arXiv 2310.02244; Dey et al., arXiv
2505.01618, Figure 2).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from mupjax.adapters import ModelFactory, as_model
from mupjax.config import check_count, check_widths
from mupjax.coord_check import record_coordinates, refuse_grids
from mupjax.depth import Depth, with_depth
from mupjax.optimizers import OptimizerFactory
from mupjax.parametrization import Parametrization
from mupjax.setting import Setting

__all__ = ["depth_check"]


def depth_check(
    model: ModelFactory,
    setting: Setting,
    optimizer: OptimizerFactory,
    parametrization: Parametrization | str | Sequence[Parametrization | str],
    *,
    layers: Sequence[int],
    depth: Depth,
    width: int,
    hyperparameters: Mapping[str, float],
    base_width: int | None = None,
    steps: int = 5,
    seeds: int | Sequence[int] = 5,
    **options: Any,
) -> xr.Dataset:
    """Train for a few steps at every depth and record every layer's coordinates.

    Args:
      model: a factory with a parameter ``depth``.
      setting, optimizer, parametrization, seeds: as for :func:`mupjax.sweep`.
      layers: the depths, increasing.
      depth: what scales with depth; its own ``layers`` is not used.
      width: of all models.
      hyperparameters: one number each; choose a learning rate at which the loss moves.
      base_width: by default ``width``, so that nothing scales with the width.
      steps: number of updates.
      **options: further arguments of :func:`mupjax.sweep`.

    Returns:
      a dataset with ``coordinate_activation`` and ``coordinate_change`` over ([parametrization,]
      layers, seed, layer, update), which :func:`mupjax.coord_check.slopes` and ``slope_table``
      read. What is inside of blocks is averaged over them (``blocks/*/attention``), and the
      residual stream after the last one has a name (``blocks/last``).

    Raises:
      ValueError: a grid instead of a number, fewer than two depths, or as
        :func:`mupjax.coord_check.coord_check` does.
    """
    steps = check_count("steps", steps)
    refuse_grids("depth_check", hyperparameters)
    checked = check_widths(layers, "layers")
    if len(checked) < 2:
        raise ValueError(f"depth_check needs at least two depths to fit slopes, got {layers!r}.")
    if base_width is None or base_width == width:
        base_width = width
        # At the base width no initial scale changes, and none needs to be measured.
        options = {"init_exponents": {"*": 0.0}, **options}
    parts: list[xr.Dataset] = []
    with_depth(model, depth)
    records = [dataclasses.replace(depth, layers=n) for n in checked]
    for record in records:
        first = as_model(with_depth(model, record), width, setting)
        part = record_coordinates(
            first,
            model,
            setting,
            optimizer,
            parametrization,
            widths=[width],
            base_width=base_width,
            depth=record,
            hyperparameters=hyperparameters,
            steps=steps,
            seeds=seeds,
            **options,
        )
        parts.append(_by_place(part, record).isel(width=0, drop=True))
    index = xr.DataArray(
        list(checked), dims="layers", name="layers", attrs={"long_name": "number of layers"}
    )
    # A layer that only some depths have cannot be followed.
    dataset = xr.concat(
        parts, dim=index, data_vars="all", coords="minimal", join="inner",
        combine_attrs="override",
    )  # fmt: skip
    configuration = json.loads(dataset.attrs["configuration"])
    configuration["depth"] = [record.to_dict() for record in records]
    dataset.attrs["configuration"] = json.dumps(configuration)
    return dataset


def _by_place(dataset: xr.Dataset, depth: Depth) -> xr.Dataset:
    """The dataset with layers named alike at every depth."""
    names = [str(name) for name in dataset["layer"].values]
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found = depth.block_of(name)
        members.setdefault(name if found is None else found[1], []).append(i)
        if found is not None and found[0] == name:
            # Names are sorted as text, and there numbers are not: 10 comes before 9.
            last = found[1].replace("*", "last")
            ends = members.setdefault(last, [i])
            ends[0] = max(ends[0], i, key=lambda j: _number(names[j]))
    places = sorted(members)
    means = [dataset.isel(layer=members[place]).mean("layer", keep_attrs=True) for place in places]
    own = [name for name, array in dataset.data_vars.items() if "layer" in array.dims]
    layered = xr.concat([m[own] for m in means], dim="layer", coords="minimal", compat="override")
    layered = layered.assign_coords(layer=np.asarray(places))
    return dataset.drop_dims("layer").assign(layered.data_vars).assign_coords(layer=places)


def _number(name: str) -> int:
    return int("".join(c for c in name.rsplit("/", 1)[-1] if c.isdigit()))
