"""`mupjax reproduce adaptive-transfer`: its arithmetic, its networks, its verdicts."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
from scipy import stats

import mupjax
from mupjax.adapters import as_model
from mupjax.figures import style
from mupjax.figures.adaptive_transfer import adaptive_transfer_figure
from mupjax.models import MLP
from mupjax.optimizers import wsd_schedule
from mupjax.reproduce import adaptive_transfer_networks as networks
from mupjax.reproduce.adaptive_transfer import TARGET
from mupjax.reproduce.adaptive_transfer_findings import analyse, judge
from mupjax.reproduce.adaptive_transfer_measures import (
    PUBLISHED_ERRORS,
    RATE_EXPONENTS,
    Estimate,
    assumed_error,
    fitted_optimum,
    fraction_interval,
    mean_interval,
    measure_drift,
    order_of_errors,
    transfer_error,
)
from mupjax.reproduce.adaptive_transfer_networks import SCHEMES, Experiment, ResidualMLP, teacher
from tolerances import float_tolerance

# The table, computed by hand from eta* ∝ w^-0.85: 2^.85 = 1.80250, 2^.15 = 1.10957,
# 2^.05 = 1.03526 and their powers.
TABLE = {
    256: (0.0, 0.0, 0.0),
    512: (0.803, 0.099, 0.035),
    1024: (2.249, 0.188, 0.072),
    2048: (4.856, 0.268, 0.110),
    4096: (9.556, 0.340, 0.149),
}


def test_the_published_table_is_arithmetic() -> None:
    for width, row in TABLE.items():
        for scheme, error in zip(("SP", "muP", "Adaptive Transfer"), row, strict=True):
            assert float(assumed_error(width / 256, scheme)) == pytest.approx(error, abs=5e-4)
            if width in PUBLISHED_ERRORS:
                assert PUBLISHED_ERRORS[width][scheme] == error
    finding = judge(made_up(-0.85))["table"]
    assert finding.verdict == "reproduced"
    assert set(finding.values) == {str(width) for width in TABLE}


def test_the_error_follows_from_the_drift() -> None:
    drift = Estimate(-3.0, -3.4, -2.6)
    for scheme, c in RATE_EXPONENTS.items():
        error = transfer_error(16.0, scheme, drift)
        assert error.value == pytest.approx(abs(16.0**-c * 2**3.0 - 1), rel=1e-12)
        dense = [abs(16.0**-c * 2.0**-d - 1) for d in np.linspace(-3.4, -2.6, 4001)]
        assert error.low == pytest.approx(min(dense), abs=1e-3)
        assert error.high == pytest.approx(max(dense), rel=1e-12)


@pytest.mark.parametrize(
    "pair", [("SP", "muP"), ("SP", "Adaptive Transfer"), ("Adaptive Transfer", "muP")]
)
def test_two_schemes_change_places_once(pair: tuple[str, str]) -> None:
    m = 8.0
    near, far = sorted(pair, key=RATE_EXPONENTS.__getitem__)
    crossing = -math.log2(2 / (m ** -RATE_EXPONENTS[near] + m ** -RATE_EXPONENTS[far]))
    for d in np.linspace(-6, 2, 81):
        order = order_of_errors(m, float(d))
        assert (order.index(near) < order.index(far)) is bool(d > crossing)


def test_optimum_is_that_of_the_least_squares_parabola() -> None:
    x = np.arange(-10, -2, 0.5)
    curve = 0.8 + 0.05 * (x + 6.3) ** 2 + 0.01 * (x + 6.3) ** 3
    i = int(np.argmin(curve))
    near = slice(i - 3, i + 4)
    c, b, _ = np.polyfit(x[near], curve[near], 2)
    assert fitted_optimum(x, curve[:, None]) == pytest.approx(-b / (2 * c), rel=1e-10)
    seeds = curve[:, None] + np.asarray([-0.1, 0.1])  # their mean is the curve
    assert fitted_optimum(x, seeds) == pytest.approx(-b / (2 * c), rel=1e-10)


def test_an_optimum_that_is_not_bracketed_is_none() -> None:
    x = np.arange(6.0)
    falling = np.exp(-x)[:, None]
    assert math.isnan(fitted_optimum(x, falling))
    bracketed = (x[:, None] - 3) ** 2
    assert fitted_optimum(x, bracketed) == pytest.approx(3, abs=1e-12)
    bracketed[4] = np.inf
    assert math.isnan(fitted_optimum(x, bracketed))
    assert math.isnan(fitted_optimum(x, np.full((6, 1), np.nan)))


def test_drift_is_exact_without_noise() -> None:
    widths = [24, 48, 96, 192]
    grids = [np.arange(-4, 4.5, 0.5) - k for k in range(4)]  # every width has its own
    best = -1.1 * np.log2(np.asarray(widths) / 24) + 0.2
    losses = [
        np.repeat(1 + 0.07 * (x - b)[:, None] ** 2, 3, axis=1)
        for x, b in zip(grids, best, strict=True)
    ]
    drift = measure_drift(widths, grids, losses)
    assert drift.exponent.value == pytest.approx(-1.1, abs=1e-10)
    assert drift.exponent.high - drift.exponent.low < 1e-9
    assert [d.value for d in drift.octaves] == pytest.approx([0, -1.1, -2.2, -3.3], abs=1e-10)
    one_seed = measure_drift(widths, grids, [y[:, :1] for y in losses])
    assert one_seed.exponent.value == pytest.approx(-1.1, abs=1e-10)
    assert math.isnan(one_seed.exponent.low)
    assert str(one_seed.exponent) == "-1.1 [no interval]"


def test_drift_intervals_cover() -> None:
    rng = np.random.default_rng(0)
    widths, x, repetitions = [16, 32, 64], np.arange(-2.5, 3, 0.5), 60
    covered = 0
    for _ in range(repetitions):
        shared = rng.normal(0, 0.02, (1, 4))  # a seed's luck, common to all its runs
        losses = [1 + 0.05 * (x + 0.3 * k)[:, None] ** 2 + shared for k in range(3)]
        losses = [y + rng.normal(0, 0.01, y.shape) for y in losses]
        covered += -0.3 in measure_drift(widths, [x] * 3, losses).exponent
    # Binomial standard error .039; the interval is a little wide at few seeds, as theory.drift's.
    assert 0.9 - 3 * 0.039 <= covered / repetitions < 1


def test_drift_without_bracket_is_unbounded_or_unknown() -> None:
    x = np.arange(-2.5, 3, 0.5)
    noisy = 1 + np.random.default_rng(1).normal(0, 1, (x.size, 3))
    bowl = np.repeat((x[:, None]) ** 2, 3, axis=1)
    rising = np.repeat(x[:, None], 3, axis=1)
    assert math.isnan(measure_drift([8, 16], [x, x], [bowl, rising]).exponent.value)
    loose = measure_drift([8, 16], [x, x], [bowl, noisy]).exponent
    assert math.isnan(loose.value) or loose.high - loose.low > 1


def test_intervals_are_the_textbook_ones() -> None:
    x = np.asarray([0.1, 0.4, 0.2, 0.5])
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.9)
    found = mean_interval(x)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert mean_interval([0.1, np.inf]) == Estimate(np.inf, np.inf, np.inf)
    assert mean_interval([-np.inf, 0.3]).high == -np.inf
    assert math.isnan(mean_interval([np.nan, 1.0]).low)
    # Clopper and Pearson through the beta distribution; all good has the lower end .05^(1/n).
    nine = fraction_interval([True] * 9 + [False] * 3)
    assert nine.low == pytest.approx(stats.beta.ppf(0.05, 9, 4), rel=1e-9)
    assert nine.high == pytest.approx(stats.beta.ppf(0.95, 10, 3), rel=1e-9)
    assert fraction_interval([True] * 12).low == pytest.approx(0.05 ** (1 / 12), rel=1e-9)
    assert fraction_interval([True] * 12).high == 1.0


def test_schemes_scale_as_the_source_says() -> None:
    expected = {  # powers of m: learning rate, std, weight decay
        "SP": (0.0, 0.0, 0.0),
        "muP": (-1.0, -0.5, 0.0),
        "Adaptive Transfer": (-0.8, -0.5, -0.3),
    }
    m = 4.0
    for name, (rate, std, decay) in expected.items():
        resolved = mupjax.resolve_sweep(
            lambda width, rngs: MLP(5, width, 3, depth=2, use_bias=False, rngs=rngs),
            small_setting(),
            lambda learning_rate: optax.adam(learning_rate),
            SCHEMES[name],
            widths=[32],
            base_width=8,
            hyperparameters={"learning_rate": 0.1, "weight_decay": 0.1},
            init_exponents={"hidden/0/kernel": 0.0, "hidden/1/kernel": 0.5, "readout/kernel": 0.5},
        )
        factors = resolved.factors(32)
        assert set(factors.learning_rate) == {
            "hidden/0/kernel",
            "hidden/1/kernel",
            "readout/kernel",
        }
        for path in factors.learning_rate:
            assert factors.learning_rate[path] == pytest.approx(m**rate)
            assert factors.weight_decay[path] == pytest.approx(m**decay)
            # flax draws with std fan-in^-1/2: the input's is the same at both widths.
            own = 0.0 if path == "hidden/0/kernel" else -0.5
            assert factors.init[path] * m**own == pytest.approx(m**std)
            assert factors.multiplier[path] == 1.0


def small_setting() -> mupjax.Setting:
    x = jnp.ones((2, 5))
    return mupjax.Setting(
        "ones", lambda data, key, step: x, lambda predict, batch: jnp.mean(predict(batch) ** 2), x
    )


@pytest.mark.slow
def test_reference_is_adamw_with_one_global_rate(tmp_path) -> None:
    """The engine's sweep against optax.adamw on the same net: init, rate, decay, depth."""
    experiment = Experiment(
        widths=(8, 16),
        offsets=(-1.0, 0.0, 1.0),
        near=(0.0,),
        seeds=1,
        steps=6,
        batch_size=16,
        validation_examples=32,
        weight_decay=0.5,
    )
    rate, width, m = 2.0**-4, 16, 2.0
    swept = networks._sweep(experiment, "reference", width, (rate,), ["muP"], tmp_path, False)

    setting = experiment.setting()
    depth = 3  # 2 at the base, one more for the doubling
    model = as_model(
        lambda width, rngs: MLP(32, width, 10, depth=depth, use_bias=False, rngs=rngs),
        width,
        setting,
    )
    key = jax.random.key(0)
    params = model.init(jax.random.fold_in(key, 0))
    flat, structure = jax.tree_util.tree_flatten(params)
    assert len(flat) == depth + 1
    # He's gain everywhere; flax has drawn n^-1/2 already but for the input matrix, 32 x 16.
    flat = [w * math.sqrt(2) * (m**-0.5 if w.shape == (32, 16) else 1.0) for w in flat]
    params = structure.unflatten(flat)
    schedule = wsd_schedule(experiment.steps)
    optimizer = optax.adamw(lambda t: rate / m * schedule(t), weight_decay=0.5 * m**0)
    state = optimizer.init(params)
    for step in range(experiment.steps):
        batch = setting.sample(None, jax.random.fold_in(key, 1), jnp.int32(step))
        gradient = jax.grad(lambda p, b: setting.loss(lambda x: model.apply(p, x), b))(
            params, batch
        )
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    by_hand = setting.evaluate(lambda x: model.apply(params, x))["loss"]
    # Adam divides by gradients that may nearly vanish: roundings grow over the steps.
    tolerance = float_tolerance(np.float32, 32 * depth * experiment.steps)
    assert float(swept["loss"].squeeze()) == pytest.approx(float(by_hand), rel=10 * tolerance)


def test_teacher_labels() -> None:
    setting = teacher(64, 4096)
    x, y = (np.asarray(a) for a in setting.validation)
    keys = jax.random.split(jax.random.key(7), 3)
    W = np.asarray(jax.random.normal(keys[0], (32, 64)), np.float64) / np.sqrt(32)
    V = np.asarray(jax.random.normal(keys[1], (64, 10)), np.float64) / 8
    agree = np.argmax(np.tanh(2 * x.astype(np.float64) @ W) @ V, axis=-1) == y
    assert agree.mean() > 0.999  # ties within rounding
    shares = np.bincount(y, minlength=10) / y.size
    guess = Experiment(validation_examples=4096).guessing_loss()
    assert guess == pytest.approx(float(stats.entropy(shares)), rel=1e-9)
    assert 0.9 * math.log(10) < guess < math.log(10)
    first, again, second = (
        setting.sample(None, jax.random.key(3), jnp.int32(t))[0] for t in (0, 0, 1)
    )
    assert bool((first == again).all())
    assert not bool((first == second).any())


def test_residual_network_normalises_what_it_reads() -> None:
    """Scaling the embedding alone changes nothing at the first block's input, hence (with zero
    blocks) nothing in the output."""
    from flax import nnx

    net = ResidualMLP(4, 8, 3, depth=2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    for block in net.blocks:
        block.kernel[...] = jnp.zeros_like(block.kernel[...])
    plain = net(x)
    net.embed.kernel[...] = 100 * net.embed.kernel[...]
    # The norm's epsilon, 1e-6 of a mean square near 1, is what is left.
    np.testing.assert_allclose(np.asarray(net(x)), np.asarray(plain), rtol=1e-4, atol=1e-5)
    assert len(jax.tree.leaves(nnx.state(net, nnx.Param))) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"widths": (32,)}, "a larger one"),
        ({"offsets": (0.0, 1.0)}, "at least 3 increasing"),
        ({"near": (0.0, 0.25)}, "only values of offsets"),
        ({"near": (1.0,)}, "near must hold 0"),
        ({"task": "mnist"}, "task must be one of"),
        ({"network": "conv"}, "network must be one of"),
    ],
)
def test_bad_experiments_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Experiment(**change)


def made_up(exponent: float, *, noise: float = 1e-4, sp_status: int = 0) -> xr.Dataset:
    """Losses of networks whose best global rate goes exactly as width^exponent."""
    rng = np.random.default_rng(5)
    base, widths, seeds = 16, np.asarray([32, 64, 128, 256]), 4
    offsets, near = np.arange(-2.5, 3, 0.5), np.asarray([-1.0, 0.0, 1.0])
    base_rate = 2.0 ** np.arange(-10, -2.5, 0.5)
    tuned = 2.0**-6
    doublings = np.log2(widths / base)

    def loss(octaves_off: np.ndarray) -> np.ndarray:
        clean = 0.8 + 0.05 * np.asarray(octaves_off)[..., None] ** 2
        return clean + rng.normal(0, noise, (*clean.shape[:-1], seeds))

    best = exponent * doublings  # of log2 rate, relative to the base's
    names = ["SP", "muP", "Adaptive Transfer", "SP, std 1/sqrt(fan-in)", "muP, per layer"]
    powers = np.asarray([0.0, 1.0, 0.8, 0.0, 1.0])
    reached = -powers[:, None] * doublings - best
    status = np.zeros((1, 5, 4, 3, seeds), np.int8)
    status[0, 0] = sp_status
    dataset = xr.Dataset(
        {
            "base_loss": (("network", "base_rate", "seed"), loss(np.log2(base_rate) + 6)[None]),
            "reference_loss": (
                ("network", "width", "offset", "seed"),
                loss(offsets - doublings[:, None] - best[:, None])[None],
            ),
            "loss": (
                ("network", "scheme", "width", "near", "seed"),
                loss(reached[:, :, None] + near)[None],
            ),
            "status": (("network", "scheme", "width", "near", "seed"), status),
            "tuned_rate": ("network", [tuned]),
            "depth": ("width", 2 + doublings.astype(int)),
        },
        coords={
            "network": ["plain"],
            "scheme": names,
            "width": widths,
            "offset": offsets,
            "near": near,
            "base_rate": base_rate,
        },
        attrs={"base_width": base},
    )
    for name in ("base", "reference"):
        dataset[f"{name}_status"] = xr.zeros_like(dataset[f"{name}_loss"], dtype=np.int8)
    return analyse(dataset, guessing_loss=2.2)


def test_a_world_as_assumed_reproduces_the_claims() -> None:
    dataset = made_up(-0.85, sp_status=2)
    findings = judge(dataset)
    assert findings["exponent"].verdict == "reproduced"
    assert dataset["exponent"].sel(bound="value").item() == pytest.approx(-0.85, abs=0.02)
    assert findings["order_of_errors"].verdict == "reproduced"
    # 4 and 16 times the base, and by the formula as published.
    errors = dataset["transfer_error"].sel(bound="value").squeeze()
    for width, row in ((64, TABLE[1024]), (256, TABLE[4096])):
        for scheme, error in zip(("SP", "muP", "Adaptive Transfer"), row, strict=True):
            assert float(errors.sel(scheme=scheme, width=width)) == pytest.approx(error, rel=0.1)
    assert np.isnan(errors.sel(scheme="muP, per layer")).all()
    # SP diverges at 4 times the base as well, where the source has .04: inside 0 of 12's interval.
    assert findings["stability"].verdict == "reproduced"
    assert findings["order_of_losses"].verdict == "reproduced"
    assert np.isinf(dataset["penalty"].sel(scheme="SP")).all()
    assert float(dataset["not_diverged"].sel(scheme="SP").max()) == 0.0
    # A parabola: .05 octaves² lost, against the reference's lowest point on a grid of half octaves.
    penalty = dataset["penalty"].sel(scheme="muP", width=256, bound="value")
    assert penalty.item() == pytest.approx(0.05 * (0.6**2 - 0.1**2), abs=1e-3)


def test_another_world_does_not() -> None:
    findings = judge(made_up(-1.1))
    assert findings["exponent"].verdict == "not reproduced"
    assert findings["order_of_errors"].verdict == "not reproduced"
    assert "muP is nearer than Adaptive Transfer" in findings["order_of_errors"].reason
    assert findings["stability"].verdict == "not reproduced"
    assert "SP at 16 times the base" in findings["stability"].reason
    assert findings["order_of_losses"].verdict == "not reproduced"
    assert "muP in plain networks" in findings["order_of_losses"].reason


def test_noise_leaves_the_question_open() -> None:
    findings = judge(made_up(-0.88, noise=0.1))
    for key in ("exponent", "order_of_errors", "order_of_losses"):
        assert findings[key].verdict == "cannot tell at this scale", findings[key]


def test_every_claim_has_a_finding_for_machines() -> None:
    findings = judge(made_up(-0.9))
    assert {claim.key for claim in TARGET.claims} == set(findings)
    assert len({claim.key for claim in TARGET.claims}) == len(TARGET.claims)
    for finding in findings.values():
        assert json.loads(json.dumps(finding.values)) == finding.values


def test_figure_shows_rates_errors_and_diverged_schemes(tmp_path) -> None:
    figure = adaptive_transfer_figure(made_up(-0.85, sp_status=2))
    curves, errors, penalty, stability = figure.axes
    assert "−0.85" in curves.get_title(loc="left")
    # SP has no loss: its marks sit on the upper edge, at the base's rate.
    top = curves.get_ylim()[1]
    edge = [line for line in curves.lines if np.array_equal(line.get_ydata(), [top])]
    assert [float(np.asarray(line.get_xdata())[0]) for line in edge] == [2.0**-6] * 4
    assert errors.get_yscale() == "log"
    assert penalty.get_ylabel().startswith("Loss over")
    assert stability.get_ylim()[1] < 1.1
    text = (style.save(figure, tmp_path / "figure", formats=("svg",))[0]).read_text()
    assert text.startswith("<?xml")
    assert "nan" not in text.lower().replace("nanum", "")
