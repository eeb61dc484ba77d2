"""All targets of ``mupjax reproduce``: each module's ``TARGET`` or ``TARGETS``."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
import textwrap
from collections.abc import Mapping
from types import MappingProxyType

import mupjax.reproduce
from mupjax.reproduce.target import Target

__all__ = ["find_target", "format_targets", "targets"]


@functools.cache
def targets() -> Mapping[str, Target]:
    """Every target by name, sorted."""
    found: dict[str, Target] = {}
    for module in pkgutil.iter_modules(mupjax.reproduce.__path__, "mupjax.reproduce."):
        content = importlib.import_module(module.name)
        several = getattr(content, "TARGETS", (getattr(content, "TARGET", None),))
        found |= {target.name: target for target in several if isinstance(target, Target)}
    return MappingProxyType(dict(sorted(found.items())))


def find_target(name: str) -> Target:
    """The target of a name.

    Raises:
      ValueError: there is none of that name.
    """
    known = targets()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"there is no target {name!r} to reproduce: {hint}Choose from {', '.join(known)}."
    )


def format_targets() -> str:
    """Names, durations and claims of all targets, for a terminal."""
    blocks = []
    for target in targets().values():
        durations = ", ".join(
            f"{scale}: {words}" for scale, words in target.duration.items() if scale != "tiny"
        )
        claims = [
            textwrap.fill(
                f"{claim.statement} [{claim.source}]",
                width=110,
                initial_indent="  - ",
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
            for claim in target.claims
        ]
        blocks.append("\n".join([f"{target.name}  ({durations})", f"  {target.title}", *claims]))
    return "\n\n".join(blocks)
