"""Speed of a vmapped Llama sweep beside its peers, and the cost of decomposing it.

    python -m benchmarks.speed_llama [--widths 32 64 128 256] [--rounds 3] [--json FILE]

A 4-layer Llama on bytes (B = 16 sequences of T = 64, Adam, 8 learning rates), by

- ``mupjax``: this package's engine, one device per core, trials chunked by measurement (on an
  accelerator all at once);
- ``observed``: the same, laid out alike, with the decomposition observer at the paper's final
  stride of 10 updates, on 32 validation sequences (twice the batch, as ``reproduce --scale paper``
  has it: their gradients alone are 20 % of the training's operations);
- ``jax-sequential``: the same trials one after another, each a jitted scan over steps;
- ``torch``: eager PyTorch, where it is installed.

Tokens a second are of all trials. Utilisation is model operations (6 per weight and token, and
attention's products) over the machine's rate for a square float32 product in the same run.
Engines take turns; times are medians over rounds. Compilation, initialisation and, which the peers
do not do, the evaluations at the start and the end are not counted: ours are the difference of a
training and a tenth of it.
"""

import argparse
import dataclasses
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from threadpoolctl import threadpool_limits

from benchmarks.speed_engine import matmul_engine, on_accelerator, timed
from mupjax.cores import use_all_cores
from mupjax.data import text
from mupjax.execute import compile_lowered, fastest_group, lower_group
from mupjax.groups import candidate_groups, group_arguments
from mupjax.models import Decoder, llama
from mupjax.observe import Observer
from mupjax.plan import Chunking, estimate_cost
from mupjax.prepare import prepare
from mupjax.setting import Setting
from theory.decomposition import decomposition_observer
from theory.trajectory import Averaging

LAYERS, HEADS, BATCH, CONTEXT, VALIDATION = 4, 4, 16, 64, 32
LEARNING_RATES = tuple(float(x) for x in np.geomspace(1e-3, 1e-2, 8))
TENTH = Averaging(0.98, 0.9995, first_stride=10, last_stride=10, warmup_steps=0)


def operations(width: int, vocabulary: int) -> float:
    """Of the model, per token."""
    weights = LAYERS * 16 * width**2 + width * vocabulary
    return 6 * weights + 12 * LAYERS * width * CONTEXT


def model(vocabulary: int) -> Callable[..., Decoder]:
    return lambda width, rngs: llama(
        vocabulary,
        width,
        layers=LAYERS,
        heads=HEADS,
        attention_scale="1/head_dim",
        rngs=rngs,
    )


def engine(
    width: int,
    steps: int,
    setting: Setting,
    vocabulary: int,
    observers: list[Observer],
    chunking: Chunking | None = None,
) -> tuple[Callable[[int], Any], Chunking, float]:
    """A compiled sweep of so many steps or fewer, its layout (measured, where none is given) and
    seconds to compile it."""
    plan = prepare(
        model(vocabulary),
        setting,
        lambda learning_rate: optax.adam(learning_rate),
        "muP",
        widths=[width],
        hyperparameters={"learning_rate": LEARNING_RATES},
        base_width=32,
        steps=steps,
        evaluations=1,
        attention="1/head_dim",
        observers=observers,
    )
    costs = {width: estimate_cost(plan.models[width], setting)}
    if chunking is not None or on_accelerator():
        groups = candidate_groups(plan, (width,), costs, "auto")[:1]
        groups = [dataclasses.replace(g, chunking=chunking or g.chunking) for g in groups]
    else:
        groups = candidate_groups(plan, (width,), costs, "measure")
    compiled = [compile_lowered(group, lower_group(plan, group, None)) for group in groups]
    group, function, _ = fastest_group(plan, compiled)
    *data, marks = group_arguments(plan, group)
    seconds = next(c for c in compiled if c[0] is group)[2]

    def run(few: int) -> Any:
        until = np.minimum(marks, few).astype(np.int32)
        # As sweeps do: LAPACK's threads and XLA's would fight for the cores.
        with threadpool_limits(1, user_api="blas"):
            return jax.block_until_ready(
                function(*data, until, np.int32(group.chunks), np.int32(1))
            )

    return run, group.chunking, seconds


def sequential(width: int, steps: int, setting: Setting, vocabulary: int) -> Callable[[], Any]:
    graph, params = nnx.split(model(vocabulary)(width, nnx.Rngs(0)))

    @jax.jit
    def train(params: Any, rate: jax.Array, data: Any, key: jax.Array) -> Any:
        def body(carry: Any, t: jax.Array) -> Any:
            params, state = carry
            batch = setting.sample(data, key, t)
            gradient = jax.grad(lambda p: setting.loss(nnx.merge(graph, p), batch))(params)
            updates, state = optax.adam(rate).update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, optax.adam(rate).init(params)), jnp.arange(steps))

    key, rates = jax.random.key(0), [jnp.float32(rate) for rate in LEARNING_RATES]
    jax.block_until_ready(train(params, rates[0], setting.data, key))
    return lambda: [jax.block_until_ready(train(params, r, setting.data, key)) for r in rates]


def torch_llama(width: int, steps: int, corpus: text.Corpus) -> Callable[[], float]:
    from benchmarks import peer_torch_llama

    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(corpus.train) - CONTEXT - 1, (steps, BATCH))
    batches = corpus.train[starts[..., None] + np.arange(CONTEXT + 1)]
    return lambda: peer_torch_llama.run(
        corpus.vocabulary, width, LAYERS, HEADS, LEARNING_RATES, batches
    )


def compare(width: int, rounds: int, corpus: text.Corpus, torch: bool) -> dict[str, Any]:
    setting = text.language_modelling(
        corpus, batch_size=BATCH, context=CONTEXT, validation_sequences=VALIDATION
    )
    steps, few, peers = 100, 10, 100 if on_accelerator() or width < 64 else 50
    observers: list[Observer] = [decomposition_observer(TENTH)]
    mine, chunking, compiling = engine(width, steps, setting, corpus.vocabulary, [])
    observed, _, _ = engine(width, steps, setting, corpus.vocabulary, observers, chunking)
    facts = {"chunking": dataclasses.asdict(chunking), "compile_seconds": round(compiling, 1)}

    def step_of(run: Callable[[int], Any]) -> float:
        # Whole times between two marks of the observer.
        return (timed(lambda: run(steps)) - timed(lambda: run(few))) / (steps - few)

    def step_of_peer(run: Callable[[], Any]) -> float:
        return timed(run) / peers

    other = sequential(width, peers, setting, corpus.vocabulary)
    engines = {
        "mupjax": lambda: step_of(mine),
        "observed": lambda: step_of(observed),
        "jax-sequential": lambda: step_of_peer(other),
    }
    if torch:
        eager = torch_llama(width, peers, corpus)
        engines["torch"] = lambda: step_of_peer(eager)
    product, flops = matmul_engine()
    seconds: dict[str, list[float]] = {name: [] for name in [*engines, "matmul"]}
    for _ in range(rounds):
        for name, seconds_per_step in engines.items():
            seconds[name].append(seconds_per_step())
            seconds["matmul"] += [timed(product) for _ in range(3)]
    rate = flops / statistics.median(seconds["matmul"])
    tokens = BATCH * CONTEXT * len(LEARNING_RATES)
    median = {name: statistics.median(seconds[name]) for name in engines}
    print(
        f"\nwidth {width}, {len(LEARNING_RATES)} trials x {steps} ({peers}) steps; matrix product "
        f"{rate / 1e9:.0f} GFLOP/s; {facts}"
    )
    rows = {}
    for name, took in median.items():
        used = tokens * operations(width, corpus.vocabulary) / took / rate
        rows[name] = {
            "seconds_per_step": round(took, 4),
            "tokens_per_second": round(tokens / took),
            "utilisation": round(used, 3),
            "spread": round((max(seconds[name]) - min(seconds[name])) / took, 2),
        }
        print(
            f"  {name:16s} {took:7.4f} s/step  {tokens / took:9.0f} tokens/s  {used:6.1%} of the "
            f"product   mupjax is {took / median['mupjax']:5.2f} x as fast",
            flush=True,
        )
    return {"width": width, "steps": steps, "matmul_gflops": round(rate / 1e9), **facts, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of a vmapped Llama sweep.")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    given = parser.parse_args()
    use_all_cores()
    documents = text.split_documents(text.standard_library())
    corpus = text.tokenize(documents, text.ByteTokenizer(), max_tokens=2_000_000)
    print(f"{jax.local_device_count()} x {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    torch = importlib.util.find_spec("torch") is not None
    found = [compare(width, given.rounds, corpus, torch) for width in given.widths]
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
