"""What a model's program does with its parameters, read off its trace: nothing is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mupjax.adapters import Model
from mupjax.roles import leaf_paths
from mupjax.setting import Setting, model_calls

__all__ = ["Uses", "uses_of"]

_Axes = tuple[frozenset[int], ...]


@dataclasses.dataclass(frozen=True)
class Uses:
    """What a model does with its parameters and activations, in all calls that a loss makes.

    Attributes:
      summed: by parameter path, the axes summed over in each product with something else (of a
        matrix product, a convolution, or a look-up of rows), one set for each distinct product;
        none where it is in products with other parameters only, which make one matrix together.
      stacked: by parameter path, the axes along which it holds independent matrices: those that a
        scan runs over, that an index picks one from, or that are a batch of a matrix product, in
        all of its products alike; only where there are some.
      inner: products of two activations, in the program's order.
      factors: constants that multiply parameters, or what they make until the next product, by the
        paths of these parameters; of several for the same ones in a call, their product (and of
        several calls the one farthest from 1). Sums, and what is normalised by something else that
        the model computes, are left out.
      outputs: paths of the parameters that made the model's outputs, from the last product on.
      entrywise: paths of parameters that meet activations, or in a product other matrices, entry by
        entry.
    """

    summed: Mapping[str, frozenset[frozenset[int]]]
    stacked: Mapping[str, frozenset[int]]
    inner: tuple[Inner, ...]
    factors: Mapping[frozenset[str], float]
    outputs: frozenset[str] = frozenset()
    entrywise: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Inner:
    """A product of two activations, as of queries and keys.

    Attributes:
      size: how many entries are summed over.
      makers: paths of the parameters that made the two, from their last product on.
      scale: the constants that multiply either of the two, or the result.
      normalised: whether either of the two is, as by a norm of the queries.
    """

    size: int
    makers: frozenset[str]
    scale: float
    normalised: bool = False


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is known of an intermediate value.

    ``active``: it depends on the model's inputs. ``axes``: by path of each parameter that it is a
    rearrangement of, which of the parameter's axes make up each of the value's. ``makers``: of an
    active one, paths of the parameters from the last product on that made it. ``constant``: what
    all of its entries are. ``factors``, ``inner``: numbers of the factors in it, and of the
    products of two activations that it comes from. ``settled``: it is a sum or was normalised, so
    that a factor is part of that. ``joint``: paths of matrices that are multiplied entry by entry
    in it, whose axes tell nothing of their roles.
    """

    active: bool = False
    axes: Mapping[str, _Axes] = dataclasses.field(default_factory=dict)
    makers: frozenset[str] = frozenset()
    constant: float | None = None
    factors: frozenset[int] = frozenset()
    inner: frozenset[int] = frozenset()
    settled: bool = False
    joint: frozenset[str] = frozenset()

    @property
    def paths(self) -> frozenset[str]:
        """Of the parameters that made it: biases and scales of norms count, too."""
        return self.makers if self.active else frozenset(self.axes)


def uses_of(model: Model, setting: Setting) -> Uses:
    """Trace the calls of the model that the setting's loss makes; nothing is computed.

    Values are followed through rearrangements (transposes, reshapes, slices, concatenations),
    functions of a single entry, nested functions and scans. A use that is not followed leaves no
    trace: an absence says nothing.
    """
    params = model.abstract_params()
    leaves = leaf_paths(params)
    values = [
        _Value(axes={path: tuple(frozenset({a}) for a in range(leaf.ndim))})
        for path, leaf in leaves.items()
    ]
    reader = _Reader({path: leaf.ndim for path, leaf in leaves.items()})
    for given in model_calls(setting, model.apply, params):
        program, arrays = _traced(model, params, given)
        constants = [_Value(constant=_uniform(array)) for array in program.consts]
        reader.read_call(program.jaxpr, [*values, *[_Value(active=True)] * arrays], constants)
    return reader.uses()


def _traced(model: Model, params: Any, given: Any) -> tuple[ClosedJaxpr, int]:
    """The program of one call of the model, and the number of arrays that it takes."""
    inputs, structure = jax.tree.flatten(given)
    arrays = [leaf for leaf in inputs if isinstance(leaf, jax.ShapeDtypeStruct)]

    def call(params: Any, arrays: Sequence[jax.Array]) -> Any:
        left = iter(arrays)
        filled = [next(left) if isinstance(x, jax.ShapeDtypeStruct) else x for x in inputs]
        args, kwargs = structure.unflatten(filled)
        return model.apply(params, *args, **kwargs)

    return jax.make_jaxpr(call)(params, arrays), len(arrays)


class _Reader:
    def __init__(self, ranks: Mapping[str, int]) -> None:
        self._ranks = ranks
        self._summed: dict[str, set[frozenset[int]]] = {}
        self._stacked: dict[str, set[frozenset[int]]] = {}
        self._inner: list[Inner] = []
        self._factors: list[tuple[frozenset[str], float]] = []
        self._of_calls: dict[frozenset[str], float] = {}
        self._outputs_made_by: set[str] = set()
        self._entrywise: set[str] = set()

    def read_call(
        self, program: Jaxpr, arguments: Sequence[_Value], constants: Sequence[_Value]
    ) -> None:
        for made in self.read(program, arguments, constants):
            self._outputs_made_by |= made.paths
        factors: dict[frozenset[str], float] = {}
        for paths, factor in self._factors:
            factors[paths] = factors.get(paths, 1.0) * factor
        for paths, factor in factors.items():
            known = self._of_calls.get(paths, 1.0)
            self._of_calls[paths] = max(known, factor, key=_distance_from_one)
        self._factors = []

    def uses(self) -> Uses:
        summed = {path: frozenset(axes) for path, axes in self._summed.items()}
        stacked = {
            path: next(iter(axes))
            for path, axes in self._stacked.items()
            if len(axes) == 1 and any(axes)
        }
        return Uses(
            summed,
            stacked,
            tuple(self._inner),
            self._of_calls,
            frozenset(self._outputs_made_by),
            frozenset(self._entrywise),
        )

    def read(
        self, program: Jaxpr, arguments: Sequence[_Value], constants: Sequence[_Value] = ()
    ) -> list[_Value]:
        """Values of a program's outputs, noting every product and factor on the way."""
        known: dict[Any, _Value] = dict(zip(program.invars, arguments, strict=True))
        known |= dict(zip(program.constvars, constants, strict=False))

        def value(atom: Any) -> _Value:
            if isinstance(atom, Literal):
                return _Value(constant=_uniform(atom.val))
            return known.get(atom, _Value())

        for equation in program.eqns:
            given = [value(atom) for atom in equation.invars]
            known.update(zip(equation.outvars, self._outputs(equation, given), strict=True))
        return [value(atom) for atom in program.outvars]

    def _outputs(self, equation: Any, given: list[_Value]) -> list[_Value]:
        name, count = equation.primitive.name, len(equation.outvars)
        active = any(value.active for value in given)
        if name == "scan":
            return self._scan(equation.params, given)
        if (inner := _called(equation)) is not None:
            return self.read(inner, given)
        if name in ("dot_general", "conv_general_dilated"):
            return [self._product(equation, given)]
        if name == "gather" and given[1].active:
            looked_up = equation.params["dimension_numbers"].start_index_map
            self._note(given[0], looked_up)
        if count != 1:
            axes = {} if active else _divided(equation, given)
            return [dataclasses.replace(self._met(given, active=active), axes=axes)] * count
        if not active and all(value.constant is not None for value in given):
            return [_Value(constant=_computed(equation, [value.constant for value in given]))]
        if name in ("mul", "div"):
            given = self._scaled(name, given)
        met = self._met(given, active=active, settled=name in ("reduce_sum", "cumsum"))
        if active and name in ("add", "div", "mul", "sub"):
            self._entrywise.update(*(value.axes for value in given if not value.active))
        if active:
            return [met]
        joint = met.joint | _multiplied(given) if name in ("mul", "div") else met.joint
        return [dataclasses.replace(met, axes=_moved(equation, given), joint=joint)]

    def _met(self, given: Sequence[_Value], *, active: bool, settled: bool = False) -> _Value:
        """What is known of a value made of others, entry by entry or by rearrangement."""
        return _Value(
            active,
            makers=frozenset().union(*(value.paths for value in given)) if active else frozenset(),
            factors=frozenset().union(*(value.factors for value in given)),
            inner=frozenset().union(*(value.inner for value in given)),
            settled=settled or any(value.settled for value in given),
            joint=frozenset().union(*(value.joint for value in given)),
        )

    def _scaled(self, name: str, given: list[_Value]) -> list[_Value]:
        """The operands of a product or quotient, entry by entry, with a constant factor noted."""
        left, right = given
        if left.constant is None and right.constant is None:
            if not (left.settled or right.settled or (name == "div" and right.paths)):
                return given  # a gate
            # One normalises the other: its factors cancel, or are part of that.
            self._forget(left.factors | right.factors)
            return [dataclasses.replace(value, settled=True) for value in given]
        at = 0 if right.constant is not None else 1
        value, constant = given[at], given[1 - at].constant
        if name == "div":
            constant = 1 / constant if constant and at == 0 else None
        # Divided by the value itself, or by a constant that is no number: nothing is known.
        if not constant or not math.isfinite(constant):
            return given
        if value.settled:
            return given
        if value.inner:
            self._scale_inner(value.inner, constant)
        elif value.paths:
            self._factors.append((value.paths, constant))
            new = frozenset({len(self._factors) - 1})
            given[at] = dataclasses.replace(value, factors=value.factors | new)
        return given

    def _forget(self, numbers: frozenset[int]) -> float:
        """Take factors back, and their product."""
        product = 1.0
        for number in numbers:
            paths, factor = self._factors[number]
            self._factors[number] = (paths, 1.0)
            product *= factor
        return product

    def _scale_inner(self, numbers: frozenset[int], factor: float) -> None:
        for number in numbers:
            product = self._inner[number]
            self._inner[number] = dataclasses.replace(product, scale=product.scale * factor)

    def _scan(self, params: Mapping[str, Any], given: list[_Value]) -> list[_Value]:
        if "ft_in" in params:  # from JAX 0.11 on
            constants, carried, _ = (len(part) for part in params["ft_in"].unpack())
        else:
            constants, carried = params["num_consts"], params["num_carry"]
        fixed, carry = given[:constants], given[constants : constants + carried]
        rows = [
            dataclasses.replace(value, axes={path: axes[1:] for path, axes in value.axes.items()})
            for value in given[constants + carried :]
        ]
        # What is carried changes from turn to turn.
        carry = [dataclasses.replace(value, constant=None) for value in carry]
        # A carry that starts as a constant becomes active: a rehearsal that notes nothing tells.
        for _ in range(len(carry) + 1):
            bare = [
                dataclasses.replace(value, factors=frozenset(), inner=frozenset())
                for value in (*fixed, *carry, *rows)
            ]
            out = _Reader(self._ranks).read(params["jaxpr"].jaxpr, bare)
            met = [_Value(a.active or b.active) for a, b in zip(carry, out, strict=False)]
            if [value.active for value in met] == [value.active for value in carry]:
                break
            carry = met
        out = self.read(params["jaxpr"].jaxpr, [*fixed, *carry, *rows])
        return [dataclasses.replace(value, axes={}, constant=None) for value in out]

    def _product(self, equation: Any, given: list[_Value]) -> _Value:
        left, right = given
        numbers, batch = equation.params["dimension_numbers"], ((), ())
        if equation.primitive.name == "dot_general":
            summed, batch = numbers
        else:
            summed = ((numbers.lhs_spec[1],), (numbers.rhs_spec[1],))
        if left.active and right.active and equation.invars[0] is equation.invars[1]:
            return self._met(given, active=True, settled=True)  # a sum of squares
        if left.active and right.active:
            shape = equation.invars[0].aval.shape
            size = math.prod(shape[axis] for axis in summed[0])
            # What scales queries before the product is the scale of attention.
            scale = self._forget(left.factors | right.factors)
            settled = left.settled or right.settled
            self._inner.append(Inner(size, left.makers | right.makers, scale, settled))
            return _Value(active=True, inner=frozenset({len(self._inner) - 1}))
        if left.axes and right.axes:
            # They make one matrix together, and neither's axes tell its role.
            for path in (*left.axes, *right.axes):
                self._summed.setdefault(path, set())
        else:
            self._note(left, summed[0], batch[0])
            self._note(right, summed[1], batch[1])
        active = left.active or right.active
        return _Value(active, makers=frozenset().union(left.axes, right.axes))

    def _note(self, value: _Value, dims: Sequence[int], batch: Sequence[int] = ()) -> None:
        for path, axes in value.axes.items():
            if path in value.joint:
                self._entrywise.add(path)
                continue
            over = frozenset().union(*(axes[d] for d in dims))
            self._summed.setdefault(path, set()).add(over)
            matrix = frozenset().union(*(axes[d] for d in range(len(axes)) if d not in batch))
            rest = frozenset(range(self._ranks[path])) - matrix
            self._stacked.setdefault(path, set()).add(rest)


def _multiplied(given: Sequence[_Value]) -> frozenset[str]:
    """Paths of matrices that meet entry by entry; what a vector is spread to is none."""
    matrices = [
        {path for path, axes in value.axes.items() if sum(map(bool, axes)) > 1} for value in given
    ]
    met = all(matrices) and not set.intersection(*matrices)  # else it may be a square
    return frozenset().union(*matrices) if met else frozenset()


def _distance_from_one(factor: float) -> float:
    return abs(math.log(abs(factor))) if factor else math.inf


def _called(equation: Any) -> Jaxpr | None:
    """The program that an equation only calls: jit, checkpoint, custom derivatives."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(equation.invars):
            return inner
    return None


def _moved(equation: Any, given: Sequence[_Value]) -> dict[str, _Axes]:
    """Where the axes of the operands' parameters are in the output, where that can be said."""
    name, params = equation.primitive.name, equation.params
    shape = equation.outvars[0].aval.shape
    found: dict[str, _Axes] = {}
    for atom, value in zip(equation.invars, given, strict=True):
        old = atom.aval.shape
        for path, axes in value.axes.items():
            if name == "transpose":
                found[path] = tuple(axes[i] for i in params["permutation"])
            elif name == "reshape":
                found[path] = _reshaped(axes, old, shape)
            elif name == "squeeze":
                found[path] = tuple(a for i, a in enumerate(axes) if i not in params["dimensions"])
            elif name == "broadcast_in_dim":
                at = dict(zip(params["broadcast_dimensions"], axes, strict=True))
                found[path] = tuple(at.get(i, frozenset()) for i in range(len(shape)))
            elif len(old) == len(shape) and name in ("slice", "dynamic_slice", "concatenate"):
                found[path] = axes
            elif old == shape:
                # Entry by entry: a cast, a factor, a normalisation.
                found[path] = axes
    return found


def _divided(equation: Any, given: Sequence[_Value]) -> Mapping[str, _Axes]:
    """Where the operand's axes are in each of several parts, where that can be said."""
    name = equation.primitive.name
    if name == "split":
        return given[0].axes
    if name != "unstack":
        return {}
    gone = equation.params["axis"]
    return {path: (*axes[:gone], *axes[gone + 1 :]) for path, axes in given[0].axes.items()}


def _reshaped(axes: _Axes, old: Sequence[int], new: Sequence[int]) -> _Axes:
    """Axes after a reshape: every new axis has those old ones that it shares entries with."""

    def spans(shape: Sequence[int]) -> list[tuple[int, int]]:
        # From the stride of an axis to the stride of the one before it.
        return [(math.prod(shape[i + 1 :]), math.prod(shape[i:])) for i in range(len(shape))]

    return tuple(
        frozenset().union(
            *(
                axis
                for axis, (low, high) in zip(axes, spans(old), strict=True)
                if max(low, start) < min(high, end)
            )
        )
        for start, end in spans(new)
    )


# What is done to scalars on the way to a factor, such as 1 / sqrt(width).
_ARITHMETIC: Mapping[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "div": lambda a, b: a / b,
    "exp": math.exp,
    "log": math.log,
    "max": max,
    "min": min,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "pow": math.pow,
    "rsqrt": lambda a: a**-0.5,
    "sqrt": math.sqrt,
    "square": lambda a: a * a,
    "sub": lambda a, b: a - b,
}
_KEPT = {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze"}


def _computed(equation: Any, given: Sequence[Any]) -> float | None:
    """The number that an equation makes of others, if it is one of those that lead to factors."""
    name = equation.primitive.name
    if name in _KEPT:
        return given[0]
    if name == "integer_pow":
        given, name = [*given, equation.params["y"]], "pow"
    if name not in _ARITHMETIC:
        return None
    try:
        return float(_ARITHMETIC[name](*given))
    except (ArithmeticError, ValueError, TypeError):
        return None


def _uniform(value: Any) -> float | None:
    """The number that all entries of an array are, if they are one."""
    if jnp.issubdtype(getattr(value, "dtype", type(value)), jax.dtypes.extended):
        return None
    array = np.asarray(value)
    real = jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.kind in "iu"
    if not array.size or not real or (array != array.flat[0]).any():
        return None
    return float(array.flat[0])
