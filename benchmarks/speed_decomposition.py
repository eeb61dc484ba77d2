"""Cost of decomposing the loss along training, and of each way to a spectrum.

1. Two-layer ReLU nets without biases (d = 64, 10 classes, momentum SGD, 4 learning rates) trained
   by the engine without the observer, with it, and with it on a quarter of the validation examples
   (2048): a mark every 10 updates, the paper's final stride. On n examples a gradient at every
   tenth update costs n / (10 B) of the training's own flops, whatever else is done: the floor.
2. The spectrum of one layer by each route, beside `eigvalsh` of its whole n × n matrix.

Runs take turns, so that a busy machine slows all of them; times are medians over rounds.
Compilation is not counted.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from threadpoolctl import threadpool_limits

import mupjax
from mupjax.data import classification
from mupjax.execute import compile_lowered, lower_group
from mupjax.groups import Group, group_arguments
from mupjax.models import MLP
from mupjax.plan import choose_chunking, estimate_cost
from mupjax.prepare import prepare
from theory.alignment import alignment_eigenvalues
from theory.decomposition import decomposition_observer
from theory.krylov import top_alignment_eigenvalues
from theory.trajectory import Averaging

D, CLASSES, EXAMPLES, VALIDATION = 64, 10, 8192, 2048
TENTH = Averaging(0.98, 0.9995, first_stride=10, last_stride=10, warmup_steps=0)
KEPT = 32


def problem(batch_size: int) -> mupjax.Setting:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES + VALIDATION, D)).astype(np.float32)
    y = rng.integers(0, CLASSES, EXAMPLES + VALIDATION)
    return classification(
        "benchmark",
        (x[:EXAMPLES], y[:EXAMPLES]),
        (x[EXAMPLES:], y[EXAMPLES:]),
        batch_size=batch_size,
    )


def training(
    setting: mupjax.Setting, width: int, steps: int, observers: list[Any]
) -> Callable[[], float]:
    """A compiled sweep, laid out by rule (measuring would choose anew each time); calls time it."""
    plan = prepare(
        lambda width, rngs: MLP(D, width, CLASSES, use_bias=False, rngs=rngs),
        setting,
        lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
        "muP",
        widths=[width],
        base_width=64,
        steps=steps,
        evaluations=1,
        hyperparameters={"learning_rate": list(np.geomspace(1e-3, 1e-2, 4))},
        observers=observers,
    )
    cost = estimate_cost(plan.models[width], setting)
    shards = len(plan.devices)
    chunking = choose_chunking(cost, 4, 1, plan.devices[0], shards)
    inner = [(0, 0, i) for i in range(4)]
    group = Group((width,), inner, plan.seeds, chunking, shards)
    _, compiled, _ = compile_lowered(group, lower_group(plan, group, None))
    arguments = (*group_arguments(plan, group), np.int32(group.chunks), np.int32(1))

    def run() -> float:
        start = time.perf_counter()
        # As sweeps do.
        with threadpool_limits(1, user_api="blas"):
            jax.block_until_ready(compiled(*arguments))
        return time.perf_counter() - start

    return run


def observer_cost(width: int, batch_size: int, rounds: int) -> dict[str, float]:
    """Seconds without the observer, and the relative cost of each kind of it."""
    setting = problem(batch_size)
    work = 1e7 if jax.default_backend() == "cpu" else 5e8
    steps = 10 * max(10, round(work / (width * batch_size)))
    kinds: dict[str, list[Any]] = {
        "none": [],
        "all": [decomposition_observer(TENTH)],
        "quarter": [decomposition_observer(TENTH, validation_examples=VALIDATION // 4)],
    }
    runs = {kind: training(setting, width, steps, listed) for kind, listed in kinds.items()}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        for kind, run in runs.items():
            taken = run()
            if turn:
                times[kind].append(taken)
    base = statistics.median(times["none"])
    found = {"width": width, "batch": batch_size, "steps": steps, "seconds": base}
    found |= {"floor": VALIDATION / (10 * batch_size), "load": os.getloadavg()[0]}
    found |= {kind: statistics.median(times[kind]) / base - 1 for kind in ("all", "quarter")}
    return found


def seconds(function: Callable[..., Any], *arrays: jax.Array, rounds: int) -> float:
    compiled = jax.jit(function).lower(*arrays).compile()
    times = []
    with threadpool_limits(1, user_api="blas"):
        jax.block_until_ready(compiled(*arrays))
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arrays))
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def spectrum_cost(m: int, n: int, rounds: int) -> dict[str, float]:
    """Seconds for one layer (m, n) by each route."""
    rng = np.random.default_rng(0)
    rank = min(m, 200)
    decay = np.arange(1, rank + 1) ** -1.0
    g, delta = (
        jnp.asarray((rng.normal(size=(m, rank)) * decay) @ rng.normal(size=(rank, n)), jnp.float32)
        for _ in range(2)
    )

    def dense(g: jax.Array, delta: jax.Array) -> jax.Array:
        product = g.T @ delta
        return jnp.linalg.eigvalsh((product + product.T) / 2)

    found = {"m": m, "n": n, "dense": seconds(dense, g, delta, rounds=rounds)}
    found["exact"] = seconds(alignment_eigenvalues, g, delta, rounds=rounds)
    if min(n, 2 * m) > 16 * KEPT:
        found["lanczos"] = seconds(
            lambda g, delta: top_alignment_eigenvalues(g, delta, KEPT), g, delta, rounds=rounds
        )
    return found


def main() -> None:
    """Print both tables, and write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--all-cores", action="store_true", help="a device per core, as in the CLI")
    parser.add_argument("--no-spectra", action="store_true", help="the first table only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.all_cores:
        mupjax.use_all_cores()
    observers, spectra = [], []
    print("width  batch  steps   seconds   + all 2048  (floor)   + 512 of them   load")
    for width in options.widths:
        for batch in options.batches:
            row = observer_cost(width, batch, options.rounds)
            observers.append(row)
            print(
                f"{width:5d}  {batch:5d}  {row['steps']:5.0f}  {row['seconds']:8.2f}  "
                f"{row['all']:+10.0%}  {row['floor']:7.0%}  {row['quarter']:+13.0%}  "
                f"{row['load']:5.1f}",
                flush=True,
            )
    shapes = [(10, 1024), (64, 1024), (64, 4096), (1024, 1024), (2048, 2048), (4096, 4096)]
    print("\n    m     n  eigvalsh ms  exact: times faster  lanczos, k = 32")
    for m, n in [] if options.no_spectra else shapes:
        row = spectrum_cost(m, n, options.rounds)
        spectra.append(row)
        lanczos = f"{row['dense'] / row['lanczos']:.1f}" if "lanczos" in row else "-"
        print(
            f"{m:5d} {n:5d}  {1e3 * row['dense']:11.1f}  {row['dense'] / row['exact']:19.1f}  "
            f"{lanczos:>15}",
            flush=True,
        )
    if options.json is not None:
        record = {"observer": observers, "spectrum": spectra, "cpus": jax.local_device_count()}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
