"""One compiled program that trains a grid of trials: a pure function, vmapped and chunked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from mupjax.adapters import Model
from mupjax.observe import Observation, Observer
from mupjax.optimizers import OptimizerFactory
from mupjax.parametrization import WeightDecayMode
from mupjax.plan import Chunking, Device, zero_pad
from mupjax.roles import leaf_paths, map_leaves
from mupjax.setting import Setting

__all__ = ["ENGINE_HYPERPARAMETERS", "STATUS", "Grid", "Program", "Recipe", "build_program"]

STATUS: Mapping[str, int] = {"ok": 0, "non_finite": 1, "above_threshold": 2, "ended_above_start": 3}
"""How a trial ended. ``non_finite``: a loss was nan or inf; ``above_threshold``: a training loss
passed the threshold times the first one; ``ended_above_start``: the evaluation loss ended higher
than it began. All but ``ok`` count as diverged."""

ROLE_MULTIPLIERS = ("input", "hidden", "output", "vector")

ENGINE_HYPERPARAMETERS: Mapping[str, str] = {
    "weight_decay": "weight decay applied by the engine, in the named mode, with the table's "
    "scaling",
    "max_gradient_norm": "largest global norm of the gradient; a larger one is scaled down to it",
    "init_scale": "factor on all initial weight matrices",
    "output_multiplier": "factor in the forward pass on the weights of role output that make the "
    "model's outputs (not of a router further in), and on the bias of a layer of their own",
    **{
        f"{role}_learning_rate_multiplier": f"factor on the learning rate of {role} parameters"
        for role in ROLE_MULTIPLIERS
    },
}
"""Hyperparameters that the engine applies itself, beside those of the optimizer factory."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything static about training one trial: shared by all trials of a program.

    Attributes:
      setting: the learning problem.
      optimizer: optimizer factory.
      optimizer_names: hyperparameters handed to the factory.
      schedule: unit-peak factor on every update, or ``None``.
      roles: role of each parameter by path (for ``init_scale`` and per-role multipliers).
      readout: paths of the parameters that ``output_multiplier`` multiplies.
      weight_decay_mode: how ``weight_decay`` acts where the engine applies it.
      optimizer_decays: the optimizer itself has a decoupled decay term.
      engine_decays: the engine applies weight decay.
      scale_gradients: some factor of Adam's epsilon differs from 1.
      use_multipliers: some forward multiplier differs from 1.
      divergence_threshold: see :data:`STATUS`.
      common_random_numbers: trials of a seed share their batches.
      observers: what to record along the way.
    """

    setting: Setting
    optimizer: OptimizerFactory
    optimizer_names: tuple[str, ...]
    schedule: optax.Schedule | None
    roles: Mapping[str, str]
    readout: frozenset[str]
    weight_decay_mode: WeightDecayMode
    optimizer_decays: bool
    engine_decays: bool
    scale_gradients: bool
    use_multipliers: bool
    divergence_threshold: float
    common_random_numbers: bool = True
    observers: tuple[Observer, ...] = ()


class Trial(NamedTuple):
    """The numbers of one trial; in a program each leaf has the chunk's axes in front."""

    hyperparameters: Mapping[str, ArrayLike]
    multiplier: Mapping[str, ArrayLike]
    init: Mapping[str, ArrayLike]
    learning_rate: Mapping[str, ArrayLike]
    weight_decay: Mapping[str, ArrayLike]
    adam_eps: Mapping[str, ArrayLike]
    readout_multiplier: ArrayLike
    width: Any
    width_index: Any
    trial_index: Any


class Grid(NamedTuple):
    """All trials of a program: ``trials`` leaves (C, I), ``seeds`` (C, S): C chunks."""

    trials: Trial
    seeds: Any


class TrainState(NamedTuple):
    params: Any
    optimizer: Any
    first_loss: jax.Array
    status: jax.Array
    diverged_step: jax.Array
    observed: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted program and its layout.

    Its function takes ``(grid, data, validation, evaluation_steps, chunks, segments)``: the last
    two bound how much is run (a few steps of one chunk, to measure, or everything).
    """

    function: Any
    chunking: Chunking
    chunks: int


def build_program(
    recipe: Recipe,
    models: Sequence[Model],
    chunking: Chunking,
    chunks: int,
    steps: int,
    evaluations: int,
    devices: Sequence[Device],
    on_segment: Callable[[], None] | None = None,
) -> Program:
    """The jitted program that trains ``chunks`` chunks of trials, sharded over devices.

    Args:
      recipe: what is common to all trials.
      models: one model per width; several run zero-padded to the last, which must be the largest.
      chunking: trials advanced together.
      chunks: number of chunks, a multiple of the number of devices.
      steps: T, number of updates.
      evaluations: E, number of evaluations, the first before any update and the last after all.
      devices: where to run.
      on_segment: called on the host after each evaluation of each chunk (progress).

    Returns:
      a program whose outputs have axes (C, S, I) in front.
    """

    def run_chunk(
        trials: Trial, seeds: jax.Array, data: Any, validation: Any, marks: jax.Array, segments: Any
    ) -> Any:
        setting = dataclasses.replace(recipe.setting, data=data, validation=validation)
        return _run_chunk(
            recipe, setting, models, chunking, steps, trials, seeds, marks, segments, on_segment
        )

    def run_all(
        grid: Grid, data: Any, validation: Any, marks: jax.Array, count: jax.Array, segments: Any
    ) -> Any:
        local = grid.seeds.shape[0]
        example = jax.eval_shape(
            run_chunk, *jax.tree.map(lambda a: a[0], tuple(grid)), data, validation, marks, segments
        )
        outputs = jax.tree.map(lambda a: jnp.zeros((local, *a.shape), a.dtype), example)

        def body(c: jax.Array, outputs: Any) -> Any:
            trials, seeds = jax.tree.map(lambda a: a[c], tuple(grid))
            result = run_chunk(trials, seeds, data, validation, marks, segments)
            return jax.tree.map(lambda o, r: o.at[c].set(r), outputs, result)

        return jax.lax.fori_loop(0, jnp.minimum(count, local), body, outputs)

    if len(devices) > 1:
        mesh = Mesh(np.asarray(devices), ("trial",))
        sharded = P("trial")
        run_all = jax.shard_map(
            run_all,
            mesh=mesh,
            in_specs=(sharded, P(), P(), P(), P(), P()),
            out_specs=sharded,
            check_vma=False,
        )
    return Program(jax.jit(run_all), chunking, chunks)


def _run_chunk(
    recipe: Recipe,
    setting: Setting,
    models: Sequence[Model],
    chunking: Chunking,
    steps: int,
    trials: Trial,
    seeds: jax.Array,
    marks: jax.Array,
    segments: jax.Array,
    on_segment: Callable[[], None] | None,
) -> dict[str, Any]:
    """Train one chunk: seeds (S,) times trials (I,); outputs have (S, I) in front."""
    model = models[-1]
    own = (trials, _masks(models, trials.width_index))
    keys = jax.vmap(jax.random.key)(seeds)
    init_keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    batch_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    initial = _initial_params(models, init_keys, trials.width_index)
    # Axes of length 1 are left out of the loop: with them XLA copies the state in every step, and
    # lays out matrix products worse.
    axes = 2 if chunking.seeds > 1 else 1 if chunking.trials > 1 else 0
    lead = (*seeds.shape, *trials.width.shape)[2 - axes :]
    if axes < 2:
        batch_keys, initial = jax.tree.map(lambda a: a[0], (batch_keys, initial))
    if axes < 1:
        own, initial = jax.tree.map(lambda a: a[0], (own, initial))

    def lift(function: Callable[..., Any], kinds: str) -> Callable[..., Any]:
        """vmap over seeds and trials; each argument has both axes (b), or one of them (s, i)."""
        if axes >= 1:
            function = jax.vmap(function, tuple(0 if k in "bi" else None for k in kinds))
        if axes == 2:
            function = jax.vmap(function, tuple(0 if k in "bs" else None for k in kinds))
        return function

    def evaluate(state: TrainState, own: Any) -> dict[str, jax.Array]:
        return setting.evaluate(_predict(recipe, model, state.params, own[0]))

    def one_step(step: jax.Array, carry: Any) -> Any:
        state, losses = carry

        def advance(state: TrainState, own: Any, batch: Any) -> Any:
            return _step(recipe, model, setting, state, own[0], own[1], batch, step)

        def sample(key: jax.Array) -> Any:
            return setting.sample(setting.data, key, step)

        def sample_own(key: jax.Array, own: Any) -> Any:
            return sample(jax.random.fold_in(key, own[0].trial_index))

        if not recipe.common_random_numbers:
            state, loss = lift(advance, "bib")(state, own, lift(sample_own, "si")(batch_keys, own))
        elif chunking.copy_batch:
            copies = lift(lambda own, key: sample(key), "is")(own, batch_keys)
            # The barrier keeps XLA from undoing the copy, which is there for its layout.
            copies = jax.lax.optimization_barrier(copies)
            state, loss = lift(advance, "bib")(state, own, copies)
        else:
            batch = jax.vmap(sample)(batch_keys) if axes == 2 else sample(batch_keys)
            state, loss = lift(advance, "bis")(state, own, batch)
        return state, losses.at[..., step].set(loss)

    state = lift(lambda p, o: _start(recipe, model, setting, p, o[0]), "bi")(initial, own)
    first = lift(evaluate, "bi")(state, own)
    count = marks.shape[0]
    curves = jax.tree.map(lambda a: jnp.full((*a.shape, count), jnp.nan).at[..., 0].set(a), first)
    losses = jnp.full((*lead, steps), jnp.nan)

    def segment(e: jax.Array, carry: Any) -> Any:
        state, losses, curves = carry
        state, losses = jax.lax.fori_loop(marks[e], marks[e + 1], one_step, (state, losses))
        scores = lift(evaluate, "bi")(state, own)
        curves = jax.tree.map(lambda c, s: c.at[..., e + 1].set(s), curves, scores)
        if on_segment is not None:
            jax.debug.callback(on_segment)
        return state, losses, curves

    state, losses, curves = jax.lax.fori_loop(0, segments, segment, (state, losses, curves))
    results = {
        "train_loss": losses,
        "evaluation": curves,
        "status": state.status,
        "diverged_step": state.diverged_step,
        "observed": tuple(
            lift(o.result, "b")(s) for o, s in zip(recipe.observers, state.observed, strict=True)
        ),
    }
    return jax.tree.map(lambda a: jnp.expand_dims(a, tuple(range(2 - axes))), results)


def _masks(models: Sequence[Model], width_index: jax.Array) -> Any:
    """Ones on true coordinates, zeros on padding, leaves (I, ...); None without padding."""
    if len(models) == 1:
        return None
    full = models[-1].abstract_params()
    stacks = []
    for model in models:
        true = model.abstract_params()
        stacks.append(
            jax.tree.map(lambda t, f: zero_pad(jnp.ones(t.shape, bool), f.shape), true, full)
        )
    stacked = jax.tree.map(lambda *m: jnp.stack(m), *stacks)
    return jax.tree.map(lambda m: m[width_index], stacked)


def _initial_params(models: Sequence[Model], keys: jax.Array, width_index: jax.Array) -> Any:
    """Initial parameters of every trial, leaves (S, I, ...); trials of a seed and width agree."""
    full = models[-1].abstract_params()
    per_width = [
        jax.tree.map(
            lambda a, f: jax.vmap(lambda x: zero_pad(x, f.shape))(a), jax.vmap(m.init)(keys), full
        )
        for m in models
    ]
    stacked = jax.tree.map(lambda *a: jnp.stack(a, axis=1), *per_width)
    return jax.tree.map(lambda a: a[:, width_index], stacked)


def _start(recipe: Recipe, model: Model, setting: Setting, params: Any, trial: Trial) -> TrainState:
    scale = trial.hyperparameters.get("init_scale", 1.0)

    def rescale(path: str, leaf: jax.Array) -> jax.Array:
        matrix = recipe.roles[path] not in ("vector", "query_vector") and leaf.ndim > 1
        return leaf * jnp.asarray(trial.init[path] * (scale if matrix else 1.0), leaf.dtype)

    params = map_leaves(rescale, params)
    transform = _transform(recipe, trial)
    effective, own = _effective(recipe, params, trial), _own_model(model, trial)
    return TrainState(
        params=params,
        optimizer=transform.init(params),
        first_loss=jnp.full((), jnp.nan),
        status=jnp.int8(STATUS["ok"]),
        diverged_step=jnp.int32(-1),
        observed=tuple(o.init(effective, own, setting) for o in recipe.observers),
    )


def _transform(recipe: Recipe, trial: Trial) -> optax.GradientTransformation:
    return recipe.optimizer(**{n: trial.hyperparameters[n] for n in recipe.optimizer_names})


def _effective(recipe: Recipe, params: Any, trial: Trial) -> Any:
    """Parameters as the model uses them: forward multipliers applied."""
    if not recipe.use_multipliers and "output_multiplier" not in trial.hyperparameters:
        return params
    output = trial.hyperparameters.get("output_multiplier", 1.0)

    def multiply(path: str, leaf: jax.Array) -> jax.Array:
        factor = trial.multiplier[path] if recipe.use_multipliers else 1.0
        if path in recipe.readout:
            factor = factor * output
        if isinstance(factor, float) and factor == 1.0:
            return leaf
        return leaf * jnp.asarray(factor, leaf.dtype)

    return map_leaves(multiply, params)


def _own_model(model: Model, trial: Trial) -> Model:
    """The model as a trial uses it, with its options filled in."""
    options: dict[str, Any] = {}
    if "width" in model.options:
        options["width"] = trial.width
    if "readout_multiplier" in model.options:
        options["readout_multiplier"] = trial.readout_multiplier
    if not options:
        return model
    seen = model.intermediates
    return dataclasses.replace(
        model,
        apply=functools.partial(model.apply, **options),
        intermediates=None if seen is None else functools.partial(seen, **options),
        options=frozenset(),
    )


def _predict(recipe: Recipe, model: Model, params: Any, trial: Trial) -> Callable[..., Any]:
    return functools.partial(_own_model(model, trial).apply, _effective(recipe, params, trial))


def _step(
    recipe: Recipe,
    model: Model,
    setting: Setting,
    state: TrainState,
    trial: Trial,
    mask: Any,
    batch: Any,
    step: jax.Array,
) -> tuple[TrainState, jax.Array]:
    def loss_of(params: Any) -> jax.Array:
        return setting.loss(_predict(recipe, model, params, trial), batch)

    loss, gradient = jax.value_and_grad(loss_of)(state.params)
    params = _update(recipe, state, trial, mask, gradient, step)
    params, optimizer = params
    first = jnp.where(step == 0, loss, state.first_loss).astype(state.first_loss.dtype)
    finite = jnp.isfinite(loss)
    above = loss > recipe.divergence_threshold * jnp.abs(first)
    fresh = (state.status == STATUS["ok"]) & (~finite | above)
    code = jnp.where(finite, STATUS["above_threshold"], STATUS["non_finite"]).astype(jnp.int8)
    observed = state.observed
    if recipe.observers:
        seen = Observation(
            step=step,
            params=_effective(recipe, state.params, trial),
            updated=_effective(recipe, params, trial),
            loss=loss,
            batch=batch,
            width=trial.width,
            model=_own_model(model, trial),
            setting=setting,
        )
        observed = tuple(
            o.update(s, seen) for o, s in zip(recipe.observers, state.observed, strict=True)
        )
    new = TrainState(
        params=params,
        optimizer=optimizer,
        first_loss=first,
        status=jnp.where(fresh, code, state.status),
        diverged_step=jnp.where(fresh, step.astype(jnp.int32), state.diverged_step),
        observed=observed,
    )
    return new, loss


def _update(
    recipe: Recipe, state: TrainState, trial: Trial, mask: Any, gradient: Any, step: jax.Array
) -> tuple[Any, Any]:
    """One optimizer step with every parameter's own factors; returns (params, optimizer state)."""
    params, hp = state.params, trial.hyperparameters
    if mask is not None:
        gradient = jax.tree.map(lambda g, m: jnp.where(m, g, 0), gradient, mask)
    if (largest := hp.get("max_gradient_norm")) is not None:
        norm = optax.tree.norm(gradient)
        gradient = jax.tree.map(
            lambda g: (g * jnp.minimum(1.0, largest / norm)).astype(g.dtype), gradient
        )
    wd, mode = hp.get("weight_decay", 0.0), recipe.weight_decay_mode
    if recipe.engine_decays and mode == "l2":
        gradient = map_leaves(
            lambda k, g, w: (g + wd * trial.weight_decay[k] * w).astype(g.dtype), gradient, params
        )
    if recipe.scale_gradients:
        # Adam with epsilon eps * f equals Adam with epsilon eps on gradients divided by f. A
        # product, not a quotient: XLA gives a quotient that is used twice a loop of its own.
        gradient = map_leaves(lambda k, g: (g * (1 / trial.adam_eps[k])).astype(g.dtype), gradient)
    decayed = params
    if recipe.optimizer_decays:
        decayed = map_leaves(lambda k, w: (w * trial.weight_decay[k]).astype(w.dtype), params)
    transform = _transform(recipe, trial)
    updates, optimizer = transform.update(gradient, state.optimizer, decayed)
    now = 1.0 if recipe.schedule is None else recipe.schedule(step)
    leaf_rates = {path: trial.learning_rate[path] * now for path in recipe.roles}
    for path, role in recipe.roles.items():
        if (own := hp.get(f"{role}_learning_rate_multiplier")) is not None:
            leaf_rates[path] = leaf_rates[path] * own

    def move(path: str, w: jax.Array, u: jax.Array) -> jax.Array:
        new = w + (leaf_rates[path] * u).astype(w.dtype)
        if recipe.engine_decays and mode != "l2":
            shrink = wd * trial.weight_decay[path]
            rate = leaf_rates[path] * hp["learning_rate"] if mode == "coupled" else now
            new = new - (rate * shrink * w).astype(w.dtype)
        return new

    params = map_leaves(move, params, updates)
    if mask is not None:
        params = jax.tree.map(lambda w, m: jnp.where(m, w, 0), params, mask)
    return params, optimizer


def count_parameters(model: Model) -> int:
    """Number of trainable parameters."""
    return sum(leaf.size for leaf in leaf_paths(model.abstract_params()).values())
