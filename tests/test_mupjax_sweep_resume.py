"""A sweep that was interrupted resumes, and overwrites nothing that it was not asked to."""

import dataclasses
import json
import signal
import time

import jax.numpy as jnp
import optax
import pytest
import xarray as xr

import mupjax
import mupjax.execute
from foreign_files import contents, folder_with_a_file, foreign_dataset, text_file
from mupjax import results
from small_sweeps import (
    TWO_WIDTHS,
    assert_same_results,
    breaking,
    line,
    parabola,
    sgd,
    timing,
    two_widths,
    unoptimised_programs,  # noqa: F401
)
from sweep_processes import in_a_process


@pytest.fixture(scope="module")
def uninterrupted():
    return two_widths()


def same_but_for_the_clock(one, other):
    """Equal in values, coordinates and attributes, except when and how fast they were made."""

    def timeless(dataset):
        # Only a sweep with an output path notes its first losses.
        configuration = json.loads(dataset.attrs["configuration"])
        configuration.pop("first_losses", None)
        return dataset.assign_attrs(timing="", created="", configuration=json.dumps(configuration))

    xr.testing.assert_identical(timeless(one), timeless(other))


@pytest.fixture
def interrupted(tmp_path):
    """The path of a sweep whose second width failed."""
    path = tmp_path / "deep" / "run.nc"
    with pytest.raises(RuntimeError, match="the power went out"):
        two_widths(path, fails_at=8)
    return path


def listing(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def forbid_running(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a program was built")

    monkeypatch.setattr(mupjax.execute, "build_program", refuse)


def test_an_interrupted_sweep_keeps_what_it_finished_and_resumes(interrupted, uninterrupted):
    assert listing(interrupted.parent) == ["run.nc.parts/width-0000004.nc"]
    part = mupjax.load(interrupted.parent / "run.nc.parts" / "width-0000004.nc")
    xr.testing.assert_equal(part.loss, uninterrupted.loss.sel(width=[4]))
    resumed = two_widths(interrupted, existing="resume")
    assert [p["widths"] for p in timing(resumed)["programs"]] == [[8]]
    same_but_for_the_clock(resumed, uninterrupted)
    same_but_for_the_clock(mupjax.load(interrupted), uninterrupted)
    assert listing(interrupted.parent) == ["run.nc"]


def test_a_killed_sweep_resumes(tmp_path, uninterrupted):
    path = tmp_path / "run.zarr"
    process = in_a_process("import sys; t.sleep_at_width_8(sys.argv[1])", str(path))
    part = results.part_path(path, 4)
    try:
        deadline = time.monotonic() + 90
        while not part.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no part was written"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    resumed = two_widths(path, existing="resume")
    assert [p["widths"] for p in timing(resumed)["programs"]] == [[8]]
    # The other process compiled with XLA's optimisations.
    assert_same_results(resumed, uninterrupted, steps=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.zarr"]


def test_a_sweep_may_be_resumed_with_further_widths(interrupted):
    resumed = two_widths(interrupted, existing="resume", widths=[2, 4, 8])
    assert [p["widths"] for p in timing(resumed)["programs"]] == [[2], [8]]
    assert resumed.width.values.tolist() == [2, 4, 8]


def test_resuming_with_another_configuration_names_what_differs(interrupted, monkeypatch):
    forbid_running(monkeypatch)
    before = listing(interrupted.parent)
    with pytest.raises(ValueError, match=r"another configuration \(differing: .*steps"):
        two_widths(interrupted, existing="resume", steps=4)
    with pytest.raises(ValueError, match=r"differing: hyperparameters"):
        two_widths(interrupted, existing="resume", hyperparameters={"learning_rate": [0.5, 1.25]})
    assert listing(interrupted.parent) == before


def test_resuming_with_another_model_of_the_same_shapes_is_refused(interrupted, monkeypatch):
    # The first width was trained with f(x) = v x; the second would be with tanh(v x).
    def bent(width):
        straight = line(width)
        return mupjax.Model(straight.init, lambda params, x: jnp.tanh(straight.apply(params, x)))

    forbid_running(monkeypatch)
    with pytest.raises(ValueError, match="cannot resume"):
        mupjax.sweep(
            bent,
            parabola(),
            sgd,
            "SP",
            **TWO_WIDTHS,
            steps=3,
            base_width=4,
            init_exponents={"*": 0.5},
            strategy="bucketed",
            observers=[breaking(0)],
            out=interrupted,
            existing="resume",
        )


def momentum(decay):
    return lambda learning_rate: optax.sgd(learning_rate, momentum=decay)


def adam_of(b2):
    return lambda learning_rate: optax.adam(learning_rate, b2=b2)


@pytest.mark.parametrize(
    ("first", "other"),
    [(momentum(0.9), momentum(0.8)), (momentum(0.9), sgd), (adam_of(0.999), adam_of(0.99))],
)
def test_resuming_with_another_momentum_is_refused(tmp_path, monkeypatch, first, other):
    """A first update does not show it."""
    out = tmp_path / "run.nc"
    arguments = {"base_width": 4, "steps": 3, "init_exponents": {"*": 0.5}, "out": out}
    arguments |= {"widths": [4, 8], "hyperparameters": {"learning_rate": 0.5}}
    with pytest.raises(RuntimeError, match="the power went out"):
        mupjax.sweep(line, parabola(), first, "SP", observers=[breaking(8)], **arguments)
    forbid_running(monkeypatch)
    again = {"observers": [breaking(0)], "existing": "resume", **arguments}
    with pytest.raises(ValueError, match="differing: optimizer"):
        mupjax.sweep(line, parabola(), other, "SP", **again)
    with pytest.raises(AssertionError, match="a program was built"):  # taken up
        mupjax.sweep(line, parabola(), first, "SP", **again)


def test_resuming_with_another_metric_is_refused(interrupted, monkeypatch):
    forbid_running(monkeypatch)

    def size(predict, batch):
        return jnp.mean(jnp.abs(predict(batch)))

    more = dataclasses.replace(parabola(), metrics={"size": size})
    with pytest.raises(ValueError, match=r"differing: (first_losses, )?metrics"):
        mupjax.sweep(
            line,
            more,
            sgd,
            "SP",
            **TWO_WIDTHS,
            steps=3,
            base_width=4,
            init_exponents={"*": 0.5},
            strategy="bucketed",
            observers=[breaking(0)],
            out=interrupted,
            existing="resume",
        )


def test_a_damaged_part_is_named(interrupted, monkeypatch):
    forbid_running(monkeypatch)
    (part,) = (interrupted.parent / "run.nc.parts").iterdir()
    with part.open("r+b") as file:
        file.truncate(500)
    with pytest.raises(ValueError, match=r"width-0000004.nc'.*delete it, and that width"):
        two_widths(interrupted, existing="resume")


def test_what_an_interruption_left_is_not_used_unless_resuming_is_asked_for(
    interrupted, monkeypatch
):
    forbid_running(monkeypatch)
    with pytest.raises(FileExistsError, match="resume"):
        two_widths(interrupted)


def test_replacing_an_interrupted_sweep_starts_afresh(interrupted, uninterrupted):
    replaced = two_widths(interrupted, existing="replace")
    assert [p["widths"] for p in timing(replaced)["programs"]] == [[4], [8]]
    same_but_for_the_clock(replaced, uninterrupted)
    assert listing(interrupted.parent) == ["run.nc"]


@pytest.fixture
def complete(tmp_path, uninterrupted):
    """A finished sweep on disk."""
    return mupjax.save(uninterrupted, tmp_path / "run.nc")


def test_a_finished_sweep_is_not_overwritten_unasked(complete, monkeypatch):
    forbid_running(monkeypatch)
    before = complete.read_bytes()
    with pytest.raises(
        FileExistsError, match=r"run.nc' holds an earlier sweep.*existing='replace'"
    ):
        two_widths(complete)
    assert complete.read_bytes() == before


def test_a_replacement_that_fails_leaves_the_earlier_sweep(complete):
    before = complete.read_bytes()
    with pytest.raises(RuntimeError, match="the power went out"):
        two_widths(complete, existing="replace", fails_at=4)
    assert complete.read_bytes() == before


def test_resuming_a_finished_sweep_returns_it(complete, uninterrupted, monkeypatch):
    forbid_running(monkeypatch)
    same_but_for_the_clock(two_widths(complete, existing="resume"), uninterrupted)


def test_a_finished_sweep_may_be_resumed_with_further_widths(complete, uninterrupted):
    resumed = two_widths(complete, existing="resume", widths=[2, 4, 8])
    assert [p["widths"] for p in timing(resumed)["programs"]] == [[2]]
    kept = resumed.sel(width=[4, 8])
    for name in uninterrupted.data_vars:
        xr.testing.assert_equal(kept[name], uninterrupted[name])
    again = two_widths(complete, existing="resume", widths=[2, 4, 8])
    same_but_for_the_clock(again, resumed)


def test_a_finished_sweep_loses_no_width(complete, monkeypatch):
    forbid_running(monkeypatch)
    before = complete.read_bytes()
    for widths in ([4], [4, 16]):
        with pytest.raises(ValueError, match=r"differing: .*widths"):
            two_widths(complete, existing="resume", widths=widths)
    assert complete.read_bytes() == before


def test_a_sweep_that_was_written_meanwhile_is_kept(tmp_path, uninterrupted, caplog):
    out = tmp_path / "run.nc"

    def init(params, model, setting):
        if not out.exists():
            mupjax.save(uninterrupted, out)
        return jnp.zeros(())

    rival = dataclasses.replace(breaking(0), init=init)
    found = two_widths(out, observers=[rival])
    same_but_for_the_clock(mupjax.load(out), uninterrupted)
    same_but_for_the_clock(mupjax.load(tmp_path / "run-2.nc"), found)
    assert "run-2.nc" in caplog.text
    assert listing(tmp_path) == ["run-2.nc", "run.nc"]


def test_resuming_a_finished_sweep_of_another_configuration_does_not_overwrite_it(
    complete, monkeypatch
):
    forbid_running(monkeypatch)
    before = complete.read_bytes()
    with pytest.raises(ValueError, match="differing: evaluation_steps, steps"):
        two_widths(complete, existing="resume", steps=4)
    assert complete.read_bytes() == before


@pytest.mark.parametrize("existing", ["error", "replace", "resume"])
@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("make", [text_file, folder_with_a_file, foreign_dataset])
def test_what_is_no_sweep_is_never_touched(tmp_path, monkeypatch, make, suffix, existing):
    forbid_running(monkeypatch)
    path = tmp_path / f"mine{suffix}"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=f"mine{suffix}' exists and is no result of a sweep"):
        two_widths(path, existing=existing)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("existing", ["error", "replace", "resume"])
@pytest.mark.parametrize("make", [text_file, folder_with_a_file])
def test_a_neighbour_that_has_the_name_of_the_parts_folder_is_never_touched(
    tmp_path, monkeypatch, make, existing
):
    forbid_running(monkeypatch)
    make(tmp_path / "run.nc.parts")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"run\.nc\.parts"):
        two_widths(tmp_path / "run.nc", existing=existing)
    assert contents(tmp_path) == before


def test_a_parent_that_is_a_file_is_refused_at_once(tmp_path, monkeypatch):
    forbid_running(monkeypatch)
    (tmp_path / "file").write_text("notes")
    with pytest.raises(FileExistsError, match="file' is a file"):
        two_widths(tmp_path / "file" / "deeper" / "run.nc")
    assert (tmp_path / "file").read_text() == "notes"
