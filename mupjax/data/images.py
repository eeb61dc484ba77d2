"""CIFAR-10 from a local copy, with mixup and random resized crops inside the compiled loop."""

from __future__ import annotations

import dataclasses
import numbers
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from mupjax.setting import Predict, Setting

__all__ = ["Augmentation", "cifar10", "mix_up", "random_resized_crop", "read_cifar10"]

_RECORD = 1 + 3 * 32 * 32
# As torchvision: a crop that does not fit is drawn again so often, before the largest central one.
_TRIES = 10


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to a training batch of images.

    Attributes:
      crop_scale: smallest and largest area of a random resized crop, as a share of the image; None
        for no crops.
      crop_ratio: smallest and largest ratio of its width to its height.
      flip: mirror half of the images.
      mixup_alpha: both parameters of the Beta distribution of mixup's weight; 0 for no mixup.

    Raises:
      ValueError: a number out of range.
    """

    crop_scale: tuple[float, float] | None = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    mixup_alpha: float = 1.0

    def __post_init__(self) -> None:
        scale = (1.0, 1.0) if self.crop_scale is None else self.crop_scale
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                f"crop_scale must be two shares 0 < low <= high <= 1, got {self.crop_scale!r}."
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(
                f"crop_ratio must be two ratios 0 < low <= high, got {self.crop_ratio!r}."
            )
        if not 0 <= self.mixup_alpha < float("inf"):
            raise ValueError(
                f"mixup_alpha must be at least 0 and finite, got {self.mixup_alpha!r}."
            )


def cifar10(
    path: str | Path,
    *,
    batch_size: int = 512,
    augmentation: Augmentation | None = None,
    validation_examples: int | None = None,
    flatten: bool = True,
) -> Setting:
    """CIFAR-10 (Krizhevsky 2009): 50 000 training images of 32 × 32 × 3 in 10 classes.

    Args:
      path: folder with a local copy in the published binary format, ``data_batch_1.bin`` to
        ``data_batch_5.bin`` and ``test_batch.bin`` (``cifar-10-batches-bin``), or its parent.
      batch_size: B; drawn with replacement.
      augmentation: of training batches; None for none.
      validation_examples: the first so many of the test images; all 10 000 by default.
      flatten: features (B, 3072) instead of images (B, 32, 32, 3).

    Returns:
      a setting with the mean cross-entropy in nats and the metric ``accuracy``. Labels are
      probabilities (B, 10), which mixup mixes. Features are standardised by the training images'
      mean and standard deviation per channel.

    Raises:
      FileNotFoundError: no such folder, or a file of the set is missing from it.
      ValueError: a file that is shorter than the others, of another format, or with labels beyond
        9; an argument out of range.
    """
    if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
        raise ValueError(f"batch_size must be whole and at least 1, got {batch_size!r}.")
    train, test = read_cifar10(path)
    held = len(test[0]) if validation_examples is None else validation_examples
    if not isinstance(held, numbers.Integral) or not 1 <= held <= len(test[0]):
        raise ValueError(
            f"validation_examples must lie between 1 and {len(test[0])}, got {held!r}."
        )
    mean, std = _moments(train[0])

    def prepared(images: jax.Array) -> jax.Array:
        images = (images - mean[None, None, None]) / std[None, None, None]
        return images.reshape(len(images), -1) if flatten else images

    def pixels(images: Any) -> jax.Array:
        return jnp.asarray(images, jnp.float32) / 255

    def sample(data: Any, key: jax.Array, step: jax.Array) -> Any:
        drawn, changed = jax.random.split(jax.random.fold_in(key, step))
        index = jax.random.randint(drawn, (batch_size,), 0, data[0].shape[0])
        images, labels = pixels(data[0][index]), jax.nn.one_hot(data[1][index], 10)
        if augmentation is not None:
            images, labels = augment(changed, images, labels, augmentation)
        return prepared(images), labels

    def loss(predict: Predict, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy(predict(batch[0]), batch[1]).mean()

    def accuracy(predict: Predict, batch: Any) -> jax.Array:
        return jnp.mean(jnp.argmax(predict(batch[0]), -1) == jnp.argmax(batch[1], -1))

    return Setting(
        "cifar10",
        sample,
        loss,
        (prepared(pixels(test[0][:held])), jax.nn.one_hot(test[1][:held], 10)),
        (jnp.asarray(train[0]), jnp.asarray(train[1], jnp.int32)),
        {"accuracy": accuracy},
        {
            "batch_size": int(batch_size),
            "train_examples": len(train[0]),
            "validation_examples": int(held),
            "augmentation": None if augmentation is None else dataclasses.asdict(augmentation),
            "input_features": 3072,
            "classes": 10,
            "loss": "cross-entropy in nats",
        },
    )


def read_cifar10(
    path: str | Path,
) -> tuple[
    tuple[NDArray[np.uint8], NDArray[np.uint8]], tuple[NDArray[np.uint8], NDArray[np.uint8]]
]:
    """Training and test set as (images (N, 32, 32, 3), labels (N,)), uint8.

    Args:
      path: as for `cifar10`.

    Raises:
      FileNotFoundError, ValueError: as `cifar10`.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: give a local copy of CIFAR-10.")
    if (root / "cifar-10-batches-bin").is_dir():
        root = root / "cifar-10-batches-bin"
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    if missing := [name for name in names if not (root / name).is_file()]:
        hint = "data_batch_1"
        other = " (it holds the Python version of the set; the binary one is needed)"
        raise FileNotFoundError(
            f"{root} holds no {missing[0]}{other if (root / hint).is_file() else ''}: give the "
            f"folder with {names[0]} to {names[4]} and {names[5]}."
        )
    parts = [_records(root / name) for name in names]
    # All files of the set are equally long: one that was cut at a record's end shows by this.
    counts = {name: len(labels) for name, (_, labels) in zip(names, parts, strict=True)}
    most = max(counts.values())
    if short := [name for name, count in counts.items() if count < most]:
        raise ValueError(
            f"{root / short[0]} has {counts[short[0]]} records and other files {most}: it is cut "
            "short."
        )
    train = tuple(np.concatenate(arrays) for arrays in zip(*parts[:5], strict=True))
    return (train[0], train[1]), parts[5]


def _records(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images and labels of one file: a label, then the red, green and blue plane, per record."""
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % _RECORD:
        raise ValueError(
            f"{path} has {raw.size} bytes, no multiple of {_RECORD} (a label and 3 × 32 × 32 "
            "pixels): it is cut short, or no file of CIFAR-10's binary version."
        )
    records = raw.reshape(-1, _RECORD)
    labels = records[:, 0]
    if labels.max() > 9:
        bad = int(np.argmax(labels > 9))
        raise ValueError(
            f"{path} has the label {labels[bad]} in record {bad}, beyond 9: it is no file of "
            "CIFAR-10's binary version (CIFAR-100 has two labels a record)."
        )
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _moments(images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation per channel, of values in [0, 1]."""
    # From counts of the 256 levels: exact, and without a copy in floating point.
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
    share, level = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ level
    std = np.sqrt((share * (level[None] - mean[:, None]) ** 2).sum(axis=1))
    return mean.astype(np.float32), std.astype(np.float32)


# --- augmentation -------------------------------------------------------------------------------


def augment(
    key: jax.Array, images: jax.Array, labels: jax.Array, what: Augmentation
) -> tuple[jax.Array, jax.Array]:
    """Crops, mirrors and mixes a batch, in this order.

    Args:
      key: typed PRNG key.
      images: (B, H, W, channels), floating.
      labels: probabilities (B, classes).
      what: which of these.
    """
    crop, flip, mix = jax.random.split(key, 3)
    if what.crop_scale is not None:
        images = random_resized_crop(crop, images, what.crop_scale, what.crop_ratio)
    if what.flip:
        mirrored = jax.random.bernoulli(flip, shape=(len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if what.mixup_alpha > 0:
        images, labels = mix_up(mix, images, labels, what.mixup_alpha)
    return images, labels


def random_resized_crop(
    key: jax.Array,
    images: jax.Array,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """A random rectangle of each image, resized to the whole (Szegedy et al., arXiv 1409.4842).

    Drawn as by torchvision's ``RandomResizedCrop``: the area uniform, the ratio log-uniform, sizes
    rounded; a rectangle that does not fit is drawn again, ten times at most, then the largest
    central one of an allowed ratio is taken. Resized bilinearly, with pixels of the crop alone.

    Args:
      key: typed PRNG key.
      images: (B, H, W, channels), floating.
      scale: smallest and largest area, as a share of the image.
      ratio: smallest and largest ratio of width to height.
    """
    height, width = images.shape[1:3]
    keys = jax.random.split(key, len(images))
    boxes = jax.vmap(lambda k: _box(k, height, width, scale, ratio))(keys)
    return jax.vmap(_resized)(images, boxes)


def _box(
    key: jax.Array,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> jax.Array:
    """Top, left, height and width of a crop, whole numbers as floats."""
    sizes, place = jax.random.split(key)
    share, shape = jax.random.uniform(sizes, (2, _TRIES))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = jnp.exp(low + (high - low) * shape)
    w, h = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = jnp.argmax(fits)
    # The whole image, cut to the nearest allowed ratio.
    whole = width / height
    central_w = min(width, round(height * ratio[1])) if whole > ratio[1] else width
    central_h = min(height, round(width / ratio[0])) if whole < ratio[0] else height
    found = fits[first]
    h = jnp.where(found, h[first], central_h)
    w = jnp.where(found, w[first], central_w)
    down, across = jax.random.uniform(place, (2,))
    top = jnp.where(found, jnp.floor(down * (height - h + 1)), (height - central_h) // 2)
    left = jnp.where(found, jnp.floor(across * (width - w + 1)), (width - central_w) // 2)
    return jnp.stack([top, left, h, w])


def _resized(image: jax.Array, box: jax.Array) -> jax.Array:
    """A crop resized to the image's size: two matrix products, which accelerators like better
    than gathering pixels.
    """
    rows = _interpolation(box[0], box[2], image.shape[0])
    columns = _interpolation(box[1], box[3], image.shape[1])
    return jnp.einsum("ih,hwc,jw->ijc", rows, image, columns)


def _interpolation(start: jax.Array, size: jax.Array, count: int) -> jax.Array:
    """Bilinear weights (count, count) of pixels start … start + size − 1 for each new pixel."""
    centre = start + (jnp.arange(count) + 0.5) * size / count - 0.5
    centre = jnp.clip(centre, start, start + size - 1)
    return jnp.maximum(0.0, 1 - jnp.abs(centre[:, None] - jnp.arange(count)[None, :]))


def mix_up(
    key: jax.Array, images: jax.Array, labels: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Each image and label mixed with another's (Zhang et al., arXiv 1710.09412).

    `x ← λ x + (1 − λ) x'` with one weight λ ~ Beta(α, α) for the batch and the batch itself in
    another order as x', as in the authors' code.

    Args:
      key: typed PRNG key.
      images: (B, ...).
      labels: probabilities (B, classes).
      alpha: α > 0.
    """
    weight, order = jax.random.split(key)
    lam = jax.random.beta(weight, alpha, alpha)
    other = jax.random.permutation(order, len(images))
    return tuple(lam * a + (1 - lam) * a[other] for a in (images, labels))  # type: ignore[return-value]
