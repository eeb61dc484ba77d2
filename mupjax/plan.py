"""How a sweep is laid out on the device: trials per chunk, shared or copied batches, padding."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mupjax.adapters import Model
from mupjax.setting import Setting

__all__ = [
    "Chunking",
    "Cost",
    "Device",
    "Strategy",
    "choose_chunking",
    "choose_strategy",
    "count_operations",
    "estimate_cost",
    "pads_exactly",
    "zero_pad",
]

Strategy = Literal["auto", "bucketed", "padded"]

Device = Any
"""A ``jax.Device`` (which type checkers do not accept as a type)."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """One training step of one trial.

    Attributes:
      flops: of loss and gradient, as XLA counts them before optimisation.
      bytes: working set: parameters with optimizer state and gradient, and live activations.
      peak_bytes: the same, of the validation batch where that takes more.
      convolution: whether a convolution occurs (vmapped over weights it becomes a grouped one).
    """

    flops: float
    bytes: float
    peak_bytes: float
    convolution: bool


Library = Literal["default", "products", "eigen"]

# In a decoder of width 32 the sums of softmax take YNNPACK three times as long as XLA's own loops.
_YNNPACK: Mapping[Library, str | None] = {
    "default": None,
    "products": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_DOT",
    "eigen": "",
}

# XLA's defaults on CPUs put off what reads an array until others are made, when it has left the
# core's cache (decoders of width 64 and small two-layer nets take 2 to 5 % longer by that), and
# copy all weights in every step (decoders of width 256 take 2 % longer).
_OPTIONS = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_copy_insertion_use_region_analysis": True,
}


@dataclasses.dataclass(frozen=True)
class Chunking:
    """How many trials run at once.

    Attributes:
      trials: trials of one seed (different hyperparameters) advanced together.
      seeds: seeds advanced together (more than one only when ``trials`` covers all of them).
      copy_batch: give every trial its own copy of the shared batch. The matrix products then are
        batched ones without transposes, which on CPU is faster from medium widths on; a shared
        batch makes one wide product, which is faster for narrow models.
      library: what XLA leaves to YNNPACK on a CPU: by ``default`` also sums and whatever is fused
        with them, ``products`` of matrices only, or nothing (``eigen``), which is faster for many
        small products.
    """

    trials: int
    seeds: int = 1
    copy_batch: bool = False
    library: Library = "default"

    @property
    def compiler_options(self) -> dict[str, str | bool]:
        """What to tell XLA, as jaxlib 0.10 names it."""
        fused = _YNNPACK[self.library]
        return _OPTIONS | ({} if fused is None else {"xla_cpu_experimental_ynn_fusion_type": fused})


def count_operations(function: Callable[..., Any], *arguments: Any) -> Mapping[str, float]:
    """XLA's count for a function, before optimisation: ``flops`` and ``bytes accessed``.

    Args:
      function: of arrays.
      arguments: arrays, or their shapes (`jax.ShapeDtypeStruct`).
    """
    # XLA counts without compiling on CPUs alone; on others, JAX's answer is None.
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others only
        device = None
    with jax.default_device(device):
        lowered = jax.jit(function).lower(*arguments)
        found = lowered.cost_analysis()
        return found if found else lowered.compile().cost_analysis() or {}


def estimate_cost(model: Model, setting: Setting, *, observed: bool = False) -> Cost:
    """Cost of one step of one trial, from tracing alone.

    Args:
      model: at one width.
      setting: whose batch and validation batch are passed through it.
      observed: gradients of the validation batch are taken along the way.
    """
    params, batch = model.abstract_params(), setting.abstract_batch()
    held = jax.eval_shape(lambda: setting.validation)

    def loss(params: Any, batch: Any) -> jax.Array:
        return setting.loss(lambda *a, **k: model.apply(params, *a, **k), batch)

    step = jax.value_and_grad(loss)
    counted = count_operations(step, params, batch)
    validated = count_operations(step if observed else loss, params, held)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    # XLA's count is before fusion; measured on two-layer nets, a quarter of it is live at a time.
    live, evaluated = (float(c.get("bytes accessed", 0.0)) / 4 for c in (counted, validated))
    return Cost(
        flops=max(float(counted.get("flops", 0.0)), 1.0),
        bytes=4 * size + live,
        peak_bytes=4 * size + max(live, evaluated),
        convolution="conv_general_dilated" in str(jax.make_jaxpr(step)(params, batch)),
    )


# On CPU the working set of a chunk should stay in the last-level cache. 16 MB was best, within
# 10 %, for two-layer nets of width 64 to 1024 on a machine with 32 MB shared by several tenants.
_CPU_CACHE_BYTES = 16e6
# From this cost per trial and step on, batched products on copied batches beat one wide product
# (two-layer nets: shared / copied 82 / 67 GFLOP/s at width 64, 83 / 119 at 128, 82 / 119 at 256).
_COPY_FROM_FLOPS = 6e6
# Below this, Eigen beats XLA's default on batched products (default / Eigen: 85 / 119 GFLOP/s at
# width 128, 93 / 119 at 256, 124 / 127 at 512, 138 / 133 at 1024), above it is the other way round.
_EIGEN_BELOW_FLOPS = 6e7


def choose_chunking(cost: Cost, trials: int, seeds: int, device: Device, shards: int) -> Chunking:
    """Chunking by rule: fit the cache on CPU, fill half the memory on an accelerator.

    Convolutions run trial by trial on CPU, where a grouped convolution is slower than its parts.
    """
    if device.platform == "cpu":
        fit = 1 if cost.convolution else max(1, int(_CPU_CACHE_BYTES / shards / cost.bytes))
    else:
        memory = (device.memory_stats() or {}).get("bytes_limit", 8e9)
        fit = max(1, int(0.5 * memory / cost.peak_bytes))
    return chunking_of_size(fit, cost, trials, seeds, device, shards)


def chunking_of_size(
    size: int, cost: Cost, trials: int, seeds: int, device: Device, shards: int
) -> Chunking:
    """The chunking that advances about ``size`` trials at once."""
    # A core by itself gains nothing from wide products (width 64: shared 100, copied 126 GFLOP/s).
    copy = device.platform == "cpu" and (shards > 1 or cost.flops >= _COPY_FROM_FLOPS)
    eigen = copy and cost.flops < _EIGEN_BELOW_FLOPS and not cost.convolution
    return _balanced(
        size, trials, seeds, shards, Chunking(1, 1, copy, "eigen" if eigen else "default")
    )


def alternatives(
    chosen: Chunking, trials: int, seeds: int, device: Device, shards: int
) -> list[Chunking]:
    """Neighbours of a chunking worth measuring: other sizes, batch mode, matrix library."""
    size = chosen.trials * chosen.seeds
    options = [chosen, dataclasses.replace(chosen, copy_batch=not chosen.copy_batch)]
    if device.platform == "cpu":
        options += [dataclasses.replace(chosen, library=other) for other in _YNNPACK]
    sizes = [n for n in (1, size // 2, 2 * size) if 1 <= n <= trials * seeds]
    options += [_balanced(n, trials, seeds, shards, chosen) for n in sizes]
    return list(dict.fromkeys(options))


def _balanced(fit: int, trials: int, seeds: int, shards: int, like: Chunking) -> Chunking:
    """About ``fit`` trials at once in equal parts, with the other choices of ``like``."""
    fit = max(1, min(fit, math.ceil(trials * seeds / shards)))
    if fit >= trials:
        together = min(seeds, max(1, fit // trials))
        parts = math.ceil(seeds / together)
        return dataclasses.replace(like, trials=trials, seeds=math.ceil(seeds / parts))
    # Equal parts with little waste: 16 trials that fit 12 at a time run as 8 + 8, and those that
    # fit 6 at a time as four times 4, because three times 6 would run two trials for nothing.
    fewest = math.ceil(trials / fit)
    parts = min(range(fewest, 2 * fewest), key=lambda p: (math.ceil(trials / p) * p, p))
    return dataclasses.replace(like, trials=math.ceil(trials / parts), seeds=1)


# Constants of the cost rule: (seconds to compile a program, overhead per step in seconds, sustained
# flop/s). The CPU row was measured on 2 cores; the accelerator row lies between what an NVIDIA H200
# took for two-layer nets (5e-5 s, 4e12 to 2e13 flop/s) and a four-layer decoder (1e-3 s).
_RULE = {"cpu": (1.5, 3e-5, 6e10), "accelerator": (6.0, 2e-4, 1e13)}


def choose_strategy(
    costs: Sequence[Cost], trials: int, steps: int, device: Device
) -> Literal["bucketed", "padded"]:
    """One program per width, or all widths padded to the largest, whichever should end sooner.

    Bucketed time: compilations (concurrent over cores), plus per width ``steps`` times a fixed
    overhead, plus the flops. Padded time: one compilation, one overhead per step, but every trial
    costs what the largest does.
    """
    compile_s, overhead, rate = _RULE["cpu" if device.platform == "cpu" else "accelerator"]
    cores = max(1, min(len(costs), os.cpu_count() or 1))
    bucketed = compile_s * math.ceil(len(costs) / cores)
    bucketed += sum(steps * (overhead + trials * cost.flops / rate) for cost in costs)
    largest = max(cost.flops for cost in costs)
    padded = compile_s + steps * (overhead + len(costs) * trials * largest / rate)
    return "padded" if padded < bucketed else "bucketed"


def zero_pad(array: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The array in the corner of zeros of a larger shape."""
    room = [(0, f - t) for t, f in zip(array.shape, shape, strict=True)]
    return jnp.pad(array, room) if room else array  # JAX pads no array without axes


def pads_exactly(narrow: Model, wide: Model, width: int, setting: Setting) -> bool:
    """Whether a model, zero-padded to a wider one and told its ``width``, is what it is alone.

    That it takes ``width`` does not show it (a norm may ignore it). Compared are the losses on the
    validation batch at random parameters: at initial ones, zero biases would hide a difference.
    """
    options: dict[str, Any] = {"width": jnp.asarray(width, float)}
    if "readout_multiplier" in narrow.options:
        options["readout_multiplier"] = jnp.asarray(1.0)

    def losses(validation: Any) -> list[jax.Array]:
        leaves, tree = jax.tree.flatten(narrow.init(jax.random.key(0)))
        keys = jax.random.split(jax.random.key(1), len(leaves))

        def moved(w: jax.Array, key: jax.Array) -> jax.Array:
            scale = jnp.sqrt(jnp.mean(jnp.square(w)))
            return w + jnp.where(scale > 0, scale, 0.1) * jax.random.normal(key, w.shape, w.dtype)

        params = tree.unflatten(map(moved, leaves, keys))
        padded = jax.tree.map(lambda w, f: zero_pad(w, f.shape), params, wide.abstract_params())
        return [
            setting.loss(lambda *a, m=m, p=p, **k: m.apply(p, *a, **k, **options), validation)
            for m, p in ((narrow, params), (wide, padded))
        ]

    with jax.default_matmul_precision("highest"):
        traced = jax.jit(losses).trace(setting.validation)
        alone, padded = map(float, traced.lower().compile()(setting.validation))
    # In half precision another order of summation alone makes a difference of some percent.
    rtol = 5e-2 if "f16[" in str(traced.jaxpr) else 1e-4
    return bool(np.isclose(padded, alone, rtol=rtol, atol=0.0, equal_nan=True))
