"""How learning rates, weight decay, Adam's epsilon and residual branches scale with depth.

A residual network of L blocks is ``x + r F(x)``, L times; with ``m = layers / base_layers`` the
branch multiplier r goes as ``m**-alpha``. Derivation, for features that move by Θ(1) whatever L:

- L branches whose updates are aligned (all follow one gradient) move the last residual stream by
  ``L r |dF|``, so ``|dF|`` must go as ``m**(alpha - 1)``.
- An update that ignores the gradient's scale (Adam; orthogonalised, as Muon's) has ``|dF| ~ lr``:
  the rate goes as ``m**(alpha - 1)``. Of SGD ``|dF| ~ lr r``, because the gradient of a block's
  parameter carries r: the rate goes as ``m**(2 alpha - 1)``.
- Epsilon is compared with a gradient that carries r: ``m**-alpha``.
- Weight decay shrinks a block's parameters per step by the same part at every depth: with ``lr wd``
  fixed (coupled), wd alone (independent), and under L2 ``lr wd`` (SGD) or ``lr wd / |gradient|``
  (Adam), so that L2's wd goes as ``m**(1 - 2 alpha)`` for all of them.

Sources: Dey et al., "CompleteP", arXiv 2505.01618, Table 1 (AdamW, alpha 1/2 and 1); Yang et al.,
"Tensor Programs VI", arXiv 2310.02244 (depth-muP: alpha 1/2, SGD and Adam); Bordelon et al., arXiv
2309.16620. Table 1 leaves AdamW's wd alone at every alpha. At alpha = 1 that is the rule above; at
1/2 it would let ``lr wd`` fall as ``m**-1/2``, and here wd grows as ``m**1/2`` instead. All this is
about pre-norm blocks: a norm after the sum is no part of a branch.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mupjax.adapters import Model, ModelFactory, as_model, takes_argument
from mupjax.config import check_count
from mupjax.parametrization import Family, WeightDecayMode
from mupjax.roles import LeafRole, leaf_paths, match_patterns
from mupjax.setting import Setting

__all__ = [
    "Depth",
    "DepthFactors",
    "check_branches",
    "completep",
    "depth_mup",
    "unscaled",
    "with_depth",
]

_ARGUMENT = "depth"
# Branch multipliers at which a model is looked at: small, so that its branches act to first order,
# and powers of two, so that multiplying by them rounds nothing.
_SMALL = (2.0**-10, 2.0**-9)
# A gradient that is so much smaller still than the largest is rounding, as of a key's bias under
# the softmax.
_NEGLIGIBLE = 1e-5 * _SMALL[1]
_POWER_TOLERANCE = 0.2
# Enough to look at the structure of a block.
_FEW_LAYERS = 2


@dataclasses.dataclass(frozen=True)
class DepthFactors:
    """Factors on the base depth's values, for every parameter of the residual blocks."""

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    adam_eps: float = 1.0


@dataclasses.dataclass(frozen=True)
class Depth:
    """A depth, and what scales with it; everything is relative to the base depth.

    The model's factory takes a parameter ``depth``, is handed this record, and builds ``layers``
    blocks ``x + depth.residual_multiplier * branch(x)``.

    Attributes:
      layers: L, number of residual blocks.
      base_layers: the depth at which all factors are 1.
      blocks: pattern or patterns (``fnmatch``) of the paths of all parameters in the branches.
      alpha: the branch multiplier goes as ``m**-alpha``: 1 (CompleteP), 1/2 (depth-muP); below 1/2
        activations grow with depth. None: nothing scales with depth, the usual practice.
      base_multiplier: the branch multiplier at the base depth.

    Raises:
      ValueError: a number out of range, or no pattern.
    """

    layers: int
    base_layers: int
    blocks: str | Sequence[str] = "blocks/*"
    alpha: float | None = 1.0
    base_multiplier: float = 1.0

    def __post_init__(self) -> None:
        for name in ("layers", "base_layers"):
            object.__setattr__(self, name, check_count(f"depth.{name}", getattr(self, name)))
        patterns = (self.blocks,) if isinstance(self.blocks, str) else self.blocks
        listed = isinstance(patterns, Sequence)
        if not listed or not patterns or not all(p and isinstance(p, str) for p in patterns):
            raise ValueError(
                "depth.blocks must be a pattern of parameter paths such as 'blocks/*', or several, "
                f"got {self.blocks!r}."
            )
        object.__setattr__(self, "blocks", tuple(patterns))
        if self.alpha is not None:
            if not _is_number(self.alpha) or not 0 <= self.alpha <= 1:
                raise ValueError(
                    "depth.alpha must lie in [0, 1] (1: CompleteP, 0.5: depth-muP), or be None for "
                    f"no scaling with depth, got {self.alpha!r}."
                )
            object.__setattr__(self, "alpha", float(self.alpha))
        if not _is_number(self.base_multiplier) or not self.base_multiplier > 0:
            raise ValueError(
                "depth.base_multiplier, the residual multiplier at the base depth, must be a "
                f"positive number, got {self.base_multiplier!r}."
            )
        object.__setattr__(self, "base_multiplier", float(self.base_multiplier))

    @property
    def ratio(self) -> float:
        """m, the depth relative to the base depth."""
        return self.layers / self.base_layers

    @property
    def residual_multiplier(self) -> float:
        """r, by which the model multiplies every residual branch."""
        return self.base_multiplier * self._power(-1.0, 0.0)

    @property
    def patterns(self) -> tuple[str, ...]:
        """``blocks`` as a tuple."""
        return (self.blocks,) if isinstance(self.blocks, str) else tuple(self.blocks)

    def factors(self, family: Family, weight_decay_mode: WeightDecayMode) -> DepthFactors:
        """Factors for parameters of the blocks under one kind of optimizer and of weight decay."""
        rate = (2.0, -1.0) if family == "sgd" else (1.0, -1.0)
        decay = {
            "coupled": (-rate[0], -rate[1]),
            "l2": (-2.0, 1.0),
            "independent": (0.0, 0.0),
        }
        return DepthFactors(
            learning_rate=self._power(*rate),
            weight_decay=self._power(*decay[weight_decay_mode]),
            # SGD has no epsilon, and to the engine another one is another gradient.
            adam_eps=1.0 if family == "sgd" else self._power(-1.0, 0.0),
        )

    def _power(self, times_alpha: float, plus: float) -> float:
        """``m**(times_alpha * alpha + plus)``; exactly 1.0 where nothing scales."""
        if self.alpha is None:
            return 1.0
        exponent = times_alpha * self.alpha + plus
        return 1.0 if exponent == 0 or self.ratio == 1 else self.ratio**exponent

    def members(self, leaves: Mapping[str, LeafRole]) -> frozenset[str]:
        """Paths of the parameters in residual blocks, among all parameters of a model.

        Raises:
          ValueError: a pattern that matches none, two that match one, or another number of blocks
            than ``layers``.
        """
        stated = dict.fromkeys(self.patterns, True)
        paths = frozenset(match_patterns("depth.blocks", stated, list(leaves)))
        blocks = sorted({block[0] for path in paths if (block := self.block_of(path)) is not None})
        count = max(len(blocks), 1)
        # Blocks stacked by a scan have no numbers, but a first axis as long as there are layers.
        stacked = all(
            shape[:1] == (self.layers,) for path in paths for shape in leaves[path].shapes.values()
        )
        if count != self.layers and not stacked:
            named = f" ({', '.join(blocks[:4])}{', ...' if count > 4 else ''})" if blocks else ""
            raise ValueError(
                f"depth.layers is {self.layers}, and depth.blocks={list(self.patterns)} matches "
                f"{count} block{'s' if count > 1 else ''}{named}: let the model's factory build "
                "depth.layers blocks of their own parameters, and match these alone."
            )
        return paths

    def block_of(self, path: str) -> tuple[str, str] | None:
        """The block in which a path lies, and the path with ``*`` for the block's number.

        ``("blocks/3", "blocks/*/attention/out")`` of ``blocks/3/attention/out``; None outside of
        the blocks, or where no component has a number.
        """
        for pattern in self.patterns:
            if not fnmatch.fnmatchcase(path, pattern):
                continue
            # The number is looked for after the pattern's last whole component without a wildcard,
            # as in stage1/*, and before it only if there is none, as in blocks/0/*.
            fixed = re.split(r"[*?\[]", pattern)[0].count("/")
            parts = path.split("/")
            numbered = [i for i, part in enumerate(parts) if re.search(r"\d", part)]
            if numbered:
                i = next((i for i in numbered if i >= fixed), numbered[0])
                starred = [*parts[:i], re.sub(r"\d+", "*", parts[i]), *parts[i + 1 :]]
                return "/".join(parts[: i + 1]), "/".join(starred)
        return None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {**dataclasses.asdict(self), "blocks": list(self.patterns)}

    def __str__(self) -> str:
        alpha = "nothing scales" if self.alpha is None else f"alpha {self.alpha:g}"
        return (
            f"depth {self.layers} (base {self.base_layers}), {alpha}, residual multiplier "
            f"{self.residual_multiplier:.4g}"
        )


def completep(layers: int, base_layers: int, **options: Any) -> Depth:
    """CompleteP (arXiv 2505.01618): alpha = 1. Options are those of :class:`Depth`."""
    return Depth(layers, base_layers, alpha=1.0, **options)


def depth_mup(layers: int, base_layers: int, **options: Any) -> Depth:
    """Depth-muP (arXiv 2310.02244): alpha = 1/2. Options are those of :class:`Depth`."""
    return Depth(layers, base_layers, alpha=0.5, **options)


def unscaled(layers: int, base_layers: int, **options: Any) -> Depth:
    """Nothing scales with depth, for contrast. Options are those of :class:`Depth`."""
    return Depth(layers, base_layers, alpha=None, **options)


def with_depth(factory: ModelFactory, depth: Depth) -> ModelFactory:
    """The model factory as a function of the width (and random streams) alone.

    Raises:
      TypeError: ``depth`` is no :class:`Depth`.
      ValueError: the factory takes no ``depth``: its branches could not have the multiplier.
    """
    if not isinstance(depth, Depth):
        raise TypeError(
            "depth must be a record such as mupjax.completep(layers=16, base_layers=4), got "
            f"{depth!r}."
        )
    if not takes_argument(factory, _ARGUMENT):
        raise ValueError(
            f"depth is given ({depth}), and the model's factory takes no parameter 'depth': write "
            "it as `lambda width, depth, rngs: Net(width, layers=depth.layers, "
            "residual_multiplier=depth.residual_multiplier, rngs=rngs)`."
        )
    return functools.partial(factory, **{_ARGUMENT: depth})


def check_branches(factory: ModelFactory, depth: Depth, setting: Setting, width: int) -> None:
    """Refuse a model whose residual branches are not multiplied as ``depth`` says.

    With a small branch multiplier r, the gradients of all parameters in branches are proportional
    to r, and those of all others do not depend on it. Both are looked at, on one batch and few
    layers: so a branch without the multiplier is found, and one that has it twice, and patterns
    that match too much or too little.

    Args:
      factory: of models, with a parameter ``depth``.
      depth: what it is handed.
      setting: whose loss is differentiated.
      width: at which a model is built.

    Raises:
      ValueError: the multiplier acts otherwise; the text names a parameter.
    """
    first, second = (_gradient_norms(factory, depth, setting, width, r) for r in _SMALL)
    inside = {p for p in first if any(fnmatch.fnmatchcase(p, q) for q in depth.patterns)}
    least = _NEGLIGIBLE * max(second.values())
    seen = {path: norm for path, norm in second.items() if norm > least and first[path] > 0}
    if not inside & seen.keys():
        raise ValueError(
            f"with a small depth.residual_multiplier, parameters matched by depth.blocks="
            f"{list(depth.patterns)} have no gradient: multiply every branch by it, once."
        )
    for path, norm in seen.items():
        power = math.log2(norm / first[path])
        if abs(power - (path in inside)) > _POWER_TOLERANCE:
            patterns = list(depth.patterns)
            raise ValueError(
                f"the gradient of {path!r} goes as depth.residual_multiplier**{power:.1f}: "
                + (
                    f"it is matched by depth.blocks={patterns}, and should go as the first power. "
                    "Multiply every branch by it, once (x + depth.residual_multiplier * branch(x))"
                    ", and match the parameters of branches alone."
                    if path in inside
                    else f"it stands in a branch, and depth.blocks={patterns} does not match it: "
                    "its learning rate would not scale. Add its path to the patterns."
                )
            )


def _gradient_norms(
    factory: ModelFactory, depth: Depth, setting: Setting, width: int, multiplier: float
) -> dict[str, float]:
    """Norms of the loss's gradients at generic parameters, by path, with one branch multiplier."""

    def build(layers: int) -> Model:
        probe = dataclasses.replace(
            depth, layers=layers, base_layers=layers, base_multiplier=multiplier
        )
        return as_model(with_depth(factory, probe), width, setting)

    try:
        model = build(min(depth.layers, _FEW_LAYERS))
    except ValueError:
        # The model may not exist with so few layers.
        model = build(depth.layers)
    draws = np.random.default_rng(0)

    def generic(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        # Not the model's own start: a zero there would hide what stands before it. Drawn outside
        # of the program, since random numbers take longer to compile than the rest of it.
        scale = max(1, math.prod(leaf.shape[:-1])) ** -0.5
        return np.asarray(scale * draws.normal(size=leaf.shape), leaf.dtype)

    def loss(params: Any, batch: Any) -> jax.Array:
        return setting.loss(lambda *a, **k: model.apply(params, *a, **k), batch)

    @jax.jit
    def norms(params: Any, data: Any) -> dict[str, jax.Array]:
        gradient = jax.grad(loss)(params, setting.sample(data, jax.random.key(0), jnp.int32(0)))
        return {path: jnp.linalg.norm(g.ravel()) for path, g in leaf_paths(gradient).items()}

    params = jax.tree.map(generic, model.abstract_params())
    return {path: float(norm) for path, norm in norms(params, setting.data).items()}


def _is_number(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)
