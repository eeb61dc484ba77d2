"""Which components lower the loss of which example: the decomposition, sample by sample.

Let `u_j` be the eigenvectors of a layer's alignment matrix `S = ½ (Gᵀ δW + δWᵀ G)`, by decreasing
magnitude of its eigenvalues, and `G_i` the layer's gradient of the loss of validation example i
alone, so that G is the mean of the G_i. Component j of a step changes the loss of example i by
(Ghosh, Wu and Bietti, arXiv 2512.22768, section 4)

    (δψ)_ij = u_jᵀ G_iᵀ δW u_j,

the derivative of that loss along `δW u_j u_jᵀ`. Its mean over examples is the eigenvalue λ_j, and
its sum over j is `⟨G_i, δW⟩`. `ψ_ij` sums it over steps and layers; the mean component index

    MCI_i = Σ_j j |ψ_ij| / Σ_j |ψ_ij|

is low for examples that the leading components learn (easy ones) and high for the others.
Averaging, marks, rule and layers are those of `theory.decomposition`, and so are parameters that
count whole: they belong to component 1, from which on they are in every `φ^k`.

Gradients of single examples exist for one chunk of examples at a time and are never kept. An
example that meets a matrix once, as in a multilayer perceptron, has a gradient of rank one,
`G_i = x d ᵀ`. Then one row and one column of it say all (``rank_one``), and a chunk costs
m n + (m + n) r per example instead of m n r, with r ≤ min(n, 2m) components.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mupjax.observe import Model, Observer, Setting
from theory.alignment import alignment_spectrum
from theory.layers import Layer, Side, layers_with_components
from theory.trajectory import Averaging, Rule, Segment, Summary, check_rule, trajectory_observer

__all__ = ["mean_component_index", "sample_losses_observer", "samplewise_observer"]

# Share of a gradient's squared norm that rank one leaves out: rounding of single precision gives
# some 1e-6, a second use of the matrix something like 0.1.
_RANK_ONE = 1e-4
# Relative: single precision, averaged over thousands of examples in two ways.
_MEAN = 1e-3


def mean_component_index(psi: jax.Array) -> jax.Array:
    """`MCI_i = Σ_j j |ψ_ij| / Σ_j |ψ_ij|`, j from 1.

    Args:
      psi: (..., samples, components).

    Returns:
      shape (..., samples), between 1 and the number of components; nan where all ψ_ij are 0.
    """
    weights = jnp.abs(psi)
    return weights @ jnp.arange(1.0, psi.shape[-1] + 1) / jnp.sum(weights, axis=-1)


class _State(NamedTuple):
    """P samples, K components."""

    psi: jax.Array  # (P, K)
    initial: jax.Array  # (P,)
    final: jax.Array  # (P,)
    rank_error: jax.Array


def samplewise_observer(
    averaging: Averaging,
    *,
    rule: Rule = "trapezoid",
    rank_one: bool = False,
    chunk: int = 32,
    keep_psi: bool = False,
    sides: Mapping[str, Side] | None = None,
    validation_examples: int | None = None,
    name: str = "samplewise",
) -> Observer:
    """An observer that decomposes the change of every validation example's loss.

    Recorded, with the sweep's dimensions in front (prefix: `name`):

    - ``mci`` (sample): mean component index.
    - ``total`` (sample): `Σ_j ψ_ij`, the linearized change of the example's loss;
      ``initial_loss``, ``final_loss`` (sample): its loss at the trajectory's ends.
    - ``top`` (component): the mean of `Σ_{j ≤ k} ψ_ij` over examples, which is the `φ^k` of
      `theory.decomposition`.
    - ``psi`` (sample, component), if `keep_psi`.
    - ``mean_error``: how far the mean of the examples' losses is from the batch's loss, relative to
      it, at the worse end of the trajectory. The sums above are those of
      `theory.decomposition` only where it is 0: where the loss is a plain mean over examples.
    - ``rank_error``: largest share of a gradient's squared norm that rank one leaves out, over all
      examples and steps (0 unless `rank_one`).

    Args:
      averaging: the average and its marks.
      rule: as for `theory.decomposition.decomposition_observer`.
      rank_one: take gradients of single examples to be of rank one in every matrix that is split.
        This is so where each example meets the matrix once (multilayer perceptrons: yes;
        convolutions, sequences: no). It is checked along the way, and a warning says where not.
      chunk: number of examples whose gradients are held at a time.
      keep_psi: record ψ itself, P × K numbers per trial.
      sides: which axes count as the width, by path pattern, instead of `theory.layers`' rule.
      validation_examples: use only the first so many examples of the validation batch.
      name: prefix of the recorded variables.

    Raises:
      ValueError: an argument out of range; and, when a sweep starts, arrays of the validation batch
        whose leading axes differ, and what `theory.layers.layers_of` refuses.
    """
    check_rule(rule)
    if not isinstance(chunk, numbers.Integral) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk must be whole and at least 1, got {chunk!r}.")

    def init(params: Any, model: Model, setting: Setting) -> _State:
        _, components = layers_with_components(model, sides)
        losses = _sample_losses(params, model, setting, int(chunk))
        return _State(
            psi=jnp.zeros((len(losses), components)),
            initial=losses,
            final=losses,
            rank_error=jnp.zeros(()),
        )

    def visit(state: _State, segment: Segment) -> _State:
        layers, components = layers_with_components(segment.model, sides)
        gradients = jax.tree.leaves(segment.gradient(rule))
        changes = jax.tree.leaves(segment.change)
        bases = [
            _basis(layer, gradient, change)
            for layer, gradient, change in zip(layers, gradients, changes, strict=True)
        ]
        loss = _sample_loss(segment.model, segment.setting)

        ends = (segment.start,) if rule == "forward" else (segment.start, segment.end)

        def of_sample(example: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            row, error = jnp.zeros(components), jnp.zeros(())
            # ψ is linear in the gradient; the mean of two gradients is not of rank one.
            for end in ends:
                own = jax.tree.leaves(jax.grad(loss)(end, example))
                for basis, leaf in zip(bases, own, strict=True):
                    values, off = _pairings(basis, leaf, rank_one)
                    row = row.at[: len(values)].add(values.astype(row.dtype) / len(ends))
                    error = jnp.maximum(error, off.astype(error.dtype))
            return row, loss(segment.end, example).astype(state.final.dtype), error

        rows, final, error = jax.lax.map(of_sample, segment.setting.validation, batch_size=chunk)
        return _State(
            psi=state.psi + rows,
            initial=state.initial,
            final=final,
            rank_error=jnp.maximum(state.rank_error, jnp.max(error)),
        )

    def result(state: _State, summary: Summary) -> dict[str, jax.Array]:
        errors = [
            jnp.abs(jnp.mean(losses) - whole) / jnp.maximum(jnp.abs(whole), jnp.finfo(whole).tiny)
            for losses, whole in (
                (state.initial, summary.initial_loss),
                (state.final, summary.final_loss),
            )
        ]
        found = {
            "mci": mean_component_index(state.psi),
            "total": jnp.sum(state.psi, axis=-1),
            "initial_loss": state.initial,
            "final_loss": state.final,
            "top": jnp.cumsum(jnp.mean(state.psi, axis=0)),
            "mean_error": jnp.maximum(*errors),
            "rank_error": state.rank_error,
        }
        return found | ({"psi": state.psi} if keep_psi else {})

    def check(dataset: Any) -> list[str]:
        found = []
        worst = float(dataset[f"{name}_rank_error"].max())
        if worst > _RANK_ONE:
            found.append(
                f"{name}: rank_one=True, but gradients of single examples are not of rank one "
                f"(which leaves out {worst:.2g} of the squared norm): wrong results; leave "
                "rank_one out."
            )
        alive = dataset["status"].isin([0, 3])
        error = dataset[f"{name}_mean_error"].where(alive, 0.0)
        if not (error <= _MEAN).all():
            found.append(
                f"{name}: the mean of the examples' losses is off by {float(error.max()):.2g} of "
                "the batch's loss, or not finite: the setting's loss is no plain mean over "
                "examples (a sum, weights, masks), so that what single examples add up to is not "
                "the decomposition of the whole."
            )
        return found

    return trajectory_observer(
        name,
        averaging=averaging,
        init=init,
        visit=visit,
        result=result,
        dims={
            **dict.fromkeys(("mci", "total", "initial_loss", "final_loss"), ("sample",)),
            "top": ("component",),
            "psi": ("sample", "component"),
        },
        validation_examples=validation_examples,
        configuration={"rule": rule, "sides": dict(sides or {}), "rank_one": rank_one},
        coords=lambda model: {
            "component": np.arange(1, layers_with_components(model, sides)[1] + 1)
        },
        check=check,
    )


def sample_losses_observer(
    averaging: Averaging,
    *,
    validation_examples: int | None = None,
    chunk: int = 1024,
    name: str = "samples",
) -> Observer:
    """An observer that records every validation example's final loss, ``final_loss`` (sample).

    The loss is that of the averaged weights at the last mark, as in `samplewise_observer`, and it
    costs a forward pass per mark: enough for learning-rate sweeps restricted to some examples.

    Args:
      averaging, validation_examples, name: as for `samplewise_observer`.
      chunk: number of examples evaluated at a time.

    Raises:
      ValueError: as `samplewise_observer`.
    """
    if not isinstance(chunk, numbers.Integral) or isinstance(chunk, bool) or chunk < 1:
        raise ValueError(f"chunk must be whole and at least 1, got {chunk!r}.")

    def init(params: Any, model: Model, setting: Setting) -> jax.Array:
        return _sample_losses(params, model, setting, int(chunk))

    def visit(state: jax.Array, segment: Segment) -> jax.Array:
        losses = _sample_losses(segment.end, segment.model, segment.setting, int(chunk))
        return losses.astype(state.dtype)

    return trajectory_observer(
        name,
        averaging=averaging,
        init=init,
        visit=visit,
        result=lambda state, summary: {"final_loss": state},
        dims={"final_loss": ("sample",)},
        validation_examples=validation_examples,
    )


class _Basis(NamedTuple):
    """The components of one layer's step: columns `u_j` (n, r) and `δW u_j` (m, r), with an axis in
    front where there are many matrices; or, for a parameter that counts whole, its change.
    """

    layer: Layer
    vectors: jax.Array | None
    images: jax.Array


def _basis(layer: Layer, gradient: jax.Array, change: jax.Array) -> _Basis:
    if not layer.size:
        return _Basis(layer, None, change)
    g, delta = layer.matrix(gradient), layer.matrix(change)
    vectors = alignment_spectrum(g, delta).eigenvectors
    return _Basis(layer, vectors, jnp.matmul(delta, vectors, precision="highest"))


def _pairings(basis: _Basis, leaf: jax.Array, rank_one: bool) -> tuple[jax.Array, jax.Array]:
    """`u_jᵀ G_iᵀ δW u_j` for one example, (r,), and how far its gradient is from rank one."""
    if basis.vectors is None:
        return jnp.sum(leaf * basis.images)[None], jnp.zeros((), leaf.dtype)
    pairings = functools.partial(_of_matrix, rank_one=rank_one)
    matrices = basis.layer.matrix(leaf), basis.vectors, basis.images
    if not basis.layer.stacked:
        return pairings(*matrices)
    values, errors = jax.vmap(pairings)(*matrices)
    return jnp.sum(values, axis=0), jnp.max(errors)


def _of_matrix(
    gradient: jax.Array, vectors: jax.Array, images: jax.Array, *, rank_one: bool
) -> tuple[jax.Array, jax.Array]:
    product = functools.partial(jnp.matmul, precision="highest")
    if not rank_one:
        paired = jnp.sum(product(gradient, vectors) * images, axis=0)
        return paired, jnp.zeros((), gradient.dtype)
    # Projected onto its largest row, which nothing can cancel: exact for rank one.
    squares = jnp.sum(gradient**2, axis=1)
    largest = jax.nn.one_hot(jnp.argmax(squares), len(squares), dtype=gradient.dtype)
    row = product(largest, gradient)
    norm = jnp.sum(row**2)
    column = product(gradient, row) / jnp.where(norm == 0, 1, norm)
    whole = jnp.sum(squares)
    rest = jnp.abs(whole - jnp.sum(column**2) * norm) / jnp.where(whole == 0, 1, whole)
    return product(column, images) * product(row, vectors), rest


def _sample_loss(model: Model, setting: Setting) -> Callable[[Any, Any], jax.Array]:
    """The loss of one example, as a function of parameters and of the example without its axis."""

    def loss(params: Any, example: Any) -> jax.Array:
        batch = jax.tree.map(lambda a: a[None], example)
        return setting.loss(functools.partial(model.apply, params), batch)

    return loss


def _sample_losses(params: Any, model: Model, setting: Setting, chunk: int) -> jax.Array:
    lengths = {jnp.shape(a)[:1] for a in jax.tree.leaves(setting.validation)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"the validation batch of {setting.name!r} must be arrays with one leading axis of "
            f"examples, got leading axes {sorted(lengths)}."
        )
    loss = _sample_loss(model, setting)
    return jax.lax.map(lambda e: loss(params, e), setting.validation, batch_size=chunk)
