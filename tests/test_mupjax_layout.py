"""How a sweep is laid out: what a step costs, and how many trials a device's memory holds."""

import dataclasses
import json
import logging
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import mupjax
import mupjax.execute
import mupjax.plan
from mupjax.adapters import Model
from mupjax.groups import Group
from mupjax.models import llama
from mupjax.plan import (
    Chunking,
    Library,
    choose_chunking,
    choose_strategy,
    count_operations,
    estimate_cost,
)
from mupjax.setting import Setting
from theory.decomposition import decomposition_observer
from theory.trajectory import Averaging

D, BATCH, VALIDATION, WIDTH = 8, 16, 4096, 32


def two_layer(width):
    def init(key):
        first, second = jax.random.split(key)
        return {
            "first": {"kernel": jax.random.normal(first, (D, width))},
            "second": {"kernel": jax.random.normal(second, (width, 1))},
        }

    def apply(params, x):
        return jnp.tanh(x @ params["first"]["kernel"]) @ params["second"]["kernel"]

    return Model(init, apply)


def setting(validation=VALIDATION):
    def loss(predict, batch):
        return jnp.mean((predict(batch[0]) - batch[1]) ** 2)

    held = (np.ones((validation, D), np.float32), np.ones((validation, 1), np.float32))
    data = tuple(jnp.asarray(a[:BATCH]) for a in held)
    return Setting("layout", lambda data, key, step: data, loss, held, data)


def accelerator(memory):
    return SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": memory})


@pytest.fixture
def silent_elsewhere(monkeypatch):
    """Of a computation that is not for the CPU by name, JAX tells no cost, as on a GPU."""
    answer = jax.stages.Lowered.cost_analysis

    def cost_analysis(self):
        return answer(self) if jax.config.values["jax_default_device"] is not None else None

    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", cost_analysis)


def test_a_product_costs_two_operations_an_entry_and_term(silent_elsewhere):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((24, 40), (40, 56))]
    assert jax.jit(jnp.matmul).lower(*shapes).cost_analysis() is None
    assert count_operations(jnp.matmul, *shapes)["flops"] == 2 * 24 * 40 * 56


def test_without_a_cpu_the_compiled_program_tells_the_cost(monkeypatch, silent_elsewhere):
    def none(backend):
        raise RuntimeError(f"Unknown backend: {backend!r} requested.")

    monkeypatch.setattr(jax, "local_devices", none)
    shape = jax.ShapeDtypeStruct((512,), jnp.float32)
    assert count_operations(lambda x: x + x, shape)["flops"] == pytest.approx(512, rel=0.1)


def test_the_cost_of_a_step_is_that_of_its_products(silent_elsewhere):
    cost = estimate_cost(two_layer(WIDTH), setting())
    # Forward; backward both gradients of the kernels and that of the hidden layer.
    products = 2 * BATCH * (2 * D * WIDTH + 3 * WIDTH)
    assert products <= cost.flops <= 1.5 * products


@pytest.mark.parametrize("observed", [False, True])
def test_trials_on_an_accelerator_leave_room_for_the_validation_batch(observed):
    small, large = (
        estimate_cost(two_layer(WIDTH), setting(count), observed=observed)
        for count in (BATCH, VALIDATION)
    )
    assert dataclasses.replace(large, peak_bytes=small.peak_bytes) == small
    # The hidden layer of the validation batch, of every trial at once.
    hidden = 4 * VALIDATION * WIDTH
    assert large.peak_bytes >= hidden * (3 if observed else 1)
    device = accelerator(40 * hidden)
    chunking = choose_chunking(large, trials=100, seeds=1, device=device, shards=1)
    assert 1 <= chunking.trials * hidden <= 0.5 * 40 * hidden
    assert choose_chunking(small, trials=100, seeds=1, device=device, shards=1).trials == 100


def test_wide_nets_are_not_padded_on_an_accelerator(silent_elsewhere):
    costs = [estimate_cost(two_layer(n), setting()) for n in (128, 1024, 8192)]
    big = [dataclasses.replace(c, flops=256 * c.flops) for c in costs]
    assert choose_strategy(big, trials=126, steps=10_000, device=accelerator(1e11)) == "bucketed"
    assert choose_strategy(costs[:1] * 3, trials=4, steps=50, device=accelerator(1e11)) == "padded"


def small_sweep(**options):
    return mupjax.sweep(
        two_layer,
        setting(64),
        lambda learning_rate: optax.sgd(learning_rate),
        "SP",
        widths=[8, 16],
        base_width=8,
        steps=4,
        seeds=3,
        strategy="bucketed",
        hyperparameters={"learning_rate": [0.001 * 2**k for k in range(5)]},
        **options,
    )


def chunkings(found):
    programs = json.loads(found.attrs["timing"])["programs"]
    return [(p["chunking"]["seeds"], p["chunking"]["trials"]) for p in programs]


def small_memory(monkeypatch, trials, when):
    """A device that holds no more than so many trials at once, as a program shows when it is
    compiled or when it runs.
    """
    compile_lowered = mupjax.execute.compile_lowered
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    def fails(*arguments):
        raise full

    def compile_here(group, lowered):
        if group.chunking.trials * group.chunking.seeds <= trials:
            return compile_lowered(group, lowered)
        if when == "compiled":
            raise full
        return group, fails, 0.0

    monkeypatch.setattr(mupjax.execute, "compile_lowered", compile_here)


@pytest.mark.parametrize("when", ["compiled", "run"])
def test_a_chunk_that_does_not_fit_is_halved_until_it_does(monkeypatch, caplog, when):
    whole = small_sweep()
    assert chunkings(whole) == [(3, 5), (3, 5)]
    small_memory(monkeypatch, 4, when)
    with caplog.at_level(logging.WARNING, logger="mupjax"):
        found = small_sweep()
    assert chunkings(found) == [(1, 3), (1, 3)]
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-5, atol=1e-7)
    assert [r.getMessage() for r in caplog.records][:3] == [
        f"widths (8,): {trials} trials at once do not fit the device's memory; trying half as many"
        for trials in (15, 10, 5)
    ]


def test_a_trial_that_does_not_fit_is_refused_and_what_was_trained_is_kept(monkeypatch, tmp_path):
    compile_lowered, out = mupjax.execute.compile_lowered, tmp_path / "sweep.nc"

    def compile_here(group, lowered):
        if group.widths == (16,):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return compile_lowered(group, lowered)

    monkeypatch.setattr(mupjax.execute, "compile_lowered", compile_here)
    with pytest.raises(MemoryError, match="one trial at width 16 does not fit the memory"):
        small_sweep(out=out)
    monkeypatch.undo()
    found = small_sweep(out=out, existing="resume")
    assert [p["widths"] for p in json.loads(found.attrs["timing"])["programs"]] == [[16]]


def test_other_faults_of_a_program_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def fails(group, lowered):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    monkeypatch.setattr(mupjax.execute, "compile_lowered", fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a fault"):
        small_sweep()


class Lowered:
    """A program that notes with which options it is compiled, and may fail at that."""

    def __init__(self, fault: str | None = None) -> None:
        self.program, self.fault, self.options = jax.jit(lambda x: 2 * x).lower(1.0), fault, []

    def compile(self, compiler_options):
        self.options.append(compiler_options)
        if self.fault is not None:
            raise jax.errors.JaxRuntimeError(self.fault)
        return self.program.compile(compiler_options=compiler_options)


def group_of(library):
    return Group((8,), [(0, 0, 0)], (0,), Chunking(1, library=library), shards=1)


def test_an_option_that_xla_does_not_know_is_left_out_alone(monkeypatch, caplog):
    known = {"xla_cpu_experimental_ynn_fusion_type": ""}
    monkeypatch.setattr(mupjax.plan, "_OPTIONS", {"xla_no_such_option": "yes"})
    lowered = Lowered()
    with caplog.at_level(logging.INFO, logger="mupjax"):
        _, function, _ = mupjax.execute.compile_lowered(group_of("eigen"), lowered)
    said = [r.getMessage() for r in caplog.records if r.name == "mupjax"]
    assert [text.rpartition(": ")[2] for text in said] == ["xla_no_such_option"]
    assert lowered.options == [{"xla_no_such_option": "yes", **known}, known]
    assert function(1.5) == 3


def test_a_program_that_cannot_be_compiled_is_tried_once():
    lowered = Lowered(fault="RESOURCE_EXHAUSTED: Out of memory")
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        mupjax.execute.compile_lowered(group_of("eigen"), lowered)
    assert len(lowered.options) == 1


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older ones do not know the scheduler")
def test_xla_knows_every_option():
    for library in get_args(Library):
        lowered = Lowered()
        mupjax.execute.compile_lowered(group_of(library), lowered)
        assert len(lowered.options) == 1


def test_options_change_no_number(monkeypatch):
    tokens = jax.random.randint(jax.random.key(0), (16, 13), 0, 17)
    learning = Setting(
        "language",
        lambda data, key, step: data[(4 * step + jnp.arange(4)) % 16],
        lambda predict, batch: optax.softmax_cross_entropy_with_integer_labels(
            predict(batch[:, :-1]), batch[:, 1:]
        ).mean(),
        tokens[:4],
        tokens,
    )
    averaging = Averaging(0.9, 0.95, first_stride=2, last_stride=2, warmup_steps=0)

    def trained():
        return mupjax.sweep(
            lambda width, rngs: llama(17, width, layers=1, heads=2, rngs=rngs),
            learning,
            lambda learning_rate: optax.adam(learning_rate),
            "muP",
            widths=[16],
            base_width=8,
            steps=12,
            seeds=2,
            attention="1/sqrt(head_dim)",
            hyperparameters={"learning_rate": [0.01, 0.03]},
            observers=[decomposition_observer(averaging)],
            strategy="bucketed",
            chunk_size=1,
        )

    ours = trained()
    monkeypatch.setattr(mupjax.plan, "_OPTIONS", {})
    plain = trained()
    for found in (ours.train_loss, ours.decomposition_total, ours.decomposition_layer_top):
        assert np.isfinite(found).all()
    assert (ours.decomposition_total < 0).all()
    assert (ours.train_loss[..., -1] < ours.train_loss[..., 0]).all()
    xr.testing.assert_equal(ours, plain)
