"""Observers: what a sweep records in training besides losses, in optax's (init, step) manner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import xarray as xr
from jax.typing import ArrayLike

from mupjax.adapters import Model
from mupjax.setting import Setting

__all__ = ["Observation", "Observer"]


class Observation(NamedTuple):
    """What an observer sees of one update of one trial.

    Attributes:
      step: index t of the update (int32 scalar).
      params: parameters before it, as the model uses them (forward multipliers applied).
      updated: the same after it.
      loss: training loss before it.
      batch: the batch it was made on.
      width: the trial's width (scalar).
      model: the model, with the trial's options (``readout_multiplier``) filled in; its ``roles``
        tell every parameter's role and layout.
      setting: the setting.
    """

    step: jax.Array
    params: Any
    updated: Any
    loss: jax.Array
    batch: Any
    width: jax.Array
    model: Model
    setting: Setting


@dataclasses.dataclass(frozen=True)
class Observer:
    """Records something along every trial's trajectory, inside the compiled loop.

    Attributes:
      name: prefix of the recorded variables.
      init: ``init(params, model, setting) -> state``, a pytree of arrays of fixed shapes.
      update: ``update(state, observation) -> state``, called after every update.
      result: ``result(state) -> {variable: array}``; arrays gain the sweep's dimensions in front.
      dims: names of the arrays' own dimensions, by variable.
      coords: ``coords(model) -> {dimension: values}``, coordinates of own dimensions at the model's
        width. Where they differ between widths, arrays are padded with nan to all of them.
      configuration: JSON-ready facts to store with results; a sweep with others is not resumed.
      check: ``check(dataset) -> texts``, called on the host with the finished sweep; each text is
        logged as a warning.
    """

    name: str
    init: Callable[[Any, Model, Setting], Any]
    update: Callable[[Any, Observation], Any]
    result: Callable[[Any], Mapping[str, jax.Array]]
    dims: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    coords: Callable[[Model], Mapping[str, ArrayLike]] | None = None
    configuration: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    check: Callable[[xr.Dataset], Sequence[str]] | None = None
