"""`reproduce ntk-mechanism`: its problems and bound, and what it concludes from known numbers."""

import itertools

import numpy as np
import pytest
import xarray as xr

from mupjax.reproduce import ntk_mechanism_curves as curves
from mupjax.reproduce.ntk_mechanism import TARGET
from mupjax.reproduce.ntk_mechanism_findings import judge
from mupjax.reproduce.registry import find_target
from mupjax.reproduce.target import Scale
from theory.ntk import linearized_ensemble, linearized_training

SIZE = curves.Size(10, 3, 5, (4, 16), 3, 4, (4,), 2)


def random_kernels(count, points=10, spread=0.05):
    rng = np.random.default_rng(0)
    spectrum = 1 / np.arange(1.0, points + 1)
    u = np.linalg.qr(rng.normal(size=(points, points)))[0]
    limit = points * (u * spectrum) @ u.T
    noise = rng.normal(size=(count, points, points)) * spread
    roots = np.eye(points) + noise
    return limit, [root @ limit @ root.T for root in roots]


@pytest.mark.parametrize("problem", curves.PROBLEMS)
def test_problems_have_the_stated_scales(problem):
    x, y = curves.points(problem, SIZE)
    assert np.mean(np.sum(x**2, axis=1)) == pytest.approx(4)
    if problem == "noise":
        np.testing.assert_array_equal(y, np.eye(10))
    else:
        assert [y.mean(), y.std()] == pytest.approx([0, 1], abs=1e-12)


def test_noise_is_the_mean_over_all_labels_of_random_signs():
    kernel, _ = random_kernels(0, points=6)
    _, identity = curves.points("noise", curves.Size(6, 3, 5, (4,), 1, 4, (4,), 1))
    rates = np.array([0.3, 1.0, 2.1])
    every = [
        linearized_training(kernel, np.array(signs)).loss(rates, 5)
        for signs in itertools.product([-1.0, 1.0], repeat=6)
    ]
    together = linearized_training(kernel, -identity).loss(rates, 5)
    np.testing.assert_allclose(together, np.mean(every, axis=0), rtol=1e-12)


def test_the_hidden_mode_holds_nothing_at_infinite_width_and_something_at_finite_width():
    limit, finite = random_kernels(2)
    _, y = curves.points("hidden mode", SIZE)
    found = curves._curves("hidden mode", y, limit, {4: finite})
    energies = found.limit.mode_energies
    assert energies[0] < 1e-25 < 1e-3 < energies[1]
    assert all(member.mode_energies[0] > 1e-3 for member in found.ensembles[4].members)
    # The other modes keep what they had.
    np.testing.assert_allclose(
        energies[1:], linearized_training(limit, -y).mode_energies[1:], rtol=1e-9, atol=1e-12
    )


def test_the_bound_by_each_part_is_what_its_definition_gives_on_a_fine_grid():
    limit, finite = random_kernels(5)
    _, y = curves.points("power law", SIZE)
    own = curves._curves("power law", y, limit, {4: finite})
    ensemble, infinite = own.ensembles[4], own.limit
    best, rate = infinite.optimum(5).learning_rate, ensemble.optimum(5).learning_rate
    parts = np.array([2, 10])
    found = curves._bound(ensemble, rate, infinite, parts, 5)

    low, high = sorted((rate / best, 1.0))
    grid = np.linspace(low, high, 4001)
    step = grid[1] - grid[0]
    wholes, tops = [], []
    for own_curves in (ensemble, linearized_ensemble([infinite])):
        top = own_curves.top(best * grid, 5)
        tops.append(top[:, parts - 1])
        wholes.append(top[:, -1:])

    def curvature(f):
        return (np.diff(f, n=2, axis=0) / step**2).min(axis=0)

    def steepest(f):
        return np.abs(np.diff(f, axis=0) / step).max(axis=0)

    strongest = np.maximum(*(curvature(top) for top in tops))
    invariance = np.abs(tops[0] - tops[1]).max(axis=0) / strongest
    flatness = sum(
        steepest(whole - top) / curvature(whole) for whole, top in zip(wholes, tops, strict=True)
    )
    expected = 2 * np.sqrt(invariance) + flatness
    # 49 points against 4001: one coarse step in where the extremes lie.
    np.testing.assert_allclose(found["bound_parts"][1], expected, rtol=0.05)
    assert found["relative_hp_gap"][1] == pytest.approx(abs(rate / best - 1))
    assert found["relative_hp_gap"][1] <= found["bound"][1] <= found["bound_parts"][1].min()


def test_shares_compare_top_parts_with_whole_curves():
    # Two members and four rates, of which two count; differences by hand.
    limit = np.zeros((4, 3))
    tops = np.zeros((2, 4, 3))
    tops[:, :, 1], tops[:, :, 2] = [[1], [3]], [[-4], [-12]]
    tops[:, 3] = 1e9
    inside = np.array([False, True, True, False])
    weights = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    share = curves._share(tops, limit, weights, 2, inside)
    np.testing.assert_allclose(share, 0.25)
    np.testing.assert_allclose(curves._share(tops, limit, weights, 3, inside), 1.0)


CANNOT_TELL = "cannot tell at this scale"
FAST, WEAK = (1.0, 1.0, 2.0), (0.3, 0.15, 0.3)


def manufactured(
    exponents=None, *, share=0.1, bound=2.0, hidden_bound=50.0, moved=0.0, error=1e-14
):
    """A dataset of `ntk-mechanism` whose gaps are exact powers, up to 1 % in the draws."""
    rates = dict.fromkeys(curves.PROBLEMS, FAST) | {"hidden mode": WEAK} | (exponents or {})
    families, problems = list(curves.FAMILIES), list(rates)
    width = 2.0 ** np.arange(6, 12)
    powers = np.array([rates[p] for p in problems])
    gaps = 0.3 * (width[:, None, None] / 64) ** -powers  # (width, problem, gap)
    draws = 40
    wobble = 1 + 0.01 * np.random.default_rng(0).normal(size=(draws, *gaps.shape))
    octaves = np.arange(-12, 3) / 4
    bowl = (octaves - 0.0) ** 2
    dims = ("family", "problem")
    relative = 0.3 * gaps[..., 1].T
    limits = np.where([p == "hidden mode" for p in problems], hidden_bound, bound)[:, None]

    def both(values):
        return np.stack([values] * len(families))

    return xr.Dataset(
        {
            "sum_error": ("optimizer", [error / 2, error]),
            "training_difference": (("family", "trained_width", "trained_rate"), [[[error]]] * 2),
            "gap_draws": (("family", "draw", "width", "problem", "gap"), both(gaps * wobble)),
            "loss_gap": ((*dims, "width"), both(gaps[..., 0].T)),
            "suboptimality": ((*dims, "width"), both(gaps[..., 2].T)),
            "total": (
                (*dims, "width", "octaves"),
                np.broadcast_to(bowl, (2, len(problems), width.size, bowl.size)),
            ),
            "top_kappa": (
                (*dims, "width", "octaves"),
                np.broadcast_to((octaves + moved) ** 2, (2, len(problems), width.size, bowl.size)),
            ),
            "kappa": (dims, np.full((2, len(problems)), 3)),
            "share_draws": (
                (*dims, "region", "draw", "width"),
                np.full((2, len(problems), 2, draws, width.size), share),
            ),
            "relative_hp_gap": ((*dims, "width"), both(relative)),
            "bound": ((*dims, "width"), both(limits * relative)),
            "bound_slack": ((*dims, "width"), both(0 * relative)),
            "bound_kappa": ((*dims, "width"), both(0 * relative + 5)),
            "bound_parts": ((*dims, "width", "parts"), both(3 * relative)[..., None]),
            "mode_share": (("optimizer", "k"), [[0.5, 0.95, 1.0], [0.2, 0.7, 1.0]]),
            "alignment_share": (("optimizer", "component"), [[1.0, 1.0], [1.3, 1.0]]),
        },
        coords={
            "family": families,
            "problem": problems,
            "width": width,
            "octaves": octaves,
            "parts": [1],
            "region": list(curves.REGIONS),
            "optimizer": ["gradient descent", "Adam"],
            "trained_width": [64],
            "trained_rate": [1.0],
        },
        attrs={"points": 12, "fit_from": 64},
    )


LAYER = {"white": 1e-15, "alignment": 0.8, "modes": 0.5}


def verdicts(scale: Scale = "laptop", **changes):
    found = judge(manufactured(**changes), LAYER, scale)
    assert set(found) == {claim.key for claim in TARGET.claims}
    return {key: finding.verdict for key, finding in found.items()}


def test_verdicts_where_the_account_holds():
    assert verdicts(exponents={"noise": WEAK}) == {
        claim.key: "not reproduced" if claim.key == "two_bases" else "reproduced"
        for claim in TARGET.claims
    }


@pytest.mark.parametrize(
    ("changes", "key", "verdict"),
    [
        ({}, "noise", "not reproduced"),
        ({}, "bound", "reproduced"),
        ({"bound": 0.5}, "bound", "not reproduced"),
        ({"bound": 500.0}, "bound", "not reproduced"),
        ({"hidden_bound": 2.0}, "bound", "not reproduced"),
        ({"exponents": {"digits": (1.0, 0.3, 0.6)}}, "fast", "not reproduced"),
        ({"exponents": {"digits": (1.0, 0.5, 1.0)}}, "fast", CANNOT_TELL),
        ({"exponents": {"hidden mode": FAST}}, "hidden_mode", "not reproduced"),
        (
            {"exponents": {"hidden mode": (0.4, 0.2, 0.9)}},
            "hidden_mode",
            CANNOT_TELL,
        ),
        ({"moved": 0.5}, "few_modes", "not reproduced"),
        ({"share": 0.8}, "invariance", "not reproduced"),
        ({"error": 1e-8}, "training", "not reproduced"),
        ({"error": 1e-8}, "sums", "not reproduced"),
        ({"error": np.nan}, "sums", "not reproduced"),
    ],
)
def test_verdicts_elsewhere(changes, key, verdict):
    assert verdicts(**changes)[key] == verdict


def test_tiny_judges_identities_only():
    found = verdicts("tiny")
    identities = {"sums": "reproduced", "training": "reproduced", "two_bases": "not reproduced"}
    assert found == dict.fromkeys(found, CANNOT_TELL) | identities


def test_rates_are_the_fitted_ones_and_components_counted_from_where_shares_stay():
    found = judge(manufactured(), LAYER, "laptop")
    own = found["fast"].values["rates"]["power law"]["random features"]
    for name, value in (("alpha", 1.0), ("beta", 1.0), ("margin", 0.5)):
        middle, low, high = own[name]
        assert middle == pytest.approx(value, abs=0.01)
        assert low < middle < high
    assert found["two_bases"].values["components_needed"] == {
        "gradient descent": [1, 2],
        "Adam": [2, 3],
    }


@pytest.mark.slow
def test_the_whole_target_runs(tmp_path):
    outcome = find_target("ntk-mechanism").run("tiny", tmp_path, False)
    for key in ("sums", "training"):
        assert outcome.findings[key].verdict == "reproduced", outcome.findings[key].measured
    assert outcome.findings["bound"].values["broken"] == 0
    layer = outcome.findings["two_bases"].values["linear_layer"]
    assert layer["white"] < 1e-13
    assert layer["alignment"] > layer["modes"] + 0.1
    assert set(outcome.figures) == {"mechanism", "hidden_mode", "gaps", "bases"}
