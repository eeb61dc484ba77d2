"""Networks whose depth grows with their width, tuned at the base and widened by rule.

The rules are the ones compared by the source of Adaptive Transfer, all matrices alike, with
``m = w / base``:

    scheme              learning rate    initial std    weight decay
    SP                  1                1              1
    muP                 m^-1             m^-1/2         1
    Adaptive Transfer   m^-0.8           m^-1/2         m^-0.3

Its "muP" is not the one of Yang et al. (arXiv 2203.03466, Table 3), which treats input and output
matrices otherwise, and its "SP" keeps the initial std of the base where libraries shrink it with
the fan-in: both of these are trained beside as controls.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from flax import nnx

from mupjax.config import check_count, check_widths
from mupjax.data import digits
from mupjax.models import MLP
from mupjax.optimizers import wsd_schedule
from mupjax.parametrization import SP, Exponents, Parametrization, adaptive_transfer, muP
from mupjax.reproduce.adaptive_transfer_measures import fitted_optimum
from mupjax.roles import Role
from mupjax.setting import Predict, Setting
from mupjax.sweep import sweep

__all__ = ["CONTROLS", "SCHEMES", "Experiment", "ResidualMLP", "run_sweeps", "teacher"]


def _all_matrices(name: str, *, rate: float, std: float) -> Parametrization:
    row = Exponents(learning_rate=rate, init_std=std)
    rows: dict[Role, Exponents] = {"input": row, "hidden": row, "output": row}
    return Parametrization(name, {"adam": {**rows, "vector": Exponents()}})


SCHEMES: Mapping[str, Parametrization] = MappingProxyType(
    {
        "SP": _all_matrices("SP", rate=0.0, std=0.0),
        "muP": _all_matrices("muP", rate=1.0, std=0.5),
        "Adaptive Transfer": adaptive_transfer,
    }
)
"""The three schemes of the source. The second, whose weight decay does not scale either, is a
network with one global rate in other units: its curves say what the best global rate is."""

CONTROLS: Mapping[str, Parametrization] = MappingProxyType(
    {
        "SP, std 1/sqrt(fan-in)": dataclasses.replace(SP, name="SP, std 1/sqrt(fan-in)"),
        "muP, per layer": dataclasses.replace(muP, name="muP, per layer"),
    }
)
"""The library default and the maximal update parametrization, as elsewhere in this package."""

_REFERENCE = "muP"

# nnx.Linear draws with std 1/sqrt(fan-in). Stated, it need not be measured for every width.
_INIT_EXPONENTS: Mapping[str, Mapping[str, float]] = {
    "plain": {"hidden/0/kernel": 0.0, "hidden/[1-9]*/kernel": 0.5, "readout/kernel": 0.5},
    "residual": {"embed/kernel": 0.0, "blocks/*/kernel": 0.5, "readout/kernel": 0.5},
}

_INPUTS, _TEACHER_UNITS, _CLASSES = 32, 64, 10


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained.

    Attributes:
      widths: increasing; the first is the base, at which the rate is tuned and all factors are 1.
      base_depth: hidden layers at the base; each doubling of the width adds one.
      search: rates tried at the base, first.
      offsets: rates of the reference at every width, in octaves from the base's optimum over m.
      near: rates of every scheme at every width, in octaves from the one it transfers; some of
        `offsets`, 0 among them.
      seeds: S.
      steps: T, Adam with linear warm-up, constant rate and cooldown.
      batch_size: B.
      validation_examples: held out.
      weight_decay: of the base, coupled (``W -= lr * wd * W``, as in AdamW).
      task: ``teacher``, fresh batches labelled by a random network, or the ``digits``.
      network: ``plain``, or ``residual`` with a norm before every matrix.
    """

    widths: tuple[int, ...] = (24, 48, 96, 192, 384)
    base_depth: int = 2
    search: tuple[float, ...] = tuple(2.0 ** (k / 2) for k in range(-20, -4))
    offsets: tuple[float, ...] = tuple(k / 2 for k in range(-5, 6))
    near: tuple[float, ...] = (-1.0, 0.0, 1.0)
    seeds: int = 4
    steps: int = 256
    batch_size: int = 64
    validation_examples: int = 2048
    weight_decay: float = 0.1
    task: Literal["teacher", "digits"] = "teacher"
    network: Literal["plain", "residual"] = "plain"

    def __post_init__(self) -> None:
        widths = check_widths(self.widths)
        check_count("base_depth", self.base_depth)
        check_count("seeds", self.seeds)
        if len(widths) < 2:
            raise ValueError(f"widths must hold the base and a larger one, got {self.widths!r}.")
        if len(self.offsets) < 3 or any(np.diff(self.offsets) <= 0):
            raise ValueError(
                f"offsets must be at least 3 increasing octaves, got {self.offsets!r}."
            )
        if 0.0 not in self.near or not set(self.near) <= set(self.offsets):
            raise ValueError(
                f"near must hold 0 and only values of offsets ({self.offsets!r}), got "
                f"{self.near!r}."
            )
        for name, known in (("task", ("teacher", "digits")), ("network", ("plain", "residual"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")

    @property
    def base_width(self) -> int:
        """The width at which the rate is tuned."""
        return self.widths[0]

    def depth(self, width: int) -> int:
        """Hidden layers: one more for each doubling.

        From base 256 to 4096 hidden parameters then grow by a factor of ``16**2 * 6 / 2 = 768``,
        as the source's do from 10M to 7B (700).
        """
        return self.base_depth + round(math.log2(width / self.base_width))

    def setting(self) -> Setting:
        """The task as the engine takes it."""
        if self.task == "digits":
            return digits(self.batch_size, self.validation_examples)
        return teacher(self.batch_size, self.validation_examples)

    def guessing_loss(self) -> float:
        """Loss in nats of the best constant prediction: the entropy of the validation labels."""
        counts = np.bincount(np.asarray(self.setting().validation[1]))
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


def teacher(batch_size: int, validation_examples: int) -> Setting:
    """Ten classes given by a random two-layer network; batches are fresh, so nothing is overfit.

    ``x ~ N(0, I_32)``, label ``argmax_c [V tanh(2 W x)]_c``, with W (64, 32) and V (10, 64) of
    variance 1/fan-in, drawn once from a fixed key. Loss: cross-entropy in nats.
    """
    key_in, key_out, key_validation = jax.random.split(jax.random.key(7), 3)
    W = jax.random.normal(key_in, (_INPUTS, _TEACHER_UNITS)) / math.sqrt(_INPUTS)
    V = jax.random.normal(key_out, (_TEACHER_UNITS, _CLASSES)) / math.sqrt(_TEACHER_UNITS)

    def labelled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, jnp.argmax(jnp.tanh(2 * x @ W) @ V, axis=-1)

    def sample(data: None, key: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        return labelled(jax.random.normal(jax.random.fold_in(key, step), (batch_size, _INPUTS)))

    def loss(predict: Predict, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = predict(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return Setting(
        "teacher",
        sample,
        loss,
        labelled(jax.random.normal(key_validation, (validation_examples, _INPUTS))),
        configuration={
            "input_features": _INPUTS,
            "classes": _CLASSES,
            "teacher": f"two layers, {_TEACHER_UNITS} tanh units",
            "batch_size": batch_size,
            "validation_examples": validation_examples,
            "loss": "cross-entropy in nats",
        },
    )


class ResidualMLP(nnx.Module):
    """``x <- x + W_l relu(norm(x))``, a norm before the readout: a transformer without attention.

    Norms have no scale and layers no bias, so that every parameter is a matrix.

    Args:
      din: input features d; inputs have shape (B, d).
      width: units n of the residual stream.
      dout: outputs; the result has shape (B, dout).
      depth: number of residual blocks.
      rngs: nnx random streams.
    """

    def __init__(self, din: int, width: int, dout: int, *, depth: int, rngs: nnx.Rngs) -> None:
        def linear(fan_in: int, fan_out: int) -> nnx.Linear:
            return nnx.Linear(fan_in, fan_out, use_bias=False, rngs=rngs)

        self.embed = linear(din, width)
        self.blocks = nnx.List([linear(width, width) for _ in range(depth)])
        self.readout = linear(width, dout)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Outputs of shape (B, dout)."""
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(jax.nn.relu(_normalised(x)))
        return self.readout(_normalised(x))


def _normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def run_sweeps(experiment: Experiment, folder: Path, progress: bool | None = None) -> xr.Dataset:
    """Tune at the base, then train the reference and every scheme at each larger width.

    The reference is a network with ``m^-1/2`` initial std and one global rate: its curve over the
    rate has the optimum ``eta*(w)``. Each scheme is trained at the rate it transfers and near it.

    Args:
      experiment: what to train.
      folder: receives the sweep of each width; what is there already is not run again.
      progress: as for :func:`mupjax.sweep`.

    Returns:
      dataset: ``base_loss`` and ``base_status`` over (base_rate, seed), and ``tuned_rate``, their
      optimum; by larger width, ``reference_loss`` and ``reference_status`` over
      (width, offset, seed), ``offset`` in octaves from ``tuned_rate / m``, and ``loss`` and
      ``status`` over (scheme, width, near, seed), ``near`` in octaves from the rate that the scheme
      transfers; ``depth`` by width.

    Raises:
      ValueError: the optimum at the base is not inside the rates searched.
    """
    base = experiment.base_width
    search = _sweep(experiment, "base", base, experiment.search, [_REFERENCE], folder, progress)
    search_attrs = search.attrs
    search = search[["loss", "status"]].isel(parametrization=0, width=0, drop=True)
    losses = search["loss"].where(search["status"] == 0, np.inf).transpose("learning_rate", "seed")
    best = fitted_optimum(np.log2(experiment.search), losses.values)
    if math.isnan(best):
        raise ValueError(
            f"the best rate at the base width {base} is not inside the rates searched, "
            f"{experiment.search[0]:.3g} to {experiment.search[-1]:.3g}: widen Experiment.search."
        )
    wide = tuple(float(2.0 ** (best + k)) for k in experiment.offsets)
    close = tuple(float(2.0 ** (best + k)) for k in experiment.near)
    names = [*SCHEMES, *CONTROLS]
    others = [name for name in names if name != _REFERENCE]
    reference, schemes = [], []
    for width in experiment.widths[1:]:
        swept = _sweep(experiment, "reference", width, wide, [_REFERENCE], folder, progress)
        rest = _sweep(experiment, "schemes", width, close, others, folder, progress)
        parts = [swept.sel(learning_rate=list(close)), rest]
        joined = xr.concat(parts, "parametrization", combine_attrs="override")
        reference.append(swept.isel(parametrization=0, drop=True))
        schemes.append(joined.sel(parametrization=names))
    curves = _joined(reference).rename(
        loss="reference_loss", status="reference_status", learning_rate="offset"
    )
    trained = _joined(schemes).rename(parametrization="scheme", learning_rate="near")
    dataset = xr.merge(
        [
            search.rename(loss="base_loss", status="base_status", learning_rate="base_rate"),
            curves.assign_coords(offset=list(experiment.offsets)),
            trained.assign_coords(near=list(experiment.near)),
        ],
        combine_attrs="drop",
    )
    dataset.attrs = {key: search_attrs[key] for key in ("versions", "device")}
    dataset["tuned_rate"] = ((), 2.0**best)
    dataset["depth"] = ("width", [experiment.depth(width) for width in experiment.widths[1:]])
    return dataset.transpose("scheme", "width", "offset", "near", "base_rate", "seed")


def _joined(by_width: list[xr.Dataset]) -> xr.Dataset:
    kept = [one[["loss", "status"]] for one in by_width]
    return xr.concat(kept, "width", data_vars="minimal", combine_attrs="override")


def _sweep(
    experiment: Experiment,
    kind: Literal["base", "reference", "schemes"],
    width: int,
    rates: tuple[float, ...],
    schemes: list[str],
    folder: Path,
    progress: bool | None,
) -> xr.Dataset:
    """One width with its own depth: factors depend on the width alone, so a sweep holds one."""
    depth = experiment.depth(width)
    setting = experiment.setting()
    din = int(setting.validation[0].shape[-1])
    plain = experiment.network == "plain"

    def network(width: int, rngs: nnx.Rngs) -> nnx.Module:
        if plain:
            return MLP(din, width, _CLASSES, depth=depth, use_bias=False, rngs=rngs)
        return ResidualMLP(din, width, _CLASSES, depth=depth, rngs=rngs)

    known = {**SCHEMES, **CONTROLS}
    return sweep(
        network,
        setting,
        lambda learning_rate: optax.adam(learning_rate),
        [known[name] for name in schemes],
        widths=[width],
        base_width=experiment.base_width,
        hyperparameters={
            "learning_rate": rates,
            "weight_decay": experiment.weight_decay,
            # He's gain keeps a plain ReLU net's signal over the depth; norms make it moot.
            "init_scale": math.sqrt(2.0) if plain else 1.0,
        },
        steps=experiment.steps,
        seeds=experiment.seeds,
        schedule=wsd_schedule(experiment.steps),
        init_exponents=_INIT_EXPONENTS[experiment.network],
        evaluations=1,
        out=folder / f"{kind}-{width}.nc",
        existing="resume",
        progress=progress,
    )
