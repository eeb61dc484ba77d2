"""Laid out in chunks of any size and on several devices, a sweep has the same results."""

import dataclasses

import jax
import pytest

import mupjax
import mupjax.execute
import mupjax.groups
from mupjax.plan import Chunking
from small_sweeps import (
    assert_same_results,
    chunked,
    sweep_line,
    timing,
    unoptimised_programs,  # noqa: F401
)
from sweep_processes import in_a_process

# Chunks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_at_once():
    return chunked(chunk_size=15)


@pytest.mark.parametrize(
    ("size", "trials", "seeds", "chunks"),
    [(1, 1, 1, 15), (3, 3, 1, 6), (10, 5, 2, 2)],  # 5 = 3 + 2 trials; 3 = 2 + 1 seeds
)
def test_chunks_of_any_size_give_the_same_results(all_at_once, size, trials, seeds, chunks):
    found = chunked(chunk_size=size)
    (program,) = timing(found)["programs"]
    assert program["chunking"] == {
        "trials": trials,
        "seeds": seeds,
        "copy_batch": False,
        "library": "default",
    }
    assert program["chunks"] == chunks
    assert_same_results(found, all_at_once, steps=5)


def test_everything_in_one_chunk(all_at_once):
    (program,) = timing(all_at_once)["programs"]
    assert program["chunking"] == {
        "trials": 5,
        "seeds": 3,
        "copy_batch": False,
        "library": "default",
    }
    assert program["chunks"] == 1


@pytest.mark.parametrize("chunking", [Chunking(3, 1, True), Chunking(5, 2, True)])
def test_copied_batches_give_the_same_results(all_at_once, monkeypatch, chunking):
    monkeypatch.setattr(mupjax.groups, "chunking_of_size", lambda *_: chunking)
    found = chunked(chunk_size=1)
    assert timing(found)["programs"][0]["chunking"]["copy_batch"] is True
    assert_same_results(found, all_at_once, steps=5)


def test_measuring_the_chunk_size_gives_the_same_results_and_counts_its_programs():
    rates = [0.5, 1.5]
    found = sweep_line(hyperparameters={"learning_rate": rates}, chunk_size="measure")
    ruled = sweep_line(hyperparameters={"learning_rate": rates})
    # Both batch modes, the other two libraries for products, and one trial at a time.
    assert timing(found)["compilations"] == 5
    assert timing(ruled)["compilations"] == 1
    assert_same_results(found, ruled, steps=3)


@pytest.mark.parametrize(
    ("saving", "at_most", "programs"), [(0.0, 1e9, 1), (1e9, 1e9, 5), (1e9, 0.0, 1)]
)
def test_layouts_are_measured_where_that_saves_more_than_it_takes(
    monkeypatch, saving, at_most, programs
):
    rates = [0.5, 1.5]
    ruled = sweep_line(hyperparameters={"learning_rate": rates})
    monkeypatch.setattr(mupjax.groups, "_MEASURE_FROM_SECONDS", 0.0)
    monkeypatch.setattr(mupjax.execute, "cautious_seconds", lambda *_: at_most)
    monkeypatch.setattr(mupjax.execute, "_SAVING", saving)
    found = sweep_line(hyperparameters={"learning_rate": rates})
    assert timing(found)["compilations"] == programs
    assert_same_results(found, ruled, steps=3)


@pytest.mark.parametrize("when", ["compiled", "run"])
def test_a_layout_that_fails_is_not_chosen(monkeypatch, when):
    """All but the one by rule fail: it is what runs."""
    rates = [0.5, 1.5]
    ruled = sweep_line(hyperparameters={"learning_rate": rates})
    (chosen,) = (p["chunking"] for p in timing(ruled)["programs"])
    compile_lowered = mupjax.execute.compile_lowered
    failed = []

    def fails(*arguments):
        failed.append(when)
        raise jax.errors.JaxRuntimeError("INTERNAL: RESOURCE_EXHAUSTED: a fault of one layout")

    def compile_here(group, lowered):
        if dataclasses.asdict(group.chunking) == chosen:
            return compile_lowered(group, lowered)
        return fails() if when == "compiled" else (group, fails, 0.0)

    monkeypatch.setattr(mupjax.execute, "compile_lowered", compile_here)
    found = sweep_line(hyperparameters={"learning_rate": rates}, chunk_size="measure")
    assert len(failed) == 4
    assert [p["chunking"] for p in timing(found)["programs"]] == [chosen]
    assert_same_results(found, ruled, steps=3)


# Devices ----------------------------------------------------------------------------------------


def test_four_devices_give_what_one_gives():
    process = in_a_process(
        "t.compare_devices()",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        JAX_PLATFORMS="cpu",
    )
    try:
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, output
