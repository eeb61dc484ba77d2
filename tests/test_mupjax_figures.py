"""Figures and the report: what is drawn and written is what the dataset and the summaries say."""

import base64
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mupjax.figures import learning_rate_figure, save, style
from mupjax.report import verdict_sentence, write_report
from theory import transfer_summary

ROOT = Path(__file__).resolve().parent.parent
DIMS = ("parametrization", "width", "learning_rate", "seed")
WIDTHS = (64, 128, 256, 512, 1024)


def dataset(octaves=(-12, -1), seeds=3, depth=1.0, floor=1.2) -> xr.Dataset:
    """SP's optimum falls by an octave per doubling, muP's stays; both diverge on the right."""
    rng = np.random.default_rng(0)
    x = np.arange(octaves[0], octaves[1] + 1.0)
    loss = np.empty((2, len(WIDTHS), x.size, seeds))
    status = np.zeros(loss.shape, dtype=np.int8)
    for p, drift in enumerate((1.0, 0.0)):
        for k in range(len(WIDTHS)):
            t = x - (-4.3 - drift * k)
            curve = np.minimum(np.where(t < 0, 0.045, 0.25) * t**2, 2.5)
            loss[p, k] = depth * (floor + 2.0 ** (-0.6 * k) + curve)[:, None]
            loss[p, k] *= np.exp(0.01 * rng.normal(size=(x.size, seeds)))
            # About to diverge: one seed has, the others are far above the plot.
            loss[p, k][(t > 2.2), 1:] *= 300
            status[p, k][(t > 2.2), 0] = 2
            status[p, k][t > 3.2] = 1
    loss[status == 1] = np.nan
    return xr.Dataset(
        {
            "loss": (DIMS, loss, {"long_name": "final validation loss", "units": "nats"}),
            "status": (DIMS, status),
        },
        {
            "parametrization": ["SP", "muP"],
            "width": list(WIDTHS),
            "learning_rate": ("learning_rate", 2.0**x, {"long_name": "learning rate"}),
            "seed": np.arange(seeds),
        },
        {
            "configuration": json.dumps({"model": {"depth": 3}, "note": "<b>bold</b> & co"}),
            "device": "cpu: 2 cores",
        },
    )


def summaries_of(data: xr.Dataset):
    return {
        str(name): transfer_summary(
            data.width.values,
            data.learning_rate.values,
            data.loss.sel(parametrization=name).transpose(*DIMS[1:]).values,
            data.status.sel(parametrization=name).transpose(*DIMS[1:]).values != 0,
        )
        for name in data.parametrization.values
    }


def drawn(data: xr.Dataset) -> Figure:
    return learning_rate_figure(data, summaries_of(data))


def curves(ax) -> dict[str, np.ndarray]:
    return {
        line.get_label(): np.asarray(line.get_ydata(), dtype=float)
        for line in ax.lines
        if line.get_label() in map(str, WIDTHS)
    }


def xy(line) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def stars(ax):
    return {line.get_gid(): line for line in ax.lines if line.get_marker() == "*"}


def crosses(ax) -> int:
    return sum(xy(line)[0].size for line in ax.lines if line.get_marker() == "x")


def legend_texts(fig: Figure) -> list[str]:
    (legend,) = fig.legends
    return [text.get_text().replace("\n", " ") for text in legend.get_texts()]


class TestLearningRateFigure:
    def test_the_synthetic_sweep_has_the_answer_it_was_made_with(self):
        found = summaries_of(dataset())
        assert found["SP"].verdict == "drifts"
        assert found["SP"].drift_per_doubling == pytest.approx(-1, abs=0.05)
        assert found["muP"].verdict == "stays"

    def test_every_optimum_is_starred_where_the_summary_has_it(self):
        data = dataset()
        found = summaries_of(data)
        fig = learning_rate_figure(data, found)
        for ax, name in zip(fig.axes, ("SP", "muP"), strict=True):
            marked = stars(ax)
            assert set(marked) == {f"optimum {name} {width}" for width in WIDTHS}
            for k, width in enumerate(WIDTHS):
                star = marked[f"optimum {name} {width}"]
                assert xy(star)[0][0] == found[name].optimal_lr[k]
                assert xy(star)[1][0] == found[name].optimal_loss[k]
                assert to_rgb(star.get_markerfacecolor()) != to_rgb("white")
                bottom, top = ax.get_ylim()
                assert bottom < xy(star)[1][0] < top
        assert "optimum" in legend_texts(fig)
        assert "at an edge: only a bound" not in legend_texts(fig)

    def test_an_optimum_that_is_only_a_bound_has_an_open_star(self):
        data = dataset(octaves=(-12, -5))
        fig = drawn(data)
        sp, mup = (stars(ax) for ax in fig.axes)
        assert to_rgb(sp["optimum SP 64"].get_markerfacecolor()) == to_rgb("white")
        assert to_rgb(sp["optimum SP 1024"].get_markerfacecolor()) != to_rgb("white")
        assert all(to_rgb(star.get_markerfacecolor()) == to_rgb("white") for star in mup.values())
        assert "at an edge: only a bound" in legend_texts(fig)

    def test_curves_are_means_over_seeds_and_leave_out_cells_with_a_diverged_seed(self):
        data = dataset()
        fig = drawn(data)
        whole = (data.status == 0).all("seed")
        expected = data.loss.mean("seed").where(whole)
        for ax, name in zip(fig.axes, ("SP", "muP"), strict=True):
            shown = curves(ax)
            assert list(shown) == [str(width) for width in WIDTHS]
            for width in WIDTHS:
                np.testing.assert_allclose(
                    shown[str(width)], expected.sel(parametrization=name, width=width)
                )
            assert crosses(ax) == int((~whole.sel(parametrization=name)).sum())
            assert len(ax.collections) == len(WIDTHS)  # a band each
        assert "diverged" in legend_texts(fig)
        assert "range over 3 seeds" in legend_texts(fig)

    def test_labels_titles_and_verdicts_are_there(self):
        fig = drawn(dataset())
        first, second = fig.axes
        assert first.get_title(loc="left") == "Standard (SP)"
        assert second.get_title(loc="left") == "Maximal update (μP)"
        for ax, verdict in ((first, "drifts"), (second, "stays")):
            (note,) = (text.get_text() for text in ax.texts)
            assert re.fullmatch(
                verdict + r": −?\d\.\d\d \[−?\d\.\d\d, −?\d\.\d\d\] octaves/doubling", note
            )
            assert ax.get_xlabel() == "Learning rate"
        assert first.get_ylabel() == "Final validation loss (nats)"
        assert legend_texts(fig)[: len(WIDTHS)] == [str(width) for width in WIDTHS]
        assert fig.legends[0].get_title().get_text() == "Width"

    def test_axes_are_shared_with_octaves_as_ticks(self):
        fig = drawn(dataset())
        first, second = fig.axes
        assert first.get_ylim() == second.get_ylim()
        assert first.get_xlim() == second.get_xlim()
        assert first.get_xscale() == "log"
        fig.canvas.draw()
        labels = [label.get_text() for label in first.get_xticklabels()]
        assert labels[0] == "$2^{-12}$"
        assert np.log2(first.get_xticks()) == pytest.approx(np.arange(-12, -1, 2))
        assert any(label.get_text() for label in first.get_yticklabels())

    def test_a_grid_of_less_than_an_octave_has_ticks_too(self):
        data = dataset().isel(learning_rate=slice(3, 6))
        data = data.assign_coords(learning_rate=[0.0011, 0.0013, 0.0015])
        ax = drawn(data).axes[0]
        assert list(ax.get_xticks()) == [0.0011, 0.0015]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["0.0011", "0.0015"]

    def test_exploding_losses_do_not_flatten_the_picture(self):
        data = dataset()
        # No status marks it: finite, and a thousand times too large.
        data["loss"][0, 0, -4] = 2500.0
        data["status"][0, 0, -4] = 0
        fig = drawn(data)
        bottom, top = fig.axes[0].get_ylim()
        assert top < 10
        # The optima of the narrowest and widest network are a good part of the height apart.
        (optima,) = ([xy(star)[1][0] for star in stars(ax).values()] for ax in fig.axes[:1])
        assert (max(optima) - min(optima)) / (top - bottom) > 0.1

    @pytest.mark.parametrize(("floor", "scale"), [(1.2, "linear"), (0.02, "log")])
    def test_the_loss_axis_is_logarithmic_only_when_the_ratio_is_large(self, floor, scale):
        fig = drawn(dataset(floor=floor))
        assert fig.axes[0].get_yscale() == scale
        fig.canvas.draw()
        labels = [label.get_text() for label in fig.axes[0].get_yticklabels()]
        assert len(labels) >= 3
        assert all(float(label) > 0 for label in labels)

    def test_crosses_do_not_meet_the_curves_and_have_no_ticks_beside_them(self):
        fig = drawn(dataset())
        for ax in fig.axes:
            heights = [
                xy(line)[1][0] for line in ax.lines if line.get_marker() == "x" and xy(line)[0].size
            ]
            assert len(set(heights)) == len(WIDTHS)
            lowest = ax.transAxes.transform((0, min(heights)))[1]
            curve_top = max(np.nanmax(shown) for shown in curves(ax).values())
            assert ax.transData.transform((ax.get_xlim()[0], curve_top))[1] < lowest
            assert ax.transData.transform((ax.get_xlim()[0], ax.get_yticks().max()))[1] < lowest

    def test_one_seed_has_no_bands_and_one_parametrization_one_panel(self):
        data = dataset(seeds=1).isel(parametrization=[1])
        fig = drawn(data)
        (ax,) = fig.axes
        assert not any("range" in text for text in legend_texts(fig))
        assert ax.texts[0].get_text().startswith("cannot tell: ")
        assert "[no interval]" in ax.texts[0].get_text()

    def test_a_sweep_where_everything_diverged_still_draws(self, tmp_path):
        data = dataset()
        data["status"][:] = 1
        fig = drawn(data)
        for ax in fig.axes:
            assert not stars(ax)
            assert crosses(ax) == data.sizes["width"] * data.sizes["learning_rate"]
            assert ax.texts[0].get_text() == "cannot tell: drift unknown"
        save(fig, tmp_path / "diverged", formats=["png"])

    def test_the_order_of_dimensions_does_not_matter(self):
        data = dataset()
        turned = data.transpose("seed", "learning_rate", "parametrization", "width")
        for one, other in zip(drawn(data).axes, drawn(turned).axes, strict=True):
            for width in map(str, WIDTHS):
                np.testing.assert_array_equal(curves(one)[width], curves(other)[width])

    def test_it_leaves_matplotlibs_global_state_alone(self):
        before = dict(mpl.rcParams)
        drawn(dataset())
        assert dict(mpl.rcParams) == before
        program = (
            "import sys, mupjax.figures, mupjax.report\n"
            "assert 'matplotlib.pyplot' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=100)

    def test_what_does_not_fit_together_is_refused(self):
        data = dataset()
        found = summaries_of(data)
        with pytest.raises(
            ValueError, match=r"no entry for parametrization 'muP'.*theory.transfer"
        ):
            learning_rate_figure(data, {"SP": found["SP"]})
        with pytest.raises(ValueError, match=r"widths \(64, 128, 256, 512, 1024\), the dataset"):
            learning_rate_figure(data.isel(width=slice(3)), found)
        with pytest.raises(ValueError, match=r"no variable 'status', only \['loss'\]"):
            learning_rate_figure(data.drop_vars("status"), found)
        with pytest.raises(ValueError, match=r"dataset\['loss'\] has dims .*expected"):
            learning_rate_figure(data.assign(loss=data.loss.mean("seed")), found)
        with pytest.raises(ValueError, match="no coordinate 'width'"):
            learning_rate_figure(data.drop_vars("width"), found)


def luminance(color) -> float:
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


class TestStyle:
    @pytest.mark.parametrize("count", range(1, 11))
    def test_wider_is_darker_and_the_lightest_still_shows_on_paper(self, count):
        values = [luminance(color) for color in style.width_colors(count)]
        assert len(values) == count
        assert all(a > b for a, b in itertools.pairwise(values))
        assert all(1.05 / (value + 0.05) > 2 for value in values)
        assert len(set(style.width_markers(count))) == count
        assert not {"x", "*"} & set(style.width_markers(count))

    def test_labels_are_found_under_the_names_of_the_engine(self):
        assert style.label_parametrization("muP") == "Maximal update (μP)"
        assert style.label_parametrization("mean-field") == "Mean-field"
        assert style.label_parametrization("Adaptive Transfer") == "Adaptive Transfer"
        assert style.label_parametrization("my own") == "my own"

    def test_saving_twice_gives_the_same_bytes_and_keeps_dots_in_names(self, tmp_path):
        data = dataset()
        first = save(drawn(data), tmp_path / "new" / "lr-0.5")
        second = save(drawn(data), tmp_path / "again" / "lr-0.5")
        assert [path.name for path in first] == ["lr-0.5.png", "lr-0.5.svg", "lr-0.5.pdf"]
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes()
        # Width and height are the first numbers of a PNG's header.
        width, height = (
            int.from_bytes(first[0].read_bytes()[start : start + 4], "big") for start in (16, 20)
        )
        inches = drawn(data).get_size_inches()
        assert (width, height) == pytest.approx(inches * 200, abs=1)


class Page(HTMLParser):
    """Text, images and open tags of a page; fails on a tag that closes another."""

    VOID = ("meta", "img", "br", "link", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


class TestReport:
    def write(self, tmp_path, data, title="Transfer of an MLP", **options) -> Page:
        found = summaries_of(data)
        path = write_report(
            tmp_path / "out" / "report.html",
            title=title,
            dataset=data,
            summaries=found,
            figure=learning_rate_figure(data, found),
            **options,
        )
        return Page(path.read_text(encoding="utf-8"))

    def test_it_says_what_the_summaries_say(self, tmp_path):
        data = dataset()
        page = self.write(tmp_path, data)
        found = summaries_of(data)
        assert "Standard (SP): drifts. The best learning rate becomes lower with width" in page.text
        assert "Maximal update (μP): stays. Each doubling of the width moves" in page.text
        assert "2 parametrizations, 5 widths from 64 to 1024, 12 learning rates" in page.text
        assert "360 trainings" in page.text
        for summary in found.values():
            for k in range(len(WIDTHS)):
                assert f"= {summary.optimal_lr[k]:.3g}" in page.text
                low, high = summary.optimal_loss_interval[k]
                assert f"{low:.4g} to {high:.4g}" in page.text
        # Two of numbers; the configuration and the device.
        assert [tag for tag, _ in page.tags].count("table") == 4

    def test_it_is_one_file_with_the_figure_inside(self, tmp_path):
        page = self.write(tmp_path, dataset())
        (image,) = (attributes for tag, attributes in page.tags if tag == "img")
        kind, content = image["src"].split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(content, validate=True)
        assert "muP" in image["alt"] or "μP" in image["alt"]
        assert "stays" in image["alt"]
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"script", "link", "iframe", "object"}
        outside = [a for _, a in page.tags for key in ("src", "href") if "//" in a.get(key, "")]
        assert outside == []

    def test_what_was_run_is_listed_and_what_was_not_recorded_is_said(self, tmp_path):
        page = self.write(tmp_path, dataset())
        assert "model.depth3" in page.text.replace(" ", "")
        assert "cpu: 2 cores" in page.text
        assert page.text.count("Not recorded in the dataset.") == 1  # the versions

    def test_text_from_outside_is_escaped(self, tmp_path):
        page = self.write(tmp_path, dataset(), title="<script>alert(1)</script> & more")
        assert "<script>alert(1)</script> & more" in page.text
        assert "<b>bold</b> & co" in page.text
        assert not {"script", "b"} & {tag for tag, _ in page.tags}

    def test_powers_and_minus_signs_are_set_as_such(self, tmp_path):
        page = self.write(tmp_path, dataset())
        assert "2^" not in page.text
        assert ("sup", {}) in page.tags
        assert re.search(r"−1\.\d\d \[−1\.\d\d, −[01]\.\d\d\] octaves", page.text)

    def test_warnings_reach_the_reader(self, tmp_path):
        page = self.write(tmp_path, dataset(octaves=(-12, -5)))
        assert "no usable learning rate brackets the optimum on the high side" in page.text
        assert "not bracketed (high)" in page.text
        assert "This sweep does not settle" in page.text
        single = self.write(tmp_path, dataset(seeds=1))
        assert "One seed: no interval can be given" in single.text
        assert "unknown" in single.text

    def test_the_same_results_give_the_same_bytes(self, tmp_path):
        data = dataset()
        self.write(tmp_path / "a", data)
        self.write(tmp_path / "b", data)
        a, b = ((tmp_path / side / "out" / "report.html").read_bytes() for side in "ab")
        assert a == b

    def test_what_does_not_fit_together_is_refused(self, tmp_path):
        data = dataset()
        found = summaries_of(data)
        options = {"title": "", "dataset": data, "figure": Figure()}
        with pytest.raises(ValueError, match=r"summaries is empty.*\['SP', 'muP'\]"):
            write_report(tmp_path / "r.html", summaries={}, **options)
        with pytest.raises(ValueError, match="has an entry 'NTP', but the dataset has only"):
            write_report(tmp_path / "r.html", summaries={"NTP": found["SP"]}, **options)
        assert not (tmp_path / "r.html").exists()


def test_the_sentence_for_a_drift_that_is_only_bounded_states_no_factor():
    found = summaries_of(dataset(octaves=(-12, -5)))["SP"]
    assert found.verdict == "drifts"
    assert any(found.at_edge)
    assert math.isinf(found.drift_per_doubling_interval[0])
    sentence = verdict_sentence(found)
    assert "becomes lower with width: the drift is at most" in sentence
    assert "by a factor of" not in sentence
    assert "by a factor of 2.0" in verdict_sentence(summaries_of(dataset())["SP"])
