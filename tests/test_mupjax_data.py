"""Settings on arrays in memory: batches, split, loss and accuracy of the handwritten digits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from mupjax.data import classification, digits
from tolerances import float_tolerance

F32 = float_tolerance(np.float32, operations=64)


@pytest.fixture(scope="module")
def small():
    return digits(batch_size=32)


def draw(setting, seed, step):
    return setting.sample(setting.data, jax.random.key(seed), jnp.int32(step))


def test_shapes_and_types(small):
    features, labels = draw(small, 0, 0)
    assert features.shape == (32, 64)
    assert features.dtype == jnp.float32
    assert labels.shape == (32,)
    assert labels.dtype == jnp.int32
    assert jax.tree.map(jnp.shape, small.data) == ((1437, 64), (1437,))
    assert jax.tree.map(jnp.shape, small.validation) == ((360, 64), (360,))
    abstract = small.abstract_batch()
    assert jax.tree.map(lambda a: a.shape, abstract) == ((32, 64), (32,))
    assert digits(validation_examples=1).validation[0].shape == (1, 64)
    assert digits(validation_examples=1796).data[0].shape == (1, 64)


def test_facts_stored_with_results(small):
    assert small.name == "digits"
    facts = {
        "batch_size": 32,
        "train_examples": 1437,
        "validation_examples": 360,
        "loss": "cross-entropy in nats",
        "source": "sklearn.datasets.load_digits",
        "input_features": 64,
    }
    assert facts.items() <= small.configuration.items()
    json.dumps(small.configuration)


def test_a_batch_is_a_function_of_key_and_step(small):
    first = draw(small, 0, 0)
    for same in (draw(small, 0, 0), draw(digits(batch_size=32), 0, 0)):
        jax.tree.map(np.testing.assert_array_equal, same, first)
    jitted = jax.jit(small.sample)(small.data, jax.random.key(0), 0)
    jax.tree.map(np.testing.assert_array_equal, jitted, first)
    for other in (draw(small, 1, 0), draw(small, 0, 1)):
        assert not np.array_equal(other[0], first[0])


def test_the_split_is_the_same_whatever_the_batch(small):
    jax.tree.map(np.testing.assert_array_equal, digits(batch_size=7).validation, small.validation)


def rows(*parts):
    """Examples as bytes, sorted; labels are part of them."""
    stacked = [
        np.concatenate([np.asarray(x, np.float64), np.asarray(y, np.float64)[:, None]], axis=1)
        for x, y in parts
    ]
    return sorted(row.tobytes() for row in np.round(np.concatenate(stacked), 3) + 0.0)


def test_training_and_validation_are_a_partition_of_the_data(small):
    images, labels = load_digits(return_X_y=True)
    # Grey levels are whole, 0 to 16, so the affine map back to them can be rounded away.
    pixels = np.concatenate([small.data[0], small.validation[0]]).astype(np.float64)
    low, high = pixels.min(), pixels.max()
    whole = [
        (np.rint((np.asarray(x, np.float64) - low) / (high - low) * 16), y)
        for x, y in (small.data, small.validation)
    ]
    assert rows(*whole) == rows((images, labels))
    assert len(set(rows((images, labels)))) == len(images)  # no example occurs twice
    assert not set(rows(whole[0])) & set(rows(whole[1]))


def test_features_are_standardised_by_the_training_set_alone(small):
    train = np.asarray(small.data[0], np.float64)
    assert train.mean() == pytest.approx(0, abs=F32)
    assert train.std() == pytest.approx(1, rel=F32)
    held_out = np.asarray(small.validation[0], np.float64)
    assert held_out.mean() != pytest.approx(0, abs=1e-4)


def test_every_class_occurs_on_both_sides(small):
    for _, labels in (small.data, small.validation):
        assert set(np.asarray(labels).tolist()) == set(range(10))


def test_batches_are_drawn_from_all_training_examples_with_their_labels():
    train = (np.arange(10, dtype=np.float32)[:, None], np.arange(10))
    setting = classification("count", train, (np.zeros((1, 1)), np.zeros(1, int)), batch_size=8)
    seen = []
    for step in range(40):
        features, labels = draw(setting, 0, step)
        np.testing.assert_array_equal(features[:, 0], labels)
        seen.append(np.asarray(labels))
    counts = np.bincount(np.concatenate(seen), minlength=10)
    # 320 draws of 10: mean 32, standard deviation 5.4; four of them.
    assert (abs(counts - 32) < 4 * 5.4).all()


def test_loss_and_accuracy_of_predictors_that_are_known(small):
    labels = small.validation[1]
    images = small.validation[0]

    def scores(logits):
        def predict(x):
            assert x.shape == images.shape
            return logits

        return {name: float(value) for name, value in small.evaluate(predict).items()}

    indifferent = scores(jnp.zeros((360, 10)))
    assert indifferent["loss"] == pytest.approx(np.log(10), rel=F32)
    zeros = float(np.mean(np.asarray(labels) == 0))
    assert indifferent["accuracy"] == pytest.approx(zeros, rel=F32)  # a tie goes to the first class
    right = 50 * jax.nn.one_hot(labels, 10)
    assert scores(right) == pytest.approx({"loss": 0, "accuracy": 1}, abs=F32)
    wrong = 50 * jax.nn.one_hot((labels + 1) % 10, 10)
    assert scores(wrong) == pytest.approx({"loss": 50, "accuracy": 0}, rel=F32, abs=F32)
    half = jnp.where(jnp.arange(360)[:, None] < 180, right, wrong)
    assert scores(half) == pytest.approx({"loss": 25, "accuracy": 0.5}, rel=F32)


@pytest.mark.parametrize("bad", [0, -1, 1797, 2000])
def test_an_impossible_number_of_validation_examples(bad):
    with pytest.raises(
        ValueError, match=rf"validation_examples .* between 1 and 1796, got {bad}\."
    ):
        digits(validation_examples=bad)


@pytest.mark.parametrize("bad", [0, -3, 2.5])
def test_an_impossible_batch_size(bad):
    with pytest.raises(ValueError, match=rf"batch_size must be .*at least 1, got {bad}\."):
        digits(batch_size=bad)


X, Y = np.ones((4, 3), np.float32), np.arange(4)


@pytest.mark.parametrize(
    ("bad", "fragment"),
    [
        ((X[:3], Y), r"shapes \(3, 3\) and \(4,\)"),
        ((X[:0], Y[:0]), r"shapes \(0, 3\) and \(0,\)"),
        ((X, Y[:, None]), r"shapes \(4, 3\) and \(4, 1\)"),
        ((X, np.eye(4)), r"shapes \(4, 3\) and \(4, 4\)"),
        ((X, Y.astype(float)), "labels must be integers, got float64"),
        ((X, Y > 1), "labels must be integers, got bool"),
        ((X, Y - 1), "labels must not be negative"),
    ],
)
def test_arrays_that_are_no_classification(bad, fragment):
    for argument, pair in (("train", (bad, (X, Y))), ("validation", ((X, Y), bad))):
        with pytest.raises(ValueError, match=f"{argument} .*{fragment}"):
            classification("bad", *pair, batch_size=2)
