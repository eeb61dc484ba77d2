"""How multiplier, initial std, learning rate, weight decay and Adam's epsilon scale with width.

A :class:`Parametrization` is data: one row of exponents per layer role and optimizer family. With
``m = width / base_width``, a weight enters the forward pass as ``m**-a W``, starts with standard
deviation ``m**-b`` times the one at the base width, and trains with learning rate ``m**-c``, weight
decay ``m**-d`` and epsilon ``m**-e`` times the global ones.

Sources: Yang et al., "Tensor Programs V", arXiv 2203.03466, Tables 3, 8, 9 (muP); Yang and Hu,
"Tensor Programs IV", arXiv 2011.14522, Table 1 (NTP, mean field, SGD); Everett et al., arXiv
2407.05872 (Adam's rates and epsilon per layer); Ghosh, Wu and Bietti, arXiv 2512.22768.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

from mupjax.roles import Role

__all__ = [
    "DECAY_COLUMN",
    "NTP",
    "PRESETS",
    "SP",
    "Exponents",
    "Family",
    "Parametrization",
    "WeightDecayMode",
    "adaptive_transfer",
    "mean_field",
    "muP",
]

Family = Literal["sgd", "adam", "spectral"]
"""``sgd``: the update is proportional to the gradient (SGD, momentum, Nesterov); ``adam``: it does
not change with the gradient's scale, entry by entry (Adam, RMSProp, Lion); ``spectral``: hidden
matrices receive an orthogonalised update of spectral norm proportional to sqrt(fan_out/fan_in)
(Muon), the rest is trained by an Adam-like rule."""

WeightDecayMode = Literal["coupled", "l2", "independent"]
"""``coupled``: ``W -= lr * wd * W`` (AdamW as in optax and torch); ``l2``: ``wd * W`` is added to
the gradient; ``independent``: ``W -= schedule * wd * W``, whatever the learning rate."""

DECAY_COLUMN: Mapping[WeightDecayMode, str] = MappingProxyType(
    {"coupled": "weight_decay", "l2": "l2", "independent": "independent_weight_decay"}
)
"""The column of :class:`Exponents` that applies in each mode of weight decay."""

_TABLE_ROLES = ("input", "hidden", "output", "vector")
_GRADIENT_POWER: Mapping[Family, int] = {"sgd": 2, "adam": 1, "spectral": 1}


@dataclasses.dataclass(frozen=True)
class Exponents:
    """One row: every quantity is ``(width / base_width) ** -exponent`` times its base value.

    Attributes:
      multiplier: a, of the forward multiplier.
      init_std: b, of the initial standard deviation.
      learning_rate: c.
      weight_decay: d in mode ``coupled``.
      l2: d in mode ``l2``.
      independent_weight_decay: d in mode ``independent``.
      adam_eps: e, of Adam's epsilon (it should shrink like the gradients do).
    """

    multiplier: float = 0.0
    init_std: float = 0.0
    learning_rate: float = 0.0
    weight_decay: float = 0.0
    l2: float = 0.0
    independent_weight_decay: float = 0.0
    adam_eps: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _finite(f"Exponents.{field.name}", getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def shifted(self, theta: float, family: Family) -> Exponents:
        """The same training in other coordinates: the abc symmetry by ``theta`` (MATH: a + theta).

        ``W = m**theta W'``: gradients with respect to W' are ``m**theta`` times smaller or larger
        in step with it, so SGD needs ``c - 2 theta`` and a scale-invariant optimizer ``c - theta``.
        The shrink per step ``lr * wd`` of coupled decay, and the ratio of the L2 term to the
        gradient, stay what they were.
        """
        power = _GRADIENT_POWER[family]
        return dataclasses.replace(
            self,
            multiplier=self.multiplier + theta,
            init_std=self.init_std - theta,
            learning_rate=self.learning_rate - power * theta,
            weight_decay=self.weight_decay + power * theta,
            l2=self.l2 + 2 * theta,
            adam_eps=self.adam_eps + (theta if family != "sgd" else 0.0),
        )

    def folded(self, family: Family) -> Exponents:
        """The equivalent row without a forward multiplier."""
        return self.shifted(-self.multiplier, family)


@dataclasses.dataclass(frozen=True)
class Parametrization:
    """Exponents per optimizer family and layer role; immutable, comparable, hashable, printable.

    Attributes:
      name: shown in tables, figures and errors.
      rows: ``rows[family][role]`` for the roles ``input``, ``hidden``, ``output`` and ``vector``.
        (``fixed`` parameters never scale; ``query`` and ``tied`` rows follow from these.)
      attention: attention logits are ``q @ k`` times ``head_dim ** -attention``, relative to the
        base width's head size: 1/2 in SP and NTP, 1 in muP.

    >>> print(muP)  # doctest: +SKIP
    """

    name: str
    rows: Mapping[Family, Mapping[Role, Exponents]]
    attention: float = 0.5

    def __post_init__(self) -> None:
        frozen: dict[Family, Mapping[Role, Exponents]] = {}
        if not self.rows:
            raise ValueError(f"parametrization {self.name!r} has no rows.")
        for family, table in self.rows.items():
            if family not in get_args(Family):
                raise ValueError(
                    f"parametrization {self.name!r}: unknown optimizer family {family!r}; "
                    f"choose from {', '.join(get_args(Family))}."
                )
            if set(table) != set(_TABLE_ROLES):
                raise ValueError(
                    f"parametrization {self.name!r}, family {family!r}: rows are needed for "
                    f"{', '.join(_TABLE_ROLES)}, got {', '.join(map(str, table)) or 'none'}."
                )
            frozen[family] = MappingProxyType({role: table[role] for role in _TABLE_ROLES})
        object.__setattr__(self, "rows", MappingProxyType(frozen))
        attention = _finite(f"parametrization {self.name!r}: attention", self.attention)
        object.__setattr__(self, "attention", attention)

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __reduce__(self) -> tuple[Any, ...]:
        # The read-only views of rows can be neither pickled nor deep-copied.
        return type(self).from_dict, (self.to_dict(),)

    def table(self, family: Family) -> Mapping[Role, Exponents]:
        """The rows of one optimizer family.

        Raises:
          ValueError: this parametrization says nothing of that family.
        """
        if family not in self.rows:
            raise ValueError(
                f"parametrization {self.name!r} has no exponents for {family}-like optimizers, "
                f"only for {', '.join(self.rows)}: add them, or use another parametrization."
            )
        return self.rows[family]

    def row(self, role: Role, family: Family) -> Exponents:
        """The exponents of any role, the derived ones included.

        A query projection carries the difference between this table's attention scale and the
        ``head_dim ** -1/2`` that Flax's attention applies itself.
        """
        table = self.table(family)
        if role == "fixed":
            return Exponents()
        if role in ("query", "query_vector"):
            row = table["hidden" if role == "query" else "vector"]
            return dataclasses.replace(row, multiplier=row.multiplier + self.attention - 0.5)
        if role == "tied":
            return self.tied_row(family)[0]
        return table[role]

    def tied_row(
        self, family: Family, mode: WeightDecayMode = "coupled"
    ) -> tuple[Exponents, float]:
        """Row of a matrix that is both embedding and readout, and the readout's extra multiplier.

        Only tables whose input and output rows agree in initial std, learning rate and the weight
        decay of this mode after a shift of the output row (its forward multiplier) allow one shared
        matrix (TP-V, Table 8).
        Returns the shared row, and the exponent a of the further multiplier ``m**-a`` that the
        model must apply where the matrix is used as readout.

        Raises:
          ValueError: no such shift exists; the text names the presets for which one does.
        """
        if (found := _tie(self, family, mode)) is not None:
            return found
        able = [p.name for p in PRESETS.values() if family in p.rows and _tie(p, family, mode)]
        raise ValueError(
            f"parametrization {self.name!r} gives the input and the output layer different initial "
            f"scales, learning rates or weight decay ({family}, {mode}), so one tied matrix cannot "
            f"serve both: untie them, or use one of {', '.join(able)}."
        )

    def shifted(self, theta: Mapping[Role, float], name: str | None = None) -> Parametrization:
        """The same training in other coordinates, each role shifted by its theta (abc symmetry)."""
        unknown = set(theta) - set(_TABLE_ROLES)
        if unknown:
            raise ValueError(f"theta names unknown roles {sorted(unknown)}; use {_TABLE_ROLES}.")
        return self._with_rows(
            lambda family, role, row: row.shifted(theta.get(role, 0.0), family), name
        )

    def folded(self) -> Parametrization:
        """The equivalent table in which every forward multiplier is 1: the canonical form.

        Two parametrizations train alike if and only if their folded tables agree.
        """
        return self._with_rows(lambda family, role, row: row.folded(family))

    def _with_rows(
        self, change: Callable[[Family, Role, Exponents], Exponents], name: str | None = None
    ) -> Parametrization:
        rows = {
            family: {role: change(family, role, row) for role, row in table.items()}
            for family, table in self.rows.items()
        }
        return dataclasses.replace(self, name=name or self.name, rows=rows)

    def is_equivalent(self, other: Parametrization, family: Family) -> bool:
        """Whether both train alike in function space under this optimizer family."""

        def numbers(p: Parametrization) -> list[float]:
            rows = p.folded().table(family).values()
            return [x for row in rows for x in dataclasses.astuple(row)] + [p.attention]

        pairs = zip(numbers(self), numbers(other), strict=True)
        return all(math.isclose(x, y, abs_tol=1e-12) for x, y in pairs)

    def form(self, table: Literal[3, 8, 9]) -> Parametrization:
        """This parametrization in the coordinates of TP-V's Table 3, 8 or 9.

        3: no forward multipliers; 8: the readout starts at a width-independent scale; 9: every
        layer starts at ``1/sqrt(width)``.
        """
        if table not in (3, 8, 9):
            raise ValueError(f"table must be 3, 8 or 9 (of arXiv 2203.03466), got {table!r}.")
        if table == 3:
            return self.folded()

        # From each family's own initial std: they need not agree.
        def moved(family: Family, role: Role, row: Exponents) -> Exponents:
            row = row.folded(family)
            if table == 9:
                return row.shifted(row.init_std - 0.5, family)
            return row.shifted(row.init_std, family) if role == "output" else row

        return self._with_rows(moved, f"{self.name} (Table {table})")

    def attention_scale(self, head_dim: int, base_head_dim: int) -> float:
        """Factor on ``q @ k``: ``base_head_dim**-1/2`` at the base, then the table's power."""
        for argument, value in (("head_dim", head_dim), ("base_head_dim", base_head_dim)):
            if value <= 0:
                raise ValueError(f"{argument} must be positive, got {value}.")
        return base_head_dim**-0.5 * (head_dim / base_head_dim) ** -self.attention

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy; :meth:`from_dict` reads it back."""
        rows = {
            family: {role: dataclasses.asdict(row) for role, row in table.items()}
            for family, table in self.rows.items()
        }
        return {"name": self.name, "attention": self.attention, "rows": rows}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Parametrization:
        """The parametrization of a record made by :meth:`to_dict` (a row may leave out zeros)."""
        unknown = set(record) - {"name", "attention", "rows"}
        if unknown or "rows" not in record:
            raise ValueError(
                "a parametrization's record has the keys name, attention and rows, "
                f"got {sorted(record)}."
            )
        names = {field.name for field in dataclasses.fields(Exponents)}
        rows: dict[Any, dict[Any, Exponents]] = {}
        for family, table in _table("rows", record["rows"]).items():
            rows[family] = {}
            for role, row in _table(f"rows of {family!r}", table).items():
                row = _table(f"row {role!r} of {family!r}", row)
                if wrong := set(row) - names:
                    raise ValueError(
                        f"parametrization, family {family!r}, role {role!r}: unknown exponents "
                        f"{sorted(wrong)}; use {sorted(names)}."
                    )
                rows[family][role] = Exponents(**row)
        name = record.get("name", "custom")
        return cls(name=name, rows=rows, attention=record.get("attention", 0.5))

    def fingerprint(self) -> str:
        """A hash of every exponent (16 hexadecimal digits), stored with results and checked."""
        record = {k: v for k, v in self.to_dict().items() if k != "name"}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        columns = [field.name for field in dataclasses.fields(Exponents)]
        head = ["family", "role", *columns]
        body = [
            [family, role, *(f"{-getattr(row, c) + 0.0:g}" for c in columns)]
            for family, table in self.rows.items()
            for role, row in table.items()
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]

        def line(cells: list[str]) -> str:
            left = [c.ljust(w) for c, w in zip(cells[:2], widths[:2], strict=True)]
            right = [c.rjust(w) for c, w in zip(cells[2:], widths[2:], strict=True)]
            return "  ".join(left + right)

        title = (
            f"{self.name}: powers of m = width / base_width; attention logits / "
            f"head_dim^{self.attention:g}"
        )
        return "\n".join([title, line(head), *map(line, body)])


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"a parametrization's {name} must be a table, got {value!r}.")
    return value


def _finite(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    # Adding 0.0 makes -0.0 and 0.0, which are equal, print and hash alike.
    return float(value) + 0.0


def _tie(
    p: Parametrization, family: Family, mode: WeightDecayMode
) -> tuple[Exponents, float] | None:
    entry, readout = p.table(family)["input"], p.table(family)["output"]
    aligned = readout.shifted(readout.init_std - entry.init_std, family)
    kept = ("init_std", "learning_rate", DECAY_COLUMN[mode])
    if any(not math.isclose(getattr(entry, k), getattr(aligned, k), abs_tol=1e-12) for k in kept):
        return None
    return entry, aligned.multiplier - entry.multiplier


def _rows(
    b: tuple[float, float, float],
    c: tuple[float, float, float, float],
    *,
    eps: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    l2: tuple[float, float, float, float] | None = None,
) -> dict[Role, Exponents]:
    """Rows without multipliers, with ``lr * wd`` of coupled decay independent of width."""
    decay = l2 if l2 is not None else tuple(-x for x in c)
    return {
        "input": Exponents(0, b[0], c[0], -c[0], decay[0], 0, eps[0]),
        "hidden": Exponents(0, b[1], c[1], -c[1], decay[1], 0, eps[1]),
        "output": Exponents(0, b[2], c[2], -c[2], decay[2], 0, eps[2]),
        "vector": Exponents(0, 0.0, c[3], -c[3], decay[3], 0, eps[3]),
    }


SP = Parametrization(
    "SP",
    {family: _rows((0, 0.5, 0.5), (0, 0, 0, 0)) for family in get_args(Family)},
)
"""Standard parametrization: the deep-learning libraries' default. Initial std ``1/sqrt(fan_in)``,
one learning rate for all layers and widths. Its input row asks for the same initial std at every
width, and Flax draws embeddings with std ``width**-1/2``, which is put right: under SP as well, a
model with an embedding needs a base width."""

# Adam with L2 follows microsoft/mup's code (hidden decay times m where the table is in Table 8's
# form), by which the ratio of the L2 term to the gradient depends on the width: it grows (measured)
# as m for input, output and vector, as m**1.5 for hidden.
_MUP_L2 = (0.0, -1.0, -2.0, 0.0)

muP = Parametrization(
    "muP",
    {
        "sgd": _rows((0, 0.5, 1), (-1, 0, 1, -1)),
        "adam": _rows((0, 0.5, 1), (0, 1, 1, 0), eps=(1, 1, 0, 1), l2=_MUP_L2),
        "spectral": {
            **_rows((0, 0.5, 1), (0, 1, 1, 0), eps=(1, 1, 0, 1), l2=_MUP_L2),
            "hidden": Exponents(0, 0.5, 0),
        },
    },
    attention=1.0,
)
"""Maximal update parametrization, in the form of TP-V's Table 3 (``muP.form(8)`` and ``form(9)``
are the same training). Epsilon follows the gradients: 1/width but for the readout."""

_NTK_L2 = (-0.5, -1.5, -1.0, -0.5)

NTP = Parametrization(
    "NTP",
    {
        "sgd": _rows((0, 0.5, 0.5), (0, 1, 1, 0)),
        "adam": _rows((0, 0.5, 0.5), (0.5, 1.5, 1, 0.5), eps=(0.5, 0.5, 0, 0.5), l2=_NTK_L2),
        "spectral": {
            **_rows((0, 0.5, 0.5), (0.5, 1.5, 1, 0.5), eps=(0.5, 0.5, 0, 0.5), l2=_NTK_L2),
            "hidden": Exponents(0, 0.5, 0.5, -0.5, -0.5),
        },
    },
).shifted({"hidden": 0.5, "output": 0.5})
"""Neural tangent parametrization: unit initial weights behind ``1/sqrt(fan_in)``, the largest
learning rates under which features do not move in the limit (they move as width**-1/2; but logits
of attention move where the head size grows, and not the number of heads). Under SGD one rate for
all layers; the Adam rows are the scale-invariant analogue."""

mean_field = muP.shifted({"hidden": 0.5, "output": 1.0}, name="mean-field")
"""Mean-field parametrization: unit initial weights behind ``1/sqrt(fan_in)``, the readout behind
``1/fan_in``, SGD rate proportional to width. The same training as muP in other coordinates."""


def _adaptive_rows() -> dict[Role, Exponents]:
    matrix = Exponents(0, 0.5, 0.8, 0.3, 0.3, 0.3)
    return {"input": matrix, "hidden": matrix, "output": matrix, "vector": Exponents()}


adaptive_transfer = Parametrization("Adaptive Transfer", {"adam": _adaptive_rows()})
"""All matrices alike: learning rate ``width**-0.8``, std ``width**-0.5``, weight decay
``width**-0.3``; biases and norms do not scale. (Empirical; stated for Adam only.)"""

PRESETS: Mapping[str, Parametrization] = MappingProxyType(
    {p.name: p for p in (SP, NTP, mean_field, muP, adaptive_transfer)}
)
"""The presets by name: SP, NTP, mean-field, muP, Adaptive Transfer."""
