"""Small problems, and roles of models for them, with nothing drawn or compiled."""

import jax
import jax.numpy as jnp

from mupjax import SP, Model, Setting, muP
from mupjax.adapters import as_model
from mupjax.program import uses_of
from mupjax.resolve import Application, dissect, resolve
from mupjax.uses import check_uses

BATCH, TOKENS, FEATURES, CLASSES, VOCABULARY = 4, 6, 5, 3, 7
BASE, WIDE = 8, 32


def setting_for(shape, whole=False):
    def sample(data, key, step):
        key = jax.random.fold_in(key, step)
        return (
            jax.random.randint(key, shape, 0, VOCABULARY)
            if whole
            else jax.random.normal(key, shape)
        )

    def loss(predict, batch):
        parts = [jnp.mean(jnp.square(out)) for out in jax.tree.leaves(predict(batch))]
        return jnp.sum(jnp.stack(parts))

    return Setting("toy", sample, loss, jnp.ones(shape, jnp.int32 if whole else jnp.float32))


VECTORS = setting_for((BATCH, FEATURES))
SEQUENCES = setting_for((BATCH, TOKENS, FEATURES))
WORDS = setting_for((BATCH, TOKENS), whole=True)


def resolved(
    factory, setting=VECTORS, attention=None, application: Application = "folded", **stated
):
    """As `resolve_sweep` would say under muP and Adam, with nothing drawn or compiled."""
    models = {width: as_model(factory, width, setting) for width in (BASE, WIDE)}
    uses = {width: uses_of(model, setting) for width, model in models.items()}
    anatomy = dissect(
        models,
        stacked=uses[WIDE].stacked,
        summed=uses[WIDE].summed,
        entrywise=uses[WIDE].entrywise,
        base_width=BASE,
        stated_roles=stated.get("roles"),
        stated_init_exponents={"*": 0.0},
    )
    check_uses(uses, anatomy, [SP, muP], attention)
    options = models[BASE].options
    return resolve(
        muP, anatomy, "adam", attention=attention, application=application, model_options=options
    )


def uses(apply, shapes, setting=VECTORS):
    def init(key):
        return {name: jax.random.normal(key, shape) for name, shape in shapes.items()}

    return uses_of(Model(init, apply), setting)
