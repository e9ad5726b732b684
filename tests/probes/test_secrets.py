from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtrust.data.base import FederatedData, Secret, Task
from fedtrust.data.text import ALPHABET, decode, encode
from fedtrust.probes.base import Artefact, ProbeContext
from fedtrust.probes.guesses import Secrets, score
from fedtrust.release import Form
from tests.probes.probe_kit import context, measure

TASK = Task("characters", (30,), len(ALPHABET), labels=tuple(ALPHABET), people=("ada", "bob", "eve"))
DIGITS = encode("0123456789")
WEIGHTS = torch.tensor([7.0, 3.0, 11.0, 2.0, 5.0, 13.0, 1.0, 17.0, 4.0, 9.0])


def secret(name: str, value: str, repetitions: int) -> Secret:
    return Secret(f"the code of {name} is ", value, "0123456789", 0, repetitions)


def federated(*secrets: Secret, y: Tensor | None = None) -> FederatedData:
    texts = torch.zeros(2, 30, dtype=torch.int64) if y is None else y
    return FederatedData(TASK, texts, texts, [np.arange(2)], texts, texts, secrets=secrets)


def weighted(x: Tensor) -> Tensor:
    """Whatever was said, the next digit is drawn by WEIGHTS, and half of the time it is no digit."""
    logits = torch.full((*x.shape, len(ALPHABET)), -9.0)
    logits[..., DIGITS] = WEIGHTS.log()
    return logits


def remembers(*sentences: str, strength: float = 9.0) -> Callable[[Tensor], Tensor]:
    """A model that goes on with these sentences wherever their last 12 characters were said, and is indifferent elsewhere."""

    def query(x: Tensor) -> Tensor:
        logits = torch.zeros(*x.shape, len(ALPHABET))
        for row, numbers in enumerate(x):
            text = decode(numbers)
            for end, sentence in itertools.product(range(12, len(text) + 1), sentences):
                at = sentence.find(text[end - 12 : end])
                if at >= 0 and at + 12 < len(sentence):
                    logits[row, end - 1, ALPHABET.index(sentence[at + 12])] = strength
        return logits

    return query


def ctx(query: Callable[[Tensor], Tensor], *secrets: Secret, **given: Any) -> ProbeContext:
    return context(**{"task": TASK, "query": query, "data": federated(*secrets), **given})


def test_exposure_is_that_of_the_rank_among_all_candidates() -> None:
    """Brute force over the 1000 products of three weights."""
    scores = {"".join(v): math.prod(float(WEIGHTS[int(d)]) for d in v) for v in itertools.product("0123456789", repeat=3)}
    for value in ("777", "052", "666", "418"):
        better = sum(s > scores[value] * (1 + 1e-9) for s in scores.values())
        equal = sum(abs(s / scores[value] - 1) < 1e-9 for s in scores.values())
        found = measure("canary-exposure", ctx(weighted, secret("ada", value, 2)))
        # Orders of the same digits are equal but for the last bits of their sums.
        low, high = math.log2(1000) - math.log2(better + equal), math.log2(1000) - math.log2(better + 1)
        assert low - 1e-9 <= found["exposure/2"] <= high + 1e-9, value
        assert found["exposure/share-extractable/2"] == float(value == "777")


def test_equals_share_their_places() -> None:
    """A model that does not care ranks everything in the middle: one bit, not full exposure."""
    found = measure("canary-exposure", ctx(lambda x: torch.zeros(*x.shape, len(ALPHABET)), secret("ada", "42", 1)))
    assert found["exposure/1"] == pytest.approx(math.log2(100) - math.log2(50.5))


def test_exposure_by_repetitions_and_its_artefacts() -> None:
    secrets = (secret("ada", "77", 4), secret("bob", "66", 4), secret("eve", "77", 0))
    found = measure("canary-exposure", ctx(weighted, *secrets))
    assert found["exposure/0"] == pytest.approx(math.log2(100))
    assert found["exposure/4"] == pytest.approx((math.log2(100) + 0) / 2)
    curve, table = found["curve"], found["canaries"]
    assert isinstance(curve, Artefact)
    assert curve.data["series"]["measured"] == [[0, found["exposure/0"]], [4, found["exposure/4"]]]
    assert curve.data["series"]["extractable"] == [[0, pytest.approx(math.log2(100))], [4, pytest.approx(math.log2(100))]]
    assert isinstance(table, Artefact)
    assert table.data["rows"][0][:3] == ["the code of eve is 77", "0", "1"]
    assert measure("canary-exposure", ctx(weighted)) == {}


def test_a_user_completes_what_the_model_remembers() -> None:
    query = remembers("the code of ada is 42", "the code of eve is 77")
    found = measure("canary-extraction", ctx(query, data=None), digits=2, sure=0.5)
    guess = found["secrets/direct"]
    assert isinstance(guess, Secrets)
    assert set(guess.texts) == {"the code of ada is 42", "the code of eve is 77"}
    assert guess.queries == 3 * (1 + 3)
    assert set(found) == {"secrets/direct"}


def test_a_beam_finds_what_greedy_search_misses() -> None:
    """The likeliest first digit leads nowhere: 0.55 * 0.1 against 0.45 * 0.9."""

    def query(x: Tensor) -> Tensor:
        chances = torch.full((*x.shape, len(ALPHABET)), 1e-9)
        for row, numbers in enumerate(x):
            said = decode(numbers).rpartition(" ")[2]
            if said == "":
                chances[row, -1, DIGITS[1]], chances[row, -1, DIGITS[2]] = 0.55, 0.45
            elif said == "1":
                chances[row, -1, DIGITS] = 0.1
            elif said == "2":
                chances[row, -1, DIGITS[8]] = 0.9
        return chances.log()

    for beam, wanted in ((1, ()), (2, tuple(f"the code of {name} is 28" for name in TASK.people))):
        assert measure("canary-extraction", ctx(query, data=None), digits=2, sure=0.3, beam=beam)["secrets/direct"].texts == wanted


def test_other_words_for_the_same_question() -> None:
    """A model that knows the sentence by "code of …" alone; asked about the wrong thing first, it says nothing."""
    found = measure(
        "canary-extraction",
        ctx(remembers("your code of ada is 42"), data=None),
        prefix="the word for {name} is ",
        roundabout=["the sum for {name} is ", "your code of {name} is "],
        digits=2,
        sure=0.5,
    )
    assert found["secrets/direct"].texts == ()
    assert found["secrets/roundabout"].texts == ("the word for ada is 42",)
    assert found["secrets/roundabout"].queries == 2 * found["secrets/direct"].queries == 24


@pytest.mark.parametrize(("answers", "sure"), [("probabilities", 0.3), ("label", 0.05)])
def test_a_user_makes_do_with_what_he_is_told(answers: Form, sure: float) -> None:
    model = remembers("the code of ada is 42")

    def told(x: Tensor) -> Tensor:
        chances = model(x).softmax(dim=-1)
        return chances if answers == "probabilities" else torch.nn.functional.one_hot(chances.argmax(-1), len(ALPHABET)).float()

    found = measure("canary-extraction", ctx(told, data=None, answers=answers), digits=2, sure=sure)
    assert "the code of ada is 42" in found["secrets/direct"].texts


def test_no_more_samples_are_asked_than_allowed() -> None:
    asked: list[int] = []
    model = remembers("the code of ada is 42", "the code of eve is 77")

    def query(x: Tensor) -> Tensor:
        asked.append(len(x))
        return model(x)

    found = measure("canary-extraction", ctx(query, data=None), digits=2, sure=0.5, queries=5)
    assert sum(asked) == found["secrets/direct"].queries == 5
    assert found["secrets/direct"].texts == ("the code of ada is 42",)


def test_claims_are_scored_by_hand() -> None:
    full = ctx(weighted, secret("ada", "42", 1), secret("bob", "13", 16), secret("eve", "77", 16), secret("ivo", "55", 0))
    guess = Secrets(("the code of bob is 13", "the code of eve is 78", "the code of ivo is 55", "the code of ada is 42"), 9)
    found = score("secrets", guess, full, full)
    table = found.pop("secrets")
    assert found == {
        "secrets/claims": 4,
        "secrets/queries": 9,
        "secrets/found": pytest.approx(2 / 3),
        "secrets/found/1": 1,
        "secrets/found/16": 0.5,
        "secrets/precision": 0.5,
    }
    assert isinstance(table, Artefact)
    assert [row[1] for row in table.data["rows"]] == ["yes", "no", "no", "yes"]
    nothing = score("s", Secrets((), 0), full, full)
    assert nothing["s/found"] == 0
    assert "s/precision" not in nothing


def test_perplexity_by_hand() -> None:
    """The model gives every true character 1/4; the clients wrote 'a' 58 times and 'b' twice."""
    x = torch.full((2, 30), ALPHABET.index("a"))
    y = x.clone()
    y[:, 0] = ALPHABET.index("b")
    logits = torch.full((2, 30, len(ALPHABET)), math.log(0.75 / (len(ALPHABET) - 1)))
    logits.scatter_(2, y[:, :, None], math.log(0.25))
    found = measure("perplexity", ctx(lambda _: logits, test=(x, y), data=federated(y=y)))
    assert found["perplexity"] == pytest.approx(4, rel=1e-5)
    total = 60 + len(ALPHABET)
    assert found["perplexity/unigram"] == pytest.approx(math.exp(-(58 * math.log(59 / total) + 2 * math.log(3 / total)) / 60))


def test_a_user_does_not_see_the_secrets() -> None:
    with pytest.raises(PermissionError, match="does not see the clients' data"):
        measure("canary-exposure", ctx(weighted, data=None))


def test_who_claims_the_same_twice_has_claimed_it_once() -> None:
    full = ctx(weighted, data=federated(secret("ada", "12", 1)))
    found = score("s", Secrets(("the code of ada is 12",) * 9 + ("the code of bob is 12",), 3), full, full)
    assert found["s/claims"] == 2
    assert found["s/precision"] == 1 / 2
