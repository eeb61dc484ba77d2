"""How a model's function uses its parameters, read off its program: what names cannot tell.

A kernel that is called like Flax's is taken to be laid out like Flax's, an embedding to be looked
up only, and attention to be one of Flax's layers. A model of one's own may do otherwise: store its
kernels as (out, in), read one matrix at both ends, or write its own attention. Each would train
under the wrong row of a table without a word, so the model is traced once and such uses refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from mupjax.adapters import Model
from mupjax.parametrization import Parametrization
from mupjax.resolve import AttentionScale, ModelAnatomy, attention_carriers, changes_attention
from mupjax.roles import LeafRole, Role, leaf_paths
from mupjax.setting import Setting, model_inputs

__all__ = ["Uses", "check_uses", "uses_of"]

_Axes = tuple[frozenset[int], ...]


@dataclasses.dataclass(frozen=True)
class Uses:
    """What one call of a model does with its parameters and activations.

    Attributes:
      summed: by parameter path, the axes summed over in each product with something else (of a
        matrix product, a convolution, or a look-up of rows), one set for each distinct product.
      inner: sizes summed over in products of two activations, in the program's order.
      makers: in the same order, the parameters that made the two, from their last product on.
    """

    summed: Mapping[str, frozenset[frozenset[int]]]
    inner: tuple[int, ...]
    makers: tuple[frozenset[str], ...]


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is known of an intermediate value.

    ``active``: it depends on the model's inputs. ``axes``: by path of each parameter that it is a
    rearrangement of, which of the parameter's axes make up each of the value's. ``makers``: of an
    active one, paths of the parameters from the last product on that made it.
    """

    active: bool = False
    axes: Mapping[str, _Axes] = dataclasses.field(default_factory=dict)
    makers: frozenset[str] = frozenset()


def uses_of(model: Model, setting: Setting) -> Uses:
    """Trace one call of the model as the setting's loss makes it; nothing is computed.

    Values are followed through rearrangements (transposes, reshapes, slices, concatenations),
    functions of a single entry, nested functions and scans. A use that is not followed leaves no
    trace: an absence says nothing.
    """
    inputs, structure = jax.tree.flatten(model_inputs(setting))
    arrays = [leaf for leaf in inputs if isinstance(leaf, jax.ShapeDtypeStruct)]

    def call(params: Any, arrays: Sequence[jax.Array]) -> Any:
        given = iter(arrays)
        filled = [next(given) if isinstance(x, jax.ShapeDtypeStruct) else x for x in inputs]
        args, kwargs = structure.unflatten(filled)
        return model.apply(params, *args, **kwargs)

    params = model.abstract_params()
    program = jax.make_jaxpr(call)(params, arrays)
    leaves = leaf_paths(params)
    values = [
        _Value(axes={path: tuple(frozenset({a}) for a in range(leaf.ndim))})
        for path, leaf in leaves.items()
    ]
    reader = _Reader()
    reader.read(program.jaxpr, [*values, *[_Value(active=True)] * len(arrays)])
    summed = {path: frozenset(axes) for path, axes in reader.summed.items()}
    return Uses(summed, tuple(reader.inner), tuple(reader.makers))


class _Reader:
    def __init__(self) -> None:
        self.summed: dict[str, set[frozenset[int]]] = {}
        self.inner: list[int] = []
        self.makers: list[frozenset[str]] = []

    def read(self, program: Jaxpr, arguments: Sequence[_Value]) -> list[_Value]:
        """Values of a program's outputs, noting every product on the way."""
        known: dict[Any, _Value] = dict(zip(program.invars, arguments, strict=True))

        def value(atom: Any) -> _Value:
            return _Value() if isinstance(atom, Literal) else known.get(atom, _Value())

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
            self._product(equation, given)
            both = all(value.active for value in given)
            makers = () if both else (path for value in given for path in value.axes)
            return [_Value(active, makers=frozenset(makers))]
        if name == "gather" and given[1].active:
            looked_up = equation.params["dimension_numbers"].start_index_map
            self._note(given[0], looked_up)
        if active or count != 1:
            return [_Value(active, makers=_makers(given))] * count
        return [_Value(axes=_moved(equation, given))]

    def _scan(self, params: Mapping[str, Any], given: list[_Value]) -> list[_Value]:
        if "ft_in" in params:  # from JAX 0.11 on
            constants, carried, _ = (len(part) for part in params["ft_in"].unpack())
        else:
            constants, carried = params["num_consts"], params["num_carry"]
        fixed, carry = given[:constants], given[constants : constants + carried]
        rows = [
            _Value(
                value.active,
                {path: axes[1:] for path, axes in value.axes.items()},
                value.makers,
            )
            for value in given[constants + carried :]
        ]
        # A carry that starts as a constant becomes active: a rehearsal that notes nothing tells.
        for _ in range(len(carry) + 1):
            out = _Reader().read(params["jaxpr"].jaxpr, [*fixed, *carry, *rows])
            met = [_Value(a.active or b.active) for a, b in zip(carry, out, strict=False)]
            if [value.active for value in met] == [value.active for value in carry]:
                break
            carry = met
        out = self.read(params["jaxpr"].jaxpr, [*fixed, *carry, *rows])
        return [_Value(value.active) for value in out]

    def _product(self, equation: Any, given: list[_Value]) -> None:
        left, right = given
        if equation.primitive.name == "dot_general":
            summed = equation.params["dimension_numbers"][0]
        else:
            numbers = equation.params["dimension_numbers"]
            summed = ((numbers.lhs_spec[1],), (numbers.rhs_spec[1],))
        if left.active and right.active:
            shape = equation.invars[0].aval.shape
            self.inner.append(math.prod(shape[axis] for axis in summed[0]))
            self.makers.append(_makers(given))
        # Two parameters make one matrix together, and neither's axes tell its role.
        elif not (left.axes and right.axes):
            self._note(left, summed[0])
            self._note(right, summed[1])

    def _note(self, value: _Value, dims: Sequence[int]) -> None:
        for path, axes in value.axes.items():
            over = frozenset().union(*(axes[d] for d in dims))
            self.summed.setdefault(path, set()).add(over)


def _makers(values: Sequence[_Value]) -> frozenset[str]:
    """Of what several values make together: biases and scales of norms count, too."""
    return frozenset().union(*(v.makers if v.active else v.axes for v in values))


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


def check_uses(
    models: Mapping[int, Model],
    setting: Setting,
    anatomy: ModelAnatomy,
    parametrizations: Sequence[Parametrization],
    attention: AttentionScale | None,
) -> None:
    """Refuse a model that uses parameters otherwise than their inferred roles say.

    Args:
      models: at two widths or more.
      setting: its loss shows the models' inputs.
      anatomy: their roles; stated ones are not questioned.
      parametrizations: the tables that will be applied.
      attention: the scale of attention logits that the model was said to apply, if it was said.

    Raises:
      ValueError: a parameter that is summed over other axes than its role implies, or at both
        ends; or a product of two activations over a growing axis (attention of one's own) whose
        scale a table changes and that no parameter of role query makes. The text names the
        parameter and how to state its role.
    """
    uses = {width: uses_of(models[width], setting) for width in (min(models), max(models))}
    asking = [p.name for p in parametrizations if changes_attention(p, attention)]
    for path, leaf in anatomy.leaves.items():
        _check_leaf(path, leaf, uses[max(uses)].summed.get(path, frozenset()))
    if asking:
        _check_products(uses, asking[0], attention_carriers(anatomy))


def _check_leaf(path: str, leaf: LeafRole, summed: frozenset[frozenset[int]]) -> None:
    if leaf.stated or leaf.role not in ("input", "output", "vector"):
        return
    roles = {_role_of_use(leaf, over) for over in summed}
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
    if len(uses[low].inner) != len(uses[high].inner):
        return
    for few, many, makers in zip(uses[low].inner, uses[high].inner, uses[high].makers, strict=True):
        # Where nothing is known of what made them, any carrier may have.
        if few == many or (makers & carriers if makers else carriers):
            continue
        by = f" (made by {', '.join(map(repr, sorted(makers)))})" if makers else ""
        raise ValueError(
            f"the model multiplies two activations{by} and sums over {few} entries at width "
            f"{low} and {many} at width {high}, as attention does whose head size grows, "
            f"and {table} scales such products otherwise than the model. State what the model "
            "divides by, attention='1/sqrt(head_dim)' or attention='1/head_dim', and which "
            "parameters make the queries, so that they carry the difference (if any): "
            "roles={'*/q/kernel': 'query', '*/q/bias': 'query_vector'}. Or keep the head size "
            "fixed and let the number of heads grow: then nothing needs to be said."
        )


def _role_of_use(leaf: LeafRole, over: frozenset[int]) -> Role:
    shapes = list(leaf.shapes.values())
    grows = {axis for axis in range(len(shapes[0])) if len({shape[axis] for shape in shapes}) > 1}
    if grows & over:
        return "hidden" if grows - over else "output"
    return "input" if grows else "fixed"
