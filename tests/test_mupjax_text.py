"""Text: readers on files in the published formats, tokenizers, sampling against plain loops."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from mupjax import sweep
from mupjax.data.text import (
    BPETokenizer,
    ByteTokenizer,
    Corpus,
    fineweb,
    folder,
    language_modelling,
    split_documents,
    standard_library,
    tokenize,
    wikitext103,
)
from mupjax.data.text.language_modelling import shuffled
from mupjax.models.transformers import llama

STORIES = [
    "Once upon a time\n\tthere was a naïve cat.\r\n",
    "The cat sat.  Two spaces, then \U0001f600 and 日本語.",
    "a b c d e f g " * 40,
    "def f(x):\n    return x + 1\n\n\n" * 30,
]


def pairs(documents, every=3):
    return [(text, i % every == 0) for i, text in enumerate(documents)]


# --- tokenizers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(itertools.islice(standard_library(), 20), 600)


def test_bytes_come_back_as_they_were():
    tokenizer = ByteTokenizer()
    for text in STORIES:
        ids = tokenizer.encode(text)
        np.testing.assert_array_equal(ids, list(text.encode()))
        assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text


def test_pieces_come_back_as_they_were(bpe):
    assert bpe.vocabulary == 600
    for text in [*STORIES, *itertools.islice(standard_library(), 30, 33)]:
        ids = bpe.encode(text)
        assert bpe.decode([*ids, bpe.end_of_text]) == text
        assert max(ids) < 600
    code = next(standard_library())
    assert len(bpe.encode(code)) < 0.6 * len(code.encode())


def test_a_saved_tokenizer_is_the_same(bpe, tmp_path):
    bpe.save(tmp_path / "bpe.model")
    again = BPETokenizer(tmp_path / "bpe.model")
    assert again.fingerprint() == bpe.fingerprint() != ByteTokenizer().fingerprint()
    assert again.encode(STORIES[0]) == bpe.encode(STORIES[0])


def test_tokenizers_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        BPETokenizer.train(["", "\n"])
    with pytest.raises(ValueError, match=r"cannot learn 100 pieces .* at least 260"):
        BPETokenizer.train(STORIES, 100)
    (tmp_path / "other").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="no SentencePiece model"):
        BPETokenizer(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent"):
        BPETokenizer(tmp_path / "absent")


# --- readers ------------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in (("b.txt", "B"), ("a.txt", "A"), ("deep/c.txt", "C"), ("d.md", "D")):
        (tmp_path / name).write_text(text)
    assert list(folder(tmp_path)) == ["A", "B", "C"]
    assert list(folder(tmp_path, "*.md")) == ["D"]
    with pytest.raises(ValueError, match=r"no file in .* matches '\*\.rst'"):
        folder(tmp_path, "*.rst")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        folder(tmp_path / "absent")
    (tmp_path / "z.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"z\.txt is not UTF-8"):
        list(folder(tmp_path))


def test_the_standard_library_is_code():
    texts = list(itertools.islice(standard_library(), 50))
    assert sum("import " in text for text in texts) > 25
    assert sum(map(len, texts)) > 200_000


WIKI = (
    " \n = First Article = \n \n Text one . \n = = A section = = \n Text two . \n"
    " \n = Second Article = \n \n = = = Deep = = = \n Text three . \n"
)


def test_wikitext_is_cut_into_articles_in_all_its_formats(tmp_path):
    (tmp_path / "wiki.train.raw").write_text(WIKI)
    (tmp_path / "wiki.valid.tokens").write_text(WIKI)
    lines = WIKI.splitlines(keepends=True)
    table = pa.table({"text": ["" if line == " \n" else line for line in lines]})
    pq.write_table(table.slice(0, 4), tmp_path / "test-00000-of-00002.parquet")
    pq.write_table(table.slice(4), tmp_path / "test-00001-of-00002.parquet")
    found = {s: list(wikitext103(tmp_path, s)) for s in ("train", "validation", "test")}
    for articles in found.values():
        assert len(articles) == 2
        assert articles[0].lstrip().startswith("= First Article =")
        assert "Text two" in articles[0]
        assert articles[1].lstrip().startswith("= Second Article =")
        assert "Text three" in articles[1]
    assert "".join(found["train"]) == WIKI.removeprefix(" \n")
    assert found["train"] == found["validation"]


def test_wikitext_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither wiki\.train\.raw"):
        wikitext103(tmp_path, "train")
    with pytest.raises(ValueError, match="split must be train, validation or test"):
        wikitext103(tmp_path, "valid")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        wikitext103(tmp_path / "absent", "train")


def test_fineweb_is_a_document_a_row(tmp_path):
    (tmp_path / "CC-MAIN-2024-10").mkdir()
    columns = {"id": ["1", "2"], "language_score": [0.9, 0.8]}
    pq.write_table(
        pa.table({"text": STORIES[:2], **columns}), tmp_path / "CC-MAIN-2024-10/000.parquet"
    )
    pq.write_table(pa.table({"text": [STORIES[2], None], **columns}), tmp_path / "sample.parquet")
    assert list(fineweb(tmp_path)) == STORIES[:3]
    assert list(fineweb(tmp_path / "sample.parquet")) == STORIES[2:3]
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "z.parquet")
    with pytest.raises(ValueError, match=r"z\.parquet has no column 'text', only content"):
        list(fineweb(tmp_path))
    (tmp_path / "z.parquet").write_text("text")
    with pytest.raises(ValueError, match=r"z\.parquet is no parquet file"):
        list(fineweb(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no parquet file"):
        fineweb(tmp_path / "empty")


# --- tokens -------------------------------------------------------------------------------------


def test_documents_are_split_by_their_text():
    texts = [f"document {i}" for i in range(2000)]
    chosen = dict(split_documents(texts, 0.1))
    assert stats.binomtest(sum(chosen.values()), 2000, 0.1).pvalue > 1e-3
    assert dict(split_documents(reversed(texts), 0.1)) == chosen
    with pytest.raises(ValueError, match=r"validation_fraction must lie in \(0, 1\), got 0"):
        split_documents(texts, 0)


def test_every_document_ends_with_its_token():
    tokenizer = ByteTokenizer()
    corpus = tokenize(pairs(["ab", "c", "", "d"]), tokenizer)
    assert corpus.train.tolist() == [ord("c"), 256, 256]
    assert corpus.validation.tolist() == [ord("a"), ord("b"), 256, ord("d"), 256]
    assert corpus.train.dtype == np.uint16
    assert tokenize(pairs(["ab", "c", "", "d"]), tokenizer, max_tokens=2).train.size == 2


def test_tokens_are_kept_and_mapped(tmp_path, bpe):
    first = tokenize(pairs(STORIES), ByteTokenizer(), tmp_path / "tokens")
    assert isinstance(first.train, np.memmap)

    def never():
        raise AssertionError("the documents were read again")
        yield

    again = tokenize(never(), ByteTokenizer(), tmp_path / "tokens")
    np.testing.assert_array_equal(first.train, again.train)
    assert first.fingerprint() == again.fingerprint()
    assert tokenize(pairs(STORIES), ByteTokenizer()).fingerprint() == first.fingerprint()
    assert tokenize(pairs(STORIES[::-1]), ByteTokenizer()).fingerprint() != first.fingerprint()
    with pytest.raises(ValueError, match="holds tokens with vocabulary 257, not 600"):
        tokenize(pairs(STORIES), bpe, tmp_path / "tokens")
    with pytest.raises(ValueError, match="holds tokens with max_tokens None, not 5"):
        tokenize(pairs(STORIES), ByteTokenizer(), tmp_path / "tokens", max_tokens=5)


def test_interrupted_writing_is_done_again(tmp_path):
    out = tmp_path / "tokens"
    tokenize(pairs(STORIES), ByteTokenizer(), out)
    (out / "corpus.json").unlink()
    (out / "train.npy").write_bytes(b"half")
    corpus = tokenize(pairs(STORIES), ByteTokenizer(), out)
    assert json.loads((out / "corpus.json").read_text())["vocabulary"] == 257
    assert corpus.fingerprint() == tokenize(pairs(STORIES), ByteTokenizer()).fingerprint()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("corpus.json", b"[]"),
        ("corpus.json", b'{"vocabulary": 25'),
        ("train.npy", None),
        ("train.npy", b"half"),
        ("train.npy", np.arange(9.0)),
        ("train.npy", np.zeros((2, 3), np.uint16)),
        ("validation.npy", np.zeros(1, np.uint16)),
    ],
)
def test_damaged_tokens_are_named_and_what_to_do(tmp_path, name, content):
    out = tmp_path / "tokens"
    tokenize(pairs(STORIES), ByteTokenizer(), out)
    (out / name).unlink()
    if isinstance(content, bytes):
        (out / name).write_bytes(content)
    elif content is not None:
        np.save(out / name, content)
    with pytest.raises(ValueError, match=r"remove .*tokens, and it is made anew"):
        tokenize(pairs(STORIES), ByteTokenizer(), out)


def test_a_truncated_array_is_noticed(tmp_path):
    out = tmp_path / "tokens"
    tokenize(pairs(STORIES), ByteTokenizer(), out)
    whole = (out / "train.npy").read_bytes()
    (out / "train.npy").write_bytes(whole[: len(whole) - 2])
    with pytest.raises(ValueError, match="damaged"):
        tokenize(pairs(STORIES), ByteTokenizer(), out)


def test_text_in_another_coding_is_named(tmp_path):
    (tmp_path / "wiki.train.raw").write_bytes(b" = Caf\xe9 = \n\nText\n")
    with pytest.raises(ValueError, match=r"wiki\.train\.raw is not UTF-8"):
        list(wikitext103(tmp_path, "train"))
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"'text' of .*a\.parquet holds int64, not strings"):
        list(fineweb(tmp_path))


def test_text_for_one_purpose_only_is_refused():
    with pytest.raises(ValueError, match="no document is for validation"):
        tokenize([("a", False)], ByteTokenizer())
    with pytest.raises(ValueError, match="no document is for training"):
        tokenize([("a", True)], ByteTokenizer())


# --- the setting --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 1025])
def test_an_epoch_is_a_permutation(size):
    key = jax.random.key(3)
    orders = [np.asarray(shuffled(key, e * size + np.arange(size), size)) for e in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
    if size > 3:
        assert (orders[0] != orders[1]).any()
    if size >= 1000:
        for order in orders:
            # Not in order, and neighbours are not kept together.
            assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.1
            assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.1


def test_places_of_an_epoch_are_even_over_keys():
    # Item 0's place over many keys, against the uniform distribution.
    keys = jax.random.split(jax.random.key(0), 4000)
    items = jax.vmap(lambda key: shuffled(key, jnp.uint32(5), 20))(keys)
    counts = np.bincount(np.asarray(items), minlength=20)
    assert stats.chisquare(counts).pvalue > 1e-3


def counting(train=200, validation=100):
    return Corpus(
        np.arange(train, dtype=np.uint16), np.arange(validation, dtype=np.uint16), 256, ""
    )


def test_batches_cover_the_text_once_an_epoch():
    context, batch_size = 9, 4
    setting = language_modelling(
        counting(), batch_size=batch_size, context=context, validation_sequences=3
    )
    sequences = (200 - 1) // context
    key, seen = jax.random.key(1), []
    sample = jax.jit(setting.sample)
    for step in range(sequences):
        batch = np.asarray(sample(setting.data, key, step))
        assert batch.shape == (batch_size, context + 1)
        assert batch.dtype == np.int32
        np.testing.assert_array_equal(np.diff(batch, axis=1), 1)
        seen.extend(batch[:, 0])
    # So many steps are as many epochs as a batch has rows.
    starts, counts = np.unique(seen, return_counts=True)
    np.testing.assert_array_equal(starts, np.arange(sequences) * context)
    np.testing.assert_array_equal(counts, batch_size)
    np.testing.assert_array_equal(setting.validation[:, 0], [0, 45, 90])


def test_random_order_begins_anywhere():
    setting = language_modelling(
        counting(), batch_size=20, context=9, validation_sequences=2, order="random"
    )
    key = jax.random.key(0)
    starts = np.concatenate(
        [setting.sample(setting.data, key, jnp.int32(t))[:, 0] for t in range(100)]
    )
    assert (starts.min(), starts.max()) == (0, 190)
    assert stats.kstest(starts / 191, "uniform").pvalue > 1e-3


def test_the_loss_is_nats_per_token():
    setting = language_modelling(counting(), batch_size=2, context=5, validation_sequences=2)
    uniform = setting.loss(lambda x: jnp.zeros((*x.shape, 256)), setting.validation)
    assert float(uniform) == pytest.approx(np.log(256), rel=1e-6)
    # A model that knows how to count.
    counts = setting.loss(lambda x: 50.0 * jax.nn.one_hot(x + 1, 256), setting.validation)
    assert float(counts) < 1e-6


def test_a_model_for_another_vocabulary_is_an_error():
    setting = language_modelling(counting(), batch_size=2, context=5, validation_sequences=2)
    with pytest.raises(ValueError, match="build the model with vocabulary=256"):
        setting.loss(lambda x: jnp.zeros((*x.shape, 255)), setting.validation)
    with pytest.raises(ValueError, match=r"to an array of shape \(2, 256\)"):
        setting.loss(lambda x: jnp.zeros((2, 256)), setting.validation)
    # A vocabulary rounded up to a multiple is fine.
    setting.loss(lambda x: jnp.zeros((*x.shape, 320)), setting.validation)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 30, "context": 9}, "22 sequences of 9, too few for batches of 30"),
        ({"batch_size": 2, "context": 60}, "1 sequences of 60, fewer than validation_sequences=2"),
        ({"batch_size": 0, "context": 9}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2, "context": 9, "order": "sorted"}, "order must be one of epochs, random"),
    ],
)
def test_too_little_text_is_an_error(options, text):
    with pytest.raises(ValueError, match=text):
        language_modelling(counting(), validation_sequences=2, **options)


def test_a_small_llama_learns_code():
    documents = split_documents(itertools.islice(standard_library(), 12), 0.3)
    corpus = tokenize(documents, ByteTokenizer())
    setting = language_modelling(corpus, batch_size=8, context=32, validation_sequences=16)
    results = sweep(
        lambda width, rngs: llama(257, width, layers=1, heads=2, zero_readout=True, rngs=rngs),
        setting,
        lambda learning_rate: optax.adam(learning_rate),
        "muP",
        widths=[16, 32],
        base_width=16,
        attention="1/sqrt(head_dim)",
        steps=60,
        seeds=1,
        hyperparameters={"learning_rate": 2.0**-6},
    )
    first, last = results.eval_loss.isel(eval_step=0), results.loss
    np.testing.assert_allclose(first, np.log(257), rtol=1e-6)
    assert np.all(last < 4.0)
