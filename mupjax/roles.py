"""Which axes of each parameter grow with width, and hence its role (input, hidden, ...)."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import jax

__all__ = [
    "Layout",
    "LeafRole",
    "Role",
    "infer_roles",
    "leaf_paths",
    "map_leaves",
    "match_patterns",
]

_Value = TypeVar("_Value")

Role = Literal["input", "hidden", "output", "vector", "fixed", "query", "query_vector", "tied"]
"""``input`` finite to width, ``hidden`` width to width, ``output`` width to finite, ``vector`` one
entry per unit (biases, norm scales), ``fixed`` no axis grows, ``query``/``query_vector`` the
attention's query projection and its bias where the head size grows (they carry the change of the
attention scale), ``tied`` one embedding matrix read at both ends."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a kernel's axes are meant: which are summed over (fan in), which are produced (fan out).

    ``kind`` is ``"matrix"`` for kernels and embeddings and ``"vector"`` for biases and norm scales,
    whose fan-in is one; ``"unknown"`` keeps a parameter from being read by its name. A matrix's
    ``fan_in``, ``fan_out``, ``other`` (spatial axes, which must not grow) and ``stacked`` (along
    which there are independent matrices; they must not grow either) cover every axis: a kernel with
    one more is not read by them. ``query`` marks a query projection whose last axis is the head
    size.
    """

    kind: Literal["matrix", "vector", "unknown"]
    fan_in: tuple[int, ...] = ()
    fan_out: tuple[int, ...] = ()
    other: tuple[int, ...] = ()
    query: bool = False
    stacked: tuple[int, ...] = ()

    @property
    def axes(self) -> tuple[int, ...]:
        """All that it knows of."""
        return (*self.fan_in, *self.fan_out, *self.other, *self.stacked)

    def with_stacked(self, axes: Iterable[int], count: int) -> Layout:
        """The same matrix, of which a parameter of `count` axes holds many along these axes."""
        rest = [axis for axis in range(count) if axis not in set(axes)]
        moved = {
            name: tuple(rest[axis] for axis in getattr(self, name))
            for name in ("fan_in", "fan_out", "other", "stacked")
        }
        moved["stacked"] = (*sorted(axes), *moved["stacked"])
        return dataclasses.replace(self, **moved)


@dataclasses.dataclass(frozen=True)
class LeafRole:
    """One parameter's role, its shape at every width looked at, and how the role was found."""

    path: str
    role: Role
    shapes: Mapping[int, tuple[int, ...]]
    stated: bool = False
    layout: Layout | None = None


def leaf_paths(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, such as ``layers/0/kernel``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_path_name(path): leaf for path, leaf in flat}


def map_leaves(function: Any, tree: Any, *rest: Any) -> Any:
    """``jax.tree.map`` whose function also receives the leaf's path (as in :func:`leaf_paths`)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(_path_name(path), *leaves), tree, *rest
    )


def _path_name(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def infer_roles(
    shapes: Mapping[int, Mapping[str, tuple[int, ...]]],
    *,
    base_width: int,
    layouts: Mapping[str, Layout] | None = None,
    stated: Mapping[str, Role] | None = None,
    stacked: Mapping[str, Iterable[int]] | None = None,
    summed: Mapping[str, Iterable[frozenset[int]]] | None = None,
    entrywise: Collection[str] = (),
) -> dict[str, LeafRole]:
    """Roles of all parameters, from their shapes at two or more widths.

    Args:
      shapes: parameter shapes by width, then by path; ``base_width`` must be among the widths.
      base_width: the width relative to which growth is measured.
      layouts: how kernels lay out their axes, by path, where the layer is known. A path that is
        not in it is read by its name: ``kernel`` with two axes is (in, out), ``embedding`` is
        (vocabulary, features), ``bias`` and ``scale`` are vectors.
      stated: roles by path pattern (``fnmatch``), which override inference.
      stacked: by path, axes along which a parameter holds independent matrices, where the model is
        seen to use it so: layers of a scan. Its layout is then that of one of them.
      summed: by path, the axes that it is seen to be summed over, in every product. They tell which
        axes are stacked where the layer's kernel has fewer than the parameter (layers that are
        vectorised over one input).
      entrywise: paths of parameters that are seen to be used entry by entry: a matrix of no known
        layer that is so, and in no product, is not taken for a hidden layer's.

    Returns:
      one :class:`LeafRole` per path.

    Raises:
      ValueError: a parameter that cannot be decided, two patterns that match one parameter, a
        pattern that matches none, a model in which no parameter grows, or an embedding in a model
        without readout (it may be tied). The text names the parameter, its shapes and how to state
        its role.
    """
    stated, layouts = dict(stated or {}), dict(layouts or {})
    stacked, summed = dict(stacked or {}), dict(summed or {})
    reference = shapes[base_width]
    for width, at_width in shapes.items():
        if set(at_width) != set(reference):
            odd = sorted(set(at_width) ^ set(reference))
            raise ValueError(
                f"the model has other parameters at width {width} than at width {base_width} "
                f"({', '.join(odd[:4])}): a family of widths must share its structure."
            )
    for pattern, role in stated.items():
        if role not in get_args(Role):
            raise ValueError(
                f"roles[{pattern!r}] = {role!r} is no role; choose one of "
                f"{', '.join(get_args(Role))}."
            )
    matched = match_patterns("roles", stated, list(reference))
    roles: dict[str, LeafRole] = {}
    for path in reference:
        by_width = {width: tuple(at_width[path]) for width, at_width in shapes.items()}
        seen = tuple(stacked.get(path, ())), tuple(summed.get(path, ()))
        layout = _layout(path, by_width, layouts.get(path), *seen)
        if path in matched:
            _, role = matched[path]
            roles[path] = LeafRole(path, role, by_width, stated=True, layout=layout)
        else:
            alone = path in entrywise and path not in summed
            role = _infer_one(path, by_width, base_width, layout, alone)
            roles[path] = LeafRole(path, role, by_width, layout=layout)
    if all(leaf.role == "fixed" and not leaf.stated for leaf in roles.values()):
        raise ValueError(
            f"no parameter changes its shape between widths {sorted(shapes)}: the model factory "
            "ignores its argument, so a parametrization would silently do nothing."
        )
    _check_embeddings(roles)
    return roles


def _check_embeddings(roles: Mapping[str, LeafRole]) -> None:
    """By its shape, an embedding that is also the readout looks like any other."""
    if any(leaf.role in ("output", "tied") for leaf in roles.values()):
        return
    for path, leaf in roles.items():
        if path.rsplit("/", 1)[-1] == "embedding" and leaf.role == "input" and not leaf.stated:
            raise ValueError(
                f"the model has an embedding {path!r} and no readout. If the embedding is also the "
                f"readout (by .attend, say), state it: roles={{{path!r}: 'tied'}}. If the model "
                f"has no readout, state roles={{{path!r}: 'input'}}."
            )


def match_patterns(
    argument: str, stated: Mapping[str, _Value], paths: Sequence[str]
) -> dict[str, tuple[str, _Value]]:
    """The pattern that matches each path, and its value; paths that none matches are left out.

    Raises:
      ValueError: a pattern that matches no path, or two that match one; the text names
        ``argument``.
    """
    matched: dict[str, tuple[str, _Value]] = {}
    for pattern, value in stated.items():
        hits = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
        if not hits:
            raise ValueError(
                f"{argument}[{pattern!r}] matches no parameter. The model has: {', '.join(paths)}."
            )
        for path in hits:
            if path in matched:
                raise ValueError(
                    f"parameter {path!r} is matched by two patterns in {argument}, "
                    f"{matched[path][0]!r} and {pattern!r}: keep one of them."
                )
            matched[path] = (pattern, value)
    return matched


def _layout(
    path: str,
    shapes: Mapping[int, tuple[int, ...]],
    given: Layout | None,
    stacked: tuple[int, ...],
    summed: tuple[frozenset[int], ...],
) -> Layout | None:
    count = len(next(iter(shapes.values())))
    layout = given or _layout_by_name(path, count)
    if layout and (layout.kind != "matrix" or len(layout.axes) == count):
        return layout
    one = given or _layout_by_name(path, count - len(stacked) or count)
    if stacked and one and len(one.axes) + len(stacked) == count:
        return one.with_stacked(stacked, count)
    one = given or _layout_by_name(path, 2)
    if one is None or one.kind != "matrix" or len(summed) != 1 or len(one.axes) >= count:
        return layout
    steady = [a for a in range(count) if len({shape[a] for shape in shapes.values()}) == 1]
    ways = (
        one.with_stacked(axes, count)
        for axes in itertools.combinations(steady, count - len(one.axes))
    )
    fitting = [way for way in ways if frozenset(way.fan_in) == summed[0]]
    return fitting[0] if len(fitting) == 1 else layout


def _layout_by_name(path: str, axes: int) -> Layout | None:
    name = path.rsplit("/", 1)[-1]
    if name in ("bias", "scale"):
        return Layout("vector", fan_out=tuple(range(axes)))
    if axes == 2 and name in ("kernel", "embedding"):
        return Layout("matrix", fan_in=(0,), fan_out=(1,))
    return None


def _infer_one(
    path: str,
    shapes: Mapping[int, tuple[int, ...]],
    base_width: int,
    layout: Layout | None,
    entrywise: bool,
) -> Role:
    if len({len(shape) for shape in shapes.values()}) > 1:
        raise _undecided(path, shapes, "its number of axes depends on the width")
    if len(set(shapes.values())) == 1:
        return "fixed"
    axes = tuple(range(len(shapes[base_width])))
    if layout is None or layout.kind == "unknown":
        growth = [_grows(path, shapes, base_width, (axis,)) for axis in axes]
        if len(growth) == 2 and all(growth):
            if not entrywise:
                return "hidden"
            raise _undecided(
                path,
                shapes,
                "it is used entry by entry, in no product that is seen to sum over it, and such a "
                "matrix (a mask, or gates of another matrix) is of no role in any table",
            )
        reason = "which of its axes is summed over is not known"
        if len(growth) == 1:
            reason = "it may be a bias or gain, role 'vector', or a readout, role 'output'"
        raise _undecided(path, shapes, reason)
    if layout.kind == "vector":
        return "vector" if _grows(path, shapes, base_width, axes) else "fixed"
    if sorted(axis % len(axes) for axis in layout.axes) != list(axes):
        raise _undecided(
            path, shapes, "its axes are not those of its layer alone, as where layers are stacked"
        )
    for axis in (*layout.other, *layout.stacked):
        if len({shape[axis] for shape in shapes.values()}) > 1:
            raise _undecided(
                path, shapes, f"its axis {axis} grows, which is neither summed over nor produced"
            )
    into = _grows(path, shapes, base_width, layout.fan_in)
    out = _grows(path, shapes, base_width, layout.fan_out)
    if into and not out and _of_keys_or_values(path, layout):
        raise _undecided(
            path,
            shapes,
            "its heads do not grow with the width; a number of queries per key (grouped queries) "
            "that changes with the width is not supported",
        )
    return "hidden" if into and out else "input" if out else "output" if into else "fixed"


def _of_keys_or_values(path: str, layout: Layout) -> bool:
    """Whether this is an attention's projection to (heads, head size) of keys or values."""
    return path.split("/")[-2:-1] in (["key"], ["value"]) and len(layout.fan_out) == 2


def _grows(
    path: str, shapes: Mapping[int, tuple[int, ...]], base_width: int, axes: Sequence[int]
) -> bool:
    sizes = {width: math.prod(shape[a] for a in axes) for width, shape in shapes.items()}
    base = sizes[base_width]
    if all(size == base for size in sizes.values()):
        return False
    if all(size * base_width == base * width for width, size in sizes.items()):
        return True
    raise _undecided(
        path, shapes, f"its axes {tuple(axes)} grow, but not in proportion to the width"
    )


def _undecided(path: str, shapes: Mapping[int, tuple[int, ...]], reason: str) -> ValueError:
    listed = ", ".join(f"{shape} at width {width}" for width, shape in sorted(shapes.items()))
    first, *others = shapes.values()
    grows = [
        any(shape[axis : axis + 1] != (n,) for shape in others) for axis, n in enumerate(first)
    ]
    # Two sides that grow are a hidden layer's; of one alone only the model's use of it tells.
    if sum(grows) > 1 or len(grows) == 1:
        example = "vector" if len(grows) == 1 else "hidden"
        remedy = f"State it, for example roles={{{path!r}: {example!r}}}"
    else:
        remedy = (
            f"State it, roles={{{path!r}: ...}}: 'output' where the model sums over the axis that "
            "grows, 'input' where it sums over others alone, 'vector' where it uses it entry by "
            "entry"
        )
    return ValueError(
        f"cannot infer the role of parameter {path!r} with shapes {listed}: {reason}. {remedy} "
        f"(one of {', '.join(get_args(Role))})."
    )
