"""Any Flax model, or a pair of pure functions, seen as ``init(key) -> params`` and ``apply``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import linen, nnx

from mupjax.roles import Layout, LeafRole, leaf_paths
from mupjax.setting import Setting, model_inputs

__all__ = ["Model", "ModelFactory", "as_model", "takes_argument"]

ModelFactory = Callable[..., Any]
"""``factory(width, rngs) -> nnx.Module``, ``factory(width) -> linen.Module`` or
``factory(width) -> Model``; and with a parameter ``depth``, where a sweep is given one."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of one width as pure functions.

    Attributes:
      init: ``init(key) -> params``, any pytree of arrays.
      apply: ``apply(params, *inputs, **options) -> outputs``. A model that takes the option
        ``width`` (the true width, a traced scalar) can run zero-padded to a larger one; a model
        that takes ``readout_multiplier`` can read a tied matrix at both ends.
      layouts: axes of kernels by parameter path, where they are known.
      options: the names among ``width`` and ``readout_multiplier`` that ``apply`` takes.
      intermediates: ``intermediates(params, *inputs, **options) -> {layer: activations}``, the
        output of every layer, for coordinate checks; ``None`` where the model cannot tell.
      roles: role and layout of every parameter by path; filled in by a sweep, for its observers.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[..., Any]
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)
    options: frozenset[str] = frozenset()
    intermediates: Callable[..., Mapping[str, jax.Array]] | None = None
    roles: Mapping[str, LeafRole] = dataclasses.field(default_factory=dict)

    def abstract_params(self) -> Any:
        """Shapes and dtypes of the parameters; nothing is allocated."""
        return jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)))


_OPTIONS = ("width", "readout_multiplier")


def as_model(factory: ModelFactory, width: int, setting: Setting) -> Model:
    """The model of one width.

    Args:
      factory: see :data:`ModelFactory`; an nnx factory has a second parameter called ``rngs``.
      width: the width to build.
      setting: its loss shows a linen module's inputs.

    Raises:
      TypeError: the factory is no function, or gives something that is no model.
      ValueError: the factory refuses this width, or the model has state other than parameters.
    """
    if isinstance(factory, nnx.Module | linen.Module) or not callable(factory):
        raise TypeError(
            "the model factory must be a function of the width, which makes a model of that width, "
            f"got {f'a {type(factory).__name__}' if callable(factory) else repr(factory)}."
        )
    if takes_argument(factory, "rngs"):
        return _from_nnx(lambda rngs: _build(factory, width, rngs=rngs), width)
    built = _build(factory, width)
    if isinstance(built, Model):
        return built
    if isinstance(built, linen.Module):
        return _from_linen(built, setting)
    if isinstance(built, nnx.Module):
        raise TypeError(
            "the model factory returned an nnx.Module with its random numbers already drawn, so "
            "every seed would start alike: write it as `lambda width, rngs: Net(width, rngs=rngs)`."
        )
    raise TypeError(
        f"the model factory returned {type(built).__name__} at width {width}: expected a flax "
        "module (nnx: a factory with a parameter called rngs; linen) or a mupjax.Model."
    )


def takes_argument(factory: Callable[..., Any], name: str) -> bool:
    """Whether a model factory has a parameter of this name that is not bound yet."""
    bound: set[str] = set()
    while isinstance(factory, functools.partial):
        bound |= set(factory.keywords)
        factory = factory.func
    # The signature of an nnx class is that of its metaclass, which shows nothing.
    function = factory.__init__ if isinstance(factory, type) else factory
    return name in inspect.signature(function).parameters and name not in bound


def _build(factory: ModelFactory, width: int, **kwargs: Any) -> Any:
    try:
        return factory(width, **kwargs)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"the model factory refuses width {width}: {error}") from error


def _accepted_options(call: Callable[..., Any]) -> frozenset[str]:
    return frozenset(_OPTIONS) & set(inspect.signature(call).parameters)


def _from_nnx(build: Callable[[nnx.Rngs], nnx.Module], width: int) -> Model:
    def checked() -> nnx.Module:
        module = build(nnx.Rngs(0))
        if not isinstance(module, nnx.Module):
            raise TypeError(
                f"the model factory returned {type(module).__name__} at width {width}: expected a "
                "flax.nnx module of a factory with a parameter called rngs."
            )
        # Here, where arrays are arrays still: what keeps them may not be seen as such later.
        _refuse_kept_arrays(module, width)
        return module

    abstract = nnx.eval_shape(checked)
    graph, _, others = nnx.split(abstract, nnx.Param, ...)
    if extra := sorted(leaf_paths(nnx.to_pure_dict(others))):
        keyed = any(isinstance(node, nnx.RNN) for _, node in nnx.iter_modules(abstract))
        hint = " (nnx.RNN: rngs=False when it is made, rngs=nnx.Rngs(0) when it is called)"
        raise ValueError(
            f"the model of width {width} has state other than parameters ({', '.join(extra[:4])}), "
            "such as batch statistics or dropout keys, which sweeps do not carry: remove it or "
            f"make it deterministic{hint if keyed else ''}."
        )

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

    def module(params: Any) -> nnx.Module:
        state = nnx.split(abstract, nnx.Param, ...)[1]
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state, others)

    def apply(params: Any, *inputs: Any, **options: Any) -> Any:
        return module(params)(*inputs, **options)  # type: ignore[operator]

    def intermediates(params: Any, *inputs: Any, **options: Any) -> dict[str, jax.Array]:
        run = nnx.capture(module(params), nnx.Intermediate, method_outputs=nnx.Intermediate)
        _, captured = run(*inputs, **options)
        return _outputs_by_layer(nnx.to_pure_dict(captured))

    layouts: dict[str, Layout] = {}
    for path, node in nnx.iter_modules(abstract):
        for leaf, layout in _nnx_layouts(node, [str(p) for p in path]).items():
            layouts["/".join([*map(str, path), leaf])] = layout
    options = _accepted_options(type(abstract).__call__)  # type: ignore[operator]
    return Model(init, apply, layouts, options, intermediates)


def _refuse_kept_arrays(module: nnx.Module, width: int) -> None:
    for path, node in nnx.iter_modules(module):
        for name, value in vars(node).items():
            for found in _arrays_in(value, frozenset()):
                where = "/".join([*map(str, path), name, *found])
                hint = " (nnx.WeightNorm: use_scale=False)" * isinstance(node, nnx.WeightNorm)
                raise ValueError(
                    f"the model of width {width} keeps an array {where!r} that is no parameter, "
                    "which sweeps do not carry: compute it where the model is called, or make it "
                    f"an nnx.Param if it is to be trained{hint}."
                )


def _arrays_in(value: Any, around: frozenset[int]) -> Iterator[list[str]]:
    """Where in mappings and sequences arrays are; modules and variables are not looked into."""
    if isinstance(value, jax.Array):
        yield []
    if id(value) in around:
        return
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping) and not isinstance(value, nnx.Pytree):
        parts = value.items()
    elif isinstance(value, tuple | list):
        parts = enumerate(value)
    for key, part in parts:
        for rest in _arrays_in(part, around | {id(value)}):
            yield [*map(str, _as_tuple(key)), *rest]


def _nnx_layouts(node: Any, path: list[str]) -> dict[str, Layout]:
    if isinstance(node, nnx.LinearGeneral):
        batch = len(node.batch_axis) if isinstance(node.batch_axis, Mapping) else 0
        into = len(_as_tuple(node.in_features))
        return _general(batch, into, len(_as_tuple(node.out_features)), path)
    if isinstance(node, nnx.Conv | nnx.ConvTranspose):
        return _convolution(node)
    if isinstance(node, nnx.Einsum):
        return {"kernel": Layout("unknown")}
    return {}


def _convolution(node: Any) -> dict[str, Layout]:
    """A kernel of (spatial axes, in, out), the last two swapped in a transposed kernel."""
    spatial = len(_as_tuple(node.kernel_size))
    into, out = (spatial,), (spatial + 1,)
    if getattr(node, "transpose_kernel", False):
        into, out = out, into
    kernel = Layout("matrix", into, out, other=tuple(range(spatial)))
    return {"kernel": kernel, "bias": Layout("vector")}


def _general(batch: int, into: int, out: int, path: list[str]) -> dict[str, Layout]:
    """A kernel that maps several axes to several: (batch axes, in axes, out axes)."""
    query = out == 2 and path[-1:] == ["query"]
    kernel = Layout(
        "matrix",
        tuple(range(batch, batch + into)),
        tuple(range(batch + into, batch + into + out)),
        stacked=tuple(range(batch)),
        query=query,
    )
    bias = Layout("vector", (), tuple(range(batch, batch + out)), query=query)
    return {"kernel": kernel, "bias": bias}


def _from_linen(module: linen.Module, setting: Setting) -> Model:
    inputs, structure = jax.tree.flatten(model_inputs(setting))
    arrays = [leaf for leaf in inputs if isinstance(leaf, jax.ShapeDtypeStruct)]
    layouts: dict[str, Layout] = {}

    def note(call: Any, call_args: Any, call_kwargs: Any, context: Any) -> Any:
        node, path = context.module, [str(p) for p in context.module.path]
        found: dict[str, Layout] = {}
        if isinstance(node, linen.DenseGeneral):
            batch = len(_as_tuple(node.batch_dims))
            into = len(_as_tuple(node.axis))
            found = _general(batch, into, len(_as_tuple(node.features)), path)
        elif isinstance(node, linen.Conv | linen.ConvTranspose | linen.ConvLocal):
            found = _convolution(node)
        elif isinstance(node, linen.Einsum):
            found = {"kernel": Layout("unknown")}
        layouts.update({"/".join([*path, leaf]): layout for leaf, layout in found.items()})
        return call(*call_args, **call_kwargs)

    def start(key: jax.Array, arrays: list[jax.Array]) -> Any:
        given = iter(arrays)
        filled = [next(given) if isinstance(x, jax.ShapeDtypeStruct) else x for x in inputs]
        args, kwargs = structure.unflatten(filled)
        # Flax boxes a parameter that carries names of device axes.
        return linen.unbox(module.init(key, *args, **kwargs))

    key = jax.eval_shape(lambda: jax.random.key(0))
    with linen.intercept_methods(note):
        collections = jax.eval_shape(start, key, arrays)
    if extra := sorted(set(collections) - {"params"}):
        raise ValueError(
            f"the model has variable collections other than params ({', '.join(extra)}), such as "
            "batch statistics, which sweeps do not carry: remove them or make them constant."
        )

    def init(key: jax.Array) -> Any:
        return start(key, [jax.numpy.zeros(a.shape, a.dtype) for a in arrays])["params"]

    def apply(params: Any, *inputs: Any, **options: Any) -> Any:
        return module.apply({"params": params}, *inputs, **options)

    def intermediates(params: Any, *inputs: Any, **options: Any) -> dict[str, jax.Array]:
        captured = module.apply({"params": params}, *inputs, **options, capture_intermediates=True)
        _, state = captured
        return _outputs_by_layer(state["intermediates"])

    return Model(init, apply, layouts, _accepted_options(type(module).__call__), intermediates)


def _outputs_by_layer(captured: Any) -> dict[str, jax.Array]:
    outputs: dict[str, jax.Array] = {}
    for path, value in leaf_paths(captured).items():
        parts = [p for p in path.split("/") if p != "__call__"]
        # The last component counts the calls of one layer; only repeated calls need it.
        name, call = "/".join(parts[:-1]), parts[-1]
        outputs[(name or "output") + ("" if call == "0" else f"#{call}")] = value
    return outputs


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
