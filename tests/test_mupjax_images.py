"""CIFAR-10 in its binary format, and augmentations against Pillow and known distributions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from scipy import stats

from mupjax import sweep
from mupjax.data import Augmentation, cifar10, digits, mix_up, random_resized_crop
from mupjax.data.images import _box, _resized, read_cifar10
from mupjax.models import MLP

FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def write_set(folder, records=20, seed=0):
    """Six files in the published format; their images and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for name in FILES:
        planes = rng.integers(0, 256, (records, 3, 32, 32), dtype=np.uint8)
        label = rng.integers(0, 10, records, dtype=np.uint8)
        with (folder / name).open("wb") as file:
            for one, plane in zip(label, planes, strict=True):
                file.write(bytes([one]))
                for channel in range(3):
                    file.write(plane[channel].tobytes())
        images.append(np.moveaxis(planes, 1, -1))
        labels.append(label)
    return images, labels


@pytest.fixture
def local(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    return folder, *write_set(folder)


def test_the_set_is_read_as_it_was_written(local):
    folder, images, labels = local
    for path in (folder, folder.parent):
        train, test = read_cifar10(path)
        np.testing.assert_array_equal(train[0], np.concatenate(images[:5]))
        np.testing.assert_array_equal(train[1], np.concatenate(labels[:5]))
        np.testing.assert_array_equal(test[0], images[5])
        np.testing.assert_array_equal(test[1], labels[5])


def test_features_are_standardised_by_channel_of_the_training_set(local):
    folder, images, labels = local
    setting = cifar10(folder, batch_size=8, validation_examples=15, flatten=False)
    train = np.concatenate(images[:5]) / 255.0
    mean, std = train.mean(axis=(0, 1, 2)), train.std(axis=(0, 1, 2))
    np.testing.assert_allclose(
        setting.validation[0], (images[5][:15] / 255.0 - mean) / std, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(setting.validation[1].argmax(-1), labels[5][:15])
    flat = cifar10(folder, batch_size=8)
    assert flat.validation[0].shape == (20, 3072)
    batch = flat.sample(flat.data, jax.random.key(0), jnp.int32(3))
    assert batch[0].shape == (8, 3072)
    # Every image of a batch is one of the training set, with its own label.
    everything = ((train - mean) / std).reshape(100, -1)
    for features, label in zip(*map(np.asarray, batch), strict=True):
        nearest = np.abs(everything - features).max(axis=1).argmin()
        np.testing.assert_allclose(features, everything[nearest], rtol=1e-4, atol=1e-5)
        assert label.argmax() == np.concatenate(labels[:5])[nearest]


def test_files_that_are_not_the_set_are_named(tmp_path, local):
    folder = local[0]
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        cifar10(tmp_path / "absent")
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "data_batch_1").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin .it holds the Python version"):
        cifar10(tmp_path / "python")
    whole = (folder / "data_batch_3.bin").read_bytes()
    (folder / "data_batch_3.bin").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has 61459 bytes, no multiple of 3073"):
        cifar10(folder)
    (folder / "data_batch_3.bin").write_bytes(whole[: 7 * 3073])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin has 7 records and other files 20"):
        cifar10(folder)
    (folder / "data_batch_3.bin").write_bytes(bytes([11]) + whole[1:])
    with pytest.raises(ValueError, match="the label 11 in record 0, beyond 9"):
        cifar10(folder)
    (folder / "data_batch_3.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes"):
        cifar10(folder)
    (folder / "data_batch_3.bin").write_bytes(whole)
    with pytest.raises(ValueError, match="between 1 and 20, got 21"):
        cifar10(folder, validation_examples=21)
    with pytest.raises(ValueError, match="batch_size must be whole and at least 1, got 0"):
        cifar10(folder, batch_size=0)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no test_batch\.bin"):
        cifar10(folder)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be two shares"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale must be two shares"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio must be two ratios"),
        ({"mixup_alpha": -1.0}, "mixup_alpha must be at least 0"),
    ],
)
def test_augmentations_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Augmentation(**options)


@pytest.mark.parametrize("box", [(0, 0, 32, 32), (3, 5, 10, 20), (31, 0, 1, 32), (7, 20, 25, 12)])
def test_crops_are_pillows(box):
    top, left, h, w = box
    image = np.random.default_rng(0).uniform(size=(32, 32, 3)).astype(np.float32)
    expected = [
        np.asarray(
            Image.fromarray(image[..., c])
            .crop((left, top, left + w, top + h))
            .resize((32, 32), Image.Resampling.BILINEAR)
        )
        for c in range(3)
    ]
    ours = _resized(jnp.asarray(image), jnp.asarray(box, jnp.float32))
    np.testing.assert_allclose(ours, np.stack(expected, -1), atol=2e-5)


def test_boxes_have_the_areas_and_ratios_asked_for():
    keys = jax.random.split(jax.random.key(0), 4000)
    top, left, h, w = np.asarray(
        jax.vmap(lambda k: _box(k, 64, 48, (0.1, 0.3), (0.5, 2.0)))(keys)
    ).T
    assert np.all((top >= 0) & (left >= 0) & (top + h <= 64) & (left + w <= 48))
    for whole in (top, left, h, w):
        np.testing.assert_array_equal(whole, np.round(whole))
    # Rounding moves a size by half a pixel: tests of distribution with bins much wider than that.
    area = h * w / (64 * 48)
    assert stats.kstest((area - 0.1) / 0.2, "uniform").statistic < 0.03
    assert stats.kstest((np.log2(w / h) + 1) / 2, "uniform").statistic < 0.04
    room = top / np.maximum(64 - h, 1)
    assert abs(room.mean() - 0.5) < 0.02


def test_a_box_that_never_fits_is_the_largest_central_one():
    # Ratios from 3 on in a square: an area of the whole never fits.
    box = _box(jax.random.key(0), 30, 30, (1.0, 1.0), (3.0, 4.0))
    np.testing.assert_array_equal(box, [10, 0, 10, 30])
    box = _box(jax.random.key(0), 30, 30, (1.0, 1.0), (0.25, 0.5))
    np.testing.assert_array_equal(box, [0, 7, 30, 15])


def test_every_image_is_cropped_by_itself_and_by_its_key():
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 8, 8, 1)), jnp.float32)
    same = jnp.broadcast_to(images[:1], images.shape)
    crops = np.asarray(random_resized_crop(jax.random.key(0), same))
    assert len(np.unique(crops.round(5), axis=0)) == 6
    again = random_resized_crop(jax.random.key(0), same)
    np.testing.assert_array_equal(crops, again)
    whole = random_resized_crop(jax.random.key(0), images, (1.0, 1.0), (1.0, 1.0))
    np.testing.assert_allclose(whole, images, atol=1e-6)


def test_mixup_weighs_by_beta():
    images, labels = jnp.arange(4.0).reshape(4, 1), jnp.eye(4)

    def mixed(key):
        return mix_up(key, images, labels, 0.4)

    x, y = jax.vmap(mixed)(jax.random.split(jax.random.key(0), 3000))
    # One weight for image and label, and a probability for every class.
    np.testing.assert_allclose(x[..., 0], y @ jnp.arange(4.0), atol=1e-5)
    np.testing.assert_allclose(y.sum(-1), 1, atol=1e-5)
    own = np.asarray(y[:, jnp.arange(4), jnp.arange(4)])
    moved = own < 1 - 1e-6
    weight = np.array([row[m][0] for row, m in zip(own, moved, strict=True) if m.any()])
    assert stats.kstest(weight, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    # Every other image is as likely a partner as any: 3/4 of them move.
    assert moved.mean() == pytest.approx(0.75, abs=0.02)


def test_augmented_batches_are_a_function_of_key_and_step(local):
    folder = local[0]
    setting = cifar10(folder, batch_size=16, augmentation=Augmentation(flip=True))
    key = jax.random.key(0)
    sample = jax.jit(setting.sample)
    first, second, again = (sample(setting.data, key, jnp.int32(t)) for t in (0, 1, 0))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.abs(first[0] - second[0]).max() > 0.1


@pytest.mark.slow
def test_augmented_images_train(local):
    folder = local[0]
    setting = cifar10(folder, batch_size=16, augmentation=Augmentation(flip=True))
    results = sweep(
        lambda width, rngs: MLP(3072, width, 10, use_bias=False, rngs=rngs),
        setting,
        lambda learning_rate: optax.sgd(learning_rate, 0.9),
        "muP",
        widths=[8],
        base_width=8,
        steps=3,
        seeds=1,
        hyperparameters={"learning_rate": [0.001, 0.01]},
    )
    assert np.isfinite(results.loss).all()
    assert "crop_scale" in results.attrs["configuration"]


def test_digits_are_augmented_as_images_with_their_labels():
    plain = digits(batch_size=16)
    nothing = digits(batch_size=16, augmentation=Augmentation(crop_scale=None, mixup_alpha=0.0))

    def draw(setting):
        return jax.jit(setting.sample)(setting.data, jax.random.key(0), jnp.int32(2))

    x, y = draw(plain)
    same, classes = draw(nothing)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(classes, np.eye(10)[np.asarray(y)])
    for predict in (lambda x: x[:, :10], lambda x: x[:, 20:30]):
        hard, soft = plain.loss(predict, (x, y)), plain.loss(predict, (x, classes))
        np.testing.assert_allclose(soft, hard, rtol=1e-6)
        scores = [plain.metrics["accuracy"](predict, (x, labels)) for labels in (y, classes)]
        assert scores[0] == scores[1]
    mixed = digits(batch_size=16, augmentation=Augmentation(crop_scale=None))
    images, labels = draw(mixed)
    # The mixture is the same in images and labels: the weights show in the labels.
    np.testing.assert_allclose(np.asarray(labels).sum(axis=1), 1, rtol=1e-6)
    lam = np.asarray(labels)[np.arange(16), np.asarray(y)].min()
    rest = (np.asarray(images) - lam * np.asarray(x)) / (1 - lam)
    # What is left is an example of the batch.
    distance = np.abs(rest[:, None] - np.asarray(x)[None]).max(axis=2).min(axis=1)
    assert distance.max() < 1e-3
    assert json_ready(mixed.configuration)["augmentation"]["mixup_alpha"] == 1.0
    crops = digits(batch_size=16, augmentation=Augmentation(mixup_alpha=0.0))
    images, labels = draw(crops)
    np.testing.assert_array_equal(labels, classes)
    assert images.shape == (16, 64)
    assert np.abs(np.asarray(images) - np.asarray(x)).max() > 0.5


def json_ready(facts):
    return json.loads(json.dumps(dict(facts)))
