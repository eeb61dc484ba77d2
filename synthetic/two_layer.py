"""Two-layer ReLU networks on Gaussian inputs: two settings in which transfer is slow.

    f(x) = Σ_{i ≤ n} a_i relu(⟨w_i, x⟩ + b_i) [+ c],     x ∈ R^d,

trained under muP by Adam on fresh batches (Ghosh, Wu and Bietti, arXiv 2512.22768). Both targets
are functions of the input, so the smallest possible loss is 0; what a network of finite width
reaches is what the settings are about. What knows nothing of x reaches
:func:`constant_loss` at best.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special, stats

from mupjax.adapters import Model
from mupjax.setting import Predict, Setting

__all__ = [
    "Biases",
    "ball_indicator",
    "ball_threshold",
    "constant_loss",
    "multi_index",
    "multi_index_moments",
    "two_layer",
]

Biases = Literal["trained", "fixed", "none"]
"""Hidden biases ``b_i``: learned, held at their random initial values, or left out.

Held means that no gradient reaches them: weight decay would still shrink them."""

# Evaluated in blocks: hidden activations of a whole validation batch would take gigabytes.
_BLOCK = 2048


def ball_threshold(dimension: int) -> float:
    """The median of ``‖x‖²`` for ``x ~ N(0, I_d)``, that is of chi-squared with d degrees."""
    return float(stats.chi2.median(_count("dimension", dimension)))


def ball_indicator(
    dimension: int = 64,
    *,
    batch_size: int = 256,
    validation_examples: int = 16384,
    validation_seed: int = 0,
) -> Setting:
    """Inside or outside of a ball: ``x ~ N(0, I_d)``, ``y = 1{‖x‖² > median}``, cross-entropy.

    The classes are balanced, so the best constant prediction has loss ln 2.

    Args:
      dimension: d.
      batch_size: B; every batch is drawn anew from its trial's seed and step.
      validation_examples: size of the validation batch, the same for all trials.
      validation_seed: fixes the validation batch; no training batch shares its random numbers.

    Returns:
      a setting with batches ``(x, y)`` of shapes (B, d) and (B,), whose loss is the mean binary
      cross-entropy in nats of logits of shape (B, 1), with the metric ``accuracy``.

    Raises:
      ValueError: a size is no whole number of at least 1, or the seed none of at least 0.
    """
    threshold = ball_threshold(dimension)

    def draw(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        x = jax.random.normal(key, (count, dimension))
        return x, (jnp.sum(x**2, axis=-1) > threshold).astype(jnp.float32)

    def loss(predict: Predict, batch: Any) -> jax.Array:
        return _mean(predict, batch, lambda z, y: optax.sigmoid_binary_cross_entropy(z, y))

    def accuracy(predict: Predict, batch: Any) -> jax.Array:
        return _mean(predict, batch, lambda z, y: ((z > 0) == (y > 0.5)).astype(z.dtype))

    return _setting(
        "ball-indicator",
        draw,
        loss,
        {"accuracy": accuracy},
        batch_size,
        validation_examples,
        validation_seed,
        {
            "input_features": dimension,
            "threshold": threshold,
            "loss": "binary cross-entropy in nats",
        },
    )


def multi_index(
    dimension: int = 64,
    directions: int = 15,
    *,
    batch_size: int = 256,
    validation_examples: int = 16384,
    validation_seed: int = 0,
) -> Setting:
    """The norm of a few coordinates: ``x ~ N(0, (4/d) I)``, ``y = sqrt(d/(4k) Σ_{i≤k} x_i²)``.

    So ``y² k`` is chi-squared with k degrees of freedom, whatever d; see
    :func:`multi_index_moments`.

    Args:
      dimension: d.
      directions: k, at most d.
      batch_size: B; every batch is drawn anew from its trial's seed and step.
      validation_examples: size of the validation batch, the same for all trials.
      validation_seed: fixes the validation batch; no training batch shares its random numbers.

    Returns:
      a setting with batches ``(x, y)`` of shapes (B, d) and (B,), whose loss is the mean squared
      error of outputs of shape (B, 1).

    Raises:
      ValueError: a size is no whole number of at least 1, the seed none of at least 0, or
        ``directions`` exceeds ``dimension``.
    """
    if _count("directions", directions) > _count("dimension", dimension):
        raise ValueError(
            f"directions must be at most the dimension {dimension}, got {directions}: the target "
            "is a function of that many coordinates of the input."
        )

    def draw(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        z = jax.random.normal(key, (count, dimension))
        return 2 / math.sqrt(dimension) * z, jnp.sqrt(jnp.mean(z[:, :directions] ** 2, axis=-1))

    def loss(predict: Predict, batch: Any) -> jax.Array:
        return _mean(predict, batch, lambda z, y: (z - y) ** 2)

    return _setting(
        "multi-index",
        draw,
        loss,
        {},
        batch_size,
        validation_examples,
        validation_seed,
        {"input_features": dimension, "directions": directions, "loss": "mean squared error"},
    )


def multi_index_moments(directions: int) -> tuple[float, float]:
    """Mean and variance of the target of :func:`multi_index`, in closed form.

    ``E y = sqrt(2/k) Γ((k+1)/2) / Γ(k/2)`` and ``E y² = 1``.
    """
    k = _count("directions", directions)
    mean = math.sqrt(2 / k) * float(special.poch(k / 2, 0.5))
    return mean, 1 - mean**2


def constant_loss(setting: Setting) -> float:
    """The loss of the best constant prediction: ln 2 for the ball, the variance of y else.

    Raises:
      ValueError: the setting is not one of this module.
    """
    if setting.name == "ball-indicator":
        return math.log(2)
    if setting.name == "multi-index":
        return multi_index_moments(setting.configuration["directions"])[1]
    raise ValueError(f"expected a setting of synthetic.two_layer, got {setting.name!r}.")


def two_layer(
    dimension: int,
    *,
    input_std: float | None = None,
    readout_std: float = 1.0,
    biases: Biases = "trained",
    bias_std: float = 0.0,
    output_bias: bool = False,
) -> Callable[[int], Model]:
    """Factory of two-layer ReLU networks, for :func:`mupjax.sweep`.

    Initial values are ``w_i ~ N(0, input_std² I)``, ``a_i ~ N(0, (readout_std/n)²)``,
    ``b_i ~ N(0, bias_std²)``, ``c = 0``: the scales of muP, which leaves them alone at every width.
    Its rates for Adam are ``lr`` for w, b and c, and ``lr · base_width / n`` for a: here the base
    width is nothing but the readout's learning-rate multiplier. In mean-field coordinates,
    ``f = (1/n) Σ a_i …`` with ``a_i ~ N(0, readout_std²)``, it is the rate of ``a_i`` relative to
    that of ``w_i``.

    Args:
      dimension: d.
      input_std: standard deviation of the entries of w_i; default ``1/sqrt(d)``.
      readout_std: n times the standard deviation of a_i.
      biases: what the hidden biases do.
      bias_std: their initial standard deviation.
      output_bias: whether there is an output bias c.

    Returns:
      ``factory(width) -> Model`` with parameters ``hidden/kernel`` (d, n), ``hidden/bias`` (n,),
      ``readout/kernel`` (n, 1), ``readout/bias`` (1,), and outputs (B, 1).

    Raises:
      ValueError: a negative scale, an unknown treatment of biases, no hidden biases but a scale, or
        an `output_bias` that is neither True nor False.
    """
    _count("dimension", dimension)
    if biases not in get_args(Biases):
        raise ValueError(
            f"biases must be one of {', '.join(map(repr, get_args(Biases)))}, got {biases!r}."
        )
    spread = 1 / math.sqrt(dimension) if input_std is None else input_std
    for argument, value in (
        ("input_std", spread),
        ("readout_std", readout_std),
        ("bias_std", bias_std),
    ):
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise ValueError(f"{argument} must be a finite number of at least 0, got {value!r}.")
    if not isinstance(output_bias, (bool, np.bool_)):
        raise ValueError(f"output_bias must be True or False, got {output_bias!r}.")
    if biases == "none" and bias_std:
        raise ValueError(f"bias_std is {bias_std:g}, but biases='none': leave one of them out.")

    def factory(width: int) -> Model:
        def init(key: jax.Array) -> Any:
            keys = jax.random.split(key, 3)
            kernel = spread * jax.random.normal(keys[0], (dimension, width))
            hidden = {"kernel": kernel}
            if biases != "none":
                hidden["bias"] = bias_std * jax.random.normal(keys[1], (width,))
            readout = {"kernel": readout_std / width * jax.random.normal(keys[2], (width, 1))}
            if output_bias:
                readout["bias"] = jnp.zeros((1,))
            return {"hidden": hidden, "readout": readout}

        def layers(params: Any, x: jax.Array) -> dict[str, jax.Array]:
            hidden, readout = params["hidden"], params["readout"]
            z = x @ hidden["kernel"]
            if "bias" in hidden:
                b = hidden["bias"]
                # Without a gradient Adam never moves it.
                z = z + (jax.lax.stop_gradient(b) if biases == "fixed" else b)[None, :]
            f = jax.nn.relu(z) @ readout["kernel"]
            return {"hidden": z, "readout": f + readout["bias"][None, :] if output_bias else f}

        def apply(params: Any, x: jax.Array, width: Any = None) -> jax.Array:
            # Zero-padded units have a = 0: nothing divides by the width.
            del width
            return layers(params, x)["readout"]

        def intermediates(params: Any, x: jax.Array, width: Any = None) -> dict[str, jax.Array]:
            del width
            return layers(params, x)

        return Model(init, apply, options=frozenset({"width"}), intermediates=intermediates)

    return factory


def _setting(
    name: str,
    draw: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
    loss: Any,
    metrics: Any,
    batch_size: int,
    validation_examples: int,
    validation_seed: int,
    facts: dict[str, Any],
) -> Setting:
    _count("batch_size", batch_size)
    _count("validation_seed", validation_seed, minimum=0)
    blocks = -(-_count("validation_examples", validation_examples) // _BLOCK)
    if blocks > 1 and validation_examples % _BLOCK:
        raise ValueError(
            f"validation_examples beyond {_BLOCK} must be a multiple of it, got "
            f"{validation_examples}: use {blocks * _BLOCK}."
        )
    # Seeds of trials make keys of 32-bit numbers; folding in a word sets this key apart.
    word = int.from_bytes(b"eval", "big")
    key = jax.random.fold_in(jax.random.key(validation_seed), word)
    return Setting(
        name,
        sample=lambda _, key, step: draw(jax.random.fold_in(key, step), batch_size),
        loss=loss,
        validation=draw(key, validation_examples),
        metrics=metrics,
        configuration={
            "batch_size": batch_size,
            "validation_examples": validation_examples,
            "validation_seed": validation_seed,
            **facts,
        },
    )


def _mean(
    predict: Predict, batch: Any, score: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """The mean of ``score(outputs, y)`` over a batch, in blocks where the batch is large."""

    def block_mean(block: Any) -> jax.Array:
        x, y = block
        return score(predict(x)[:, 0], y).mean()

    count = batch[1].shape[0]
    if count <= _BLOCK:
        return block_mean(batch)
    blocks = jax.tree.map(lambda a: a.reshape(-1, _BLOCK, *a.shape[1:]), batch)
    return jax.lax.map(block_mean, blocks).mean()


def _count(name: str, value: Any, minimum: int = 1) -> int:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)
    if not whole or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}.")
    return int(value)
