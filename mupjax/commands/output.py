"""Files that a command writes: checked before it computes, written whole or not at all.

A link, a pipe or a device is not replaced but written through: `/dev/stdout` stays what it is.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "check_file",
    "check_folder",
    "check_outputs",
    "move_into",
    "write_json",
    "write_outputs",
]


def check_file(path: Path, option: str, source: Path | None = None) -> None:
    """Refuse a path where no file can be written.

    Args:
      path: the file.
      option: by which it was named.
      source: a file that the command reads, and must not write over.

    Raises:
      FileExistsError: it is a folder, lies below a file, or is the file that is read.
      PermissionError: it may not be written.
      OSError: the system takes no such name.
    """
    try:
        folder, present, through = path.is_dir(), path.exists(), _written_through(path)
        itself = present and source is not None and source.exists() and path.samefile(source)
    except OSError as error:
        raise OSError(f"{option} {_cannot(path, error)}") from error
    if folder:
        raise FileExistsError(f"{option} {str(path)!r} is a folder: name a file in it.")
    if itself:
        raise FileExistsError(
            f"{option} {str(path)!r} is the file that is read, and would be written over: name "
            "another."
        )
    if not through:
        check_folder(path.parent, option)
    if present and not os.access(path, os.W_OK):
        raise PermissionError(f"{option} {str(path)!r} may not be written.")


def check_folder(path: Path, option: str) -> None:
    """Refuse a path where no folder can be made or written to.

    Raises:
      FileExistsError: it is a file, or lies below one.
      PermissionError: it may not be written.
      OSError: the system takes no such name.
    """
    try:
        while not path.exists():
            path = path.parent
    except OSError as error:
        raise OSError(f"{option} {_cannot(path, error)}") from error
    if not path.is_dir():
        raise FileExistsError(f"{option}: {str(path)!r} is a file, not a folder.")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{option}: {str(path)!r} may not be written.")


def write_json(path: Path, record: Any) -> None:
    """Write a JSON file, to a neighbouring name first and then moved into place.

    Raises:
      OSError: the system refuses.
    """
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    try:
        if _written_through(path):
            path.write_text(text, encoding="utf-8")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(_cannot(path, error)) from error


def check_outputs(json: Path | None, figures: Path | None, source: Path | None = None) -> None:
    """Refuse a JSON file or a folder of figures that cannot be written, or that are one.

    The JSON file may not be `source`, which the command reads, either.

    Raises:
      OSError: as `check_file` and `check_folder`.
    """
    if json is not None:
        check_file(json, "--json", source)
    if figures is None:
        return
    check_folder(figures, "--figures")
    whole = figures.absolute()
    if json is not None and json.absolute() in (whole, *whole.parents):
        raise FileExistsError(
            f"{str(json)!r} cannot be both a file (--json) and a folder (--figures "
            f"{str(figures)!r}): name two."
        )


def write_outputs(
    json: Path | None,
    record: Callable[[], Any],
    figures: Path | None,
    draw: Callable[[Path], Sequence[Path]],
) -> list[Path]:
    """Write what was asked for; everything is drawn before anything is written.

    Args:
      json: file, or None.
      record: makes its content.
      figures: folder, or None.
      draw: draws into a folder, and returns the files.

    Raises:
      OSError: the system refuses.
    """
    written: list[Path] = []
    with tempfile.TemporaryDirectory() as drafts:
        drawn = [] if figures is None else draw(Path(drafts))
        for path in [] if figures is None else [figures / draft.name for draft in drawn]:
            if path.is_dir():
                raise FileExistsError(f"{str(path)!r} is a folder, and a file of that name is due.")
        if json is not None:
            write_json(json, record())
            written.append(json)
        if figures is not None:
            written += move_into(figures, drawn)
    return written


def move_into(folder: Path, drafts: Sequence[Path]) -> list[Path]:
    """Move finished files into a folder, which is made, over files of the same names.

    Raises:
      OSError: the system refuses.
    """
    path, moved = folder, []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for draft in drafts:
            path = folder / draft.name
            # Unlike os.replace also from one file system to another.
            shutil.move(draft, path)
            moved.append(path)
    except OSError as error:
        raise OSError(_cannot(path, error)) from error
    return moved


def _written_through(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not path.is_file())


def _cannot(path: Path, error: OSError) -> str:
    return f"{str(path)!r} cannot be written: {error.strerror}."
