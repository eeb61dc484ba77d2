"""Files that a command writes: checked before it computes, written whole or not at all.

A link, a pipe or a device is not replaced but written through: `/dev/stdout` stays what it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["check_file", "check_folder", "move_into", "write_json"]


def check_file(path: Path, option: str) -> None:
    """Refuse a path where no file can be written.

    Raises:
      FileExistsError: it is a folder, or lies below a file.
      PermissionError: it may not be written.
      OSError: the system takes no such name.
    """
    try:
        folder, present, through = path.is_dir(), path.exists(), _written_through(path)
    except OSError as error:
        raise OSError(f"{option} {_cannot(path, error)}") from error
    if folder:
        raise FileExistsError(f"{option} {str(path)!r} is a folder: name a file in it.")
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
