"""What a language-model target costs before it is run: operations, and hours on accelerators."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mupjax.plan import count_operations
from mupjax.reproduce.language_models_training import (
    EXPERIMENTS,
    Experiment,
    Sizes,
    check_sizes,
    hyperparameters,
    largest_of,
    model_of,
    vocabulary_of,
)
from mupjax.reproduce.target import Scale

__all__ = ["ACCELERATORS", "Cost", "cost", "estimate"]

# Peak of dense float32-input products at the default precision (TF32, bfloat16 passes), operations
# a second, from the makers' data sheets.
ACCELERATORS = {
    "NVIDIA A100": 156e12,
    "NVIDIA H100 SXM": 495e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
}
# Of the peak; small widths reach less, large ones more.
UTILISATION = 0.3


@dataclasses.dataclass(frozen=True)
class Cost:
    """Floating-point operations of all trials of a target.

    Attributes:
      training: gradients of the batches.
      observing: gradients of the validation batch at the marks.
      trials: how many.
    """

    training: float
    observing: float
    trials: int


def cost(name: str, scale: Scale, sizes: Sizes) -> Cost:
    """Operations of gradients alone: spectra, optimizers and evaluations come on top."""
    experiment = EXPERIMENTS[name]
    trials = 0
    for axis in experiment.axes:
        values = hyperparameters(experiment, axis, scale)[axis.hp]
        assert isinstance(values, tuple)
        trials += len(values) * sizes.seeds
    marks = len(sizes.averaging.marks(sizes.steps))
    training = observing = 0.0
    for width in sizes.widths:
        sequence = gradient_flops(experiment, sizes, width)
        training += trials * sizes.steps * sizes.batch_size * sequence
        observing += trials * marks * sizes.validation_sequences * sequence
    return Cost(training, observing, trials * len(sizes.widths))


def gradient_flops(experiment: Experiment, sizes: Sizes, width: int) -> float:
    """Operations of the loss and its gradient on one sequence, as XLA counts them."""
    vocabulary = vocabulary_of(sizes)
    make = model_of(experiment, sizes, vocabulary)
    graph, params = nnx.split(nnx.eval_shape(lambda: make(width, nnx.Rngs(0))))

    def loss(params: nnx.State, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    tokens = jax.ShapeDtypeStruct((1, sizes.context + 1), jnp.int32)
    return float(count_operations(jax.value_and_grad(loss), params, tokens)["flops"])


def estimate(
    name: str,
    scale: Scale,
    *,
    seeds: int | None = None,
    max_width: int | None = None,
    data: str | None = None,
) -> str:
    """The cost in words; arguments as for the target."""
    sizes = check_sizes(name, scale, seeds=seeds, max_width=max_width, data=data)
    found = cost(name, scale, sizes)
    whole = found.training + found.observing
    hours = ", ".join(
        f"{whole / (UTILISATION * peak) / 3600:.3g} h on one {device}"
        for device, peak in ACCELERATORS.items()
    )
    published = check_sizes(name, scale, seeds=seeds, max_width=largest_of(name, scale), data=data)
    left_out = [str(n) for n in published.widths if n not in sizes.widths]
    without = f" (without widths {', '.join(left_out)}: --max-width)" if left_out else ""
    return (
        f"{name} trains {found.trials} models of widths "
        f"{', '.join(map(str, sizes.widths))}{without}: {found.training:.3g} operations, and "
        f"{found.observing:.3g} for gradients of the validation batch; at {UTILISATION:.0%} of the "
        f"peak {hours}. Spectra come on top."
    )
