"""Classification on arrays in memory, and the digits that ship inside scikit-learn."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mupjax.data.images import Augmentation
from mupjax.data.images import augment as augment_images
from mupjax.setting import Predict, Setting

__all__ = ["classification", "digits"]


def classification(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    *,
    batch_size: int,
    augment: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    configuration: dict[str, Any] | None = None,
) -> Setting:
    """Classification with cross-entropy on arrays in memory.

    Batches are drawn with replacement, so that a batch is a pure function of key and step.

    Args:
      name: of the setting.
      train: features (N, ...) and integer labels (N,).
      validation: likewise (M, ...), (M,).
      batch_size: B.
      augment: ``augment(key, features, labels) -> (features, labels)`` for training batches, with
        labels as probabilities (B, classes), inside the compiled loop.
      configuration: further facts to store with results.

    Returns:
      a setting whose loss is the mean cross-entropy in nats, with the metric ``accuracy``.

    Raises:
      ValueError: shapes that do not match, labels that are not integers, or an empty set.
    """
    train = (np.asarray(train[0]), np.asarray(train[1]))
    validation = (np.asarray(validation[0]), np.asarray(validation[1]))
    for argument, (features, labels) in (("train", train), ("validation", validation)):
        if len(features) == 0 or len(features) != len(labels) or labels.ndim != 1:
            raise ValueError(
                f"{argument} needs features (N, ...) and labels (N,) with N >= 1, got shapes "
                f"{features.shape} and {labels.shape}."
            )
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{argument} labels must be integers, got {labels.dtype}.")
        if labels.min() < 0:
            raise ValueError(f"{argument} labels must not be negative, got {labels.min()}.")
    if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise ValueError(f"batch_size must be whole and at least 1, got {batch_size!r}.")
    data = (jnp.asarray(train[0], jnp.float32), jnp.asarray(train[1], jnp.int32))
    held_out = (jnp.asarray(validation[0], jnp.float32), jnp.asarray(validation[1], jnp.int32))
    examples, classes = len(train[0]), int(max(train[1].max(), validation[1].max())) + 1

    def sample(data: Any, key: jax.Array, step: jax.Array) -> Any:
        key = jax.random.fold_in(key, step)
        index = jax.random.randint(key, (batch_size,), 0, examples)
        features, labels = jax.tree.map(lambda a: a[index], data)
        if augment is None:
            return features, labels
        # Folded in, so that the examples are those of the same setting without augmentation.
        return augment(jax.random.fold_in(key, 1), features, jax.nn.one_hot(labels, classes))

    def loss(predict: Predict, batch: Any) -> jax.Array:
        logits = predict(batch[0])
        if batch[1].ndim == 2:
            return optax.softmax_cross_entropy(logits, batch[1]).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def accuracy(predict: Predict, batch: Any) -> jax.Array:
        labels = jnp.argmax(batch[1], axis=-1) if batch[1].ndim == 2 else batch[1]
        return jnp.mean(jnp.argmax(predict(batch[0]), axis=-1) == labels)

    facts = {
        "batch_size": batch_size,
        "train_examples": examples,
        "validation_examples": len(validation[0]),
        "loss": "cross-entropy in nats",
    }
    return Setting(
        name,
        sample,
        loss,
        held_out,
        data,
        {"accuracy": accuracy},
        facts | (configuration or {}),
    )


def digits(
    batch_size: int = 128,
    validation_examples: int = 360,
    augmentation: Augmentation | None = None,
) -> Setting:
    """Handwritten digits (8 x 8 pixels, 10 classes, 1797 examples) as shipped in scikit-learn.

    Features are flattened to d = 64 and standardised by the training set's overall mean and
    standard deviation; the split is fixed.

    Args:
      batch_size: B.
      validation_examples: how many examples are held out.
      augmentation: of training batches; None for none.

    Raises:
      ValueError: fewer than 1 or more than 1796 examples held out.
    """
    # Imported here: only this setting needs scikit-learn.
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images, labels = np.asarray(bunch.data), np.asarray(bunch.target)
    if not 1 <= validation_examples < len(images):
        raise ValueError(
            f"validation_examples must lie between 1 and {len(images) - 1}, got "
            f"{validation_examples}."
        )
    order = np.random.default_rng(0).permutation(len(images))
    held_out, kept = order[:validation_examples], order[validation_examples:]
    mean, std = images[kept].mean(), images[kept].std()
    images = (images - mean) / std

    def augmented(
        key: jax.Array, features: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        assert augmentation is not None
        square, labels = augment_images(key, features.reshape(-1, 8, 8, 1), labels, augmentation)
        return square.reshape(-1, 64), labels

    facts = {} if augmentation is None else {"augmentation": dataclasses.asdict(augmentation)}
    return classification(
        "digits",
        (images[kept], labels[kept]),
        (images[held_out], labels[held_out]),
        batch_size=batch_size,
        augment=None if augmentation is None else augmented,
        configuration={
            **facts,
            "source": "sklearn.datasets.load_digits",
            "input_features": 64,
            "classes": 10,
        },
    )
