"""How far one update of one parameter moves every layer's output, to first order.

Derivatives along an update rather than differences after one: no remainder in the learning rate, no
rounding, and one parameter at a time, so that there is no sum of what several of them do, each with
its own power of the width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mupjax import PRESETS
from mupjax.adapters import as_model
from mupjax.matrix_optimizers import muon
from mupjax.models.transformers import apply_rope
from mupjax.parametrization import Family
from mupjax.resolve import dissect, resolve
from mupjax.roles import leaf_paths, map_leaves

OPTIMIZERS = {
    "sgd": lambda roles: optax.sgd(1.0),
    # No epsilon to speak of: what it does is another question.
    "adam": lambda roles: optax.adam(1.0, eps=1e-20),
    "muon": lambda roles: muon(1.0, roles=roles, eps=1e-20),
}
FAMILIES: dict[str, Family] = {"sgd": "sgd", "adam": "adam", "muon": "spectral"}

# How the initial std of Flax's decoders goes with the width. A wrong one would show in the powers
# of the initial outputs.
INITIAL = {"kernel": 0.5, "embedding": 0.5, "bias": 0.0, "scale": 0.0}

# These programs run for less time than they compile.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def resolved(
    factory, setting, base_width, names, optimizers, *, measure=False, roles=None, attention=None
):
    """Every parametrization, applied to a model and an optimizer: by (optimizer, name).

    The model's own initial std is measured only if so asked: it takes compilations.
    """
    models = {width: as_model(factory, width, setting) for width in (base_width, 2 * base_width)}
    paths = leaf_paths(models[base_width].abstract_params())
    known = None if measure else {path: INITIAL[path.rsplit("/", 1)[-1]] for path in paths}
    anatomy = dissect(
        models, base_width=base_width, stated_roles=roles, stated_init_exponents=known
    )
    options = {"attention": attention, "model_options": models[base_width].options}
    return {
        (optimizer, name): resolve(PRESETS[name], anatomy, FAMILIES[optimizer], **options)
        for optimizer in optimizers
        for name in names
    }


def with_logits(outputs, power, rope):
    """Layers' outputs, and the products of queries and keys as the softmax sees them."""
    found = dict(outputs)
    for path, query in outputs.items():
        if not path.endswith("attention/query"):
            continue
        # The decoder's layers see the tokens of all sequences as rows.
        query, key = (
            rows.reshape(*outputs["embed"].shape[:2], *rows.shape[1:])
            for rows in (query, outputs[path.removesuffix("query") + "key"])
        )
        if rope:
            query, key = apply_rope(query), apply_rope(key)
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        logits = jnp.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -power
        seen = jnp.tril(jnp.ones(logits.shape[-2:]))
        found[path.removesuffix("query") + "logits"] = logits * seen[None, None]
    return found


def responses(factory, setting, width, tables, seeds, coordinates, one_by_one=False):
    """log2 of the root mean square of every layer's output and of its change, seed by seed.

    Args:
      factory, setting, width: the model, its data (`setting.validation` is the batch).
      tables: of `resolved`.
      seeds: S, how many initialisations.
      coordinates: adds to the dictionary of layers' outputs, or passes it on.
      one_by_one: seeds one after another. Together, convolutions become grouped ones, which on a
        CPU take far longer.

    Returns:
      by (optimizer, parametrization): (start, change), ``start[layer]`` and
      ``change[parameter][layer]`` of shape (S,). The layer ``loss`` is the loss.
    """
    model = as_model(factory, width, setting)
    intermediates = model.intermediates
    assert intermediates is not None

    @_jit
    @jax.vmap
    def initial(seed):
        return model.init(jax.random.fold_in(jax.random.key(seed), width))

    def for_each(function, *trees):
        if one_by_one:
            return jax.lax.map(lambda given: function(*given), trees)
        return jax.vmap(function)(*trees)

    def outputs(params, multiplier):
        options = {}
        if "readout_multiplier" in model.options:
            options["readout_multiplier"] = multiplier
        seen = {}

        def predict(*inputs):
            seen.update(coordinates(intermediates(params, *inputs, **options)))
            return seen["output"]

        seen["loss"] = setting.loss(predict, setting.validation)
        return seen["loss"], seen

    def sizes(values):
        return {layer: 0.5 * jnp.log2(jnp.mean(jnp.square(h))) for layer, h in values.items()}

    @_jit
    def start(params, multiplier):
        def one(params):
            (_, seen), gradient = jax.value_and_grad(outputs, has_aux=True)(params, multiplier)
            return sizes(seen), gradient

        return for_each(one, params)

    @_jit
    def change(params, step, which, multiplier):
        """The derivative along the update of parameter number `which` alone."""
        places = {path: i for i, path in enumerate(leaf_paths(step))}

        def one(params, step):
            alone = map_leaves(lambda path, leaf: jnp.where(places[path] == which, leaf, 0), step)
            return sizes(jax.jvp(lambda p: outputs(p, multiplier)[1], (params,), (alone,))[1])

        return for_each(one, params, step)

    @functools.cache
    def updates(optimizer):
        leaves = next(iter(tables.values())).anatomy.leaves
        transform = OPTIMIZERS[optimizer](leaves)
        return _jit(jax.vmap(lambda g: transform.update(g, transform.init(g), g)[0]))

    drawn, found = initial(jnp.arange(seeds)), {}
    for (optimizer, name), table in tables.items():
        factors = table.factors(width)
        params = map_leaves(lambda path, leaf, f=factors: leaf * f.init[path], drawn)
        multiplier = factors.readout_multiplier
        begin, gradient = start(params, multiplier)
        step = map_leaves(
            lambda path, leaf, f=factors: leaf * f.learning_rate[path], updates(optimizer)(gradient)
        )
        moved = {
            path: change(params, step, i, multiplier) for i, path in enumerate(leaf_paths(step))
        }
        found[optimizer, name] = jax.device_get((begin, moved))
    return found


def powers(by_width, *, many_heads):
    """Slopes of log2 against log2 of the width, (mean, standard error over seeds), leaf by leaf.

    Args:
      by_width: one tree of arrays (S,) for each width.
      many_heads: average root mean squares over seeds, and not their logarithms. As the number of
        heads grows, the spread of a seed's mean over heads falls, which the mean of logarithms
        would show as a power. Where their number is fixed, the spread stays, and is wide: there the
        mean of logarithms is much the less noisy one.
    """
    log = np.log2(sorted(by_width))
    weights = (log - log.mean()) / np.square(log - log.mean()).sum()

    def mean(values):
        if not np.isfinite(values).all():
            return np.nan, np.nan
        if not many_heads:
            return values.mean(), values.std(ddof=1) / np.sqrt(values.size)
        sizes = 2 ** (values - values.max())
        error = sizes.std(ddof=1) / (sizes.mean() * np.log(2) * np.sqrt(values.size))
        return np.log2(sizes.mean()) + values.max(), error

    def slope(*values):
        means, errors = np.transpose([mean(np.asarray(v, float)) for v in values])
        return float(weights @ means), float(np.sqrt(weights**2 @ errors**2))

    return jax.tree.map(slope, *(by_width[width] for width in sorted(by_width)))
