"""Powers of the width in a real training, against the theory of each parametrization."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mupjax
from mupjax.coord_check import coord_check, slope_table, slopes
from mupjax.data import digits
from mupjax.figures.coordinates import coordinate_figure
from mupjax.models import MLP

WIDTHS = [64, 192, 512]


def mlp(width, rngs):
    return MLP(64, width, 10, depth=2, rngs=rngs)


def adam(learning_rate):
    return optax.adam(learning_rate)


@pytest.fixture(scope="module")
def checked():
    return coord_check(
        mlp,
        digits(64, 64),
        adam,
        ["SP", "NTP", "muP"],
        widths=WIDTHS,
        hyperparameters={"learning_rate": 2.0**-9},
        base_width=64,
        steps=3,
        seeds=4,
    )


@pytest.fixture(scope="module")
def fitted(checked):
    return {(s.parametrization, s.layer, s.quantity, s.update): s for s in slopes(checked)}


@pytest.mark.parametrize("layer", ["hidden/0", "hidden/1"])
@pytest.mark.parametrize(("name", "power"), [("muP", 0.0), ("NTP", -0.5)])
def test_features_move_as_the_theory_says(fitted, layer, name, power):
    # After a few steps at finite width, corrections of relative order width**-1/2 remain.
    assert fitted[name, layer, "change", 3].slope == pytest.approx(power, abs=0.1)
    assert fitted[name, layer, "activation", 3].slope == pytest.approx(0.0, abs=0.1)


def test_sp_blows_up_under_adam(fitted):
    # Width-to-width layers gain a full power per step of one rate; the loss stops it short of that.
    assert fitted["SP", "hidden/1", "change", 1].slope > 0.5
    assert fitted["SP", "readout", "change", 1].slope > 0.5


def test_the_readout_starts_at_its_scale(fitted):
    for name, power in (("muP", -0.5), ("SP", 0.0), ("NTP", 0.0)):
        slope = fitted[name, "readout", "activation", 0]
        # Random-feature sums over 64 images are noisy: 4 seeds leave about 0.1.
        assert slope.slope == pytest.approx(power, abs=0.2)


def test_coordinates_are_those_of_the_model(checked):
    """The recorded numbers against the model run by hand at one width."""
    seed, width = 2, 512
    key = jax.random.fold_in(jax.random.key(seed), 0)
    model = mlp(width, nnx.Rngs(key))
    x = digits(64, 64).validation[0]
    first = model.hidden[0](x)
    recorded = checked.coordinate_activation.sel(
        parametrization="SP", width=width, seed=seed, layer="hidden/0", update=0
    )
    np.testing.assert_allclose(recorded, np.abs(first).mean(), rtol=1e-5)


@pytest.mark.slow  # that they train alike is a fast test among the traps
def test_equivalent_tables_have_equal_coordinates():
    options = {
        "widths": [16, 32],
        "hyperparameters": {"learning_rate": 2.0**-7},
        "base_width": 16,
        "steps": 2,
        "seeds": 2,
    }
    both = [mupjax.muP, mupjax.mean_field]
    found = coord_check(mlp, digits(32, 32), adam, both, application="multipliers", **options)
    changes = found.coordinate_change
    np.testing.assert_allclose(
        changes.sel(parametrization="muP"),
        changes.sel(parametrization="mean-field"),
        rtol=1e-3,
        atol=1e-6,
    )


def test_coordinates_of_a_tied_readout_have_its_multiplier():
    """Under muP the model's logits are those of the shared matrix times base / width."""
    vocabulary, seed, widths = 7, 1, [8, 32]
    tokens = jnp.asarray(np.random.default_rng(0).integers(vocabulary, size=(16, 3)), jnp.int32)

    class Tied(nnx.Module):
        def __init__(self, width, rngs):
            self.embed = nnx.Embed(vocabulary, width, rngs=rngs)

        def __call__(self, tokens, *, readout_multiplier=1.0):
            return self.embed.attend(jnp.tanh(self.embed(tokens))) * readout_multiplier

    found = coord_check(
        lambda width, rngs: Tied(width, rngs),
        mupjax.Setting(
            "tokens",
            lambda data, key, step: tokens,
            lambda predict, batch: jnp.mean(jnp.square(predict(batch))),
            tokens,
        ),
        adam,
        "muP",
        widths=widths,
        hyperparameters={"learning_rate": 0.01},
        base_width=8,
        steps=1,
        seeds=[seed],
        roles={"embed/*": "tied"},
        init_exponents={"*": 0.5},
    )
    for width in widths:
        model = Tied(width, nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 0)))
        embedding = model.embed.embedding[...] * (width / 8) ** 0.5
        logits = jnp.tanh(embedding[tokens]) @ embedding.T * (8 / width)
        recorded = found.coordinate_activation.sel(width=width, seed=seed, layer="output", update=0)
        np.testing.assert_allclose(recorded, np.abs(logits).mean(), rtol=1e-5)


def test_table_and_figure_name_every_layer(checked):
    table = slope_table(checked)
    figure = coordinate_figure(checked)
    drawn = [legend for ax in figure.axes if (legend := ax.get_legend()) is not None]
    legends = [text.get_text() for legend in drawn for text in legend.get_texts()]
    for layer in ("hidden/0", "hidden/1", "readout"):
        assert table.count(layer) == 3
        assert sum(layer in text for text in legends) == 9


def test_a_grid_or_a_single_width_is_refused():
    options = {"base_width": 16, "steps": 1, "seeds": 1}
    with pytest.raises(ValueError, match="learning_rate has a grid"):
        coord_check(
            mlp,
            digits(),
            adam,
            "muP",
            widths=[16, 32],
            hyperparameters={"learning_rate": [0.1, 0.2]},  # pyright: ignore[reportArgumentType]
            **options,
        )
    with pytest.raises(ValueError, match="at least two widths"):
        coord_check(
            mlp,
            digits(),
            adam,
            "muP",
            widths=[16],
            hyperparameters={"learning_rate": 0.1},
            **options,
        )
