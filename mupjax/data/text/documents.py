"""Documents: any folder, Python's standard library, local copies of WikiText-103 and FineWeb."""

from __future__ import annotations

import itertools
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

__all__ = ["fineweb", "folder", "split_documents", "standard_library", "wikitext103"]


def folder(path: str | Path, pattern: str = "**/*.txt") -> Iterator[str]:
    """Every file of a folder that matches, a document each, in the order of their names.

    Args:
      path: the folder.
      pattern: of `pathlib.Path.glob`; ``**`` descends.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: no file matches, or one is not UTF-8 text.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}.")
    files = sorted(p for p in root.glob(pattern) if p.is_file())
    if not files:
        raise ValueError(f"no file in {root} matches {pattern!r}: change the pattern.")
    return map(_text, files)


# Left out by some distributions of Python.
_OPTIONAL_PARTS = {"test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3"}


def standard_library() -> Iterator[str]:
    """The source of Python's standard library, a document for each module.

    Some ten million characters that every machine has, if not the same on all: the text depends on
    Python's version, of which results store a fingerprint.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    out = {"site-packages", "dist-packages", "__pycache__", *_OPTIONAL_PARTS}
    files = (p for p in root.rglob("*.py") if not out & set(p.relative_to(root).parts))
    # A few files of the library are not UTF-8 on purpose.
    return (p.read_text(encoding="utf-8", errors="replace") for p in sorted(files))


def wikitext103(path: str | Path, split: Literal["train", "validation", "test"]) -> Iterator[str]:
    """Articles of a local copy of WikiText-103 (Merity et al., arXiv 1609.07843).

    Args:
      path: a folder with the original text files (``wiki.train.raw`` or ``wiki.train.tokens``,
        ``wiki.valid...``, ``wiki.test...``), or with parquet files whose names begin with the split
        and whose column ``text`` holds a line each (``wikitext-103-raw-v1/train-*.parquet``).
      split: which part.

    Raises:
      FileNotFoundError: no such folder, or none of these files in it.
      ValueError: an unknown split, or a file in another format.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be train, validation or test, got {split!r}.")
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}.")
    short = "valid" if split == "validation" else split
    for name in (f"wiki.{short}.raw", f"wiki.{short}.tokens"):
        if (root / name).is_file():
            return _articles(_lines(root / name))
    files = sorted(root.glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{root} holds neither wiki.{short}.raw, nor wiki.{short}.tokens, nor "
            f"{split}-*.parquet: give the folder that holds the files of WikiText-103."
        )
    return _articles(itertools.chain.from_iterable(map(_column, files)))


def fineweb(path: str | Path) -> Iterator[str]:
    """Documents of a local copy of FineWeb (Penedo et al., arXiv 2406.17557).

    Args:
      path: a folder with parquet files (at any depth, in the order of their names) whose column
        ``text`` holds a document a row; or one such file.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: no parquet file, or one without the column ``text``.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"there is no {root}.")
    files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{root} holds no parquet file: give the folder of FineWeb's files.")
    return itertools.chain.from_iterable(map(_column, files))


def split_documents(
    documents: Iterable[str], validation_fraction: float = 0.05
) -> Iterator[tuple[str, bool]]:
    """Pairs of a document and whether it is for validation.

    By a hash of the text: neither the order nor the other documents matter, and copies of one
    document stay together.

    Args:
      documents: texts.
      validation_fraction: of the documents, in (0, 1).

    Raises:
      ValueError: a fraction out of range.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie in (0, 1), got {validation_fraction!r}.")
    bound = validation_fraction * 2**32
    return ((text, zlib.crc32(text.encode()) < bound) for text in documents)


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's lines by article: ` = Title = ` begins one, ` = = Section = = ` does not."""
    article: list[str] = []
    for line in lines:
        if re.fullmatch(r" = [^=].* = \n?", line) and not line.startswith(" = = "):
            if any(part.strip() for part in article):
                yield "".join(article)
            article = []
        article.append(line if line.endswith("\n") or not line else line + "\n")
    if any(part.strip() for part in article):
        yield "".join(article)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}).") from error


def _column(path: Path) -> Iterator[str]:
    """The column ``text`` of a parquet file, a few thousand rows in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file: {error}") from error
    if "text" not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column 'text', only {', '.join(file.schema_arrow.names)}.")
    kind = file.schema_arrow.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"the column 'text' of {path} holds {kind}, not strings.")
    for batch in file.iter_batches(columns=["text"]):
        yield from (text for text in batch.column("text").to_pylist() if text is not None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): change the pattern.") from error
