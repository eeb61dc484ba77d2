"""A model at every width of a sweep, each checked against the setting that it is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mupjax.adapters import Model, ModelFactory, as_model
from mupjax.config import check_count
from mupjax.roles import leaf_paths
from mupjax.setting import Setting

__all__ = ["build_models"]


def build_models(
    factory: ModelFactory, setting: Setting, widths: Sequence[int], base_width: int | None
) -> dict[int, Model]:
    """The model at all widths and the base width, and at a second one where there is but one.

    Raises:
      ValueError: a base width that is no count, or a model that `as_model` or the setting's loss
        refuses at some width.
    """
    wanted = set(widths)
    if base_width is not None:
        wanted.add(check_count("base_width", base_width))
    if len(wanted) == 1:
        # Growth can only be seen between two widths.
        wanted.add(2 * next(iter(wanted)))
    models = {width: as_model(factory, width, setting) for width in sorted(wanted)}
    for width, built in models.items():
        _check_fit(built, width, setting)
    return models


_KEYLESS = " (sweeps hand models no random keys: make dropout deterministic, or rate 0)"


def _check_fit(model: Model, width: int, setting: Setting) -> None:
    """The loss must accept the model's outputs, on training and validation batches alike."""
    params = model.abstract_params()
    if not leaf_paths(params):
        raise ValueError(f"the model of width {width} has no parameters.")
    for path, leaf in leaf_paths(params).items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"parameter {path!r} is of type {leaf.dtype}, which no optimizer can train: make "
                "it a constant computed in the model's call, not a parameter."
            )
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"parameter {path!r} is of type {leaf.dtype}, whose gradient in JAX is the "
                "conjugate of the direction to move in, which optimizers do not know: store its "
                "real and imaginary parts as two real parameters."
            )

    def loss(params: Any, batch: Any) -> dict[str, jax.Array]:
        problem = dataclasses.replace(setting, validation=batch)
        return problem.evaluate(lambda *a, **k: model.apply(params, *a, **k))

    for kind, batch in (("training", setting.abstract_batch()), ("validation", setting.validation)):
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), batch
        )
        try:
            values = jax.eval_shape(loss, params, abstract)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            hint = _KEYLESS if "rngs" in reason[0] or "PRNG" in reason[0] else ""
            raise ValueError(
                f"setting {setting.name!r} and the model disagree at width {width} on a {kind} "
                f"batch: {reason[0]}{hint}"
            ) from error
        for name, value in values.items():
            if not hasattr(value, "shape"):
                raise ValueError(
                    f"{name!r} of setting {setting.name!r} must be a real scalar, got {value!r}."
                )
            if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
                raise ValueError(
                    f"{name!r} of setting {setting.name!r} must be a real scalar, got shape "
                    f"{value.shape} of {value.dtype} (take the mean over the batch)."
                )
