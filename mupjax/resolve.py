"""A parametrization applied to a model: every parameter's role and factors, as data."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mupjax.adapters import Model
from mupjax.depth import Depth, DepthFactors
from mupjax.parametrization import (
    DECAY_COLUMN,
    Exponents,
    Family,
    Parametrization,
    WeightDecayMode,
)
from mupjax.roles import LeafRole, Role, infer_roles, leaf_paths, match_patterns

__all__ = [
    "ATTENTION_POWER",
    "Application",
    "Factors",
    "ModelAnatomy",
    "Resolved",
    "attention_carriers",
    "changes_attention",
    "dissect",
    "resolve",
]

Application = Literal["folded", "multipliers"]
"""``folded``: forward multipliers are moved into initial values and learning rates (no cost);
``multipliers``: they are applied to the parameters in every forward pass."""

AttentionScale = Literal["1/sqrt(head_dim)", "1/head_dim"]
"""The factor on ``q @ k`` that the model itself applies."""

ATTENTION_POWER: Mapping[AttentionScale, float] = {"1/sqrt(head_dim)": 0.5, "1/head_dim": 1.0}
# What a table shows of parameters that carry a factor on the attention logits.
_CARRYING: Mapping[Role, Role] = {"hidden": "query", "vector": "query_vector"}

# Relative change of a measured initial std that still counts as "a power of the width".
_INIT_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class ModelAnatomy:
    """What is known of a model family before any parametrization: roles and initial scales.

    Attributes:
      base_width: width to which growth and factors refer.
      leaves: the role of every parameter, in the order of the parameter tree.
      init_exponents: b0 by path: the model's own initial std goes as ``m ** -b0``.
      query_growth: paths of the parameters without stated role that can carry a factor on the
        attention logits, where the head size (their last axis) changes with width: a query
        projection's, or the scale of the norm that follows it.
    """

    base_width: int
    leaves: Mapping[str, LeafRole]
    init_exponents: Mapping[str, float]
    query_growth: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Factors:
    """Per-parameter factors at one width, by path: each multiplies its base value."""

    multiplier: Mapping[str, float]
    init: Mapping[str, float]
    learning_rate: Mapping[str, float]
    weight_decay: Mapping[str, float]
    adam_eps: Mapping[str, float]
    readout_multiplier: float = 1.0


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A parametrization resolved for one model family and optimizer family.

    ``factors(width)`` gives the numbers, ``table(width)`` a readable table of them. Parameters in
    ``blocks``, the residual blocks, have those of ``depth`` in them, if there is one.
    """

    parametrization: Parametrization
    family: Family
    anatomy: ModelAnatomy
    rows: Mapping[str, Exponents]
    roles: Mapping[str, Role]
    readout_exponent: float
    weight_decay_mode: WeightDecayMode
    depth: Depth | None = None
    blocks: frozenset[str] = frozenset()

    @property
    def depth_factors(self) -> DepthFactors:
        """Further factors on the parameters of the residual blocks."""
        if self.depth is None:
            return DepthFactors()
        return self.depth.factors(self.family, self.weight_decay_mode)

    def factors(self, width: int) -> Factors:
        """The factors at a width; exactly 1.0 where the exponent is 0."""
        ratio = width / self.anatomy.base_width
        deep = self.depth_factors

        def power(exponent: float) -> float:
            return 1.0 if exponent == 0 or ratio == 1 else ratio**-exponent

        def column(name: str, in_blocks: float) -> dict[str, float]:
            return {
                path: power(getattr(row, name)) * (in_blocks if path in self.blocks else 1.0)
                for path, row in self.rows.items()
            }

        decay = DECAY_COLUMN[self.weight_decay_mode]
        return Factors(
            multiplier={p: power(row.multiplier) for p, row in self.rows.items()},
            init={
                p: power(row.init_std - self.anatomy.init_exponents[p])
                for p, row in self.rows.items()
            },
            learning_rate=column("learning_rate", deep.learning_rate),
            weight_decay=column(decay, deep.weight_decay),
            adam_eps=column("adam_eps", deep.adam_eps),
            readout_multiplier=power(self.readout_exponent),
        )

    def scales(self) -> bool:
        """Whether any factor depends on the width, so that the base width matters."""
        decay = DECAY_COLUMN[self.weight_decay_mode]
        return self.readout_exponent != 0 or any(
            row.multiplier
            or row.learning_rate
            or row.adam_eps
            or getattr(row, decay)
            or row.init_std != self.anatomy.init_exponents[path]
            for path, row in self.rows.items()
        )

    def table(self, width: int) -> str:
        """Every parameter at one width: role, shape, and its factors.

        The column ``lr*wd`` is the shrink per step relative to the base width: under coupled decay
        the product of both factors, under independent decay the decay factor alone, and under L2 as
        well the product (times 1 / |gradient| for optimizers that ignore its scale).
        """
        f = self.factors(width)
        head = ["parameter", "role", "shape", "multiplier", "init", "lr", "wd", "lr*wd", "eps"]
        body = []
        for path, leaf in self.anatomy.leaves.items():
            shape = leaf.shapes.get(width) or next(iter(leaf.shapes.values()))
            rate, decay = f.learning_rate[path], f.weight_decay[path]
            product = decay if self.weight_decay_mode == "independent" else rate * decay
            numbers = [f.multiplier[path], f.init[path], rate, decay, product, f.adam_eps[path]]
            role = self.roles[path] + (" (stated)" if leaf.stated else "")
            role += " in block" if path in self.blocks else ""
            body.append([path, role, str(shape), *(f"{x:.4g}" for x in numbers)])
        sizes = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        title = (
            f"{self.parametrization.name} at width {width} (base {self.anatomy.base_width}), "
            f"{self.family}-like optimizer, weight decay {self.weight_decay_mode}: factors on the "
            "base width's values"
        )
        if self.depth is not None:
            deep = self.depth_factors
            title += (
                f"\n{self.depth}; of these, factors of depth in residual blocks: "
                f"lr {deep.learning_rate:.4g}, wd {deep.weight_decay:.4g}, eps {deep.adam_eps:.4g}"
            )
        lines = [
            "  ".join(c.ljust(s) for c, s in zip(r, sizes, strict=True)) for r in [head, *body]
        ]
        return "\n".join([title, *(line.rstrip() for line in lines)])


def dissect(
    models: Mapping[int, Model],
    *,
    base_width: int,
    stated_roles: Mapping[str, Role] | None = None,
    stated_init_exponents: Mapping[str, float] | None = None,
    stacked: Mapping[str, Iterable[int]] | None = None,
    summed: Mapping[str, Iterable[frozenset[int]]] | None = None,
    entrywise: Collection[str] = (),
) -> ModelAnatomy:
    """Roles (from shapes alone) and initial scales (measured) of a family of models.

    Args:
      models: the model at two or more widths, ``base_width`` among them.
      base_width: the reference width.
      stated_roles: roles by path pattern, which override inference.
      stated_init_exponents: b0 by path pattern, where the model's own initial std goes as
        ``width ** -b0``; otherwise it is measured between the base and the largest width. A
        parameter of role ``fixed`` has none unless it is stated by its exact path: a pattern such
        as ``readout/*`` is about the kernel, not the bias beside it.
      stacked, summed: axes along which parameters hold independent matrices, and which they are
        summed over, by path (`mupjax.program.Uses`).
      entrywise: paths of parameters that are used entry by entry (the same).

    Raises:
      ValueError: see :func:`mupjax.roles.infer_roles`; a pattern for initial exponents that
        matches no parameter, or two that match one; or an initial std that follows no power.
    """
    shapes = {
        width: {path: leaf.shape for path, leaf in leaf_paths(model.abstract_params()).items()}
        for width, model in models.items()
    }
    leaves = infer_roles(
        shapes,
        base_width=base_width,
        layouts=models[base_width].layouts,
        stated=stated_roles,
        stacked=stacked,
        summed=summed,
        entrywise=entrywise,
    )
    stated = match_patterns("init_exponents", stated_init_exponents or {}, list(leaves))
    for pattern, value in stated.values():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"init_exponents[{pattern!r}] must be a finite number, got {value!r}.")
    exponents = {
        path: float(value)
        for path, (pattern, value) in stated.items()
        if leaves[path].role != "fixed" or pattern == path
    }
    open_leaves = [p for p, leaf in leaves.items() if leaf.role != "fixed" and p not in exponents]
    other = max(width for width in models if width != base_width)
    exponents |= _measure_init_exponents(models, base_width, other, open_leaves)
    exponents = {path: exponents.get(path, 0.0) for path in leaves}
    return ModelAnatomy(base_width, leaves, exponents, _query_growth(leaves))


def _query_growth(leaves: Mapping[str, LeafRole]) -> frozenset[str]:
    carriers: set[str] = set()
    for path, leaf in leaves.items():
        if leaf.layout and leaf.layout.query:
            # A norm of the queries would undo what their projection carries.
            norm = path.rpartition("query/")[0] + "query_ln/"
            carriers.update([p for p in leaves if p.startswith(norm)] or [path])
    return frozenset(
        path
        for path in carriers
        if not leaves[path].stated and len({s[-1] for s in leaves[path].shapes.values()}) > 1
    )


def _measure_init_exponents(
    models: Mapping[int, Model], base: int, other: int, paths: Sequence[str]
) -> dict[str, float]:
    if not paths:
        return {}
    (low, n_low), (high, n_high) = (_mean_squares(models[w], paths) for w in (base, other))
    exponents: dict[str, float] = {}
    for path in paths:
        if low[path] == high[path]:
            exponents[path] = 0.0
            continue
        if not (low[path] > 0 and high[path] > 0):
            raise ValueError(
                f"parameter {path!r} starts at zero at one of the widths {base} and {other} "
                f"and not at the other; state init_exponents={{{path!r}: 0.5}} or initialise "
                "it alike."
            )
        stretch = math.log(other / base)
        slope = -0.5 * math.log(high[path] / low[path]) / stretch
        # Standard error of a log std estimated from N Gaussian entries is sqrt(1/2N).
        noise = math.sqrt(0.5 / n_low[path] + 0.5 / n_high[path]) / abs(stretch)
        nearest = round(2 * slope) / 2
        if abs(slope - nearest) > min(_INIT_TOLERANCE + 5 * noise, 0.2):
            raise ValueError(
                f"the initial std of parameter {path!r} goes as width**{-slope:.3f} between widths "
                f"{base} and {other}: no multiple of 1/2, as with Glorot's initializer, so "
                "it has no place in a parametrization. Use flax.nnx.initializers.lecun_normal() or "
                f"another fan-in initializer, or state init_exponents={{{path!r}: {slope:.3f}}}, "
                "the power of 1/width, yourself."
            )
        exponents[path] = nearest
    return exponents


def _mean_squares(model: Model, paths: Sequence[str]) -> tuple[dict[str, float], dict[str, int]]:
    """Mean square of each parameter over enough initialisations, and how many entries that was."""
    sizes = {path: leaf.size for path, leaf in leaf_paths(model.abstract_params()).items()}
    wanted = math.ceil(50_000 / min(sizes[path] for path in paths))
    draws = max(1, min(wanted, 4096, 5_000_000 // sum(sizes.values())))

    def squares(key: jax.Array) -> dict[str, jax.Array]:
        leaves = leaf_paths(model.init(key))
        return {path: jnp.mean(jnp.square(leaves[path].astype(jnp.float32))) for path in paths}

    keys = jax.random.split(jax.random.key(0), draws)
    means = jax.jit(lambda keys: jax.lax.map(squares, keys))(keys)
    mean_squares = {path: float(np.mean(np.asarray(m, np.float64))) for path, m in means.items()}
    return mean_squares, {path: sizes[path] * draws for path in paths}


def resolve(
    parametrization: Parametrization,
    anatomy: ModelAnatomy,
    family: Family,
    *,
    application: Application = "folded",
    weight_decay_mode: WeightDecayMode = "coupled",
    attention: AttentionScale | None = None,
    model_options: frozenset[str] = frozenset(),
    depth: Depth | None = None,
) -> Resolved:
    """Give every parameter its row of exponents.

    Args:
      parametrization: the table.
      anatomy: of the model family, by :func:`dissect`.
      family: of the optimizer.
      application: see :data:`Application`.
      weight_decay_mode: which decay exponents apply.
      attention: the scale on ``q @ k`` that the model applies, needed only where the head size
        grows with width and the parametrization scales logits otherwise than ``head_dim**-1/2``
        (Flax's own scale, which is assumed if nothing is said). Query projections, or the norms
        that follow them, carry the difference.
      model_options: the model's options; a tied matrix needs ``readout_multiplier``.
      depth: of the models, whose residual blocks get its factors too.

    Raises:
      ValueError: patterns of ``depth`` that do not fit the model, a tied matrix under a table that
        gives its two ends different scales, a model that cannot apply the readout multiplier, an
        attention scale that is unknown or must be stated, or a head size that goes as no power of
        the width.
    """
    if attention is not None and attention not in ATTENTION_POWER:
        raise ValueError(
            f"attention must be {' or '.join(map(repr, get_args(AttentionScale)))}, "
            f"got {attention!r}."
        )
    roles: dict[str, Role] = {}
    rows: dict[str, Exponents] = {}
    readout_exponent = 0.0
    for path, leaf in anatomy.leaves.items():
        role = leaf.role
        if role == "tied":
            row, readout_exponent = parametrization.tied_row(family, weight_decay_mode)
            if readout_exponent and "readout_multiplier" not in model_options:
                raise ValueError(
                    f"parameter {path!r} is tied, and {parametrization.name} needs a multiplier "
                    "where it is used as readout: let the model's __call__ take "
                    "`readout_multiplier` and multiply the logits by it."
                )
        else:
            row = parametrization.row(role, family)
        if role in _CARRYING.values() and attention is not None:
            # A stated query's row makes up for Flax's scale, not for that of this model.
            row = dataclasses.replace(
                row, multiplier=row.multiplier + 0.5 - ATTENTION_POWER[attention]
            )
        if carried := _carried(leaf, anatomy, parametrization, attention):
            row = dataclasses.replace(row, multiplier=row.multiplier + carried)
            role = _CARRYING.get(role, role)
        roles[path] = role
        rows[path] = row.folded(family) if application == "folded" else row
    blocks = frozenset() if depth is None else depth.members(anatomy.leaves)
    return Resolved(
        *(parametrization, family, anatomy, rows, roles, readout_exponent, weight_decay_mode),
        depth=depth,
        blocks=blocks,
    )


def changes_attention(parametrization: Parametrization, attention: AttentionScale | None) -> bool:
    """Whether a table asks for another scale of attention logits than the model applies.

    The model applies Flax's, if nothing is said.
    """
    return parametrization.attention != ATTENTION_POWER[attention or "1/sqrt(head_dim)"]


def attention_carriers(anatomy: ModelAnatomy) -> frozenset[str]:
    """Paths of the parameters that carry the difference: queries, known or stated."""
    stated = (p for p, leaf in anatomy.leaves.items() if leaf.role in _CARRYING.values())
    return anatomy.query_growth | frozenset(stated)


def _carried(
    leaf: LeafRole,
    anatomy: ModelAnatomy,
    parametrization: Parametrization,
    attention: AttentionScale | None,
) -> float:
    """Exponent of the multiplier that makes up for the attention scale the model applies."""
    if leaf.path not in anatomy.query_growth:
        return 0.0
    if attention is None and parametrization.attention != 0.5:
        raise ValueError(
            f"the head size of attention parameter {leaf.path!r} grows with width, and "
            f"{parametrization.name} scales logits as head_dim**-{parametrization.attention:g} "
            "while Flax's attention layers apply 1/sqrt(head_dim). State what the model applies: "
            "attention='1/sqrt(head_dim)' or attention='1/head_dim' (the query projection carries "
            "the difference, if any). Or keep the head size fixed and let the number of heads "
            "grow: then nothing needs to be said. If it is no attention, state its role."
        )
    missing = parametrization.attention - ATTENTION_POWER[attention or "1/sqrt(head_dim)"]
    return missing * _head_growth(leaf, anatomy.base_width) if missing else 0.0


def _head_growth(leaf: LeafRole, base_width: int) -> float:
    """The power of the width with which the head size, the last axis, grows."""
    base = leaf.shapes[base_width][-1]
    powers = [
        math.log(shape[-1] / base) / math.log(width / base_width)
        for width, shape in leaf.shapes.items()
        if width != base_width
    ]
    if max(powers) - min(powers) > 1e-9:
        sizes = ", ".join(f"{s[-1]} at width {w}" for w, s in sorted(leaf.shapes.items()))
        raise ValueError(
            f"the head size of attention parameter {leaf.path!r} ({sizes}) goes as no power of the "
            "width, so no exponent makes up for the attention scale that the model applies: let "
            "the head size or the number of heads alone grow."
        )
    return powers[0]
