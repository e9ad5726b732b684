"""What a run guarantees its clients, for the reader: a sentence, a card, and what was spent round by round."""

from __future__ import annotations

from typing import Any

from fedtrust.report.load import Guarantee, Run
from fedtrust.report.svg import Axes, Series, line_chart

_RELATIONS = {
    "add-or-remove-one": "one more or one less",
    "replace-one": "one replaced by another",
    "zero-out-one": "one whose updates are all zero",
}


def sentence(found: Guarantee) -> str:
    """Say in one sentence what was guaranteed, to whom, and by whom."""
    whose = "client with all its data" if found.unit == "client" else found.unit
    how = found.mechanism if found.by == "server" else "the clients' own noise"
    epsilon = "no finite ε" if found.epsilon is None else f"ε = {found.epsilon:.3g}"
    relation = _RELATIONS.get(found.relation, found.relation)
    most = "" if found.worst_client is None else f" for client {found.worst_client:.0f}, which paid most"
    return f"Privacy of a {whose}: {epsilon} at δ = {found.delta or 0:g} by {how}{most} ({relation}; {found.releases or 0:.0f} releases)."


def card(found: Guarantee) -> dict[str, Any]:
    """Lay out a guarantee as a card."""
    server = found.by == "server"
    facts = [
        ("Unit", found.unit),
        ("Neighbours", _RELATIONS.get(found.relation, found.relation)),
        ("Sampling", found.sampled or found.sampling),
        ("Clip", _number(found.clip_norm if server else found.clip) + (", adaptive" if found.clip_kind == "adaptive" else "")),
        ("Noise multiplier", _number(found.noise_multiplier)),
        ("Sensitivity", found.sensitivity),
        ("Releases", _number(found.releases)),
        ("δ", _number(found.delta)),
        ("ε by PLD", _number(found.epsilon_pld if server else found.epsilon)),
        ("ε by RDP", _number(found.epsilon_rdp)),
        ("A round's noise", f"{found.noise_to_clip:.3g} times the longest update" if found.noise_to_clip is not None else ""),
        ("Worst client", "" if found.worst_client is None else f"client {found.worst_client:.0f} of {found.clients or 0:.0f}"),
        ("Trusts", "the server with every update" if server else "nobody"),
    ]
    name = found.mechanism or ("local client-level privacy" if found.unit == "client" else "record-level privacy")
    return {"name": name, "summary": sentence(found), "facts": [(key, value) for key, value in facts if value]}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def section(run: Run) -> dict[str, Any] | None:
    """Lay out what a run guarantees; `None` where it guarantees nothing."""
    if not run.summary.privacy:
        return None
    points = [(float(entry.round), entry.epsilon) for entry in run.rounds if entry.epsilon is not None]
    curve = None
    if len(points) > 1:
        svg = line_chart("ε spent by round", [Series("ε", points)], Axes("Round", "ε", False))
        curve = {"title": "ε spent by round", "svg": svg, "note": ""}
    return {"cards": [card(found) for found in run.summary.privacy], "curve": curve}
