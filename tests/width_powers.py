"""Powers of the width by counting: how large every layer is, and how far one update moves it.

A small calculus of its own, for one hidden width n, data of a fixed size and n → ∞ (Yang and Hu,
arXiv 2011.14522; Yang et al., arXiv 2203.03466; Everett et al., arXiv 2407.05872). A weight enters
as n^-a W with W of std n^-b and learning rate n^-c. A sum over n terms counts n^1 where the terms
have one sign, as those of an update with what made it do, and n^1/2 where they are independent. An
answer is a set of powers: one for each term of a sum. Where there are several, a finite width shows
a power between them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Optimizer = Literal["sgd", "adam", "muon"]
Role = Literal["input", "hidden", "output"]
Powers = frozenset[float]

# a and b by role: arXiv 2011.14522, Table 1 and its extension to more layers; SP is no scaling.
MULTIPLIER: Mapping[str, Mapping[Role, float]] = {
    "SP": {"input": 0, "hidden": 0, "output": 0},
    "NTP": {"input": 0, "hidden": 0.5, "output": 0.5},
    "muP": {"input": -0.5, "hidden": 0, "output": 0.5},
}
STD: Mapping[str, Mapping[Role, float]] = {
    "SP": {"input": 0, "hidden": 0.5, "output": 0.5},
    "NTP": {"input": 0, "hidden": 0, "output": 0},
    "muP": {"input": 0.5, "hidden": 0.5, "output": 0.5},
}
# SP: one rate. SGD: one rate (ibid.). muP, Adam: arXiv 2203.03466, Table 9. NTP, Adam and Muon: the
# rates with which every layer moves as it does under SGD, so that the limit is the kernel's. Muon's
# update has spectral norm √(fan out / fan in), which needs no power under SP and muP
# (arXiv 2310.17813); it is the rate of W itself, before the multiplier.
RATE: Mapping[str, Mapping[Optimizer, Mapping[Role, float]]] = {
    "SP": {
        "sgd": {"input": 0, "hidden": 0, "output": 0},
        "adam": {"input": 0, "hidden": 0, "output": 0},
        "muon": {"input": 0, "hidden": 0, "output": 0},
    },
    "NTP": {
        "sgd": {"input": 0, "hidden": 0, "output": 0},
        "adam": {"input": 0.5, "hidden": 1, "output": 0.5},
        "muon": {"input": 0.5, "hidden": 0, "output": 0.5},
    },
    "muP": {
        "sgd": {"input": 0, "hidden": 0, "output": 0},
        "adam": {"input": 0.5, "hidden": 1, "output": 0.5},
        "muon": {"input": 0.5, "hidden": 0, "output": 0.5},
    },
}
# Attention logits are q·k times (head size)^-power.
ATTENTION: Mapping[str, float] = {"SP": 0.5, "NTP": 0.5, "muP": 1.0}


@dataclasses.dataclass(frozen=True)
class Count:
    """Powers of the width under one parametrization and optimizer.

    Attributes:
      parametrization, optimizer: names.
      head_grows: whether the size of a head grows as n, its number fixed (else the reverse).
      carried: of q @ k's power, what the query projection makes up for in the model's place.
    """

    parametrization: str
    optimizer: Optimizer
    head_grows: bool = False
    carried: float = 0.0

    def _std(self, role: Role) -> float:
        return -(MULTIPLIER[self.parametrization][role] + STD[self.parametrization][role])

    @property
    def readout_start(self) -> float:
        """Of the outputs at the start: a sum over n independent terms."""
        return 0.5 + self._std("output")

    @property
    def gradient(self) -> float:
        """Of the loss's gradient with respect to one feature: a readout weight's."""
        return self._std("output")

    @property
    def size(self) -> float:
        """1 where the head size grows as n, else 0."""
        return float(self.head_grows)

    @property
    def logits_start(self) -> float:
        """q·k is a sum over the head size of independent terms."""
        return self.size * (0.5 - ATTENTION[self.parametrization])

    @property
    def logits_gradient(self) -> float:
        """The gradient of a head's output times a value, independent at the start."""
        return self.gradient + self.size * 0.5

    def step(self, role: Role, gradient: float | None = None) -> float:
        """Of the change of a layer's output by its own weights' update.

        Args:
          role: of the weights; biases and gains are like input weights, with a fan-in of 1.
          gradient: of the loss with respect to the layer's output, where it is not a feature's.
        """
        a = MULTIPLIER[self.parametrization][role]
        c = RATE[self.parametrization][self.optimizer][role]
        if gradient is None:
            gradient = 0.0 if role == "output" else self.gradient
        if self.optimizer == "muon" and role == "hidden":
            return -a - c
        terms = 0.0 if role == "input" else 1.0
        if self.optimizer == "sgd":
            return terms + gradient - 2 * a - c
        return terms - a - c

    def outputs(self, change: float) -> float:
        """Of the outputs' change after the last features': a sum over independent terms."""
        return change + 0.5 + self._std("output")

    def loss(self, change: float) -> float:
        """The part of the outputs' change that the loss sees: features move along the readout."""
        return change + 1 + self._std("output")

    def logits(self, change: float) -> Powers:
        """Of the change of q·k where the features before both projections change.

        Where the head size grows, the change goes along k by as much as the way through the logits
        adds to the gradient of the features.
        """
        power = ATTENTION[self.parametrization]
        if not self.head_grows:
            return frozenset({change})
        share = min(0.0, 0.5 - power)
        return frozenset({change + 0.5 - power, change + 1 - power + share})


def starts(count: Count, layers: list[str]) -> dict[str, float]:
    """Powers of every layer's output at the start; layers are named as in `mupjax.models`."""
    special = {
        "logits": count.logits_start,
        "readout": count.readout_start,
        "output": count.readout_start,
        "query": -count.carried,
    }
    return {layer: special.get(layer.rsplit("/", 1)[-1], 0.0) for layer in layers}


# What comes after what, within a decoder of one block.
_ORDER = (
    ("embed", "position"),
    ("blocks/0/attention_norm",),
    ("blocks/0/attention/query", "blocks/0/attention/key", "blocks/0/attention/value"),
    ("blocks/0/attention/logits",),
    ("blocks/0/attention/out",),
    ("blocks/0/feed_forward_norm",),
    ("blocks/0/feed_forward/gate", "blocks/0/feed_forward/up"),
    ("blocks/0/feed_forward/down",),
    ("final_norm",),
    ("readout",),
)
_STAGE = {layer: stage for stage, layers in enumerate(_ORDER) for layer in layers} | {
    "output": 9,
    "loss": 9,
    "blocks/0/attention": 4,
    "blocks/0/feed_forward": 7,
    "blocks/0": 7.5,
}


def decoder_changes(count: Count, parameter: str, layers: list[str]) -> dict[str, Powers]:
    """Powers of the first-order change of every layer of a decoder of one block, by one parameter.

    Layers that the parameter does not reach are left out. Without a layer `readout`, the embedding
    is tied.
    """
    layer, kind = parameter.rsplit("/", 1)
    name = layer.rsplit("/", 1)[-1]
    if name == "readout":
        power = frozenset({count.step("output")})
        return {x: power for x in layers if x in ("readout", "output", "loss")}
    role: Role = "hidden" if kind == "kernel" else "input"
    gradient = None
    if name in ("query", "key"):
        # The logits' gradient times the other of the two, times the scale.
        power = ATTENTION[count.parametrization]
        gradient = count.logits_gradient - count.size * power
    own = count.step(role, gradient)
    stage = _STAGE[layer]
    after: Powers = frozenset({own})
    loss = count.loss(own)
    logits: Powers = frozenset()
    if name in ("query", "key"):
        # Along the other of the two, which made the gradient.
        logits = frozenset({own + count.size * (1 - ATTENTION[count.parametrization])})
        after = logits
        # Values are independent of the readout; over many heads the signs of the changes are not.
        (along,) = logits
        loss = count.outputs(along) if count.head_grows else count.loss(along)
    elif stage < _STAGE["blocks/0/attention/query"]:
        logits = count.logits(own)
    found: dict[str, Powers] = {}
    for x in layers:
        at, last = _STAGE[x], x.rsplit("/", 1)[-1]
        if x == layer:
            found[x] = frozenset({own})
        elif at < stage or (at == stage and not layer.startswith(x + "/")):
            continue
        elif x == "loss":
            found[x] = frozenset({loss})
        elif at == _STAGE["readout"]:
            found[x] = frozenset({*map(count.outputs, after | logits), loss})
        elif last == "logits":
            if logits:
                found[x] = logits
        elif last in ("query", "key", "value"):
            found[x] = frozenset({own})
        else:
            found[x] = after | logits
    for x in found:
        if x.endswith("attention/query"):
            found[x] = frozenset({p - count.carried for p in found[x]})
        elif layer == "embed" and "readout" not in layers and _STAGE[x] == _STAGE["readout"]:
            # Tied: the same matrix moves as a readout too.
            found[x] |= {count.step("output")}
    return found


_PLAIN_ORDER = (
    ("stem",),
    ("hidden/0", "blocks/0/norms/0"),
    ("norms/0", "blocks/0/convs/0"),
    ("hidden/1", "blocks/0/norms/1"),
    ("norms/1", "blocks/0/convs/1"),
    ("blocks/0",),
    ("final_norm",),
    ("readout", "output", "loss"),
)
_PLAIN_STAGE = {layer: stage for stage, layers in enumerate(_PLAIN_ORDER) for layer in layers}


def plain_changes(count: Count, parameter: str, layers: list[str]) -> dict[str, Powers]:
    """The same for an `MLP` of two hidden layers, and a `CNN` of one block."""
    layer, kind = parameter.rsplit("/", 1)
    last = ("readout", "output", "loss")
    if layer == "readout":
        # A bias of the readout has no axis that grows, and no factors.
        power = count.step("output") if kind == "kernel" else 0.0
        return {x: frozenset({power}) for x in layers if x in last}
    own = count.step(
        "hidden" if kind == "kernel" and layer not in ("hidden/0", "stem") else "input"
    )
    outputs = frozenset({count.outputs(own), count.loss(own)})
    special = {"loss": frozenset({count.loss(own)}), "readout": outputs, "output": outputs}
    return {
        x: special.get(x, frozenset({own}))
        for x in layers
        if _PLAIN_STAGE[x] > _PLAIN_STAGE[layer] or x == layer
    }
