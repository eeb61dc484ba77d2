"""What is trained on: a ``Setting`` gives batches, loss and evaluation, and knows no width."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Batch", "Metric", "Predict", "Setting", "model_calls", "model_inputs"]

Batch = Any
"""Any pytree of arrays; the leading axis of each is the batch axis B."""

Predict = Callable[..., Any]
"""A model with its parameters filled in: inputs to outputs."""

Metric = Callable[[Predict, Batch], jax.Array]
"""A scalar (shape ``()``) read off a model on one batch."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A learning problem: where batches come from, what is minimised, what is reported.

    Attributes:
      name: short name, stored with every result.
      sample: ``sample(data, key, step) -> batch``, a pure function of a typed PRNG key and the
        step (int32 scalar); it runs inside the compiled loop. Trials that share a seed share the
        key, hence see the same batches (common random numbers).
      loss: ``loss(predict, batch) -> scalar``, the mean loss on a batch.
      validation: the batch on which trials are evaluated (read once, whole).
      data: pytree of arrays handed to ``sample``; passed to the compiled program as an argument,
        so that a large data set is not compiled in as a constant. ``None`` where batches are drawn
        from a distribution.
      metrics: further scalars to evaluate on ``validation`` beside the loss, by name.
      configuration: JSON-ready facts to store with results (sizes, units, sources).
    """

    name: str
    sample: Callable[[Any, jax.Array, jax.Array], Batch]
    loss: Metric
    validation: Batch
    data: Any = None
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    configuration: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for argument in ("sample", "loss"):
            if not callable(getattr(self, argument)):
                raise TypeError(
                    f"Setting.{argument} must be a function, got {getattr(self, argument)!r}."
                )
        if not isinstance(self.metrics, Mapping) or not all(
            isinstance(name, str) and callable(metric) for name, metric in self.metrics.items()
        ):
            raise TypeError(
                "Setting.metrics must map names to functions of (predict, batch), got "
                f"{self.metrics!r}."
            )
        if "loss" in self.metrics:
            raise ValueError(
                "Setting.metrics must not contain 'loss': Setting.loss is always reported."
            )
        try:
            json.dumps(dict(self.configuration))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"Setting.configuration of {self.name!r} must hold what JSON can (it is stored "
                f"with every result): {error}."
            ) from error
        if not jax.tree.leaves(self.validation):
            raise ValueError(
                "Setting.validation holds no array: give the batch on which trials are evaluated."
            )

    def abstract_batch(self) -> Batch:
        """Shapes and dtypes of one training batch; nothing is computed."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.eval_shape(self.sample, self.data, key, step)

    def evaluate(self, predict: Predict) -> dict[str, jax.Array]:
        """The loss and every metric of one model on the validation batch, each of shape ``()``."""
        scores = {"loss": self.loss(predict, self.validation)}
        scores.update({name: f(predict, self.validation) for name, f in self.metrics.items()})
        return scores


class _InputsSeenError(Exception):
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = args
        self.keywords = kwargs


def _abstract(leaf: Any) -> Any:
    """Shape and dtype of an array; a flag or a name stays what it is."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def model_inputs(setting: Setting) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the loss passes to the model, as ``(args, kwargs)``: of arrays, shapes and dtypes.

    Found by tracing the loss up to its first call of the model, so that linen modules can be
    initialised without asking the user for an example input.

    Raises:
      ValueError: the loss never calls the model.
    """

    def first_call(batch: Batch) -> jax.Array:
        def predict(*args: Any, **kwargs: Any) -> Any:
            raise _InputsSeenError(*jax.tree.map(_abstract, (args, kwargs)))

        return setting.loss(predict, batch)

    try:
        jax.eval_shape(first_call, setting.abstract_batch())
    except _InputsSeenError as seen:
        return seen.inputs, seen.keywords
    raise ValueError(
        f"the loss of setting {setting.name!r} never calls the model: "
        "write it as loss(predict, batch), with predict(inputs) giving the model's outputs."
    )


def model_calls(
    setting: Setting, apply: Callable[..., Any], params: Any
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the loss passes to the model in each of its calls, as of `model_inputs`.

    Calls with arguments of the same shapes and flags count once. The loss is traced; nothing is
    computed.

    Args:
      setting: the setting.
      apply: ``apply(params, *args, **kwargs)``, the model.
      params: its parameters, as shapes and dtypes.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def loss(params: Any, batch: Batch) -> jax.Array:
        def predict(*args: Any, **kwargs: Any) -> Any:
            call = jax.tree.map(_abstract, (args, kwargs))
            if call not in calls:
                calls.append(call)
            return apply(params, *args, **kwargs)

        return setting.loss(predict, batch)

    jax.eval_shape(loss, params, setting.abstract_batch())
    return calls
