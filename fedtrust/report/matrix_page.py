"""What stands on the page of a matrix, as plain values for the template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedtrust.report import arena, claims, devices, frontier, verdict
from fedtrust.report.curves import matrix_panels, together
from fedtrust.report.figures import holdings, trust_strip, trust_words
from fedtrust.report.heat import heat_maps
from fedtrust.report.load import Axes, Cell, Matrix, Threat
from fedtrust.report.parts import (
    STATUS_WORDS,
    Budget,
    artefact,
    cell_name,
    duration,
    metric_title,
    observer_groups,
    population,
    shown,
    threat_card,
    trouble,
)
from fedtrust.report.run_page import clients_of, common, skew_note

_MOST_CELLS, _MOST_STRIPS, _MOST_METRICS = 400, 60, 10
_MOST_PAIRS = 40  # more pairs of attack and defence than this make no sentence that anybody would read


def matrix_page(matrix: Matrix) -> dict[str, Any]:
    """Lay out the report of a matrix."""
    summary, axes = matrix.summary, matrix.summary.axes
    curves = Budget(350_000)
    groups = matrix_panels(matrix, curves) + devices.matrix_panels(matrix, curves)
    rounds = max((entry.round for run in matrix.runs.values() for entry in run.rounds if not entry.repair), default=0)
    attacks = sum(not verdict.is_none(attack, summary.threats) for attack in axes.attackers)
    sizes = [(attacks, "attack"), (len(axes.strategies), "rule"), (len(axes.partitions), "partition"), (len(axes.seeds), "seed")]
    played = " × ".join(f"{size} {name}{'' if size == 1 else 's'}" for size, name in sizes)
    ranked = arena.section(matrix)
    said, more = _said(matrix, ranked)
    facts = [played, f"{len(summary.cells)} cells", f"{rounds} rounds" if rounds else ""]
    engine = summary.engine or next((run.summary.engine for run in matrix.runs.values() if run.summary.engine), "")
    return {
        **common(matrix),
        "kind": "matrix",
        "facts": [fact for fact in [*facts, duration(summary.seconds), engine] if fact],
        "verdict": said,
        "verdict_more": more,
        "alerts": _matrix_alerts(matrix),
        "claims": claims.section(matrix),
        "arena": ranked and {**ranked, "lead": [words for words in ranked["lead"] if words not in said]},
        "frontier": frontier.section(matrix),
        "heat": heat_maps(matrix),
        "curves": groups,
        "curves_note": curves.note("panels") + (" Bands: lowest to highest seed." if len(axes.seeds) > 1 else ""),
        "clients": _matrix_clients(matrix),
        "artefacts": _matrix_artefacts(matrix),
        "threats": [*_matrix_threats(matrix), *observer_groups(matrix.summary.observers)],
        "faults": _matrix_faults(matrix),
        "cells": _cell_table(summary.cells, axes),
    }


def _said(matrix: Matrix, ranked: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """Return what stands at the top, and what is folded away: of a large arena who leads, and the rest attack by attack."""
    said = verdict.sentences(matrix.folder.raw)
    if ranked is None or not ranked["lead"] or len(ranked["heat"]["columns"]) * len(ranked["heat"]["rows"]) <= _MOST_PAIRS:
        return said, []
    claimed = len(claims.sentences(matrix.folder.raw))
    return [*said[:claimed], *ranked["lead"]], said[claimed:]


def _matrix_alerts(matrix: Matrix) -> list[str]:
    alerts = []
    if matrix.folder.status != "finished":
        why = f": {matrix.folder.why[:600]}" if matrix.folder.why else ""
        alerts.append(f"This matrix {STATUS_WORDS.get(matrix.folder.status, f'has the status {matrix.folder.status[:60]}')}{why}.")
    groups: dict[tuple[str, str, str, str], list[Cell]] = {}  # seeds and partitions that failed alike are one line
    for cell in matrix.summary.cells:
        if not cell.ok and not cell.refused:
            groups.setdefault((cell.attackers, cell.strategies, cell.status, cell.why), []).append(cell)
    for (attack, strategy, status, why), cells in list(groups.items())[:8]:
        name = cell_name(cells[0], matrix.summary.axes) if len(cells) == 1 else f"{attack} against {strategy} ({len(cells)} cells)"
        alerts.append(f"{name} {STATUS_WORDS.get(status, status)}{f': {why[:300]}' if why else ''}.")
    return alerts + ([f"{len(groups) - 8} more pairs did not finish."] if len(groups) > 8 else [])


def _matrix_clients(matrix: Matrix) -> dict[str, Any]:
    """One picture of the data a partition, from the cell that shows most, and a strip of trust for each defended cell."""
    figures = []
    for partition in matrix.summary.axes.partitions[:6]:
        runs = [matrix.runs[c.cell] for c in matrix.summary.cells if c.partitions == partition and c.cell in matrix.runs]
        best = max(runs, key=lambda run: (bool(run.summary.federation.label_counts), bool(run.malicious)), default=None)
        if best is not None and (clients := population(best)):
            title = f"Who holds what{f', {partition}' if len(matrix.summary.axes.partitions) > 1 else ''}"
            figures.append({"title": title, "svg": holdings(clients_of(best, clients, trust=False)), "note": skew_note(best, clients)})
    strips, note = _strips(matrix)
    # The first strips stand beside the data, so that a reader sees one without unfolding anything.
    first = strips[:3] if len(figures) == 1 else []
    return {"figures": figures, "first": first, "strips": strips[len(first) :], "note": note}


def _strips(matrix: Matrix) -> tuple[list[dict[str, Any]], str]:
    """Mean trust by client for every cell whose rule has such a notion, the attacked cells first."""
    budget, strips = Budget(200_000), list[dict[str, Any]]()
    cells = sorted(matrix.summary.cells, key=lambda cell: verdict.is_none(cell.attackers, matrix.summary.threats))
    trusting = {cell.strategies for cell in cells if cell.cell in matrix.runs and matrix.runs[cell.cell].trust}
    for cell in cells:
        run = matrix.runs.get(cell.cell)
        if run is None or not run.trust or not cell.ok:
            continue
        svg = trust_strip(run.trust, run.malicious, population(run), f"Mean trust: {cell_name(cell, matrix.summary.axes)}")
        if len(strips) < _MOST_STRIPS and budget.take(svg):
            strips.append({"title": cell_name(cell, matrix.summary.axes), "svg": svg, "note": trust_words(run.trust, run.malicious)})
    blind = sorted({cell.strategies for cell in cells if cell.cell in matrix.runs} - trusting)
    return strips, f"{f'Without a notion of trust: {verdict.listed(blind)}.' if blind else ''} {budget.note('strips')}".strip()


def _matrix_artefacts(matrix: Matrix) -> list[dict[str, Any]]:
    """Show the curves of all cells together, and each attack's other artefacts once, from its first cell that left any."""
    budget, seen = Budget(250_000), set[tuple[str, str]]()
    found = together(matrix, budget)
    drawn = {item["file"] for item in found}
    for cell in matrix.summary.cells:
        run = matrix.runs.get(cell.cell)
        for raw in run.artefacts if run else []:
            key = (cell.attackers, raw["file"])
            if key not in seen and raw["file"] not in drawn and len(found) < 40:
                seen.add(key)
                found.append({**artefact(raw, budget), "where": cell_name(cell, matrix.summary.axes)})
    return found


def _matrix_threats(matrix: Matrix) -> list[dict[str, Any]]:
    groups = []
    for attack, threats in matrix.summary.threats.items():
        runs = [matrix.runs[c.cell] for c in matrix.summary.cells if c.attackers == attack and c.cell in matrix.runs]
        clients = max((population(run) for run in runs), default=0)
        assumed = next((run.summary.assumed_malicious for run in runs if run.summary.assumed_malicious is not None), None)
        bad = len({c for threat in threats if threat.malicious for c in threat.clients}) or max(
            (len(run.malicious) for run in runs), default=0
        )
        if threats:
            groups.append({"title": attack, "cards": [threat_card(threat, clients, assumed, bad) for threat in _distinct(threats)]})
    return groups[:30]


def _distinct(threats: Iterable[Threat]) -> list[Threat]:
    return list({threat.model_dump_json(): threat for threat in threats}.values())[:12]


def _matrix_faults(matrix: Matrix) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for cell in matrix.summary.cells:
        run = matrix.runs.get(cell.cell)
        bad = trouble(run.rounds, limit=8) if run else None
        if bad and (bad.dropped or bad.missed):
            found.append({"title": cell_name(cell, matrix.summary.axes), "trouble": bad})
    return found[:40]


def _cell_table(cells: list[Cell], axes: Axes) -> dict[str, Any]:
    names = [name for name in dict.fromkeys(name for cell in cells for name in cell.metrics) if not name.startswith("recall/")][
        :_MOST_METRICS
    ]
    rows = [
        {"name": cell_name(cell, axes), "values": [*(shown(n, cell.metrics.get(n)) for n in names), duration(cell.seconds), cell.status]}
        for cell in cells[:_MOST_CELLS]
    ]
    note = f"{len(cells) - _MOST_CELLS} more cells are in summary.json." if len(cells) > _MOST_CELLS else ""
    return {"columns": [*map(metric_title, names), "Time", "Status"], "rows": rows, "note": note}
