"""The tangent kernel of a model at given parameters, exactly, in bounded memory.

`K = J Jᵀ` with `J = ∂f/∂θ`, the Jacobian of the stacked outputs of all examples: P·C rows, that of
output c of example i being row i·C + c. It is built from blocks `J_i J_jᵀ` of two chunks of
examples, so that no more than two chunks of the Jacobian exist at a time. Its products with vectors
need none: `K v = J (Jᵀ v)` is one vector–Jacobian and one Jacobian–vector product.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

__all__ = ["Apply", "empirical_ntk", "ntk_vector_product"]

Apply = Callable[[Any, Any], jax.Array]
"""`f(params, x)`: any pytree of parameters and inputs of shape (B, ...) to outputs (B, ...), each
example by itself (no batch statistics)."""

# Of the Jacobian's two chunks; a guess that leaves room for what reverse mode keeps beside them.
_JACOBIAN_BYTES = 256e6
_VECTOR_CHUNK = 256


def empirical_ntk(
    apply: Apply,
    params: Any,
    x1: ArrayLike,
    x2: ArrayLike | None = None,
    *,
    form: Literal["full", "trace"] = "full",
    chunk_size: int | None = None,
) -> NDArray[Any]:
    """The tangent kernel between two sets of examples.

    Args:
      apply: the model, see `Apply`. Outputs of shape (B,) count as C = 1; further axes are
        flattened.
      params: pytree of floating arrays.
      x1: examples, shape (P1, ...).
      x2: examples, shape (P2, ...); `x1` if left out, and then only half the blocks are computed.
      form: `"full"`: every pair of outputs; `"trace"`: the mean of the C × C blocks' diagonals,
        which for a network with independent readout weights tends to the kernel of one output
        (`infinite_width_kernels`).
      chunk_size: examples whose Jacobian is held at a time; by default as many as fit 256 MB twice.

    Returns:
      Shape (P1·C, P2·C) for `"full"`, (P1, P2) for `"trace"`, in the precision of the parameters.
      Call it inside `jax.enable_x64(True)` with float64 parameters for float64. The model's own
      matrix products run as JAX is set: on an accelerator in single precision, wrap the call in
      `jax.default_matmul_precision("highest")`.

    Raises:
      ValueError, TypeError: arguments that are not as described.
    """
    if form not in ("full", "trace"):
        raise ValueError(f"form={form!r} is not known; use 'full' or 'trace'")
    first = _examples("x1", x1)
    second = first if x2 is None else _examples("x2", x2)
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"x1 and x2 hold examples of shapes {first.shape[1:]} and {second.shape[1:]}; "
            "expected the same"
        )
    outputs, dtype = check_model(apply, params, first)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    if chunk_size is None:
        chunk_size = max(1, int(_JACOBIAN_BYTES / (2 * size * outputs * dtype.itemsize)))
    chunk_size = check_chunk(chunk_size, max(len(first), len(second)))
    per_example = outputs if form == "full" else 1
    shape = (len(first) * per_example, len(second) * per_example)
    kernel = np.empty(shape, dtype)
    starts = [range(0, len(x), chunk_size) for x in (first, second)]
    for i in starts[0]:
        rows = slice(i * per_example, (i + chunk_size) * per_example)
        left = _jacobian(apply, params, _chunk(first, i, chunk_size))
        for j in starts[1]:
            if x2 is None and j < i:
                continue
            right = left
            if x2 is not None or j > i:
                right = _jacobian(apply, params, _chunk(second, j, chunk_size))
            columns = slice(j * per_example, (j + chunk_size) * per_example)
            height, width = kernel[rows, columns].shape
            block = np.asarray(_block(left, right, form))[:height, :width]
            kernel[rows, columns] = block
            if x2 is None and j > i:
                kernel[columns, rows] = block.T
    return kernel


def ntk_vector_product(
    apply: Apply,
    params: Any,
    x: ArrayLike,
    vector: ArrayLike,
    *,
    chunk_size: int | None = None,
) -> jax.Array:
    """`K v` for the kernel of `empirical_ntk(apply, params, x)`, without forming it.

    `u = Jᵀ v` (one vector–Jacobian product), then `K v = J u` (one Jacobian–vector product), both
    summed and mapped over chunks of examples. Time and memory are those of a few gradients. Can be
    traced, differentiated and vmapped over `vector`.

    Args:
      apply: the model, see `Apply`.
      params: pytree of floating arrays.
      x: examples, shape (P, ...).
      vector: shape (P·C,), or the shape (P, ...) of the model's outputs.
      chunk_size: examples run through the model at a time; 256 by default.

    Returns:
      `K v`, in the shape of `vector`.

    Raises:
      ValueError, TypeError: arguments that are not as described.
    """
    examples = _examples("x", x)
    outputs, dtype = check_model(apply, params, examples)
    v = jnp.asarray(vector)
    if v.size != len(examples) * outputs:
        raise ValueError(
            f"vector has shape {v.shape}; expected ({len(examples) * outputs},), one entry for "
            f"each of {outputs} outputs of {len(examples)} examples"
        )
    chunk = check_chunk(_VECTOR_CHUNK if chunk_size is None else chunk_size, len(examples))
    count = math.ceil(len(examples) / chunk)
    inputs = _chunk(examples, 0, count * chunk).reshape(count, chunk, *examples.shape[1:])
    # Examples that only fill the last chunk have weight 0.
    flat = jnp.zeros((count * chunk, outputs), dtype)
    flat = flat.at[: len(examples)].set(v.reshape(-1, outputs).astype(dtype))
    product = _product(apply, params, inputs, flat.reshape(count, chunk, outputs))
    return product.reshape(-1, outputs)[: len(examples)].reshape(v.shape)


def check_model(apply: Apply, params: Any, x: Any) -> tuple[int, np.dtype[Any]]:
    """Outputs C per example and the kernel's dtype; nothing is computed.

    Raises:
      ValueError, TypeError: no parameters, parameters that are not floating, outputs without the
        batch axis in front or not floating.
    """
    leaves = jax.tree.leaves(params)
    if not leaves:
        raise ValueError("params holds no array: a tangent kernel needs parameters")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is of {jnp.result_type(leaf)}; expected "
                "floating point: take other leaves out of the tree and close over them"
            )
    example = jax.ShapeDtypeStruct((2, *x.shape[1:]), jnp.result_type(x))
    out = jax.eval_shape(apply, params, example)
    if not hasattr(out, "shape") or out.shape[:1] != (2,):
        got = getattr(out, "shape", type(out).__name__)
        raise ValueError(
            f"apply(params, x) gave {got} for 2 examples; expected one array of shape (2, ...)"
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"apply(params, x) gave {out.dtype}; expected floating point outputs")
    dtype = jnp.result_type(*[jnp.result_type(leaf) for leaf in leaves], out.dtype)
    return math.prod(out.shape[1:]), np.dtype(dtype)


def check_chunk(chunk_size: int, examples: int) -> int:
    """The chunk size, at most the number of examples."""
    whole = isinstance(chunk_size, numbers.Integral) and not isinstance(chunk_size, bool)
    if not whole or chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size!r}; expected a whole number, at least 1")
    return min(int(chunk_size), examples)


def _examples(name: str, x: ArrayLike) -> Any:
    array = x if isinstance(x, jax.Array) else np.asarray(x)
    if array.ndim == 0 or array.shape[0] == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected (P, ...) with P >= 1 examples")
    return array


def _chunk(x: Any, start: int, size: int) -> Any:
    """`size` examples from `start`; the last one is repeated past the end, to keep one shape."""
    return x[np.minimum(np.arange(start, start + size), len(x) - 1)]


def _rows(apply: Apply, params: Any, example: Any) -> jax.Array:
    """The outputs of one example, flattened to (C,)."""
    return apply(params, example[None]).reshape(-1)


@functools.partial(jax.jit, static_argnums=0)
def _jacobian(apply: Apply, params: Any, x: Any) -> list[jax.Array]:
    """The Jacobian of a chunk of b examples: per parameter leaf, shape (b, C, entries)."""
    rows = jax.vmap(lambda e: jax.jacrev(lambda p: _rows(apply, p, e))(params))(x)
    return [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(rows)]


@functools.partial(jax.jit, static_argnums=2)
def _block(left: list[jax.Array], right: list[jax.Array], form: str) -> jax.Array:
    # Without "highest", accelerators round the factors to 10 bits or fewer.
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    (b1, outputs, _), (b2, _, _) = left[0].shape, right[0].shape
    pairs = list(zip(left, right, strict=True))
    if form == "trace":
        return sum((dot("ick,jck->ij", a, b) for a, b in pairs), jnp.zeros(())) / outputs
    blocks = (dot("ick,jdk->icjd", a, b) for a, b in pairs)
    return sum(blocks, jnp.zeros(())).reshape(b1 * outputs, b2 * outputs)


@functools.partial(jax.jit, static_argnums=0)
def _product(apply: Apply, params: Any, x: Any, v: Any) -> jax.Array:
    """`J Jᵀ v` with x (chunks, b, ...) and v (chunks, b, C)."""

    def outputs(params: Any, chunk: Any) -> jax.Array:
        return jax.vmap(functools.partial(_rows, apply, params))(chunk)

    def add(total: Any, chunk_and_weights: Any) -> tuple[Any, None]:
        chunk, weights = chunk_and_weights
        out, pull = jax.vjp(lambda p: outputs(p, chunk), params)
        (part,) = pull(weights.astype(out.dtype))
        return jax.tree.map(jnp.add, total, part), None

    zero = jax.tree.map(jnp.zeros_like, params)
    direction, _ = jax.lax.scan(add, zero, (x, v))

    def push(chunk: Any) -> jax.Array:
        return jax.jvp(lambda p: outputs(p, chunk), (params,), (direction,))[1]

    return jax.lax.map(push, x)
