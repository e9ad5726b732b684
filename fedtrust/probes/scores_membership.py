"""How well an adversary told members from others, or clients with a property from those without."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedtrust.probes import roc
from fedtrust.probes.base import Artefact, ProbeContext, need
from fedtrust.probes.guesses import Membership, Property, scorer

#: The false positive rates at which the true positive rate is reported, and what the metric calls them.
RATES = ((0.01, "1pct"), (0.001, "0.1pct"))


@scorer(Membership)
def membership(guess: Membership, full: ProbeContext, seen: ProbeContext) -> dict[str, float | Artefact]:
    """Return AUC, the true positive rates at 1 % and 0.1 % false positives, each with a 95 % interval, and the ROC curve.

    AUC: Newcombe's interval (`roc.auc_interval`); rates: Clopper–Pearson. A rate is absent where there are fewer than 1/FPR others, and the
    picture says so. `balanced-accuracy` is that of the best threshold, chosen in hindsight (as in Carlini et al., S&P 2022, table I).

    Raises:
        ValueError: the guess has not one finite score a candidate.
    """
    member = need(full.member, "who is a member")
    scores = guess.scores.double()
    inside, outside = int(member.sum()), int((~member).sum())
    area = roc.auc(scores, member)
    low, high = roc.auc_interval(area, inside, outside)
    found: dict[str, float | Artefact] = {"auc": area, "auc-low": low, "auc-high": high}
    notes = []
    for rate, name in RATES:
        at = roc.tpr_at(scores, member, rate)
        if at is None:
            notes.append(f"a rate of {100 * rate:g} % cannot be told from 0 with {outside} non-members (it takes {math.ceil(1 / rate)})")
            continue
        found |= {f"tpr-at-{name}": at.value, f"tpr-at-{name}-low": at.low, f"tpr-at-{name}-high": at.high}
        notes.append(f"TPR {100 * at.value:.1f} % [{100 * at.low:.1f}, {100 * at.high:.1f}] at {100 * rate:g} % FPR")
    found["balanced-accuracy"] = roc.best_accuracy(scores, member)
    caption = f"{inside} members, {outside} non-members, both axes logarithmic. AUC {area:.3f} [{low:.3f}, {high:.3f}]; {'; '.join(notes)}."
    axes = {"x": "log10 of the false positive rate", "y": "log10 of the TPR"}
    lines = {"attack": _logarithmic(roc.curve(scores, member)), "guessing": _guessing(outside)}
    return found | {"": Artefact("curve", "ROC of a membership inference", caption, {**axes, "series": lines})}


def _logarithmic(curve: roc.Curve, most: int = 60) -> list[list[float]]:
    """Return at most so many points of a curve, evenly spread over the logarithm of the false positive rate; rates of 0 have none."""
    some = (curve.fpr > 0) & (curve.tpr > 0)
    x, y = curve.fpr[some].log10(), curve.tpr[some].log10()
    last = torch.ones(len(x), dtype=torch.bool)  # of the thresholds with one false positive rate, the one that finds most
    last[:-1] = x[1:] != x[:-1]
    x, y = x[last], y[last]
    cell = ((x - x[0]) / (-x[0]).clamp(min=1e-9) * (most - 1)).round().long()
    shown = torch.ones(len(x), dtype=torch.bool)
    shown[:-1] = cell[1:] != cell[:-1]
    return [[round(a, 4), round(b, 4)] for a, b in zip(x[shown].tolist(), y[shown].tolist(), strict=True)]


def _guessing(others: int) -> list[list[float]]:
    lowest = round(-math.log10(others), 4)
    return [[lowest, lowest], [0.0, 0.0]]


@scorer(Property)
def has_property(guess: Property, full: ProbeContext, seen: ProbeContext) -> dict[str, float | Artefact]:
    """Return how well clients whose data have a property were told from those whose data have not: AUC with Newcombe's interval.

    The truth is what the data's feature skew says of each client. Nothing where the clients that were scored are all of a kind.

    Raises:
        ValueError: the clients' data have no such property.
    """
    skews = need(full.data, "the clients' data").skews
    if not any(guess.name in skew.properties for skew in skews):
        raise ValueError(f'no client\'s data are \'{guess.name}\': set data.feature_skew = {{ kind = "property", what = "{guess.name}" }}')
    clients = sorted(guess.scores)
    truth = torch.tensor([guess.name in skews[c].properties for c in clients], dtype=torch.bool)
    table = _table(guess, clients, truth)
    if not bool(truth.any()) or bool(truth.all()):
        return {"": table}
    scores = torch.tensor([guess.scores[c] for c in clients], dtype=torch.float64)
    area = roc.auc(scores, truth)
    low, high = roc.auc_interval(area, int(truth.sum()), int((~truth).sum()))
    right = float(((scores > 0.5) == truth).double().mean())
    return {"auc": area, "auc-low": low, "auc-high": high, "accuracy": right, "": table}


def _table(guess: Property, clients: list[int], truth: Tensor) -> Artefact:
    ranked = sorted(zip(clients, truth.tolist(), strict=True), key=lambda pair: -guess.scores[pair[0]])
    rows = [[client, round(guess.scores[client], 3), "yes" if has else "no"] for client, has in ranked]
    caption = "What the observer believed of each client, the most likely first, and what is true."
    return Artefact("table", f"Whose data are '{guess.name}'?", caption, {"columns": ["client", "believed", "true"], "rows": rows})
