from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedtrust.data.base import Task
from fedtrust.data.build import build
from fedtrust.data.text import decode, encode
from fedtrust.registry import REGISTRY
from fedtrust.runner import run
from fedtrust.scenario import Scenario

TASK = Task("characters", (29,), 39)
VIEW: Any = None


def kept(*texts: str, span: int) -> list[str]:
    """Which texts are left; each is filled up with a letter of its own."""
    filled = [text.ljust(30, letter) for text, letter in zip(texts, "vwxyz", strict=False)]
    rows = torch.stack([encode(text) for text in filled])
    x, y = REGISTRY.make("behaviour", "deduplicated", {"span": span}).poison(rows[:, :-1], rows[:, 1:], VIEW)
    return [texts[filled.index(decode(row))] for row in torch.cat([x, y[:, -1:]], dim=1)]


def test_of_texts_with_a_stretch_in_common_the_first_is_kept() -> None:
    texts = ("abcdefgh and more", "12345 abcdefgh", "abcdefg is shorter", "quite another one..", "less abcdefg h")
    assert kept(*texts, span=8) == [texts[0], texts[2], texts[3]]  # the last has "abcdefg " of the third
    assert kept(*texts, span=7) == [texts[0], texts[3]]
    assert kept(*texts, span=20) == list(texts)


def test_what_was_left_out_does_not_count_against_others() -> None:
    """The second shares a stretch with the first and is left out; the third shares one with the second alone."""
    texts = ("aaaaaaaa1234567890", "1234567890bcdefghijkl", "bcdefghijkl0987654321")
    assert kept(*texts, span=10) == [texts[0], texts[2]]


def test_a_canary_stays_once_and_most_of_the_text_stays() -> None:
    data = build("chronicle", {"authors": 8, "samples": 40, "repetitions": [16], "canaries": 4}, "natural", {}, None, 8, seed=1)
    behaviour = REGISTRY.make("behaviour", "deduplicated")
    shares = []
    for secret in data.secrets:
        x, y = behaviour.poison(*data.client(secret.author), VIEW)
        texts = [decode(row) for row in torch.cat([x, y[:, -1:]], dim=1)]
        assert sum(secret.prefix + secret.value in text for text in texts) == 1
        shares.append((len(texts) - 1) / (40 - 16))
    assert min(shares) > 0.5


def test_deduplication_is_for_texts_long_enough() -> None:
    behaviour = REGISTRY.make("behaviour", "deduplicated", {"span": 31})
    assert behaviour.check(TASK) == "no text has 31 characters in a row: samples are 30 long"
    assert "the task is a regression" in behaviour.check(Task("regression", (3,), 1))
    assert REGISTRY.make("behaviour", "deduplicated", {"span": 30}).check(TASK) is None


def last(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "rounds.jsonl").read_text().splitlines()[-1])["metrics"]
    return found


def test_who_walks_away_has_the_model_of_his_last_round(small: Callable[..., Scenario], tmp_path: Path) -> None:
    """He stops after round 2: his copy is the model after round 1, to the last bit, whatever came of it later."""
    thief = {"behaviour": "walk-away", "count": 2, "rounds": [1, 2]}
    model = {"model": {"name": "mlp", "hidden": [8]}}
    assert run(small(rounds=4, attackers=[thief], **model), tmp_path / "long", engine="local").status == "finished"
    run(small(rounds=1, attackers=[{**thief, "rounds": [1, 1]}], **model), tmp_path / "short", engine="local")
    run(small(rounds=4, **model), tmp_path / "plain", engine="local")
    final, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("long", "short"))
    away = {name: final[name] - kept[name] for name in final}
    for name in list(away)[-2:]:  # what softmax does not see
        away[name] -= away[name].mean(dim=0, keepdim=True)
    found = last(tmp_path / "long")
    assert found["walk-away/parameter-error"] == pytest.approx(max(float(v.abs().max()) for v in away.values()), abs=1e-6)
    assert 0 < found["walk-away/fidelity"] < 1
    assert found["walk-away/queries"] == 0
    assert found["accuracy"] == last(tmp_path / "plain")["accuracy"], "nobody notices"


@dataclass
class Memory:
    """All of a view that a thief who was never asked can look at."""

    memory: dict[str, torch.Tensor]


def test_who_never_took_part_has_nothing() -> None:
    behaviour = REGISTRY.make("behaviour", "walk-away")
    memory = behaviour.remember(5)
    assert behaviour.claim(Memory(memory)) == {}
    assert behaviour.claim(replace(Memory(memory), memory={})) == {}
