"""What users of muP packages trip over around an update: weight decay, schedules, clipping."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mupjax import NTP, SP, mean_field, muP, sweep, wsd_schedule
from mupjax.optimizers import check_schedule, examine
from mupjax.resolve import resolve
from mupjax.roles import map_leaves
from sine_regression import (
    COMMON,
    EPS,
    FIXED_MLP,
    KEY,
    MLP_EXPONENTS,
    SETTING,
    STEPS,
    TOLERANCE,
    WIDTH,
    M,
    curve,
    mlp,
    resolved,
    sgd,
    train_by_hand,
)

# --- Weight decay -------------------------------------------------------------------------------


def column(table, name):
    lines = [line.split("  ") for line in table.split("\n")[1:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    where = cells[0].index(name)
    return {row[0]: float(row[where]) for row in cells[1:]}


@pytest.fixture(scope="module")
def anatomy():
    return resolved(mlp, init_exponents=MLP_EXPONENTS).anatomy


@pytest.mark.parametrize("parametrization", [muP, mean_field, NTP, SP], ids=lambda p: p.name)
@pytest.mark.parametrize("family", ["sgd", "adam", "spectral"])
def test_weight_decay_shrinks_every_layer_alike_per_step(anatomy, parametrization, family):
    coupled = resolve(parametrization, anatomy, family, weight_decay_mode="coupled")
    factors = coupled.factors(WIDTH)
    for path, rate in factors.learning_rate.items():
        assert rate * factors.weight_decay[path] == pytest.approx(1.0), path
    assert set(column(coupled.table(WIDTH), "lr*wd").values()) == {1.0}
    assert column(coupled.table(WIDTH), "lr") == pytest.approx(factors.learning_rate, rel=1e-3)
    independent = resolve(parametrization, anatomy, family, weight_decay_mode="independent")
    assert set(independent.factors(WIDTH).weight_decay.values()) == {1.0}
    assert set(column(independent.table(WIDTH), "lr*wd").values()) == {1.0}
    assert "weight decay independent" in independent.table(WIDTH)


def test_weight_decay_twice_is_refused():
    with pytest.raises(ValueError, match="would decay them once more"):
        resolved(
            mlp,
            optimizer=lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.1),
            hyperparameters={"learning_rate": 0.1, "weight_decay": 0.1},
            init_exponents=MLP_EXPONENTS,
        )


@pytest.mark.parametrize("mode", ["l2", "independent"])
def test_weight_decay_of_the_optimizer_is_refused_in_another_mode(mode):
    with pytest.raises(
        ValueError, match="applies coupled weight decay by itself, but weight_decay"
    ):
        resolved(
            mlp,
            optimizer=lambda learning_rate: optax.adamw(learning_rate, weight_decay=0.1),
            weight_decay_mode=mode,
            init_exponents=MLP_EXPONENTS,
        )


def test_weight_decay_l2_inside_adam_cannot_be_scaled_from_outside():
    def adam_with_l2(learning_rate):
        return optax.chain(optax.add_decayed_weights(0.01), optax.adam(learning_rate))

    options = {"optimizer": adam_with_l2, "init_exponents": MLP_EXPONENTS}
    with pytest.raises(ValueError, match="which muP cannot scale per layer") as refusal:
        resolved(mlp, **options)
    assert "weight_decay_mode='l2'" in str(refusal.value)
    resolved(mlp, parametrization=SP, **options)


def test_weight_decay_l2_inside_sgd_is_scaled():
    def sgd_with_l2(learning_rate):
        return optax.chain(optax.add_decayed_weights(0.01), optax.sgd(learning_rate, momentum=0.9))

    assert examine(sgd_with_l2, {"learning_rate": 0.1}).own_decay == "decoupled"
    factors = resolved(
        mlp, optimizer=sgd_with_l2, weight_decay_mode="l2", init_exponents=MLP_EXPONENTS
    ).factors(WIDTH)
    assert factors.weight_decay["hidden/0/kernel"] == 1 / M
    assert factors.weight_decay["readout/kernel"] == M


# --- Learning-rate schedules --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (optax.constant_schedule(0.1), "schedule peaks at 0.1 within 12 steps, not at 1"),
        (optax.linear_schedule(3.0, 0.0, 12), "schedule peaks at 3 within"),
        (optax.linear_schedule(1.0, -1.0, 12), "negative or non-finite"),
        (lambda step: jnp.where(step < 3, 1.0, jnp.nan), "negative or non-finite"),
    ],
)
def test_schedule_must_have_a_unit_peak(schedule, reason):
    with pytest.raises(ValueError, match=reason):
        check_schedule(schedule, STEPS)
    with pytest.raises(ValueError, match=reason):
        sweep(
            mlp, SETTING, sgd, muP, hyperparameters={"learning_rate": 0.1}, schedule=schedule,
            **COMMON,
        )  # fmt: skip


def test_schedule_of_warmup_stable_decay_has_a_unit_peak():
    for steps in (1, 2, 10, 1000):
        check_schedule(wsd_schedule(steps), steps)


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=3, decay_steps=STEPS)
RATES, DECAY, NEVER, OFTEN = [0.01, 0.05], 0.1, 1e6, 0.3


@pytest.fixture(scope="module")
def scheduled():
    """A schedule, and clipping by norms that are never and often reached."""

    return sweep(
        FIXED_MLP,
        SETTING,
        lambda learning_rate: optax.adam(learning_rate, eps=EPS),
        [muP, muP.form(8)],
        hyperparameters={
            "learning_rate": RATES,
            "max_gradient_norm": [OFTEN, NEVER],
            "weight_decay": DECAY,
        },
        optimizer_family="adam",
        application="multipliers",
        schedule=SCHEDULE,
        **COMMON,
    )


def scheduled_by_hand(anatomy, parametrization, rate, clip=math.inf):
    """AdamW with optax, parameter by parameter."""
    factors = resolve(parametrization, anatomy, "adam", application="multipliers").factors(WIDTH)
    model = FIXED_MLP(WIDTH)

    def predict(params, x):
        return model.apply(map_leaves(lambda path, w: w * factors.multiplier[path], params), x)

    def of_layer(path):
        # A warm-up that pinned every layer to the global rate would not be this product.
        return lambda step: rate * factors.learning_rate[path] * SCHEDULE(step)

    transforms = {
        path: optax.adamw(
            of_layer(path),
            eps=EPS * factors.adam_eps[path],
            weight_decay=DECAY * factors.weight_decay[path],
        )
        for path in factors.init
    }
    params = map_leaves(lambda path, leaf: leaf * factors.init[path], model.init(KEY))
    return train_by_hand(params, transforms, predict, clip=clip)


def test_schedule_with_warmup_and_cosine_acts_before_the_layers_factor(scheduled, anatomy):
    got = curve(scheduled, parametrization="muP", learning_rate=RATES[1], max_gradient_norm=NEVER)
    expected = scheduled_by_hand(anatomy, muP, RATES[1])
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE)


def test_schedule_leaves_the_rates_swept(scheduled):
    slow, fast = (
        curve(scheduled, parametrization="muP", learning_rate=rate, max_gradient_norm=NEVER)
        for rate in RATES
    )
    assert slow[0] == fast[0]
    assert not np.allclose(slow, fast, rtol=1e-2)


# --- Clipping -----------------------------------------------------------------------------------


def test_clipping_at_a_norm_that_is_never_reached_changes_nothing(scheduled):
    forms = [
        curve(scheduled, parametrization=name, learning_rate=RATES[1], max_gradient_norm=NEVER)
        for name in ("muP", "muP (Table 8)")
    ]
    np.testing.assert_allclose(*forms, rtol=TOLERANCE)
    for name, free in zip(("muP", "muP (Table 8)"), forms, strict=True):
        where = {"parametrization": name, "learning_rate": RATES[1]}
        often = curve(scheduled, **where, max_gradient_norm=OFTEN)
        assert not np.allclose(often, free, rtol=1e-3)


def test_clipping_is_by_the_norm_of_the_gradient(scheduled, anatomy):
    # Table 8 by multipliers: the optimizer trains the very parameters of mup's own code.
    where = {"parametrization": "muP (Table 8)", "max_gradient_norm": OFTEN}
    expected = scheduled_by_hand(anatomy, muP.form(8), RATES[1], clip=OFTEN)
    got = curve(scheduled, learning_rate=RATES[1], **where)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE)


def clipped_adam(learning_rate):
    return optax.chain(optax.clip_by_global_norm(0.1), optax.adam(learning_rate))


def test_clip_inside_the_optimizer_is_refused_where_epsilon_scales():
    # Epsilon is scaled by scaling Adam's gradients, in front of which the clip would stand.
    with pytest.raises(ValueError, match="max_gradient_norm"):
        resolved(mlp, optimizer=clipped_adam)
    resolved(mlp, parametrization="SP", optimizer=clipped_adam)
