"""Text as token arrays: readers of folders, WikiText-103 and FineWeb, tokenizers, a `Setting`.

Nothing is downloaded. Text comes as an iterable of documents (`folder`, `standard_library`,
`wikitext103`, `fineweb`, or any iterable of strings), is turned into one array of token ids with an
end-of-text token after each document, kept in memory or in a file that is mapped into memory, and
is sampled inside the compiled loop by a pure function of key and step.
"""

from mupjax.data.text.corpus import Corpus, tokenize
from mupjax.data.text.documents import (
    fineweb,
    folder,
    split_documents,
    standard_library,
    wikitext103,
)
from mupjax.data.text.language_modelling import language_modelling
from mupjax.data.text.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer

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
