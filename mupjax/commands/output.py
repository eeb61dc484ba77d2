"""Files that a command writes: checked before it computes, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["check_file", "check_folder", "write_json"]


def check_file(path: Path, option: str) -> None:
    """Refuse a path where no file can be written.

    Raises:
      FileExistsError: it is a folder, or lies below a file.
      PermissionError: it may not be written.
    """
    if path.is_dir():
        raise FileExistsError(f"{option} {str(path)!r} is a folder: name a file in it.")
    check_folder(path.parent, option)
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{option} {str(path)!r} may not be written.")


def check_folder(path: Path, option: str) -> None:
    """Refuse a path where no folder can be made or written to.

    Raises:
      FileExistsError: it is a file, or lies below one.
      PermissionError: it may not be written.
    """
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise FileExistsError(f"{option}: {str(path)!r} is a file, not a folder.")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{option}: {str(path)!r} may not be written.")


def write_json(path: Path, record: Any) -> None:
    """Write a JSON file, to a neighbouring name first and then moved into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        draft.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
