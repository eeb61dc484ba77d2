"""Token arrays of documents, in memory or in files mapped into it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mupjax.data.text.tokenizers import Tokenizer

__all__ = ["Corpus", "tokenize"]

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two token arrays and what made them.

    Attributes:
      train, validation: ids, shape (N,), uint16 (or uint32 beyond 65536 ids); mapped from files if
        they were written.
      vocabulary: number of ids.
      tokenizer: fingerprint of the tokenizer.
    """

    train: Tokens
    validation: Tokens
    vocabulary: int
    tokenizer: str

    def fingerprint(self) -> str:
        """A hash of both arrays (16 hexadecimal digits), stored with results."""
        digest = hashlib.sha256(self.tokenizer.encode())
        for tokens in (self.train, self.validation):
            digest.update(str(len(tokens)).encode())
            for start in range(0, len(tokens), 1 << 24):
                digest.update(tokens[start : start + (1 << 24)].tobytes())
        return digest.hexdigest()[:16]


def tokenize(
    documents: Iterable[tuple[str, bool]],
    tokenizer: Tokenizer,
    out: str | Path | None = None,
    *,
    max_tokens: int | None = None,
) -> Corpus:
    """Token arrays of documents, each followed by the end-of-text token.

    Args:
      documents: pairs of a text and whether it is for validation (`split_documents`; or
        ``[(t, False) for t in wikitext103(path, "train")]`` and so on, chained).
      tokenizer: any `Tokenizer`.
      out: folder for ``train.npy``, ``validation.npy`` and ``corpus.json``. If it holds those of
        this tokenizer already they are used, and the documents are not read; ``max_tokens`` must be
        the same.
      max_tokens: stop after so many tokens of training text.

    Raises:
      ValueError: no training or no validation text; `out` holds another tokenizer's tokens; an id
        that is not below the tokenizer's vocabulary.
    """
    kind = np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.uint32
    facts = {
        "vocabulary": int(tokenizer.vocabulary),
        "tokenizer": tokenizer.fingerprint(),
        "max_tokens": max_tokens,
    }
    if out is not None and (Path(out) / "corpus.json").exists():
        return _kept(Path(out), facts, kind)
    parts: dict[bool, list[NDArray[Any]]] = {False: [], True: []}
    held = 0
    for text, for_validation in documents:
        ids = np.append(np.asarray(tokenizer.encode(text), np.int64), tokenizer.end_of_text)
        if ids.max() >= tokenizer.vocabulary or ids.min() < 0:
            raise ValueError(
                f"the tokenizer gave the id {int(ids.max())}, and says that its vocabulary is "
                f"{tokenizer.vocabulary}."
            )
        parts[for_validation].append(ids.astype(kind))
        held += 0 if for_validation else len(ids)
        if max_tokens is not None and held >= max_tokens:
            break
    for for_validation, name in ((False, "training"), (True, "validation")):
        if not parts[for_validation]:
            raise ValueError(
                f"no document is for {name}: give more documents (a document is for one or the "
                "other as a whole; a text in one piece has to be cut up first), another "
                "validation_fraction, or a larger max_tokens."
            )
    arrays = {k: np.concatenate(v) for k, v in parts.items()}
    train = arrays[False][:max_tokens]
    if out is None:
        return Corpus(train, arrays[True], facts["vocabulary"], facts["tokenizer"])
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    np.save(target / "train.npy", train)
    np.save(target / "validation.npy", arrays[True])
    facts |= {"train": len(train), "validation": len(arrays[True])}
    # Last: what is there without it was interrupted, and is written anew.
    (target / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    return _kept(target, facts, kind)


def _kept(target: Path, facts: dict[str, Any], kind: type[np.unsignedinteger[Any]]) -> Corpus:
    again = f"remove {target}, and it is made anew"
    try:
        found = json.loads((target / "corpus.json").read_text())
        if not isinstance(found, dict):
            raise TypeError("corpus.json is no table")
        arrays = {n: np.load(target / f"{n}.npy", mmap_mode="r") for n in ("train", "validation")}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"the tokens kept in {target} are damaged ({error}): {again}.") from error
    if wrong := [k for k, v in facts.items() if found.get(k) != v]:
        raise ValueError(
            f"{target} holds tokens with {wrong[0]} {found.get(wrong[0])!r}, not "
            f"{facts[wrong[0]]!r}: choose another folder, or remove this one."
        )
    for name, tokens in arrays.items():
        # Files of before lengths were recorded have none.
        if tokens.dtype != kind or tokens.shape != (found.get(name, len(tokens)),):
            raise ValueError(
                f"{target / name}.npy holds {tokens.dtype} of shape {tokens.shape}, not "
                f"{found.get(name, 'the')} tokens as {np.dtype(kind)}: {again}."
            )
    return Corpus(arrays["train"], arrays["validation"], facts["vocabulary"], facts["tokenizer"])
