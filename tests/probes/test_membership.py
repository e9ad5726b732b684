"""Who was trained on, from outputs: the scorer, the loss threshold, LiRA and RMIA, on models whose answers are written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor

from fedtrust.data.base import Task
from fedtrust.probes import membership_shadow, roc
from fedtrust.probes.base import Artefact, ProbeContext
from fedtrust.probes.guesses import Membership, score
from fedtrust.probes.membership import scaled_confidence
from tests.probes.probe_kit import context, measure

#: A sample is its own number; the parameters of a model are its scaled confidence in each of them.
TASK = Task("classification", (1,), 2)
CANDIDATES, POPULATION = 400, 400
RISE = 2.0  # how much more confident a model is in what it was trained on


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(params: Tensor, x: Tensor) -> Tensor:
    """Give sample i the logits (params[i], 0): its scaled confidence in class 0 is params[i]."""
    said = params[x.flatten().long()]
    return torch.stack([said, torch.zeros_like(said)], 1)


class Memory:
    """Models that know samples of very different difficulty a little better if they were trained on them; `scale` stretches what they
    say."""

    def __init__(self, scale: float = 1.0, seed: int = 0) -> None:
        self.rng, self.scale = rng(seed), scale
        self.easy = 4 * torch.randn(CANDIDATES + POPULATION, generator=rng(99))

    def one(self, trained_on: Tensor) -> Tensor:
        said = self.easy + 0.5 * torch.randn(len(self.easy), generator=self.rng)
        said[trained_on.flatten().long()] += RISE
        return self.scale * said

    def __call__(self, sets: Sequence[tuple[Tensor, Tensor]], start: Tensor | None = None, epochs: int | None = None) -> Tensor:
        return torch.stack([self.one(x) for x, _ in sets])


def game(scale: float = 1.0, **given: Any) -> ProbeContext:
    """Every second candidate is a member of a target that is such a model."""
    ids = torch.arange(CANDIDATES + POPULATION, dtype=torch.float32)[:, None]
    x, own = ids[:CANDIDATES], ids[CANDIDATES:]
    target = Memory(seed=7).one(x[::2])
    zeros = torch.zeros(CANDIDATES, dtype=torch.int64)
    base = {
        "task": TASK,
        "query": lambda x: model(target, x),
        "model": model,
        "rng": rng(3),
        "shadow": Memory(scale),
        "candidates": (x, zeros),
        "population": (own, zeros[:POPULATION]),
        "member": torch.arange(CANDIDATES) % 2 == 0,
    }
    return context(**(base | given))


def rates(ctx: ProbeContext, guess: Membership) -> tuple[float, float]:
    """Area under the curve, and TPR at 1 % FPR."""
    assert ctx.member is not None
    at = roc.tpr_at(guess.scores, ctx.member, 0.01)
    assert at is not None
    return roc.auc(guess.scores, ctx.member), at.value


def test_the_scaled_confidence_is_the_log_odds_and_survives_confidences_of_one() -> None:
    output, y = torch.randn(50, 7, generator=rng()), torch.arange(50) % 7
    p = output.double().softmax(1)[torch.arange(50), y]
    torch.testing.assert_close(scaled_confidence(output, y), (p / (1 - p)).log())
    sure = scaled_confidence(torch.tensor([[200.0, 0.0, 0.0], [90.0, 0.0, 0.0]]), torch.tensor([0, 0]))
    torch.testing.assert_close(sure, torch.tensor([200.0, 90.0], dtype=torch.float64) - math.log(2))


def test_the_loss_threshold_takes_small_losses_for_members() -> None:
    ctx = game()
    assert ctx.candidates is not None
    x, y = ctx.candidates
    found = measure("loss-threshold", ctx)["loss-threshold"]
    torch.testing.assert_close(found.scores, -F.cross_entropy(ctx.query(x), y, reduction="none"))


def test_the_loss_threshold_makes_do_with_what_users_are_told() -> None:
    ctx = game()
    plain = rates(ctx, measure("loss-threshold", ctx)["loss-threshold"])
    chances = game(query=lambda x: ctx.query(x).softmax(1), answers="probabilities")
    assert rates(chances, measure("loss-threshold", chances)["loss-threshold"]) == pytest.approx(plain, abs=0.01)
    labels = game(query=lambda x: F.one_hot(ctx.query(x).argmax(1), 2).float(), answers="label")
    scores = measure("loss-threshold", labels)["loss-threshold"].scores
    assert len(scores.unique()) == 2  # right or wrong, and nothing else


def test_online_lira_is_the_ratio_of_the_papers_two_normal_densities() -> None:
    ctx = game()
    found = measure("lira", ctx, mode="online", models=64, align=False)["lira-online"].scores
    again = membership_shadow.train_shadows(game(), 64, 10, None, online=True)
    assert ctx.candidates is not None
    seen = ctx.query(ctx.candidates[0])[:, 0].double()
    for i in range(0, CANDIDATES, 37):
        inside, outside = again.params[again.inside[:, i], i].double(), again.params[~again.inside[:, i], i].double()
        assert len(inside) == len(outside) == 32
        logs = [norm.logpdf(float(seen[i]), float(v.mean()), float(v.std())) for v in (inside, outside)]
        assert float(found[i]) == pytest.approx(logs[0] - logs[1], rel=1e-4, abs=1e-4)


def test_lira_finds_what_the_loss_cannot_where_samples_differ_in_difficulty() -> None:
    """Carlini et al., section IV: a hard member and an easy stranger have the same loss. Measured: AUC 0.63 against 0.99 and 0.99."""
    ctx = game()
    loss = rates(ctx, measure("loss-threshold", ctx)["loss-threshold"])
    offline = rates(ctx, measure("lira", game(), models=32)["lira-offline"])
    online = rates(ctx, measure("lira", game(), mode="online", models=32)["lira-online"])
    assert loss[0] < 0.7
    assert loss[1] < 0.1
    assert min(offline[0], online[0]) > 0.97
    assert min(offline[1], online[1]) > 0.7


def test_alignment_brings_stretched_shadow_models_to_the_targets_scale() -> None:
    """Shadow models three times as sure of themselves: the paper's score falls, the aligned one does not."""
    ctx = game(scale=3.0)
    aligned, plain = (rates(ctx, measure("lira", game(scale=3.0), models=32, align=a)["lira-offline"])[0] for a in (True, False))
    assert aligned > 0.95
    assert plain < 0.75


def test_shadow_models_of_a_pair_share_the_candidates_out_and_take_the_rest_from_the_population() -> None:
    made = membership_shadow.train_shadows(game(), 6, 1, 300, online=True)
    assert torch.equal(made.inside.sum(0), torch.full((CANDIDATES,), 3))
    assert torch.equal(made.inside[::2], ~made.inside[1::2])
    assert made.own.sum(1).tolist() == [100] * 6
    offline = membership_shadow.train_shadows(game(), 3, 1, None, online=False)
    assert not bool(offline.inside.any())
    assert offline.own.sum(1).tolist() == [POPULATION // 2] * 3


def test_rmia_counts_the_samples_that_a_candidate_stands_out_from() -> None:
    found = measure("rmia", game(), models=4, gamma=1.5, a=0.4)["rmia"].scores
    ctx, made = game(), membership_shadow.train_shadows(game(), 4, 10, None, online=False)
    target, shadows = torch.sigmoid(ctx.query(torch.arange(800.0)[:, None])[:, 0].double()), torch.sigmoid(made.params.double())
    p_x = ((1 + 0.4) * shadows[:, :CANDIDATES].mean(0) + 1 - 0.4) / 2
    p_z = shadows[:, CANDIDATES:].mean(0)
    for i in range(0, CANDIDATES, 23):
        ratio = (target[i] / p_x[i]) / (target[CANDIDATES:] / p_z)
        assert float(found[i]) == pytest.approx(float((ratio >= 1.5).double().mean()), abs=1e-9)
    assert rates(ctx, Membership(found))[0] > rates(ctx, measure("loss-threshold", ctx)["loss-threshold"])[0]


def scored(scores: Tensor, member: Tensor) -> dict[str, Any]:
    return score("m", Membership(scores), context(member=member), context())


def test_the_scorer_gives_every_number_its_interval_and_says_what_it_cannot_tell() -> None:
    member = torch.arange(400) % 2 == 0
    found = scored(torch.randn(400, generator=rng(5)) + member.float(), member)
    assert found["m/auc-low"] < found["m/auc"] < found["m/auc-high"]
    assert found["m/tpr-at-1pct-low"] <= found["m/tpr-at-1pct"] <= found["m/tpr-at-1pct-high"]
    assert not any("0.1pct" in key for key in found)  # it takes 1000 strangers
    picture = found["m"]
    assert isinstance(picture, Artefact)
    assert "0.1 % cannot be told from 0 with 200 non-members (it takes 1000)" in picture.caption
    many = torch.arange(2000) % 2 == 0
    assert "m/tpr-at-0.1pct" in scored(torch.randn(2000, generator=rng(6)), many)


def test_the_picture_is_logarithmic_starts_at_the_first_false_alarm_and_ends_at_one() -> None:
    member = torch.arange(2000) % 2 == 0
    lines = scored(torch.randn(2000, generator=rng(7)) + 2 * member.float(), member)["m"].data["series"]
    points = torch.tensor(lines["attack"])
    assert len(points) <= 60
    assert bool((points.diff(dim=0) >= 0).all())
    assert points[0, 0] == pytest.approx(-3, abs=1e-3)  # one of 1000
    assert points[-1].tolist() == [0.0, 0.0]
    assert lines["guessing"] == [[-3.0, -3.0], [0.0, 0.0]]


def test_perfect_reversed_and_constant_scores() -> None:
    member = torch.arange(300) % 2 == 0
    assert scored(member.float(), member)["m/auc"] == 1.0
    assert scored(member.float(), member)["m/balanced-accuracy"] == 1.0
    assert scored(-member.float(), member)["m/auc"] == 0.0
    flat = scored(torch.zeros(300), member)
    assert (flat["m/auc"], flat["m/balanced-accuracy"], flat["m/tpr-at-1pct"]) == (0.5, 0.5, 0.0)
