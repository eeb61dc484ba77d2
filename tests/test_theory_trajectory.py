"""The averaged, subsampled trajectory against plain loops, and what it costs between marks."""

import dataclasses
import itertools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mupjax
from mupjax.observe import Observation
from theory import trajectory
from theory.trajectory import (
    GWB_GPT2,
    GWB_LLAMA,
    LAPTOP,
    Averaging,
    Rule,
    Segment,
    Summary,
    trajectory_observer,
)
from tolerances import float_tolerance

SCHEDULES = [
    GWB_LLAMA,
    GWB_GPT2,
    LAPTOP,
    Averaging(0.0, 0.0, 1, 1, 0),
    Averaging(0.5, 0.9, 3, 3, 17),
    Averaging(0.9, 0.5, 7, 2, 31),  # shrinking
    Averaging(0.5, 0.9, 1, 40, 5),  # the second mark lies beyond the warm-up
]


def marks_by_hand(averaging, updates):
    marks = [0]
    while True:
        share = Fraction(1)
        if averaging.warmup_steps:
            share = min(share, Fraction(marks[-1], averaging.warmup_steps))
        stride = averaging.first_stride + (averaging.last_stride - averaging.first_stride) * share
        marks.append(marks[-1] + int(stride + Fraction(1, 2)))
        if marks[-1] > updates:
            return tuple(marks[:-1])


@pytest.mark.parametrize("averaging", SCHEDULES)
def test_marks_are_those_of_a_plain_loop(averaging):
    expected = marks_by_hand(averaging, 2500)
    assert averaging.marks(2500) == expected
    assert averaging.marks(expected[3]) == expected[:4]
    flags = jax.jit(averaging.is_mark)(jnp.arange(2501))
    assert tuple(np.flatnonzero(flags)) == expected


def test_the_published_strides_and_windows():
    marks = np.array(GWB_LLAMA.marks(7185))
    strides = np.diff(marks)
    assert strides[0] == 2
    assert (strides[marks[:-1] >= 2000] == 10).all()
    assert (np.diff(strides) >= 0).all()
    rates = GWB_LLAMA.rate(jnp.asarray([0, 1000, 2000, 7184]))
    np.testing.assert_allclose(rates, [0.02, 1 / 1025, 0.0005, 0.0005], rtol=1e-5)
    np.testing.assert_allclose(
        GWB_GPT2.rate(jnp.asarray([0, 1000, 2000])), [0.005, 1 / 225, 0.004], rtol=1e-5
    )


# A two-parameter problem of which everything is known: loss ½ (c₁ w₁² + c₂ w₂²) + ¼ w₁⁴.
CURVATURE = np.array([1.0, 0.1])


def bowl(validation=(1.0, 1.0, 1.0)):
    """The loss on examples x is the mean of x times the bowl."""

    def loss(predict, batch):
        w = predict(batch)
        return jnp.mean(batch) * (
            0.5 * jnp.sum(jnp.asarray(CURVATURE, w.dtype) * w**2) + w[0] ** 4 / 4
        )

    return mupjax.Setting(
        "bowl",
        sample=lambda data, key, step: jnp.ones(1),
        loss=loss,
        validation=jnp.asarray(validation),
    )


def bowl_loss(w):
    return 0.5 * np.sum(CURVATURE * w**2) + w[0] ** 4 / 4


def bowl_gradient(w):
    return CURVATURE * w + np.array([w[0] ** 3, 0])


MODEL = mupjax.Model(
    init=lambda key: {"w": jnp.asarray([1.0, -2.0])}, apply=lambda params, x: params["w"]
)


def recorder(averaging, size, **options):
    """Everything that `visit` sees, in the order in which it sees it."""
    keys = ("step", "start_loss", "end_loss", "forward", "trapezoid")

    def init(params, model, setting):
        return jnp.int32(0), jnp.full((size, len(keys)), jnp.nan)

    def visit(state, segment: Segment):
        count, rows = state
        products = [
            optax.tree.vdot(segment.gradient(rule), segment.change)
            for rule in ("forward", "trapezoid")
        ]
        row = jnp.stack(
            [segment.step.astype(rows.dtype), segment.start_loss, segment.end_loss, *products]
        )
        return count + 1, rows.at[count].set(row)

    def result(state, summary: Summary):
        whole = summary._asdict()
        rules = {
            f"{rule}_faithfulness": summary.faithfulness(rule) for rule in ("forward", "trapezoid")
        }
        return {"rows": state[1]} | whole | rules

    return trajectory_observer(
        "seen",
        averaging=averaging,
        init=init,
        visit=visit,
        result=result,
        dims={"rows": ("segment", "column")},
        **options,
    )


def following(observer, setting):
    """A function of iterates (T + 1, 2) that gives the observer's results."""

    def step(state, pair):
        t, before, after = pair
        seen = Observation(
            step=t,
            params={"w": before},
            updated={"w": after},
            loss=jnp.asarray(jnp.nan),
            batch=None,
            width=jnp.asarray(4.0),
            model=MODEL,
            setting=setting,
        )
        return observer.update(state, seen), None

    def run(iterates):
        state = observer.init({"w": iterates[0]}, MODEL, setting)
        steps = jnp.arange(len(iterates) - 1)
        state, _ = jax.lax.scan(step, state, (steps, iterates[:-1], iterates[1:]))
        return observer.result(state)

    return run


def follow(observer, iterates, setting=None):
    """The observer's results on given iterates (T + 1, 2), or (trials, T + 1, 2)."""
    run = following(observer, bowl() if setting is None else setting)
    run = run if np.ndim(iterates) == 2 else jax.vmap(run)
    return jax.device_get(jax.jit(run)(jnp.asarray(iterates)))


def descent(steps, rate, start=(1.0, -2.0)):
    iterates = [np.array(start)]
    for _ in range(steps):
        iterates.append(iterates[-1] - rate * bowl_gradient(iterates[-1]))
    return np.array(iterates)


@pytest.mark.parametrize("averaging", [Averaging(0.5, 0.9, 2, 5, 20), Averaging(0.0, 0.0, 1, 3, 9)])
def test_segments_are_those_of_a_plain_loop(averaging):
    iterates = descent(47, 0.1)
    iterates[1:] += np.random.default_rng(0).normal(scale=0.05, size=iterates[1:].shape)
    average, points = iterates[0], {0: iterates[0]}
    path, lengths = np.float64(0), {0: np.float64(0)}
    for t in range(47):
        window_ends = [1 / (1 - averaging.first_coefficient), 1 / (1 - averaging.last_coefficient)]
        window = np.interp(t, [0, averaging.warmup_steps], window_ends)
        moved = average + (iterates[t + 1] - average) / window
        path += np.linalg.norm(moved - average)
        average = moved
        points[t + 1], lengths[t + 1] = average, path
    marks = marks_by_hand(averaging, 47)
    expected = []
    for a, b in itertools.pairwise(marks):
        ga, gb = bowl_gradient(points[a]), bowl_gradient(points[b])
        change = points[b] - points[a]
        row = (b, bowl_loss(points[a]), bowl_loss(points[b]), ga @ change, (ga + gb) @ change / 2)
        expected.append(row)
    expected = np.array(expected)
    chords = [np.linalg.norm(points[b] - points[a]) for a, b in itertools.pairwise(marks)]
    with jax.enable_x64(True):
        found = follow(recorder(averaging, 60), iterates)
    rows = found["rows"][: len(expected)]
    np.testing.assert_allclose(rows, expected, rtol=1e-12, atol=1e-13)
    assert np.isnan(found["rows"][len(expected) :]).all()
    assert found["updates"] == marks[-1]
    change = expected[-1, 2] - expected[0, 1]
    sums = expected.sum(axis=0)
    for name, value in {
        "initial_loss": expected[0, 1],
        "final_loss": expected[-1, 2],
        "forward": sums[3],
        "trapezoid": sums[4],
        "variation": np.abs(expected[:, 2] - expected[:, 1]).sum(),
        "chords": sum(chords),
        "path": lengths[marks[-1]],
        "forward_faithfulness": abs(sums[3] / change - 1),
        "trapezoid_faithfulness": abs(sums[4] / change - 1),
    }.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, err_msg=name)


def test_the_forward_sum_is_of_first_order_and_the_trapezoid_of_second():
    # So small a step that the iterates lie on a smooth curve however often they are looked at.
    iterates = descent(1024, 0.002)
    strides = np.array([8, 16, 32, 64])
    errors: dict[Rule, list[float]] = {"forward": [], "trapezoid": []}
    with jax.enable_x64(True):
        for stride in strides:
            found = follow(recorder(Averaging(0.9, 0.9, stride, stride, 0), 1), iterates)
            change = found["final_loss"] - found["initial_loss"]
            for rule, listed in errors.items():
                listed.append(float(abs(found[rule] - change)))
    orders: dict[Rule, int] = {"forward": 1, "trapezoid": 2}
    for rule, order in orders.items():
        slope = np.polyfit(np.log2(strides), np.log2(errors[rule]), 1)[0]
        assert abs(slope - order) < 0.05, (rule, slope)


def test_iterates_that_stand_still_have_a_trajectory_of_length_zero():
    iterates = np.broadcast_to(np.array([1 / 3, -2 / 7], np.float32), (60, 2))
    found = follow(recorder(Averaging(0.9, 0.99, 2, 3, 10), 1), iterates)
    for name in ("forward", "trapezoid", "variation", "chords", "path"):
        assert found[name] == 0, name
    assert np.isnan(found["forward_faithfulness"])


def test_the_first_validation_examples():
    iterates = descent(12, 0.1)
    averaging = Averaging(0.5, 0.5, 2, 2, 0)
    half = follow(recorder(averaging, 8, validation_examples=2), iterates, bowl((0.5, 0.5, 9.0)))
    whole = follow(recorder(averaging, 8), iterates, bowl((0.5, 0.5)))
    for name, value in whole.items():
        np.testing.assert_allclose(
            half[name], value, rtol=float_tolerance(np.float32, 20), err_msg=name
        )


def test_half_precision_parameters_are_averaged_in_single():
    observer = recorder(Averaging(0.9, 0.9, 1, 1, 0), 8)
    state = observer.init({"w": jnp.ones(2, jnp.bfloat16)}, MODEL, bowl())
    assert state.average["w"].dtype == jnp.float32
    assert state.path.dtype == jnp.float32


def test_gradients_are_computed_at_marks_only():
    # Vectorised over trials, a loop that became a select would run in every step.
    assert jax.devices()[0].platform == "cpu"  # elsewhere one call serves all trials
    averaging = Averaging(0.9, 0.9, 3, 5, 10)
    calls = []
    setting = bowl()

    def loss(predict, batch):
        if batch.shape == (3,):
            jax.debug.callback(lambda: calls.append(1))
        return setting.loss(predict, batch)

    found = mupjax.sweep(
        lambda width: mupjax.Model(
            init=lambda key: {"kernel": jax.random.normal(key, (2, width))},
            apply=lambda params, x: params["kernel"].sum(axis=1),
        ),
        dataclasses.replace(setting, loss=loss),
        lambda learning_rate: optax.sgd(learning_rate),
        "SP",
        widths=[4],
        hyperparameters={"learning_rate": [0.001, 0.002, 0.003]},
        seeds=2,
        steps=20,
        evaluations=2,
        observers=[recorder(averaging, 20)],
        devices=jax.devices()[:1],
        roles={"kernel": "input"},
    )
    jax.effects_barrier()
    assert averaging.marks(20) == (0, 3, 7, 11, 16)
    assert (found["seen_updates"] == 16).all()
    # At the marks each of the six trials in turn, and in the three evaluations all at once.
    assert len(calls) == 5 * 6 + 3
    # Every trial has its own trajectory.
    assert len(np.unique(found["seen_forward"])) == 6


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the program as written for CPUs")
@pytest.mark.parametrize("trials", [1, 2])
def test_xla_leaves_the_gradient_to_the_marks(trials):
    # What does not depend on a loop's own turns it would move before that loop, into every step.
    setting = bowl()
    plain = setting.loss

    def loss(predict, batch):
        return plain(lambda x: jnp.sort(predict(x)), batch)

    run = following(recorder(LAPTOP, 6), dataclasses.replace(setting, loss=loss))
    iterates = jnp.asarray(descent(15, 0.1))
    if trials > 1:
        run, iterates = jax.vmap(run), jnp.stack([iterates] * trials)
    text = jax.jit(run).lower(iterates).compile().as_text()
    assert text is not None
    parts = {part.split(" ")[0].lstrip("%"): part for part in text.split("\n\n")}

    def walk(name):
        """A computation with all that it calls, but for the bodies of loops; those."""
        code = parts.get(name, "")
        bodies = re.findall(r" while\(.*body=%([\w.-]+)", code)
        for called in re.findall(r"(?:to_apply|calls)=%([\w.-]+)", code):
            more, inside = walk(called)
            code, bodies = code + more, bodies + inside
        return code, bodies

    loops = [walk(body) for body in walk("ENTRY")[1]]
    ((in_every_step, turns),) = [(code, inside) for code, inside in loops if inside]
    assert " sort(" not in in_every_step
    (turn,) = turns  # the loop over trials is inside
    code, inside = walk(turn)
    assert " sort(" in code + "".join(walk(body)[0] for body in inside)


def test_trials_in_turn_give_what_they_give_together(monkeypatch):
    averaging = Averaging(0.5, 0.9, 2, 4, 10)
    starts = [(1.0, -2.0), (0.5, 0.1), (-1.5, 3.0)]
    iterates = np.stack([descent(15, 0.1, start) for start in starts])
    found = follow(recorder(averaging, 6), iterates)
    # Each alone, without vmap; and vectorised in the ordinary way.
    alone = [follow(recorder(averaging, 6), one) for one in iterates]
    monkeypatch.setattr(trajectory, "in_turn", lambda function: function)
    together = follow(recorder(averaging, 6), iterates)
    for name, value in found.items():
        np.testing.assert_allclose(value, together[name], rtol=1e-5, atol=1e-6, err_msg=name)
        expected = np.stack([one[name] for one in alone])
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len(np.unique(found["trapezoid"])) == len(starts)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"first_coefficient": 1.0}, r"first_coefficient must lie in \[0, 1\), got 1.0"),
        ({"last_coefficient": -0.1}, "last_coefficient must lie"),
        ({"last_coefficient": float("nan")}, "last_coefficient must lie"),
        ({"first_stride": 0}, "first_stride must be whole and at least 1, got 0"),
        ({"last_stride": 2.5}, "last_stride must be whole and at least 1, got 2.5"),
        ({"warmup_steps": -1}, "warmup_steps must be whole and at least 0, got -1"),
    ],
)
def test_bad_averaging(change, text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(LAPTOP, **change)


def test_bad_arguments():
    with pytest.raises(TypeError, match="averaging must be"):
        recorder("llama", 1)
    with pytest.raises(ValueError, match="validation_examples must be whole and at least 1, got 0"):
        recorder(LAPTOP, 1, validation_examples=0)
    with pytest.raises(ValueError, match=r"validation_examples is 4, but .* holds 3"):
        follow(recorder(LAPTOP, 1, validation_examples=4), descent(3, 0.1))
    with pytest.raises(ValueError, match="rule must be one of forward, trapezoid, got 'midpoint'"):
        Summary(*[jnp.ones(())] * 8).total("midpoint")  # pyright: ignore[reportArgumentType]
