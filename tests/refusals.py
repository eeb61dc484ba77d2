"""A good sweep, and checks that a change to it is refused before anything compiles."""

import jax.numpy as jnp
import optax
import pytest

import mupjax
import mupjax.execute

D, B = 3, 4


class CompilationError(BaseException):
    """No subclass of Exception: nothing may catch it and call it something else."""


# Importing it is enough: it holds for every test of the file.
@pytest.fixture(autouse=True)
def no_program_is_compiled(monkeypatch):
    def fail(*args, **kwargs):
        raise CompilationError

    monkeypatch.setattr(mupjax.execute, "build_program", fail)


def setting(loss=None, validation=None, sample=None, **more):
    batch = (jnp.ones((B, D)), jnp.zeros((B, 2)))

    def mean_square(predict, batch):
        return jnp.mean((predict(batch[0]) - batch[1]) ** 2)

    return mupjax.Setting(
        "toy",
        sample or (lambda data, key, step: batch),
        loss or mean_square,
        batch if validation is None else validation,
        **more,
    )


def two_layers(width):
    def init(key):
        return {
            "enter": {"kernel": jnp.ones((D, width))},
            "readout": {"kernel": jnp.ones((width, 2))},
        }

    def apply(params, x):
        return jnp.tanh(x @ params["enter"]["kernel"]) @ params["readout"]["kernel"]

    return mupjax.Model(init, apply)


def adam(learning_rate, b1=0.9, eps=1e-8):
    return optax.adam(learning_rate, b1=b1, eps=eps)


GOOD = {
    "model": two_layers,
    "setting": setting(),
    "optimizer": adam,
    "parametrization": "muP",
    "widths": [4, 8],
    "hyperparameters": {"learning_rate": [0.1, 0.2]},
    "steps": 3,
    "base_width": 4,
    # Not measured, to save time: true of `two_layers`.
    "init_exponents": {"*": 0.0},
}


def run(**changes):
    arguments = {k: v for k, v in (GOOD | changes).items() if v is not ...}
    first = ("model", "setting", "optimizer", "parametrization")
    return mupjax.sweep(*[arguments.pop(name) for name in first], **arguments)


def refused(error, *fragments, **changes):
    """The sweep raises `error`, whose text has every fragment; returns the text."""
    with pytest.raises(error) as caught:
        run(**changes)
    missing = [fragment for fragment in fragments if fragment not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    return str(caught.value)


def accepted(**changes):
    """The sweep finds nothing wrong and would compile."""
    with pytest.raises(CompilationError):
        run(**changes)
