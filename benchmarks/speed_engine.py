"""Speed of the engine beside its peers, in one run: ``make bench``.

Two-layer ReLU nets (d = 64, batch 256, Adam, 16 learning rates, squared loss) at several widths, by

- ``mupjax``: this package's engine, one device per core, trials chunked by measurement (on an
  accelerator all at once);
- ``jax-sequential``: the same trials one after another, each a jitted scan over steps;
- ``jax-python-loop``: a Python loop over jitted steps;
- ``torch-mup``: PyTorch eager with the ``mup`` package (extra ``peers``), where it is installed;

beside the machine's own rate for a square float32 matrix product (n = 2048; on an accelerator
8192). Engines take turns, so that a busy machine slows all of them; times are medians over rounds.
Compilation is not counted. On an accelerator nets are wider and trainings longer, and PyTorch runs
on it too, where it sees it.
"""

import argparse
import dataclasses
import importlib.util
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
from flax import nnx

from mupjax.cores import use_all_cores
from mupjax.data import digits
from mupjax.execute import compile_lowered, fastest_group, lower_group
from mupjax.groups import candidate_groups, group_arguments
from mupjax.models import MLP
from mupjax.plan import estimate_cost
from mupjax.prepare import prepare
from mupjax.setting import Setting

D, BATCH, EXAMPLES = 64, 256, 4096
LEARNING_RATES = tuple(float(x) for x in np.geomspace(1e-4, 1e-2, 16))


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a table: a model's size and how many steps are timed."""

    width: int
    hidden_layers: int
    steps: int

    @property
    def flops(self) -> float:
        """Of all trials: matrix products forward, and backward but for the input's gradient."""
        first = D * self.width
        rest = (self.hidden_layers - 1) * self.width**2 + self.width
        return 2 * BATCH * (2 * first + 3 * rest) * self.steps * len(LEARNING_RATES)


def problem() -> tuple[Setting, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, D)).astype(np.float32)
    y = np.sin(x.sum(axis=1, keepdims=True)).astype(np.float32)

    def sample(data: Any, key: jax.Array, step: jax.Array) -> Any:
        i = jax.random.randint(jax.random.fold_in(key, step), (BATCH,), 0, EXAMPLES)
        return jax.tree.map(lambda a: a[i], data)

    def loss(predict: Any, batch: Any) -> jax.Array:
        return 0.5 * jnp.mean((predict(batch[0]) - batch[1]) ** 2)

    data = (jnp.asarray(x), jnp.asarray(y))
    return Setting("benchmark", sample, loss, (data[0][:BATCH], data[1][:BATCH]), data), x, y


def mupjax_engine(
    case: Case, setting: Setting, model: Any = None
) -> tuple[Callable[[], Any], dict]:
    def mlp(width: int, rngs: nnx.Rngs) -> MLP:
        return MLP(D, width, 1, depth=case.hidden_layers, use_bias=False, rngs=rngs)

    plan = prepare(
        model or mlp,
        setting,
        lambda learning_rate: optax.adam(learning_rate),
        "muP",
        widths=[case.width],
        hyperparameters={"learning_rate": LEARNING_RATES},
        base_width=case.width if model else 64,
        steps=case.steps,
        evaluations=1,
    )
    costs = {case.width: estimate_cost(plan.models[case.width], setting)}
    # An accelerator takes all trials at once, by rule.
    chunk_size = "auto" if on_accelerator() else "measure"
    compiled = [
        compile_lowered(group, lower_group(plan, group, None))
        for group in candidate_groups(plan, (case.width,), costs, chunk_size)
    ]
    group, function, _ = fastest_group(plan, compiled)
    chosen = next(c for c in compiled if c[0] is group)
    arguments = (*group_arguments(plan, group), np.int32(group.chunks), np.int32(1))
    memory = function.memory_analysis()
    facts = {
        "chunking": dataclasses.asdict(group.chunking),
        "compile_seconds": round(chosen[2], 2),
        "peak_memory_mb": round((memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6, 1),
    }
    return lambda: jax.block_until_ready(function(*arguments)), facts


def plain_step(hidden_layers: int) -> Callable[..., Any]:
    """One Adam step of the same net as a JAX user writes it by hand."""

    def loss(params: list[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
        for kernel in params[:-1]:
            x = jax.nn.relu(x @ kernel)
        return 0.5 * jnp.mean((x @ params[-1] - y) ** 2)

    def step(params: Any, state: Any, rate: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        updates, state = optax.adam(rate).update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    del hidden_layers
    return step


def plain_params(case: Case) -> list[jax.Array]:
    sizes = [D, *[case.width] * case.hidden_layers, 1]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return [
        jax.random.normal(key, (a, b)) / np.sqrt(a)
        for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]


def sequential_engine(case: Case, setting: Setting) -> Callable[[], Any]:
    step, params = plain_step(case.hidden_layers), plain_params(case)

    @jax.jit
    def train(params: Any, rate: jax.Array, data: Any, key: jax.Array) -> Any:
        def body(carry: Any, t: jax.Array) -> Any:
            params, state, value = step(*carry, rate, *setting.sample(data, key, t))
            return (params, state), value

        return jax.lax.scan(body, (params, optax.adam(rate).init(params)), jnp.arange(case.steps))

    key = jax.random.key(0)
    rates = [jnp.float32(rate) for rate in LEARNING_RATES]
    jax.block_until_ready(train(params, rates[0], setting.data, key))
    return lambda: [jax.block_until_ready(train(params, r, setting.data, key)) for r in rates]


def loop_engine(case: Case, setting: Setting) -> Callable[[], Any]:
    step, params = plain_step(case.hidden_layers), plain_params(case)

    @jax.jit
    def one(params: Any, state: Any, rate: jax.Array, data: Any, key: jax.Array, t: Any) -> Any:
        return step(params, state, rate, *setting.sample(data, key, t))

    key = jax.random.key(0)

    def run() -> None:
        for rate in LEARNING_RATES:
            rate = jnp.float32(rate)
            now, state = params, optax.adam(rate).init(params)
            value = None
            for t in range(case.steps):
                now, state, value = one(now, state, rate, setting.data, key, t)
            jax.block_until_ready(value)

    one(params, optax.adam(1.0).init(params), jnp.float32(0), setting.data, key, 0)
    return run


def torch_engine(case: Case, x: np.ndarray, y: np.ndarray) -> Callable[[], float]:
    from benchmarks import peer_torch

    indices = np.random.default_rng(1).integers(0, EXAMPLES, (case.steps, BATCH))
    arguments = (case.width, LEARNING_RATES, case.steps, D, BATCH, case.hidden_layers)
    return lambda: peer_torch.run(*arguments, data=(x, y), indices=indices)[0]


def matmul_engine() -> tuple[Callable[[], Any], float]:
    """A float32 product at JAX's default precision (TF32 on GPUs), and its operations."""
    n = 8192 if on_accelerator() else 2048
    a = jax.random.normal(jax.random.key(0), (n, n))
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    return lambda: jax.block_until_ready(product(a)), 2.0 * n**3


def on_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call; an engine that times itself returns them."""
    start = time.perf_counter()
    own = run()
    return own if isinstance(own, float) else time.perf_counter() - start


def compare(cases: list[Case], rounds: int, torch: bool) -> tuple[list[dict], list[dict]]:
    setting, x, y = problem()
    product, flops = matmul_engine()
    rows, details = [], []
    for case in cases:
        mine, facts = mupjax_engine(case, setting)
        engines: dict[str, Callable[[], Any]] = {
            "mupjax": mine,
            "jax-sequential": sequential_engine(case, setting),
            "jax-python-loop": loop_engine(case, setting),
        }
        if torch:
            engines["torch-mup"] = torch_engine(case, x, y)
        seconds: dict[str, list[float]] = {name: [] for name in [*engines, "matmul"]}
        for _ in range(rounds):
            for name, run in engines.items():
                seconds[name].append(timed(run))
                seconds["matmul"] += [timed(product) for _ in range(3)]
        rate = flops / statistics.median(seconds["matmul"]) / 1e9
        for name in engines:
            median = statistics.median(seconds[name])
            gflops = case.flops / median / 1e9
            rows.append(
                {
                    "engine": name,
                    "width": case.width,
                    "seconds": round(median, 4),
                    "gflops": round(gflops, 1),
                    "fraction_of_matmul": round(gflops / rate, 3),
                }
            )
        details.append(
            {
                "width": case.width,
                "hidden_layers": case.hidden_layers,
                "steps": case.steps,
                "matmul_gflops": round(rate, 1),
                "spread": {
                    name: round((max(s) - min(s)) / statistics.median(s), 2)
                    for name, s in seconds.items()
                },
                **facts,
            }
        )
        print_case(case, rows[-len(engines) :], details[-1])
    return rows, details


def print_case(case: Case, rows: list[dict], detail: dict) -> None:
    mine = rows[0]["seconds"]
    print(
        f"\nwidth {case.width}, {case.hidden_layers} hidden, {len(LEARNING_RATES)} trials x "
        f"{case.steps} steps; matrix product {detail['matmul_gflops']} GFLOP/s; chunking "
        f"{detail['chunking']}, compiled in {detail['compile_seconds']} s, "
        f"{detail['peak_memory_mb']} MB"
    )
    for row in rows:
        print(
            f"  {row['engine']:16s} {row['seconds']:8.3f} s  {row['gflops']:7.1f} GFLOP/s  "
            f"{row['fraction_of_matmul']:6.1%} of the product   mupjax is "
            f"{row['seconds'] / mine:5.2f} x as fast",
            flush=True,
        )


def growth(rounds: int) -> list[dict]:
    """Time against the number of trials, at width 256: one trial up to 64."""
    global LEARNING_RATES
    setting, _, _ = problem()
    kept, rows = LEARNING_RATES, []
    for trials in (1, 4, 16, 64):
        LEARNING_RATES = tuple(float(x) for x in np.geomspace(1e-4, 1e-2, trials))
        run, facts = mupjax_engine(Case(256, 1, 100), setting)
        seconds = statistics.median(timed(run) for _ in range(rounds))
        rows.append({"trials": trials, "seconds": round(seconds, 4), **facts})
        print(f"  {trials:3d} trials: {seconds:.3f} s, {seconds / trials * 1e3:.1f} ms a trial")
    LEARNING_RATES = kept
    return rows


class SmallCNN(nnx.Module):
    """Two 3 x 3 convolutions and a readout, for 8 x 8 images."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.second = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.readout = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.first(x.reshape(-1, 8, 8, 1)))
        return self.readout(jax.nn.relu(self.second(x)).mean(axis=(1, 2)))


def convolutions(rounds: int) -> dict:
    """A CNN on the digits: chunking must not lose against one trial at a time."""
    setting, case = digits(64, 64), Case(32, 1, 10)
    run, facts = mupjax_engine(case, setting, lambda width, rngs: SmallCNN(width, rngs))
    graph, params = nnx.split(SmallCNN(case.width, nnx.Rngs(0)))

    @jax.jit
    def train(params: Any, rate: jax.Array, data: Any, key: jax.Array) -> Any:
        def body(carry: Any, t: jax.Array) -> Any:
            params, state = carry
            batch = setting.sample(data, key, t)
            gradient = jax.grad(lambda p: setting.loss(nnx.merge(graph, p), batch))(params)
            updates, state = optax.adam(rate).update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, optax.adam(rate).init(params)), jnp.arange(case.steps))

    key = jax.random.key(0)

    def sequential() -> None:
        for rate in LEARNING_RATES:
            jax.block_until_ready(train(params, jnp.float32(rate), setting.data, key))

    sequential()
    seconds: dict[str, list[float]] = {"mupjax": [], "jax-sequential": []}
    for _ in range(rounds):
        seconds["mupjax"].append(timed(run))
        seconds["jax-sequential"].append(timed(sequential))
    medians = {name: round(statistics.median(s), 4) for name, s in seconds.items()}
    ratio = medians["jax-sequential"] / medians["mupjax"]
    print(f"\nCNN of width {case.width}: {medians}, mupjax is {ratio:.2f} x as fast; {facts}")
    return {"width": case.width, "steps": case.steps, "seconds": medians, **facts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Speed of the engine beside its peers, in one run."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--quick", action="store_true", help="few steps, one round: a smoke test")
    options = parser.parse_args()
    use_all_cores()
    rounds = 1 if options.quick else options.rounds
    shorten = 20 if options.quick else 1
    device = jax.devices()[0].device_kind
    print(f"{jax.local_device_count()} x {device}, JAX {jax.__version__}")
    torch = (
        importlib.util.find_spec("torch") is not None
        and importlib.util.find_spec("mup") is not None
    )
    if not torch:
        print("torch with mup is not installed (pip install 'mupjax[peers]'): left out")
    if on_accelerator():
        sizes = ((256, 800), (1024, 800), (4096, 400)), ((256, 800), (1024, 400), (4096, 60))
    else:
        sizes = ((64, 400), (256, 200), (1024, 60)), ((64, 300), (256, 60), (512, 20))
    one, two = (
        [Case(w, depth, max(4, s // shorten)) for w, s in listed]
        for depth, listed in enumerate(sizes, start=1)
    )
    rows, details = compare(one, rounds, torch)
    deep_rows, deep_details = compare(two, rounds, torch)
    print("\ntime against the number of trials, width 256:")
    record = {
        "device": device,
        "cores": os.cpu_count(),
        "one_hidden_layer": details,
        "two_hidden_layers": {"rows": deep_rows, "details": deep_details},
        "growth": growth(rounds),
        "convolutions": convolutions(rounds),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "engine.json").write_text(json.dumps(rows, indent=2) + "\n")
    (options.out / "engine_details.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nwrote {options.out / 'engine.json'} and {options.out / 'engine_details.json'}")


if __name__ == "__main__":
    main()
