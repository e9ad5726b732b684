"""How good a stolen model is."""

from __future__ import annotations

from torch import Tensor

from fedtrust.probes.base import Artefact, ProbeContext, need, share
from fedtrust.probes.guesses import Copies, Copy, scorer
from fedtrust.release import Metered


@scorer(Copy)
def copy_scored(guess: Copy, full: ProbeContext, seen: ProbeContext) -> dict[str, float | Artefact]:
    """Return what a copy is worth on the test samples that the thief has not had in hand.

    `fidelity` is the share of them on which it says what the owner's model says (Jagielski et al., USENIX Security 2020, section 3),
    `accuracy` the share that it gets right, `queries` what it took. `parameter-error`, where the thief claims the parameters themselves,
    is the largest difference to the true ones, without what softmax does not see: one vector added to all classes of the last layer.
    """
    scores: dict[str, float | Artefact] = {**_agreement(guess, full, seen), "queries": float(guess.queries)}
    if guess.params is not None:
        scores["parameter-error"] = _parameter_error(guess.params, full)
    return scores


@scorer(Copies)
def copies_scored(guess: Copies, full: ProbeContext, seen: ProbeContext) -> dict[str, float | Artefact]:
    """Return what the last copy is worth, `fidelity/<queries>` and `accuracy/<queries>` of each, and the curve of both."""
    last = guess.items[-1]
    scores = copy_scored(last, full, seen)
    lines: dict[str, list[list[float]]] = {"fidelity": [], "accuracy": []}
    for item in guess.items:
        for name, value in _agreement(item, full, seen).items():
            scores[f"{name}/{item.queries}"] = value
            lines[name].append([float(item.queries), value])
    x, y = _unseen(full)
    own = share(full.query(x).argmax(dim=-1) == y)
    ends = (lines["fidelity"][0][0], lines["fidelity"][-1][0])
    curve = {
        "x": "samples asked",
        "y": "share of samples",
        "series": {**lines, "owner's": [[end, own] for end in ends]},
    }
    caption = "On unseen test samples: how often a copy says what the owner's model says, and how often it, or the owner's, is right."
    return scores | {"": Artefact("curve", "What a copy costs", caption, curve)}


def _agreement(guess: Copy, full: ProbeContext, seen: ProbeContext) -> dict[str, float]:
    x, y = _unseen(full)
    said = _answered(guess, seen, x).argmax(dim=-1)
    if said.shape != y.shape:
        raise ValueError(f"a copy answers {list(said.shape)} for labels {list(y.shape)}")
    return {"fidelity": share(said == full.query(x).argmax(dim=-1)), "accuracy": share(said == y)}


def _answered(guess: Copy, seen: ProbeContext, x: Tensor) -> Tensor:
    """Return what a copy says.

    Raises:
        ValueError: it asks the owner's model: then it is none.
    """
    before = seen.query.asked if isinstance(seen.query, Metered) else 0
    said = guess.predict(x.clone())
    if isinstance(seen.query, Metered) and seen.query.asked != before:
        raise ValueError("a copy asks the owner's model: what it answers must be its own")
    return said


def _unseen(full: ProbeContext) -> tuple[Tensor, Tensor]:
    """Return the test samples without those that observers were given as their own."""
    x, y = need(full.test, "the test samples")
    if full.population is None:
        return x, y
    theirs = {row.numpy().tobytes() for row in full.population[0]}
    keep = [i for i, row in enumerate(x) if row.numpy().tobytes() not in theirs]
    return x[keep], y[keep]


def _parameter_error(params: Tensor, full: ProbeContext) -> float:
    layout, true = need(full.layout, "the layout"), need(full.params, "the parameters")
    if params.shape != true.shape:
        raise ValueError(f"a copy of {len(params)} parameters, the model has {len(true)}")
    parts = {name: value.clone() for name, value in layout.unflatten(params.double() - true.double()).items()}
    for head in need(full.model, "the model").heads:
        for name in (f"{head}.weight".lstrip("."), f"{head}.bias".lstrip(".")):
            if name in parts:
                parts[name] -= parts[name].mean(dim=0, keepdim=True)
    return float(max(part.abs().max() for part in parts.values()))
