"""Tokenizers: bytes, and byte pairs learned on local text."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["BPETokenizer", "ByteTokenizer", "Tokenizer"]


class Tokenizer(Protocol):
    """What `tokenize` needs of a tokenizer."""

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        ...

    @property
    def end_of_text(self) -> int:
        """The id that follows every document."""
        ...

    def encode(self, text: str) -> Sequence[int] | NDArray[Any]:
        """Ids of a text, without the end-of-text token."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ids; ends of text are left out."""
        ...

    def fingerprint(self) -> str:
        """Tells tokenizers apart; stored with token files and results."""
        ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """The bytes of UTF-8: ids 0 to 255, and 256 at the end of a document."""

    vocabulary: int = dataclasses.field(default=257, init=False)
    end_of_text: int = dataclasses.field(default=256, init=False)

    def encode(self, text: str) -> NDArray[np.uint8]:
        """Ids of a text, without the end-of-text token."""
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; ends of text are left out, and broken UTF-8 becomes U+FFFD."""
        return bytes(int(t) for t in tokens if t < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        """Tells tokenizers apart; stored with token files and results."""
        return "bytes"


class BPETokenizer:
    """Byte-pair encoding by SentencePiece, trained on local text.

    Characters that the training text does not have fall back to bytes, and nothing is normalised:
    any text comes back as it was, but for U+2581, which SentencePiece keeps for itself and returns
    as a space.

    Args:
      model: a serialized SentencePiece model, or the path of one.
    """

    def __init__(self, model: bytes | str | Path) -> None:
        # Takes a tenth of a second to import, which most users of mupjax need not wait for.
        from sentencepiece import SentencePieceProcessor

        if not isinstance(model, bytes):
            if not Path(model).is_file():
                raise FileNotFoundError(f"there is no {model}.")
            model = Path(model).read_bytes()
        self.model = model
        try:
            self._processor = SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise ValueError(f"this is no SentencePiece model: {error}") from error
        if self._processor.eos_id() < 0:
            raise ValueError(
                "the SentencePiece model has no end-of-sentence token, which marks the end of a "
                "document: train it with one (BPETokenizer.train does)."
            )

    @classmethod
    def train(cls, documents: Iterable[str], vocabulary: int = 4096) -> BPETokenizer:
        """Learn `vocabulary` pieces, 256 bytes and the end-of-text token among them.

        Args:
          documents: the text; all of it is read, so pass a part of a large corpus.
          vocabulary: number of ids.

        Raises:
          ValueError: the text is empty or too small for so many pieces.
        """
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        lines = (line for text in documents for line in text.splitlines() if line)
        first = next(lines, None)
        if first is None:
            raise ValueError("there is no text to train a tokenizer on: every document is empty.")
        try:
            SentencePieceTrainer.train(
                sentence_iterator=itertools.chain([first], lines),
                model_writer=model,
                vocab_size=vocabulary,
                model_type="bpe",
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n", "\t"],
                character_coverage=1.0,
                max_sentence_length=1_000_000,
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"SentencePiece cannot learn {vocabulary} pieces from this text ({error}): choose "
                "a vocabulary that fits, at least 260 and the number of distinct characters."
            ) from error
        return cls(model.getvalue())

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return self._processor.vocab_size()

    @property
    def end_of_text(self) -> int:
        """The id that follows every document."""
        return self._processor.eos_id()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the end-of-text token."""
        return self._processor.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; ends of text are left out."""
        return self._processor.decode([int(t) for t in tokens if t != self.end_of_text])

    def fingerprint(self) -> str:
        """Tells tokenizers apart; stored with token files and results."""
        return "bpe-" + hashlib.sha256(self.model).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the model, which `BPETokenizer(path)` reads."""
        Path(path).write_bytes(self.model)
