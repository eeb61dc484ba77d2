"""`mupjax reproduce mlp-sgd`: findings on planted sweeps, options, and the path to CIFAR-10."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import xarray as xr

from mupjax.figures.samplewise import index_figure, restricted_figure
from mupjax.figures.sweep_losses import loss_figure
from mupjax.reproduce.decomposed import best_value, interval_over_seeds
from mupjax.reproduce.mlp_sgd_findings import judge
from mupjax.reproduce.mlp_sgd_measures import measure
from mupjax.reproduce.mlp_sgd_training import SIZES, check_sizes, train_grid, train_samplewise

WIDTHS, SEEDS, SAMPLES = np.array([8, 16, 32, 64, 128]), 3, 80
LOG_RATES = np.arange(-8.0, -1.9, 0.5)
RATE = 2.0**-5
SIZED = dataclasses.replace(
    SIZES["laptop"], widths=tuple(WIDTHS.tolist()), learning_rates=tuple(2.0**LOG_RATES)
)
# The first 20 examples are easy, the last 4 are hard.
HARDNESS = np.linspace(1, 20, SAMPLES)
LABELS = np.arange(SAMPLES) // (SAMPLES // 2)


def planted(*, hard_drift=0.6, faithful=0.001, ranking_noise=0.01, shift=0.0):
    """A grid and a sample-wise sweep: parabolas in log2 of the rate, moved for hard examples."""
    rng = np.random.default_rng(0)
    x, n = LOG_RATES[None, :, None, None], np.log2(WIDTHS / 8.0)[:, None, None, None]
    hard = np.arange(SAMPLES) >= SAMPLES - 4
    moved = np.where(hard, hard_drift, shift)[None, None, None, :]
    scale = np.where(np.arange(SAMPLES) < SAMPLES // 4, 0.2, 1.0)[None, None, None, :]
    # Flat where hard, so that the mean over all examples stays a power law.
    curvature = np.where(hard, 0.01, 0.1)[None, None, None, :]
    floor = 0.5 + 2.0 * (WIDTHS[:, None, None, None] ** -0.77)
    seeds = rng.normal(0, 3e-3, (len(WIDTHS), 1, SEEDS, 1))
    each = scale * (floor + curvature * (x + 5 - moved * n) ** 2 + seeds)
    each = each + rng.normal(0, 1e-5, each.shape)
    mean = each.mean(axis=-1)
    components = np.arange(1, WIDTHS[-1] + 1)
    # What depends on the rate is in the first two components, the width's floor in the last.
    start = 3.0
    whole = (mean - start)[..., None]
    varying = whole - (scale * floor).mean(axis=-1, keepdims=True)
    share = np.minimum(components / 2, 1.0)
    top = np.where(components < WIDTHS[:, None, None, None], varying * share, whole)
    top = np.where(components > WIDTHS[:, None, None, None], np.nan, top)
    cell = ("width", "learning_rate", "seed")
    off = 1 + faithful
    grid = xr.Dataset(
        {
            "loss": (cell, mean + 0.001),
            "status": (cell, np.zeros(mean.shape, np.int8)),
            "decomposition_initial_loss": (cell, np.full_like(mean, start)),
            "decomposition_final_loss": (cell, mean),
            "decomposition_total": (cell, off * (mean - start)),
            "decomposition_faithfulness": (cell, np.full_like(mean, faithful)),
            "decomposition_top": ((*cell, "component"), off * top),
            "samples_final_loss": ((*cell, "sample"), each),
        },
        coords={
            "width": WIDTHS,
            "learning_rate": 2.0**LOG_RATES,
            "seed": np.arange(SEEDS),
            "component": components,
        },
    )
    index = HARDNESS + ranking_noise * rng.normal(size=(len(WIDTHS), SEEDS, SAMPLES))
    single = xr.Dataset(
        {
            "samplewise_mci": (("width", "seed", "sample"), index),
            "loss": grid["loss"].sel(learning_rate=RATE),
        },
        coords={"width": WIDTHS, "seed": np.arange(SEEDS)},
    )
    dims = {"parametrization": ["muP"], "momentum": [0.9]}
    single = single.drop_vars("learning_rate").expand_dims(dims | {"learning_rate": [RATE]})
    return grid.expand_dims(dims), single


def found(**options):
    grid, single = planted(**options)
    return measure(grid, single, LABELS)


def verdicts(measured, sizes=SIZED):
    findings = judge(measured, sizes, shown=True)
    return {key: finding.verdict for key, finding in findings.items()}


@pytest.fixture(scope="module")
def as_published():
    return found()


def test_what_the_paper_describes_is_reproduced(as_published):
    assert best_value(planted()[0]) == RATE
    np.testing.assert_array_equal(as_published.easy, np.arange(20))
    np.testing.assert_array_equal(as_published.hard, np.arange(76, 80))
    assert as_published.summaries["easy"].drift_per_doubling == pytest.approx(0, abs=0.01)
    assert as_published.summaries["hard"].drift_per_doubling == pytest.approx(0.6, abs=0.01)
    # Two halves of a uniform law: 3/4 of its variance.
    assert as_published.class_share == pytest.approx(0.75, abs=0.01)
    law = as_published.scaling["optimal"]
    # All examples: hard ones, 4 of 80, pull the optimum only a little.
    assert law.exponent == pytest.approx(0.77, abs=0.1)
    expected = dict.fromkeys(
        ("faithful", "transfer", "overlap", "easy_and_hard", "mechanism"), "reproduced"
    )
    # Another data set: an exponent that agrees would mean nothing.
    assert verdicts(as_published) == expected | {"scaling": "cannot tell at this scale"}
    published = dataclasses.replace(SIZED, published_training=True)
    assert verdicts(as_published, published)["scaling"] == "reproduced"


def test_nothing_is_judged_where_nothing_is_shown(as_published):
    findings = judge(as_published, SIZED, shown=False)
    assert {f.verdict for f in findings.values()} == {"cannot tell at this scale"}
    assert all(f.measured and "nan" not in f.measured for f in findings.values())


@pytest.mark.parametrize(
    ("options", "failing"),
    [
        ({"faithful": 0.2, "hard_drift": 0.0}, {"faithful", "easy_and_hard"}),
        ({"ranking_noise": 30.0, "shift": 0.6}, {"overlap", "transfer"}),
    ],
)
def test_each_claim_fails_where_it_is_built_to_fail(options, failing):
    judged = verdicts(found(**options))
    failed = {claim for claim, verdict in judged.items() if verdict == "not reproduced"}
    # A profile that is not faithful says nothing of the mechanism.
    assert failed - {"mechanism"} == failing


def test_figures_show_every_width(as_published):
    m = as_published
    drawn = [
        loss_figure(m.curves, m.summaries, m.scaling, m.scaling_losses),
        restricted_figure(m.curves, m.summaries, {"easy": 20, "hard": 4}),
    ]
    for figure in drawn:
        curves = figure.axes[0].get_lines()
        np.testing.assert_allclose(
            np.array([line.get_ydata() for line in curves if np.size(line.get_xdata()) > 1]),
            m.curves[{4: "raw", 3: "ema"}[len(figure.axes)]].mean("seed").values,
        )
        assert [t.get_text() for t in figure.legends[0].get_texts()] == [str(n) for n in WIDTHS]
    examples = index_figure(m.index, m.overlaps)
    shown = np.asarray(examples.axes[1].images[0].get_array())
    np.testing.assert_allclose(shown, m.overlaps["lowest"].shares)


def test_an_interval_over_seeds():
    mean, low, high = interval_over_seeds(np.array([1.0, 2.0, 3.0]))
    # Student's 95 % quantile with 2 degrees of freedom is 2.9200.
    assert (mean, low, high) == pytest.approx((2, 2 - 2.92 / 3**0.5, 2 + 2.92 / 3**0.5), rel=1e-4)
    assert np.isnan(interval_over_seeds(np.array([1.0]))[1:]).all()


def test_options(tmp_path):
    assert check_sizes("laptop", seeds=5, max_width=64).widths == (16, 32, 64)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"scale": "laptop", "data": "x"}, "is for scale paper"),
        ({"scale": "laptop", "max_width": 16}, "at least two are needed"),
        ({"scale": "laptop", "seeds": 0}, "seeds"),
        ({"scale": "paper"}, "say --data FOLDER"),
    ]
    for bad, text in refused:
        with pytest.raises(ValueError, match=text):
            check_sizes(**bad)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_sizes("paper", data=str(tmp_path / "absent"))
    assert check_sizes("paper", data=str(tmp_path), max_width=512).widths == (128, 256, 512)


@pytest.mark.slow
def test_cifar10_from_a_folder_trains_the_published_way(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        # Bright or dark by class, so that there is something to learn.
        labels = rng.integers(0, 10, (24, 1))
        pixels = 20 * labels + rng.integers(0, 50, (24, 3072))
        np.concatenate([labels, pixels], axis=1).astype(np.uint8).tofile(folder / name)
    sizes = dataclasses.replace(
        SIZES["paper"],
        data=str(tmp_path),
        widths=(4, 8),
        learning_rates=(5e-5, 1e-4, 2e-4),
        steps=12,
        seeds=2,
        batch_size=8,
        validation_examples=20,
        times=(4, 12),
    )
    grid = train_grid(sizes, tmp_path, False)
    single = train_samplewise(sizes, 1e-4, tmp_path, False)
    assert (grid.status == 0).all()
    np.testing.assert_allclose(
        single.samplewise_top.isel(learning_rate=0),
        grid.decomposition_top.sel(learning_rate=1e-4),
        rtol=1e-3,
        atol=1e-5,
    )
    # Where no unit of a net of width 4 is active on an image, it has no index.
    assert np.isfinite(measure(grid, single, sizes.classes()).index).mean() > 0.7
