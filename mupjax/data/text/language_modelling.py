"""Next-token prediction: batches are a pure function of key and step."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mupjax.data.text.corpus import Corpus
from mupjax.setting import Predict, Setting

__all__ = ["language_modelling", "shuffled"]

Order = Literal["epochs", "random"]


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
