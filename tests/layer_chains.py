"""Chains of layers, and the roles of their parameters by shapes alone."""

import jax
import jax.numpy as jnp
from flax import nnx

from mupjax import Setting
from mupjax.adapters import as_model
from mupjax.resolve import dissect

BASE, WIDE = 8, 32
FEATURES, LENGTH, CLASSES = 6, 3, 5


def setting_for(shape, tokens=False):
    dtype = jnp.int32 if tokens else jnp.float32

    def sample(data, key, step):
        key = jax.random.fold_in(key, step)
        return jax.random.randint(key, shape, 0, 7) if tokens else jax.random.normal(key, shape)

    return Setting(
        "toy",
        sample=sample,
        loss=lambda predict, batch: jnp.mean(jnp.square(predict(batch))),
        validation=jnp.ones(shape, dtype),
    )


SEQUENCES = setting_for((4, LENGTH, FEATURES))
VECTORS = setting_for((4, FEATURES))
IMAGES = setting_for((4, 8, 8, FEATURES))
TOKENS = setting_for((4, LENGTH), tokens=True)


def anatomy(factory, setting=VECTORS, widths=(BASE, WIDE), base=BASE, **stated):
    """Roles from shapes alone: with every initial exponent stated, nothing is computed."""
    models = {width: as_model(factory, width, setting) for width in widths}
    return dissect(models, base_width=base, stated_init_exponents={"*": 0.0}, **stated)


def roles(*args, **kwargs):
    return {path: leaf.role for path, leaf in anatomy(*args, **kwargs).leaves.items()}


def chain(*layers):
    """An nnx factory for layers ``name, make(width, rngs)`` applied one after the other."""

    class Chain(nnx.Module):
        def __init__(self, width, rngs):
            for name, make in layers:
                setattr(self, name, make(width, rngs))

        def __call__(self, x):
            for name, _ in layers:
                x = getattr(self, name)(x)
            return x

    return lambda width, rngs: Chain(width, rngs)


def linear(into=None, out=None, **options):
    """A dense layer; None is the width."""
    return lambda n, rngs: nnx.Linear(into or n, out or n, rngs=rngs, **options)


def right_or_refused(expected, factory, setting=VECTORS, **kwargs):
    """Kernels whose layout cannot be read must be asked for, never guessed."""
    try:
        found = roles(factory, setting, **kwargs)
    except ValueError as error:
        assert "cannot infer the role" in str(error)  # noqa: PT017
        return
    assert {path: found[path] for path in expected} == expected


ATTENTION_ROLES = {
    **{f"attention/{name}/kernel": "hidden" for name in ("query", "key", "value", "out")},
    **{f"attention/{name}/bias": "vector" for name in ("query", "key", "value", "out")},
}
