"""How the options of the command line bound what a target trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import jax

from mupjax.config import check_count
from mupjax.reproduce.target import Scale

__all__ = ["check_data", "restricted"]


class _Trained(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def widths(self) -> tuple[int, ...]: ...

    @property
    def seeds(self) -> int: ...


_Sizes = TypeVar("_Sizes", bound=_Trained)


def restricted(
    sizes: _Sizes,
    scale: Scale,
    *,
    seeds: int | None,
    max_width: int | None,
    largest_on_cpu: int,
) -> _Sizes:
    """Sizes with another number of seeds and without the widest networks.

    Args:
      sizes: a dataclass with ``widths`` and ``seeds``.
      scale: which they are of.
      seeds: another number of seeds, or None.
      max_width: leave out wider networks; without it, on a CPU at scale ``paper``, those beyond
        ``largest_on_cpu``.
      largest_on_cpu: see ``max_width``.

    Raises:
      ValueError: ``seeds`` is no positive whole number, or fewer than two widths are left.
    """
    if seeds is not None:
        sizes = dataclasses.replace(sizes, seeds=check_count("seeds", seeds))
    bound = max_width
    if bound is None and scale == "paper" and jax.default_backend() == "cpu":
        bound = largest_on_cpu
    kept = tuple(n for n in sizes.widths if bound is None or n <= bound)
    if len(kept) < 2:
        raise ValueError(
            f"max_width {bound} leaves {len(kept)} of the widths "
            f"{', '.join(map(str, sizes.widths))}: at least two are needed."
        )
    return dataclasses.replace(sizes, widths=kept)


def check_data(name: str, scale: Scale, needed: str | None, data: str | None) -> None:
    """Refuse a folder that is not used, not given where it is needed, or not there.

    Args:
      name: of the target.
      scale: which.
      needed: what a local copy is needed of, or None.
      data: the folder, or None.

    Raises:
      ValueError, FileNotFoundError: see above.
    """
    if needed is None:
        if data is not None:
            raise ValueError(
                f"data={data!r} is for scale paper: {name} at scale {scale} needs no local copy."
            )
    elif data is None:
        raise ValueError(
            f"{name} at scale {scale} trains on {needed}: say --data FOLDER, a local copy; scale "
            "laptop needs none."
        )
    elif not Path(data).is_dir():
        raise FileNotFoundError(f"there is no folder {data}: give a local copy of {needed}.")
