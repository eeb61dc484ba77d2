"""What ``mupjax reproduce llama-adam`` and its kin train: decoders on text, at three scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import optax
import xarray as xr

from mupjax.data import text
from mupjax.matrix_optimizers import dion, muon
from mupjax.models import Decoder, gpt2, llama
from mupjax.optimizers import wsd_schedule
from mupjax.parametrization import Family
from mupjax.reproduce.sizes import check_data, restricted
from mupjax.reproduce.target import Scale
from mupjax.setting import Setting
from mupjax.sweep import sweep
from theory.curves import Scale as HPScale
from theory.decomposition import decomposition_observer
from theory.trajectory import GWB_GPT2, GWB_LLAMA, Averaging

__all__ = [
    "EXPERIMENTS",
    "PARAMETRIZATION",
    "Axis",
    "Experiment",
    "Sizes",
    "check_sizes",
    "check_whole",
    "corpus_of",
    "hyperparameters",
    "largest_of",
    "model_of",
    "setting_of",
    "train",
    "vocabulary_of",
]

PARAMETRIZATION = "muP"
ATTENTION: Literal["1/head_dim"] = "1/head_dim"
# Beyond, one width takes a CPU days.
_LARGEST_ON_CPU = 256
# Of the vocabulary that GWB's number of steps per epoch speaks for, GPT-2's.
_PUBLISHED_VOCABULARY = 50257
_LAPTOP_TOKENS = 2_000_000
# Characters from which byte pairs are learned.
_LEARNED_FROM = 50_000_000


@dataclasses.dataclass(frozen=True)
class Axis:
    """One hyperparameter and what is held beside it.

    Attributes:
      label: of its sweep, unique in an experiment.
      hp: name.
      scale: on which it is compared.
      values: grid, increasing, by scale of the target.
      fixed: other hyperparameters.
      options: of the optimizer, not hyperparameters (ranks).
    """

    label: str
    hp: str
    scale: HPScale
    values: Mapping[Scale, tuple[float, ...]]
    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One of the paper's: a model, an optimizer and the axes that are swept."""

    model: Literal["llama", "gpt2"]
    optimizer: Literal["adam", "muon", "dion"]
    axes: tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is trained, and on what.

    Attributes:
      widths: n, increasing; the first is the base width.
      steps: T.
      seeds: S.
      batch_size: sequences.
      context: tokens that each predicts.
      layers, heads: of the decoder.
      validation_sequences: in the validation batch, of which all losses and gradients are.
      averaging: of the iterates.
      times: numbers of updates at which the decomposition is recorded on the way.
      text: "standard_library", or "wikitext103" or "fineweb" from the folder `data`.
      data: folder with a local copy.
    """

    widths: tuple[int, ...]
    steps: int
    seeds: int
    batch_size: int
    context: int
    layers: int
    heads: int
    validation_sequences: int
    averaging: Averaging
    times: tuple[int, ...]
    text: Literal["standard_library", "wikitext103", "fineweb"]
    data: str | None = None

    @property
    def published(self) -> bool:
        """Text, steps, batch and context are the paper's."""
        return self.text != "standard_library"


def _octaves(low: float, high: float, step: float = 1.0) -> tuple[float, ...]:
    return tuple(2.0**x for x in np.arange(low, high + step / 2, step))


def _windows(low: float, high: float, step: float = 1.0) -> tuple[float, ...]:
    """Momenta β whose windows 1/(1 − β) are powers of two."""
    return tuple(1 - 2.0**-x for x in np.arange(low, high + step / 2, step))


def _rates(paper: tuple[float, ...]) -> Mapping[Scale, tuple[float, ...]]:
    # On the small text the optima lie between 2^-7.1 (Dion, width 16) and 2^-4.8 (Muon, width 128).
    return {
        "tiny": _octaves(-8.25, -3.75, 2.25),
        "laptop": _octaves(-8.25, -3.75, 0.9),
        "paper": paper,
    }


_ADAM = {"b1": 0.9, "b2": 0.999}
_LLAMA_ADAM = _rates((1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 4.8e-3, 5.7e-3, 6.7e-3, 8e-3))
_LLAMA_MUON = _rates((1e-3, 2e-3, 4e-3, 5.7e-3, 8e-3, 1.1e-2, 1.6e-2, 1.9e-2))
_GPT2_ADAM = _rates((3e-3, 6e-3, 8e-3, 1.2e-2, 1.7e-2, 2.4e-2, 3.4e-2))
_GPT2_MUON = _rates((3e-3, 6e-3, 1.2e-2, 2e-2, 4e-2, 6e-2, 1.2e-1))
# Adam's learning rate beside the swept quantity; at laptop scale near the best of llama-adam's.
_BESIDE: Mapping[Scale, float] = {"tiny": 2.0**-6, "laptop": 2.0**-6, "paper": 4e-3}


EXPERIMENTS: Mapping[str, Experiment] = MappingProxyType(
    {
        "llama-adam": Experiment(
            "llama", "adam", (Axis("lr", "learning_rate", "log2", _LLAMA_ADAM, _ADAM),)
        ),
        "adam-betas": Experiment(
            "llama",
            "adam",
            (
                Axis(
                    "b1",
                    "b1",
                    "momentum",
                    {
                        "tiny": _windows(1, 5, 2),
                        "laptop": _windows(0.5, 5.5),
                        "paper": (0.63, 0.78, 0.86, 0.92, 0.95),
                    },
                    {"b2": 0.999},
                ),
                Axis(
                    "b2",
                    "b2",
                    "momentum",
                    {
                        "tiny": _windows(4, 10, 3),
                        "laptop": _windows(1.5, 9, 1.5),
                        "paper": (0.95, 0.98, 0.99, 0.995, 0.998, 0.9999),
                    },
                    {"b1": 0.9},
                ),
            ),
        ),
        "llama-muon": Experiment(
            "llama", "muon", (Axis("lr", "learning_rate", "log2", _LLAMA_MUON),)
        ),
        "llama-dion": Experiment(
            "llama",
            "dion",
            (
                Axis(
                    "bounded",
                    "learning_rate",
                    "log2",
                    _LLAMA_MUON,
                    options={"rank_fraction": 0.5, "bounded": True},
                ),
                Axis(
                    "proportional",
                    "learning_rate",
                    "log2",
                    _LLAMA_MUON,
                    options={"rank_fraction": 0.5},
                ),
            ),
        ),
        "gpt2-adam": Experiment(
            "gpt2",
            "adam",
            (Axis("lr", "learning_rate", "log2", _GPT2_ADAM, {"b1": 0.9, "b2": 0.95}),),
        ),
        "gpt2-muon": Experiment("gpt2", "muon", (Axis("lr", "learning_rate", "log2", _GPT2_MUON),)),
    }
)


def _marks(updates: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(updates * share)) for share in _SHARES}))


_SHARES = (0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0)
_WIDTHS = tuple(2**k for k in range(7, 12))
_LAPTOP = Sizes(
    widths=(16, 32, 64, 128),
    steps=250,
    seeds=3,
    batch_size=8,
    context=32,
    layers=4,
    heads=4,
    validation_sequences=32,
    averaging=Averaging(0.95, 0.99, 2, 10, 150),
    times=_marks(250),
    text="standard_library",
)
_TINY = dataclasses.replace(
    _LAPTOP,
    widths=(8, 16),
    steps=24,
    seeds=2,
    batch_size=4,
    context=8,
    layers=1,
    heads=2,
    validation_sequences=4,
    averaging=Averaging(0.5, 0.8, 2, 4, 8),
    times=(8, 24),
)
# One epoch of WikiText-103 and 1e9 tokens of FineWeb.
_PAPER: Mapping[str, Sizes] = {
    "llama": Sizes(
        widths=_WIDTHS,
        steps=7185,
        seeds=3,
        batch_size=128,
        context=128,
        layers=4,
        heads=8,
        validation_sequences=256,
        averaging=GWB_LLAMA,
        times=_marks(7185),
        text="wikitext103",
    ),
    "gpt2": Sizes(
        widths=_WIDTHS,
        steps=10**9 // (256 * 1024),
        seeds=3,
        batch_size=256,
        context=1024,
        layers=4,
        heads=8,
        validation_sequences=256,
        averaging=GWB_GPT2,
        times=_marks(10**9 // (256 * 1024)),
        text="fineweb",
    ),
}


def check_sizes(
    name: str,
    scale: Scale,
    *,
    seeds: int | None = None,
    max_width: int | None = None,
    data: str | None = None,
) -> Sizes:
    """The sizes of an experiment at a scale, with the options of the command line.

    Raises:
      ValueError: an option out of range; ``data`` where it is not used, or not where it is needed.
      FileNotFoundError: no such folder.
    """
    sizes = _sizes(name, scale)
    check_data(name, scale, sizes.text if sizes.published else None, data)
    sizes = dataclasses.replace(sizes, data=data)
    return restricted(
        sizes, scale, seeds=seeds, max_width=max_width, largest_on_cpu=_LARGEST_ON_CPU
    )


def largest_of(name: str, scale: Scale) -> int:
    """The largest width of an experiment at a scale, on any device."""
    return _sizes(name, scale).widths[-1]


def _sizes(name: str, scale: Scale) -> Sizes:
    experiment = EXPERIMENTS[name]
    if scale == "laptop" and len(experiment.axes) > 1:
        # With three seeds two sweeps take more than a quarter of an hour.
        return dataclasses.replace(_LAPTOP, seeds=2)
    return {"tiny": _TINY, "laptop": _LAPTOP, "paper": _PAPER[experiment.model]}[scale]


def corpus_of(sizes: Sizes, folder: Path) -> text.Corpus:
    """Tokens, kept in ``folder/tokens`` once made: bytes of the standard library, or byte pairs
    learned on the beginning of the training text, as many as GPT-2's.
    """
    out = folder / "tokens"
    if sizes.text == "standard_library":
        documents = text.split_documents(text.standard_library())
        return text.tokenize(documents, text.ByteTokenizer(), out, max_tokens=_LAPTOP_TOKENS)
    assert sizes.data is not None
    path = Path(sizes.data)
    saved = folder / "tokenizer.model"
    if sizes.text == "wikitext103":
        training = lambda: text.wikitext103(path, "train")  # noqa: E731
        held = ((t, True) for t in text.wikitext103(path, "validation"))
        documents = (pair for part in (((t, False) for t in training()), held) for pair in part)
    else:
        training = lambda: text.fineweb(path)  # noqa: E731
        documents = text.split_documents(training(), 0.005)
    if saved.exists():
        tokenizer = text.BPETokenizer(saved)
    else:
        tokenizer = text.BPETokenizer.train(_beginning(training()), _PUBLISHED_VOCABULARY)
        tokenizer.save(saved)
    limit = None if sizes.text == "wikitext103" else 10**9 + 1
    corpus = text.tokenize(documents, tokenizer, out, max_tokens=limit)
    check_whole(corpus, sizes)
    return corpus


def check_whole(corpus: text.Corpus, sizes: Sizes) -> None:
    """Refuse a fragment of the published text, of which training would make many epochs.

    Raises:
      ValueError: the published training, one epoch, reads more than twice as many tokens.
    """
    read = sizes.steps * sizes.batch_size * sizes.context
    if read > 2 * len(corpus.train):
        raise ValueError(
            f"{sizes.data} has {len(corpus.train):,} tokens of training text, and the published "
            f"training reads {read:,} of {sizes.text}, about one epoch: give the whole of it."
        )


def _beginning(documents: Iterable[str]) -> Iterator[str]:
    """The first documents: SentencePiece holds all that it learns from in memory."""
    seen = 0
    for document in documents:
        yield document
        seen += len(document)
        if seen >= _LEARNED_FROM:
            return


def vocabulary_of(sizes: Sizes) -> int:
    """Size of the vocabulary that `corpus_of` will have."""
    return _PUBLISHED_VOCABULARY if sizes.published else text.ByteTokenizer().vocabulary


def setting_of(sizes: Sizes, corpus: text.Corpus) -> Setting:
    """The learning problem."""
    return text.language_modelling(
        corpus,
        batch_size=sizes.batch_size,
        context=sizes.context,
        validation_sequences=sizes.validation_sequences,
        name=sizes.text,
    )


def model_of(experiment: Experiment, sizes: Sizes, vocabulary: int) -> Callable[..., Decoder]:
    """``factory(width, rngs)``."""
    common: dict[str, Any] = {
        "layers": sizes.layers,
        "heads": sizes.heads,
        "attention_scale": ATTENTION,
    }
    if experiment.model == "llama":
        return lambda width, rngs: llama(vocabulary, width, rngs=rngs, **common)
    return lambda width, rngs: gpt2(vocabulary, width, context=sizes.context, rngs=rngs, **common)


def _optimizer(
    experiment: Experiment, axis: Axis, sizes: Sizes
) -> tuple[Callable[..., optax.GradientTransformation], Family | None]:
    if experiment.optimizer == "adam":
        return (lambda learning_rate, b1, b2: optax.adam(learning_rate, b1=b1, b2=b2)), None
    if experiment.optimizer == "muon":
        return (
            lambda learning_rate, adam_learning_rate, roles: muon(
                learning_rate, roles=roles, adam_learning_rate=adam_learning_rate
            )
        ), "spectral"
    # 128 at base width 128 (GWB): the bound goes with the base width.
    bound = sizes.widths[0] if axis.options.get("bounded") else None
    fraction = axis.options["rank_fraction"]
    return (
        lambda learning_rate, adam_learning_rate, roles: dion(
            learning_rate,
            roles=roles,
            adam_learning_rate=adam_learning_rate,
            rank_fraction=fraction,
            max_rank=bound,
        )
    ), "spectral"


def hyperparameters(
    experiment: Experiment, axis: Axis, scale: Scale
) -> dict[str, float | tuple[float, ...]]:
    """The axis and what is held beside it."""
    held: dict[str, float | tuple[float, ...]] = dict(axis.fixed)
    if experiment.optimizer != "adam":
        published = 1e-2 if experiment.model == "gpt2" else _BESIDE["paper"]
        held["adam_learning_rate"] = published if scale == "paper" else _BESIDE[scale]
    elif axis.hp != "learning_rate":
        held["learning_rate"] = _BESIDE[scale]
    return {**held, axis.hp: axis.values[scale]}


def train(
    name: str,
    axis: Axis,
    scale: Scale,
    sizes: Sizes,
    corpus: text.Corpus,
    folder: Path,
    progress: bool | None,
) -> xr.Dataset:
    """One sweep of an experiment, with the decomposition; resumed if it was interrupted."""
    experiment = EXPERIMENTS[name]
    optimizer, family = _optimizer(experiment, axis, sizes)
    return sweep(
        model_of(experiment, sizes, corpus.vocabulary),
        setting_of(sizes, corpus),
        optimizer,
        [PARAMETRIZATION],
        widths=sizes.widths,
        base_width=sizes.widths[0],
        hyperparameters=hyperparameters(experiment, axis, scale),
        steps=sizes.steps,
        seeds=sizes.seeds,
        schedule=wsd_schedule(sizes.steps),
        attention=ATTENTION,
        optimizer_family=family,
        observers=[decomposition_observer(sizes.averaging, times=sizes.times)],
        out=folder / f"{axis.label}.nc",
        existing="resume",
        progress=progress,
    )
