"""Sweeps described by a TOML file: what ``mupjax sweep`` and ``mupjax coord-check`` read."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optax
from flax import nnx

from mupjax.adapters import ModelFactory
from mupjax.config import check_count
from mupjax.data import digits
from mupjax.depth import Depth, completep, depth_mup, unscaled
from mupjax.models import MLP
from mupjax.observe import Observer
from mupjax.optimizers import OptimizerFactory, wsd_schedule
from mupjax.parametrization import PRESETS, Parametrization
from mupjax.setting import Setting
from theory.decomposition import decomposition_observer
from theory.trajectory import GWB_GPT2, GWB_LLAMA, LAPTOP, Averaging

__all__ = ["SweepFile", "read_sweep_file"]

_SECTIONS = (
    "model",
    "setting",
    "optimizer",
    "schedule",
    "sweep",
    "depth",
    "hyperparameters",
    "parametrization",
    "decomposition",
)
_SWEEP_KEYS = (
    "parametrizations", "widths", "steps", "seeds", "base_width", "weight_decay_mode", "roles",
    "init_exponents", "attention", "application", "optimizer_family", "evaluations",
    "divergence_threshold", "common_random_numbers", "strategy", "chunk_size",
)  # fmt: skip
_OPTIMIZERS: Mapping[str, OptimizerFactory] = {
    "sgd": lambda learning_rate, momentum=0.0: optax.sgd(learning_rate, momentum=momentum),
    "adam": lambda learning_rate, b1=0.9, b2=0.999, eps=1e-8: optax.adam(
        learning_rate, b1=b1, b2=b2, eps=eps
    ),
    "lion": lambda learning_rate, b1=0.9, b2=0.99: optax.lion(
        learning_rate, b1=b1, b2=b2, weight_decay=0.0
    ),
}
_DEPTHS: Mapping[str, Callable[..., Depth]] = {
    "completep": completep,
    "depth-mup": depth_mup,
    "unscaled": unscaled,
}
_AVERAGINGS = {"laptop": LAPTOP, "gwb-llama": GWB_LLAMA, "gwb-gpt2": GWB_GPT2}
_DECOMPOSITION_KEYS = (
    "rule", "components", "spectrum", "times", "sides", "validation_examples",
)  # fmt: skip
_ACTIVATIONS = ("relu", "gelu", "tanh", "silu", "identity")


@dataclasses.dataclass(frozen=True)
class SweepFile:
    """A sweep read from a file: the arguments of :func:`mupjax.sweep`."""

    model: ModelFactory
    setting: Setting
    optimizer: OptimizerFactory
    parametrizations: list[Parametrization | str]
    arguments: Mapping[str, Any]


def read_sweep_file(path: Path) -> SweepFile:
    """Read and check a TOML file.

    Sections: ``[model]`` (``name = "mlp"`` with ``depth``, ``activation``, ``use_bias``, ``norm``,
    ``zero_readout``; or ``factory = "module:function"``), ``[setting]`` (``name = "digits"`` with
    ``batch_size``; or ``factory``), ``[optimizer]`` (``name`` of sgd, adam, lion; or ``factory``),
    ``[schedule]`` (``name`` of constant, wsd, cosine; or ``factory``, called with ``steps``),
    ``[sweep]`` (arguments of :func:`mupjax.sweep`), ``[depth]`` (``name`` of completep, depth-mup,
    unscaled, or ``alpha``; and ``layers``, ``base_layers``, ``blocks``, ``base_multiplier`` of
    :class:`mupjax.Depth`), ``[hyperparameters]`` (numbers, lists, or
    ``{from, to, per_octave}``), ``[[parametrization]]`` tables for custom ones, and
    ``[decomposition]``, if the change of the loss shall be decomposed along training: ``averaging``
    (``"laptop"``, ``"gwb-llama"``, ``"gwb-gpt2"``, or a table of the numbers of
    ``theory.trajectory.Averaging``) and the arguments of
    ``theory.decomposition.decomposition_observer``, where ``times`` may be a count of times spread
    over the run. A factory is a function in a module that can be imported from the file's folder.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no TOML, or something in it is unknown, missing or of the wrong kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no valid TOML: {error}") from error
    _known(record, _SECTIONS, f"{str(path)!r}")
    for section in (
        *("model", "setting", "optimizer", "schedule", "sweep", "hyperparameters"),
        *("depth", "decomposition"),
    ):
        if not isinstance(record.get(section, {}), dict):
            raise ValueError(f"[{section}] must be a table, got {record[section]!r}.")
    for needed in ("sweep", "hyperparameters"):
        if needed not in record:
            raise ValueError(f"{str(path)!r} has no section [{needed}].")
    folder = path.resolve().parent
    setting = _setting(record.get("setting", {"name": "digits"}), folder)
    arguments = dict(record["sweep"])
    _known(arguments, _SWEEP_KEYS, "[sweep]")
    for needed in ("widths", "steps"):
        if needed not in arguments:
            raise ValueError(f"[sweep] needs {needed!r}.")
    tables = record.get("parametrization", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(
            f"[[parametrization]] (in double brackets) must be tables, got {tables!r}."
        )
    custom = [Parametrization.from_dict(table) for table in tables]
    names = arguments.pop("parametrizations", ["SP", "muP"] if not custom else [])
    steps = check_count("steps", arguments["steps"])
    arguments["hyperparameters"] = {k: _grid(k, v) for k, v in record["hyperparameters"].items()}
    arguments["schedule"] = _schedule(record.get("schedule", {"name": "constant"}), steps, folder)
    if "depth" in record:
        arguments["depth"] = _depth(dict(record["depth"]))
    if "decomposition" in record:
        arguments["observers"] = [_decomposition(dict(record["decomposition"]), steps)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"[sweep]: parametrizations must be a list of names, got {names!r}.")
    parametrizations: list[Parametrization | str] = [PRESETS.get(n, n) for n in names]
    return SweepFile(
        model=_model(record.get("model", {"name": "mlp"}), setting, folder),
        setting=setting,
        optimizer=_optimizer(record.get("optimizer", {"name": "adam"}), folder),
        parametrizations=parametrizations + list(custom),
        arguments=arguments,
    )


def _depth(table: dict[str, Any]) -> Depth:
    fields = tuple(field.name for field in dataclasses.fields(Depth))
    _known(table, ("name", *fields), "[depth]")
    if ("name" in table) == ("alpha" in table):
        raise ValueError(
            f"[depth] needs either name ({', '.join(_DEPTHS)}) or alpha, got "
            f"name={table.get('name')!r}, alpha={table.get('alpha')!r}."
        )
    for needed in ("layers", "base_layers"):
        if needed not in table:
            raise ValueError(f"[depth] needs {needed!r}.")
    if "alpha" in table:
        return Depth(**table)
    name = table.pop("name")
    if not isinstance(name, str) or name not in _DEPTHS:
        raise ValueError(f"[depth]: name must be one of {', '.join(_DEPTHS)}, got {name!r}.")
    return _DEPTHS[name](**table)


def _decomposition(table: dict[str, Any], steps: int) -> Observer:
    _known(table, ("averaging", *_DECOMPOSITION_KEYS), "[decomposition]")
    averaging = table.pop("averaging", "laptop")
    if isinstance(averaging, dict):
        averaging = _called(Averaging, averaging, "[decomposition]: averaging")
    elif isinstance(averaging, str) and averaging in _AVERAGINGS:
        averaging = _AVERAGINGS[averaging]
    else:
        raise ValueError(
            f"[decomposition]: averaging must be one of {', '.join(_AVERAGINGS)}, or a table, got "
            f"{averaging!r}."
        )
    if isinstance(table.get("times"), int):
        count = check_count("[decomposition]: times", table["times"], minimum=2)
        table["times"] = np.linspace(0, steps, count).astype(int).tolist()
    return decomposition_observer(averaging, **table)


def _known(table: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(table) - set(allowed)):
        raise ValueError(f"{where} has unknown keys {unknown}; it may have {', '.join(allowed)}.")


def _imported(reference: Any, folder: Path, where: str) -> Callable[..., Any]:
    module_name, _, name = str(reference).partition(":")
    if not name:
        raise ValueError(f"{where}: factory must read 'module:function', got {reference!r}.")
    # It stays there, as a script's folder does: a function may import more when it is called.
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ImportError as error:
        raise ValueError(f"{where}: cannot import {module_name!r}: {error}.") from error
    if not callable(found):
        raise ValueError(f"{where}: module {module_name!r} has no function {name!r}.")
    return found


def _model(table: dict[str, Any], setting: Setting, folder: Path) -> ModelFactory:
    if "factory" in table:
        _known(table, ("factory",), "[model]")
        return _imported(table["factory"], folder, "[model]")
    options = ("name", "depth", "activation", "use_bias", "norm", "zero_readout", "din", "dout")
    _known(table, options, "[model]")
    if table.get("name") != "mlp":
        raise ValueError(f"[model]: name must be 'mlp', got {table.get('name')!r}; or use factory.")
    activation = table.get("activation", "relu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(
            f"[model]: activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}."
        )
    din = table.get("din", setting.configuration.get("input_features"))
    dout = table.get("dout", setting.configuration.get("classes"))
    if din is None or dout is None:
        raise ValueError(
            f"[model]: setting {setting.name!r} does not tell din and dout: give them."
        )
    for key, size in (("din", din), ("dout", dout), ("depth", table.get("depth", 1))):
        check_count(f"[model]: {key}", size)
    flags = ("use_bias", "norm", "zero_readout")
    for key in flags:
        if not isinstance(table.get(key, False), bool):
            raise ValueError(f"[model]: {key} must be true or false, got {table[key]!r}.")
    plain = {k: table[k] for k in ("depth", *flags) if k in table}

    def factory(width: int, rngs: nnx.Rngs) -> MLP:
        return MLP(din, width, dout, activation=getattr(nnx, activation), rngs=rngs, **plain)

    return factory


def _setting(table: dict[str, Any], folder: Path) -> Setting:
    if "factory" in table:
        options = {k: v for k, v in table.items() if k != "factory"}
        made = _called(_imported(table["factory"], folder, "[setting]"), options, "[setting]")
        if not isinstance(made, Setting):
            raise ValueError(f"[setting]: factory returned {type(made).__name__}, not a Setting.")
        return made
    _known(table, ("name", "batch_size", "validation_examples"), "[setting]")
    if table.get("name") != "digits":
        raise ValueError(
            f"[setting]: name must be 'digits', got {table.get('name')!r}; or use factory."
        )
    for key in ("batch_size", "validation_examples"):
        if key in table:
            check_count(f"[setting]: {key}", table[key])
    return digits(**{k: v for k, v in table.items() if k != "name"})


def _called(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> Any:
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from error
    return function(**options)


def _optimizer(table: dict[str, Any], folder: Path) -> OptimizerFactory:
    if "factory" in table:
        _known(table, ("factory",), "[optimizer]")
        return _imported(table["factory"], folder, "[optimizer]")
    _known(table, ("name",), "[optimizer]")
    if not isinstance(table.get("name"), str) or table["name"] not in _OPTIMIZERS:
        raise ValueError(
            f"[optimizer]: name must be one of {', '.join(_OPTIMIZERS)}, got "
            f"{table.get('name')!r}; or use factory. (Its numbers go into [hyperparameters].)"
        )
    return _OPTIMIZERS[table["name"]]


def _schedule(table: dict[str, Any], steps: Any, folder: Path) -> optax.Schedule | None:
    if "factory" in table:
        _known(table, ("factory",), "[schedule]")
        return _imported(table["factory"], folder, "[schedule]")(steps)
    _known(table, ("name", "warmup", "cooldown"), "[schedule]")
    name = table.get("name")
    options = {k: v for k, v in table.items() if k != "name"}
    for key, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"[schedule]: {key} must be a number, got {value!r}.")
    if name == "wsd":
        return wsd_schedule(steps, **options)
    if name in ("constant", "cosine") and options:
        raise ValueError(f"[schedule]: {name!r} takes no further keys, got {sorted(options)}.")
    if name == "constant":
        return None
    if name == "cosine":
        return optax.cosine_decay_schedule(1.0, steps)
    raise ValueError(f"[schedule]: name must be constant, wsd or cosine, got {name!r}.")


def _grid(name: str, given: Any) -> Any:
    """A number, a list, or {from, to, per_octave}: a grid uniform in log2."""
    if not isinstance(given, dict):
        return given
    _known(given, ("from", "to", "per_octave"), f"hyperparameter {name!r}")
    if "from" not in given or "to" not in given:
        raise ValueError(f"hyperparameter {name!r}: a grid needs 'from' and 'to'.")
    low, high, per_octave = given["from"], given["to"], given.get("per_octave", 1)
    for key, value in (("from", low), ("to", high), ("per_octave", per_octave)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"hyperparameter {name!r}: {key} must be a number, got {value!r}.")
    if not (0 < low < high and per_octave > 0):
        raise ValueError(
            f"hyperparameter {name!r}: needs 0 < from < to and per_octave > 0, got {given}."
        )
    octaves = np.log2(high / low)
    steps = max(round(octaves * per_octave), 1)
    return (low * 2.0 ** np.linspace(0, octaves, steps + 1)).tolist()
