"""A text that needs no download: sentences of a small grammar, every author with people, places and habits of his own.

Some authors note down a secret, a sentence with random digits, several times: the canaries of Carlini et al. (The Secret Sharer, USENIX
Security 2019, section 4.1), of which a language model should not remember a thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedtrust.data.base import RawData, Secret, Task
from fedtrust.engine.seeds import stream
from fedtrust.errors import InputError
from fedtrust.registry import source

#: The characters that a text may consist of; their places are the numbers that models see.
ALPHABET = " .,0123456789abcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"

_GOODS = ("salt", "wool", "bread", "honey", "iron", "apples", "candles", "rope", "cheese", "barley", "oil", "paper")
_PLACES = ("mill", "market", "bridge", "chapel", "forge", "harbour", "inn", "well", "tower", "orchard")
_SEASONS = ("spring", "summer", "autumn", "winter")
_FORMS = (
    "{who} sells {number} {good} to {other}.",
    "{who} walks {number} miles to {town}.",
    "the price of {good} is {number}.",
    "in {season} {who} buys {number} {good}.",
    "the {place} of {town} has {number} steps.",
    "{number} {good} lie at the {place}.",
    "{number} sacks of {good} for {who}.",
)
#: What a secret looks like.
PREFIX = "the code of {name} is "

_REPETITIONS = [0, 1, 2, 4, 8, 16]

#: Every author knows so many people, goods and places.
_PEOPLE, _KNOWN = 3, 4


def encode(text: str) -> Tensor:
    """Return the numbers of a text's characters, int64 [len(text)].

    Raises:
        InputError: a character that is not in the alphabet.
    """
    odd = sorted(set(text) - set(ALPHABET))
    if odd:
        raise InputError(f"'{odd[0]}' is not among the characters of the text ({ALPHABET})")
    return torch.tensor([ALPHABET.index(c) for c in text], dtype=torch.int64)


def decode(numbers: Tensor) -> str:
    """Return the text of characters given by number [n]."""
    return "".join(ALPHABET[int(i)] for i in numbers)


@source(
    "chronicle",
    paper="its canaries: Carlini et al., The Secret Sharer, USENIX Security 2019, section 4.1; the text is of a grammar made for fedtrust",
)
def chronicle(
    *,
    authors: Annotated[int, Field(ge=2, le=200)] = 20,
    samples: Annotated[int, Field(ge=2, le=10_000)] = 60,
    length: Annotated[int, Field(ge=30, le=200)] = 40,
    test_samples: Annotated[int, Field(ge=1, le=10_000)] = 400,
    repetitions: list[Annotated[int, Field(ge=0)]] = _REPETITIONS,
    canaries: Annotated[int, Field(ge=0)] = 2,
    digits: Annotated[int, Field(ge=1, le=6)] = 4,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> RawData:
    """Village chronicles by several authors, and secrets that some of them noted down.

    Args:
        authors: how many there are; the partition `natural` makes each a client.
        samples: training samples of each.
        length: characters of a sample, L; the longest canary has 27.
        test_samples: samples of the test set, by all authors alike and without secrets.
        repetitions: how many samples of its author hold a canary, one entry for each kind of canary; 0 is the control: never written.
        canaries: how many canaries there are of each kind; each of another author as far as there are enough.
        digits: how many random digits a secret has.
        seed: of the text and the secrets.

    Returns:
        x int64 [n, L] and y int64 [n, L], after each character the next. A sample is a row of whole sentences, the last one cut off;
        one with a secret begins with it.

    Raises:
        InputError: more canaries than there are people, or more samples with secrets than an author has samples.
    """
    writers = _writers(authors, seed)
    secrets = _secrets(writers, repetitions, canaries, digits, seed)
    _room(secrets, samples)
    rows, groups = [], []
    for author, writer in enumerate(writers):
        rng = stream(seed, "chronicle/train", author)
        notes = [s.prefix + s.value + "." for s in secrets if s.author == author for _ in range(s.repetitions)]
        rows += [writer.sample(length + 1, rng, begin) for begin in [*notes, *[""] * (samples - len(notes))]]
        groups += [author] * samples
    test = [writers[i % authors].sample(length + 1, stream(seed, "chronicle/test", i)) for i in range(test_samples)]
    task = Task("characters", (length,), len(ALPHABET), labels=tuple(ALPHABET), people=tuple(n for w in writers for n in w.people))
    train, held = (torch.stack([encode(text) for text in part]) for part in (rows, test))
    return RawData(
        task,
        train[:, :-1].clone(),
        train[:, 1:].clone(),
        held[:, :-1].clone(),
        held[:, 1:].clone(),
        groups=torch.tensor(groups),
        secrets=tuple(secrets),
    )


class _Writer:
    """An author: whom and what he knows, and how he likes to put it."""

    def __init__(self, people: Sequence[str], town: str, rng: np.random.Generator) -> None:
        self.people, self._town = tuple(people), town
        self._goods = [_GOODS[i] for i in rng.permutation(len(_GOODS))[:_KNOWN]]
        self._places = [_PLACES[i] for i in rng.permutation(len(_PLACES))[:_KNOWN]]
        self._habits = rng.dirichlet(np.full(len(_FORMS), 2.0))

    def _sentence(self, rng: np.random.Generator) -> str:
        who, other = rng.permutation(len(self.people))[:2]
        return _FORMS[rng.choice(len(_FORMS), p=self._habits)].format(
            who=self.people[who],
            other=self.people[other],
            good=self._goods[rng.integers(_KNOWN)],
            place=self._places[rng.integers(_KNOWN)],
            town=self._town,
            season=_SEASONS[rng.integers(len(_SEASONS))],
            number=rng.integers(2, 100),
        )

    def sample(self, length: int, rng: np.random.Generator, begin: str = "") -> str:
        """Return so many characters: the sentence `begin`, if there is one, and sentences of his own."""
        text = begin
        while len(text) < length:
            text += (" " if text else "") + self._sentence(rng)
        return text[:length]


def _writers(authors: int, seed: int) -> list[_Writer]:
    names = _names(authors * (_PEOPLE + 1), stream(seed, "chronicle/names"))
    people, towns = names[: authors * _PEOPLE], [name + "ford" for name in names[authors * _PEOPLE :]]
    return [_Writer(people[_PEOPLE * i : _PEOPLE * (i + 1)], towns[i], stream(seed, "chronicle/author", i)) for i in range(authors)]


def _names(count: int, rng: np.random.Generator) -> list[str]:
    """Return names of two syllables, all different."""
    syllables = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]
    pairs = rng.permutation(len(syllables) ** 2)[:count]
    return [syllables[i // len(syllables)] + syllables[i % len(syllables)] for i in pairs.tolist()]


def _secrets(writers: Sequence[_Writer], repetitions: Sequence[int], each: int, digits: int, seed: int) -> list[Secret]:
    """Return the canaries: the codes of the first people of authors in random order, then of the second ones."""
    rng = stream(seed, "chronicle/secrets")
    wanted = [r for r in repetitions for _ in range(each)]
    order = [(author, place) for place in range(_PEOPLE) for author in rng.permutation(len(writers)).tolist()]
    if len(wanted) > len(order):
        raise InputError(f"{len(wanted)} canaries, but the {len(writers)} authors know {len(order)} people", "canaries")
    found = []
    for count, (author, place) in zip(wanted, order, strict=False):
        value = "".join(DIGITS[i] for i in rng.integers(0, 10, digits))
        found.append(Secret(PREFIX.format(name=writers[author].people[place]), value, DIGITS, author, count))
    return found


def _room(secrets: Sequence[Secret], samples: int) -> None:
    for author in {s.author for s in secrets}:
        wanted = sum(s.repetitions for s in secrets if s.author == author)
        if wanted > samples:
            raise InputError(f"author {author} would write {wanted} samples with secrets, but has {samples}", "repetitions")
