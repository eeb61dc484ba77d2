"""The decomposition of gradient descent on a quadratic, of which every share is known.

In a diagonal layer the change of each mode's share of the loss, `½ i^{-b} (1 − ηλ_i)^{2t}`, is one
eigenvalue of the alignment matrix, and on a quadratic the trapezoid is exact.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mupjax
from synthetic.quadratic import PowerLawQuadratic, coordinates
from theory.decomposition import decomposition_observer
from theory.trajectory import Averaging

QUADRATIC = PowerLawQuadratic(1.0, 1.5)
RATES, WIDTHS, STEPS = (0.2, 0.9, 1.6), (3, 7), 13
EVERY_STEP = Averaging(0.0, 0.0, 1, 1, 0)


def diagonal(width):
    plain = coordinates(width)

    def apply(params, mode):
        return plain.apply({"coordinates": jnp.diagonal(params["kernel"])}, mode)

    return mupjax.Model(init=lambda key: {"kernel": jnp.zeros((width, width))}, apply=apply)


def shares(rate, width, step):
    """Of each mode in the loss after so many steps."""
    i = np.arange(1, width + 1)
    return 0.5 * i**-1.5 * (1 - rate / i) ** (2 * step)


def test_every_top_part_is_the_closed_form_and_the_total_is_the_change_of_the_loss():
    with jax.enable_x64(True):
        found = mupjax.sweep(
            diagonal,
            QUADRATIC.setting(modes=WIDTHS[-1]),
            lambda learning_rate: optax.sgd(learning_rate),
            "SP",
            widths=WIDTHS,
            base_width=WIDTHS[0],
            hyperparameters={"learning_rate": RATES},
            steps=STEPS,
            observers=[decomposition_observer(EVERY_STEP)],
        )
    for width in WIDTHS:
        for rate in RATES:
            cell = found.sel(width=width, learning_rate=rate, seed=0)
            change = QUADRATIC.loss(rate, steps=STEPS, width=width) - QUADRATIC.loss(
                rate, steps=0, width=width
            )
            np.testing.assert_allclose(cell.decomposition_total, change, rtol=1e-12)
            assert cell.decomposition_faithfulness < 1e-12
            # Of each step separately: which mode learns most changes on the way.
            expected = np.zeros(width)
            for t in range(STEPS):
                moved = shares(rate, width, t + 1) - shares(rate, width, t)
                expected += np.cumsum(moved[np.argsort(-np.abs(moved), kind="stable")])
            top = cell.decomposition_top.values
            np.testing.assert_allclose(top[:width], expected, rtol=1e-10)
            assert np.isnan(top[width:]).all()
