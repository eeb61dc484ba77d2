"""Every parameter as a matrix with the width along its columns, or as a vector that counts whole.

The decomposition sorts the directions of one side of a layer's matrix. Ghosh, Wu and Bietti
(arXiv 2512.22768, section 4) take the side whose dimension is the width, so that one k serves all
layers: the units that an input layer feeds, the units that an output layer reads. Which side that
is follows from the role and the layout that the engine inferred for the parametrization.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax

from mupjax.observe import Model

__all__ = ["Layer", "Side", "layers_of", "layers_with_components"]

Side = Literal["fan_in", "fan_out", "whole"]
"""Which axes of a parameter count as the width; ``whole``: it is not split into components."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """How one parameter takes part in the decomposition.

    Attributes:
      path: of the parameter.
      axes: the axes whose directions are sorted, jointly; none where the parameter counts whole.
      size: number of these directions, the columns of `matrix`.
      stacked: axes along which there are independent matrices, as of layers of a scan.
    """

    path: str
    axes: tuple[int, ...] = ()
    size: int = 0
    stacked: tuple[int, ...] = ()

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """The parameter (or its gradient, or its change) as (everything else, size); where there
        are many matrices, as (matrices, everything else, size).
        """
        rest = (a for a in range(leaf.ndim) if a not in (*self.stacked, *self.axes))
        moved = leaf.transpose(*self.stacked, *rest, *self.axes)
        many = [math.prod(leaf.shape[a] for a in self.stacked)] if self.stacked else []
        return moved.reshape(*many, -1, self.size)


def layers_of(model: Model, sides: Mapping[str, Side] | None = None) -> tuple[Layer, ...]:
    """All parameters in the order of the parameter tree.

    Input layers are split by their outputs, output layers by their inputs, a tied embedding by the
    side that grows. Where both sides grow, the smaller one counts (of an MLP four times as wide as
    its block: the block's), and of two equal ones the inputs. Convolutions and projections to
    several heads are reshaped: their heads count jointly, their spatial positions go to the other
    side. Layers stacked in one parameter are as many matrices. Vectors, and matrices none of whose
    axes grows, count whole.

    Args:
      model: with its `roles`, as observers receive it.
      sides: by path pattern (`fnmatch`), what shall hold instead.

    Raises:
      ValueError: a model without roles, an unknown side, a pattern that matches no parameter, two
        with different sides that match one, or a parameter of which it is not known which axes are
        summed over.
    """
    if not model.roles:
        raise ValueError(
            "model.roles is empty: run the observer by mupjax.sweep, which fills them in, or use "
            "dataclasses.replace(model, roles=...)."
        )
    shapes = {_name(path): leaf.shape for path, leaf in _flat(model.abstract_params())}
    stated: dict[str, Side] = {}
    for pattern, side in (sides or {}).items():
        if side not in get_args(Side):
            raise ValueError(
                f"sides[{pattern!r}] must be one of {', '.join(get_args(Side))}, got {side!r}."
            )
        matched = [path for path in shapes if fnmatch.fnmatchcase(path, pattern)]
        if not matched:
            raise ValueError(
                f"sides[{pattern!r}] matches no parameter. The model has: {', '.join(shapes)}."
            )
        if twice := [path for path in matched if stated.get(path, side) != side]:
            raise ValueError(
                f"sides[{pattern!r}] says {side!r} of parameter {twice[0]!r}, and another pattern "
                f"{stated[twice[0]]!r}: let only one of them match it."
            )
        stated |= dict.fromkeys(matched, side)
    layers = []
    for path, shape in shapes.items():
        axes = _axes(model.roles[path], len(shape), stated.get(path))
        layout = model.roles[path].layout
        stacked = layout.stacked if axes and layout is not None else ()
        size = math.prod(shape[a] for a in axes) if axes else 0
        layers.append(Layer(path, axes, size, tuple(a % len(shape) for a in stacked)))
    return tuple(layers)


def layers_with_components(
    model: Model, sides: Mapping[str, Side] | None = None
) -> tuple[tuple[Layer, ...], int]:
    """`layers_of` a model, and the largest number of components of any of them.

    Raises:
      ValueError: as `layers_of`, or every parameter counts whole.
    """
    layers = layers_of(model, sides)
    largest = max((layer.size for layer in layers), default=0)
    if largest == 0:
        raise ValueError(
            "no parameter of the model is split into components: all count whole, and there "
            "is nothing to decompose. Leave the observer out, or change sides."
        )
    return layers, largest


def _axes(leaf: Any, count: int, stated: Side | None) -> tuple[int, ...]:
    """The axes that count as the width of one parameter (a `mupjax.roles.LeafRole`)."""
    if stated == "whole" or count < 2:
        return ()
    if stated is None and leaf.role in ("vector", "query_vector", "fixed"):
        return ()
    shapes = list(leaf.shapes.values())
    layout = leaf.layout
    if layout is not None and layout.kind == "matrix":
        fan_in, fan_out = (
            tuple(axis % count for axis in axes) for axes in (layout.fan_in, layout.fan_out)
        )
        if sorted(axis % count for axis in layout.axes) != list(range(count)):
            raise _undecided(leaf, "its axes are not those of its layer alone")
    elif count == 2:
        fan_in, fan_out = (0,), (1,)
    elif stated is None and leaf.role in ("input", "output", "tied"):
        # Which axes are summed over does not matter: those that grow are the width.
        return tuple(axis for axis in range(count) if len({shape[axis] for shape in shapes}) > 1)
    else:
        raise _undecided(leaf, "which of its axes are summed over is not known")
    sizes = {
        side: [math.prod(shape[a] for a in axes) for shape in shapes]
        for side, axes in (("fan_in", fan_in), ("fan_out", fan_out))
    }
    growing = [side for side, size in sizes.items() if len(set(size)) > 1]
    side = stated or min(growing, key=lambda side: sizes[side], default="whole")
    return {"fan_in": fan_in, "fan_out": fan_out, "whole": ()}[side]


def _undecided(leaf: Any, reason: str) -> ValueError:
    shape = next(iter(leaf.shapes.values()))
    return ValueError(
        f"cannot tell which axes of parameter {leaf.path!r} of shape {shape} and role "
        f"{leaf.role!r} count as the width: {reason}. Give the mupjax.Model a layout of it, or "
        f"count it whole: decomposition_observer(..., sides={{{leaf.path!r}: 'whole'}})."
    )


def _flat(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
