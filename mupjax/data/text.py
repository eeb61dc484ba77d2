"""Text as token arrays: readers of folders, WikiText-103 and FineWeb, tokenizers, a `Setting`.

Nothing is downloaded. Text comes as an iterable of documents (`folder`, `standard_library`,
`wikitext103`, `fineweb`, or any iterable of strings), is turned into one array of token ids with an
end-of-text token after each document, kept in memory or in a file that is mapped into memory, and
is sampled inside the compiled loop by a pure function of key and step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from mupjax.setting import Predict, Setting

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "Tokenizer",
    "fineweb",
    "folder",
    "language_modelling",
    "split_documents",
    "standard_library",
    "tokenize",
    "wikitext103",
]

Tokens = NDArray[np.uint16] | NDArray[np.uint32]
Order = Literal["epochs", "random"]


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

        self.model = model if isinstance(model, bytes) else _existing(Path(model)).read_bytes()
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


# --- documents ----------------------------------------------------------------------------------


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
    root = _existing(Path(path))
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
        yield from file


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
    for batch in file.iter_batches(columns=["text"]):
        yield from (text for text in batch.column("text").to_pylist() if text is not None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): change the pattern.") from error


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}.")
    return path


# --- tokens -------------------------------------------------------------------------------------


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
        return _kept(Path(out), facts)
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
                f"no document is for {name}: give more documents, or another validation_fraction."
            )
    arrays = {k: np.concatenate(v) for k, v in parts.items()}
    train = arrays[False][:max_tokens]
    if out is None:
        return Corpus(train, arrays[True], facts["vocabulary"], facts["tokenizer"])
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    np.save(target / "train.npy", train)
    np.save(target / "validation.npy", arrays[True])
    # Last: what is there without it was interrupted, and is written anew.
    (target / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    return _kept(target, facts)


def _kept(target: Path, facts: dict[str, Any]) -> Corpus:
    found = json.loads((target / "corpus.json").read_text())
    if wrong := [k for k, v in facts.items() if found.get(k) != v]:
        raise ValueError(
            f"{target} holds tokens with {wrong[0]} {found.get(wrong[0])!r}, not "
            f"{facts[wrong[0]]!r}: choose another folder, or remove this one."
        )
    arrays = [np.load(target / f"{name}.npy", mmap_mode="r") for name in ("train", "validation")]
    return Corpus(arrays[0], arrays[1], facts["vocabulary"], facts["tokenizer"])


# --- the setting --------------------------------------------------------------------------------


def language_modelling(
    corpus: Corpus,
    *,
    batch_size: int,
    context: int,
    validation_sequences: int = 64,
    order: Order = "epochs",
    name: str = "text",
) -> Setting:
    """Next-token prediction: batches of sequences, cross-entropy in nats per token.

    A batch is an integer array (B, context + 1); the model maps the first `context` tokens of each
    row to logits (B, context, V).

    Args:
      corpus: of `tokenize`.
      batch_size: B.
      context: tokens that a sequence predicts.
      validation_sequences: so many sequences, evenly spread over the validation text.
      order: ``"epochs"``: the text is cut into sequences, each of which is seen once an epoch, in
        an order that the key decides; ``"random"``: sequences begin anywhere.
      name: of the setting.

    Raises:
      ValueError: a size below 1, an unknown order, or too few tokens for what is asked; from the
        loss, while it is traced, logits for fewer tokens than the tokenizer has.
    """
    for argument, value in (
        ("batch_size", batch_size),
        ("context", context),
        ("validation_sequences", validation_sequences),
    ):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value!r}.")
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {order!r}.")
    sequences = (len(corpus.train) - 1) // context
    if sequences < batch_size:
        raise ValueError(
            f"the training text has {len(corpus.train)} tokens, {sequences} sequences of "
            f"{context}, too few for batches of {batch_size}: give more text, or a smaller batch "
            "or context."
        )
    held = (len(corpus.validation) - 1) // context
    if held < validation_sequences:
        raise ValueError(
            f"the validation text has {len(corpus.validation)} tokens, {held} sequences of "
            f"{context}, fewer than validation_sequences={validation_sequences}: ask for fewer, or "
            "raise validation_fraction."
        )
    starts = np.linspace(0, held - 1, validation_sequences).astype(int) * context
    validation = np.stack([corpus.validation[s : s + context + 1] for s in starts])

    def sample(tokens: jax.Array, key: jax.Array, step: jax.Array) -> jax.Array:
        if order == "random":
            own = jax.random.fold_in(key, step)
            begin = jax.random.randint(own, (batch_size,), 0, tokens.size - context)
        else:
            count = jnp.asarray(step, jnp.uint32) * batch_size + jnp.arange(
                batch_size, dtype=jnp.uint32
            )
            begin = shuffled(key, count, sequences) * context
        cut = jax.vmap(lambda s: jax.lax.dynamic_slice(tokens, (s,), (context + 1,)))
        return cut(begin.astype(jnp.int32)).astype(jnp.int32)

    def loss(predict: Predict, batch: jax.Array) -> jax.Array:
        logits = predict(batch[:, :-1])
        shape = (*batch[:, :-1].shape, corpus.vocabulary)
        if logits.shape[:2] != shape[:2] or logits.shape[2:] < shape[2:]:
            raise ValueError(
                f"the model maps tokens of shape {shape[:2]} to an array of shape {logits.shape}, "
                f"but the tokenizer's vocabulary takes logits of shape {shape}: build the model "
                f"with vocabulary={corpus.vocabulary}."
            )
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]))

    return Setting(
        name=name,
        sample=sample,
        loss=loss,
        validation=jnp.asarray(validation.astype(np.int32)),
        data=jnp.asarray(np.asarray(corpus.train)),
        configuration={
            "batch_size": batch_size,
            "context": context,
            "vocabulary": corpus.vocabulary,
            "tokenizer": corpus.tokenizer,
            "corpus": corpus.fingerprint(),
            "train_tokens": len(corpus.train),
            "validation_sequences": validation_sequences,
            "order": order,
            "loss_units": "nats per token",
        },
    )


def shuffled(key: jax.Array, count: jax.Array, size: int) -> jax.Array:
    """Which of `size` items comes at place `count`: every epoch is a permutation of its own.

    A bijection on the numbers of k bits (rounds of an odd multiplication, an addition and a shifted
    exclusive or, with constants drawn from key and epoch), applied again where it leaves the range:
    a permutation of 0 … size − 1 that costs no memory and can be entered at any place.

    Args:
      key: typed PRNG key.
      count: places, not negative, uint32, any shape.
      size: number of items, below 2³¹.
    """
    bits = max(1, (size - 1).bit_length())
    mask, shift = jnp.uint32((1 << bits) - 1), max(1, bits // 2)

    def one(count: jax.Array) -> jax.Array:
        epoch, place = count // size, count % size
        constants = jax.random.bits(jax.random.fold_in(key, epoch), (4, 2), jnp.uint32)

        def mixed(x: jax.Array) -> jax.Array:
            for multiplier, offset in constants:
                x = (x * (multiplier | 1) + offset) & mask
                x = x ^ (x >> shift)
            return x

        return jax.lax.while_loop(lambda x: x >= size, mixed, mixed(place))

    flat = jax.vmap(one)(jnp.asarray(count, jnp.uint32).reshape(-1))
    return flat.reshape(jnp.shape(count))
