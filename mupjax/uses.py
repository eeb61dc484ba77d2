"""How a model's function uses its parameters: refused where it is not as their roles say.

A kernel that is called like Flax's is taken to be laid out like Flax's, an embedding to be looked
up only, attention to be one of Flax's layers, and sums over the width to have no factor of their
own. A model of one's own may do otherwise: store its kernels as (out, in), read one matrix at both
ends, write its own attention, or divide by a root of its width. Each would train under the wrong
row of a table without a word, so the model's program is read (`mupjax.program`) and such uses
refused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

from mupjax.parametrization import Parametrization
from mupjax.program import Inner, Uses
from mupjax.resolve import (
    ATTENTION_POWER,
    AttentionScale,
    ModelAnatomy,
    attention_carriers,
    changes_attention,
)
from mupjax.roles import LeafRole, Role

__all__ = ["check_uses"]

logger = logging.getLogger("mupjax")

# Of the powers of the width that factors show: those of half precision have two digits.
_ROUNDING = 0.02


def check_uses(
    uses: Mapping[int, Uses],
    anatomy: ModelAnatomy,
    parametrizations: Sequence[Parametrization],
    attention: AttentionScale | None,
    *,
    scaling: bool = True,
    orthogonalised: bool = False,
) -> None:
    """Refuse a model that uses parameters otherwise than their inferred roles say.

    Args:
      uses: of the model at two widths.
      anatomy: their roles; stated ones are believed, with a warning where another use is seen.
      parametrizations: the tables that will be applied.
      attention: the scale of attention logits that the model was said to apply, if it was said.
      scaling: whether a table scales anything with the width. If none does, the model trains as it
        is, and its own factors are its own affair.
      orthogonalised: the optimizer treats the two sides of hidden matrices differently.

    Raises:
      ValueError: a parameter that is summed over other axes than its role (or, if orthogonalised,
        its layout) implies, or at both ends; a factor of the model's own that depends on the width;
        a product of two activations over a growing axis (attention) that is not scaled as it was
        said, or, of one's own, whose scale a table changes and that no parameter of role query
        makes. The text names the parameter and the remedy.
    """
    asking = [p.name for p in parametrizations if changes_attention(p, attention)]
    for path, leaf in anatomy.leaves.items():
        summed = uses[max(uses)].summed.get(path, frozenset())
        _check_leaf(path, leaf, summed)
        if orthogonalised:
            _check_sides(path, leaf, summed)
    if scaling:
        _check_factors(uses, anatomy)
    if asking:
        _check_products(uses, asking[0], attention_carriers(anatomy))
    _check_scales(uses, attention, attention_carriers(anatomy))


def _check_leaf(path: str, leaf: LeafRole, summed: frozenset[frozenset[int]]) -> None:
    roles = {_role_of_use(leaf, over) for over in summed}
    if leaf.stated:
        seen = len(roles) == 1 and leaf.role in ("input", "hidden", "output", "vector")
        if seen and roles != {leaf.role}:
            logger.warning(
                "parameter %r is stated to be of role %r, which is believed; the model multiplies "
                "with it as of role %r",
                *(path, leaf.role, min(roles)),
            )
        return
    if leaf.role not in ("input", "output", "vector"):
        return
    if not roles or roles == {leaf.role} or "hidden" in roles:
        return
    listed = ", ".join(f"{shape} at width {n}" for n, shape in sorted(leaf.shapes.items()))
    role = min(roles)
    says = f"as of role {role!r}: state it, roles={{{path!r}: {role!r}}}"
    if len(roles) > 1:
        says = (
            "as input layer and as readout: if one matrix serves both ends, state it, "
            f"roles={{{path!r}: 'tied'}}"
        )
    raise ValueError(
        f"parameter {path!r} with shapes {listed} would be of role {leaf.role!r} by its name "
        f"and layout, but the model multiplies with it {says}."
    )


def _check_products(uses: Mapping[int, Uses], table: str, carriers: frozenset[str]) -> None:
    low, high = min(uses), max(uses)
    for few, many in _growing_products(uses):
        # Where nothing is known of what made them, any carrier may have.
        if many.makers & carriers if many.makers else carriers:
            continue
        by = f" (made by {_listed(many.makers)})" if many.makers else ""
        raise ValueError(
            f"the model multiplies two activations{by} and sums over {few.size} entries at "
            f"width {low} and {many.size} at width {high}, as attention does whose head size "
            f"grows, and {table} scales such products otherwise than the model. State what the "
            "model divides by, attention='1/sqrt(head_dim)' or attention='1/head_dim', and which "
            "parameters make the queries, so that they carry the difference (if any): "
            "roles={'*/q/kernel': 'query', '*/q/bias': 'query_vector'}. Or keep the head size "
            "fixed and let the number of heads grow: then nothing needs to be said. If it is no "
            "attention, and the roles of the parameters are right, attention='1/head_dim' leaves "
            "all as they say under muP."
        )


def _check_scales(
    uses: Mapping[int, Uses], attention: AttentionScale | None, carriers: frozenset[str]
) -> None:
    assumed = attention or "1/sqrt(head_dim)"
    for few, many in _growing_products(uses):
        ratio = many.scale / few.scale
        if not many.makers & carriers or many.normalised or not 0 < ratio < math.inf:
            continue  # it may be anything
        power = -math.log(ratio) / math.log(many.size / few.size)
        # No factor at all: there may be one that is not followed.
        if abs(power) < _ROUNDING or abs(power - ATTENTION_POWER[assumed]) < _ROUNDING:
            continue
        known = next((s for s, p in ATTENTION_POWER.items() if abs(power - p) < _ROUNDING), None)
        says = f"attention={attention!r} says" if attention else "is assumed where nothing is said"
        remedy = f"state attention={known!r}" if known else "let it be one of the two"
        raise ValueError(
            f"the model multiplies products of two activations over {few.size} entries by "
            f"{few.scale:.4g}, and over {many.size} entries (at width {max(uses)}) by "
            f"{many.scale:.4g}: as head_dim**{-power:.2g}, not {assumed} as {says}; {remedy}."
        )


def _check_factors(uses: Mapping[int, Uses], anatomy: ModelAnatomy) -> None:
    low, high = min(uses), max(uses)
    for paths in uses[low].factors.keys() | uses[high].factors.keys():
        few, many = (uses[width].factors.get(paths, 1.0) for width in (low, high))
        ours = sorted(path for path in paths if not anatomy.leaves[path].stated)
        ratio = many / few if few else math.nan
        if not ours or not 0 < ratio < math.inf:
            continue
        power = math.log(ratio) / math.log(high / low)
        if abs(power) < _ROUNDING:
            continue
        stated = ", ".join(f"{path!r}: {anatomy.leaves[path].role!r}" for path in ours)
        raise ValueError(
            f"the model multiplies {_listed(ours)}, or what is made with it, by constants of its "
            f"own that are {ratio:.4g} times as large at width {high} as at width {low}: as "
            f"width**{power:.2g}, on top of which the parametrization would be applied. Leave the "
            "factor out of the model and let the parametrization have it (mupjax.NTP divides by "
            "the root of the fan-in; initial scales are put right under every table), or, if it "
            f"shall stay on top, state the role: roles={{{stated}}}."
        )


def _check_sides(path: str, leaf: LeafRole, summed: frozenset[frozenset[int]]) -> None:
    layout = leaf.layout
    if leaf.role not in ("hidden", "query") or layout is None or layout.kind != "matrix":
        return
    shape = next(iter(leaf.shapes.values()))
    fan_in, fan_out = (
        frozenset(axis % len(shape) for axis in axes) for axes in (layout.fan_in, layout.fan_out)
    )
    if summed != {fan_out} or fan_in == fan_out:
        return
    if math.prod(shape[a] for a in fan_in) != math.prod(shape[a] for a in fan_out):
        raise ValueError(
            f"hidden parameter {path!r} of shape {shape} would be read as (in, out) by its name, "
            "but the model sums over its last axes, and an optimizer that orthogonalises updates "
            "scales them by the root of fan out over fan in: store it as (in, out), or give the "
            "mupjax.Model a layout of it."
        )


def _growing_products(uses: Mapping[int, Uses]) -> list[tuple[Inner, Inner]]:
    """Products of two activations at both widths, over as many entries as grow."""
    low, high = uses[min(uses)].inner, uses[max(uses)].inner
    if len(low) != len(high):
        return []
    return [(a, b) for a, b in zip(low, high, strict=True) if a.size != b.size and a.size]


def _listed(paths: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(paths)))


def _role_of_use(leaf: LeafRole, over: frozenset[int]) -> Role:
    shapes = list(leaf.shapes.values())
    grows = {axis for axis in range(len(shapes[0])) if len({shape[axis] for shape in shapes}) > 1}
    if grows & over:
        return "hidden" if grows - over else "output"
    return "input" if grows else "fixed"
