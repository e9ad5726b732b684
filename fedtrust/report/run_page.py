"""What stands on the page of a single run, as plain values for the template."""

from __future__ import annotations

from typing import Any

from fedtrust.report import verdict
from fedtrust.report.curves import run_panels
from fedtrust.report.devices import fates_figure, time_panels, timed
from fedtrust.report.figures import Clients, holdings, trust_rounds, trust_strip, trust_words
from fedtrust.report.load import Matrix, Run
from fedtrust.report.parts import (
    STATUS_WORDS,
    Budget,
    artefact,
    command,
    duration,
    environment,
    metric_title,
    observer_groups,
    population,
    scenario,
    shown,
    threat_card,
    trouble,
)
from fedtrust.report.privacy import section

_MOST_METRICS, _MOST_FOUND = 8, 40  # columns of the table of repairs, and numbers below it


def common(found: Run | Matrix) -> dict[str, Any]:
    """What the pages of a run and of a matrix have in common."""
    folder = found.folder
    return {
        "title": found.summary.title or folder.path.resolve().name,
        "status": folder.status,
        "command": command(folder),
        "scenario": scenario(folder),
        "environment": environment(folder),
        "warnings": [warning[:600] for warning in found.summary.warnings[:30]],
    }


def run_page(run: Run) -> dict[str, Any]:
    """Lay out the report of a single run."""
    summary = run.summary
    raw = {**run.folder.raw, "status": run.folder.status, "metrics": summary.metrics}
    main, more = run_panels(run, Budget(300_000))
    later = time_panels(run, Budget(100_000))
    bad = trouble(run.rounds)
    pictures = Budget(250_000)
    clients = population(run)
    cards = [threat_card(threat, clients, summary.assumed_malicious, len(run.malicious)) for threat in summary.threats]
    played = (
        int(summary.rounds_counted or 0)
        if summary.rounds_counted is not None
        else len([e for e in run.rounds if e.round > 0 and e.counted and not e.repair])
    )
    facts = [
        f"{summary.attack or 'no attack'} against {summary.strategy}" if summary.strategy else "",
        f"{played} of {summary.rounds:.0f} rounds counted" if summary.rounds is not None else f"{played} rounds",
        f"{clients} clients" if clients else "",
        f"seed {summary.seed}" if summary.seed else "",
        duration(summary.seconds),
        f"{duration(max(entry.clock or 0.0 for entry in run.rounds))} of virtual time" if timed(run) else "",
        summary.engine,
    ]
    return {
        **common(run),
        "kind": "run",
        "facts": [fact for fact in facts if fact],
        "verdict": verdict.sentences(raw),
        "alerts": run_alerts(run),
        "tiles": _tiles(run),
        "repairs": _repairs(run),
        "metrics": [(metric_title(name), shown(name, value)) for name, value in list(summary.metrics.items())[:200]],
        "curves": ([{"title": "", "panels": main}] if main else []) + ([{"title": "Over virtual time", "panels": later}] if later else []),
        "more_curves": more,
        "clients": _run_clients(run, clients),
        "artefacts": [artefact(raw, pictures) for raw in run.artefacts[:40]],
        "threats": [*([{"title": "", "cards": cards}] if cards else []), *observer_groups(summary.observers)],
        "faults": [{"title": "", "trouble": bad}] if bad.dropped or bad.missed else [],
        "privacy": section(run),
        "sha256": summary.model_sha256,
    }


def run_alerts(run: Run) -> list[str]:
    """Say how a run that is not whole ended, and which rounds had no quorum."""
    missed = trouble(run.rounds).missed
    alerts = []
    if run.folder.status != "finished":
        reached = max((entry.round for entry in run.rounds if not entry.repair), default=0)
        why = f": {run.folder.why[:600]}" if run.folder.why else ""
        alerts.append(
            f"This run {STATUS_WORDS.get(run.folder.status, f'has the status {run.folder.status[:60]}')} after round {reached}{why}."
        )
    if missed:
        alerts.append(f"The quorum was missed in {verdict.listed(missed[:6])}{' and more' if len(missed) > 6 else ''}.")
    return alerts


def _tiles(run: Run) -> list[dict[str, str]]:
    """The few numbers worth printing large."""
    metrics = run.summary.metrics
    wanted = [verdict.ACCURACY, verdict.SUCCESS, "client-accuracy/worst", "detection/recall", "detection/fpr", verdict.LOSS]
    names = [name for name in wanted if metrics.get(name) is not None] or [name for name, value in metrics.items() if value is not None]
    tiles = []
    for name in names[:4]:
        start = next((entry.metrics[name] for entry in run.rounds if entry.metrics.get(name) is not None), None)
        words = f"from {shown(name, start)} at the start" if start is not None and len(run.rounds) > 1 else ""
        tiles.append({"name": metric_title(name), "value": shown(name, metrics[name]), "note": words})
    return tiles


def _repairs(run: Run) -> dict[str, Any] | None:
    """Lay out what was measured after the last round and after each repair; `None` for a run without repairs."""
    mended = [entry for entry in run.rounds if entry.repair]
    if not mended:
        return None
    last = next((entry for entry in reversed(run.rounds) if not entry.repair), None)
    stages = [last, *mended] if last else mended
    names = [name for name in mended[-1].metrics if not any(name.startswith(f"{entry.repair}/") for entry in mended)][:_MOST_METRICS]
    rows = []
    for entry in stages:
        title = f"{entry.repair}{'' if entry.counted else ' (not made: too few answers)'}" if entry.repair else f"after round {entry.round}"
        rows.append({"name": title, "values": [shown(name, entry.metrics.get(name)) for name in names]})
    found = [(metric_title(name), shown(name, value)) for entry in mended for name, value in entry.metrics.items() if name not in names]
    found = [pair for pair in found if pair[1] != "–"]
    note = "; ".join(f"{title} {value}" for title, value in found[:_MOST_FOUND])
    return {"columns": [metric_title(name) for name in names], "rows": rows, "note": f"What they found: {note}." if note else ""}


def _run_clients(run: Run, clients: int) -> dict[str, Any]:
    figures = [{"title": "Who holds what", "svg": holdings(clients_of(run, clients)), "note": skew_note(run, clients)}]
    if run.trust and 0 < clients <= 60 and run.clients.trust:
        figures.append(
            {
                "title": "Trust by round",
                "svg": trust_rounds(run.clients.trust, run.malicious, clients),
                "note": trust_words(run.trust, run.malicious),
            }
        )
    elif run.trust:
        svg = trust_strip(run.trust, run.malicious, clients, "Mean trust by client")
        figures.append({"title": "Mean trust", "svg": svg, "note": trust_words(run.trust, run.malicious)})
    devices = fates_figure(run, clients)
    figures += [devices] if devices else []
    none = "" if run.trust else f"{run.summary.strategy or 'The rule'} gives no trust to single clients."
    return {"figures": figures, "strips": [], "note": none}


def clients_of(run: Run, clients: int, trust: bool = True) -> Clients:
    """Collect what a picture of the clients needs."""
    federation = run.summary.federation
    counts = [[value or 0.0 for value in row] for row in federation.label_counts[:clients]]
    return Clients(federation.labels, counts, frozenset(c for c in run.malicious if c < clients), run.trust if trust else {}, clients)


def skew_note(run: Run, clients: int) -> str:
    """Say how many clients are malicious and how unequal their shares of the data are."""
    sizes = [sum(value or 0.0 for value in row) for row in run.summary.federation.label_counts]
    bad = f"{len(run.malicious)} of {clients} clients are malicious (▲). " if run.malicious else "No client is malicious. "
    if not sizes:
        return bad if clients else ""
    ordered = sorted(sizes)
    return f"{bad}A client holds {ordered[0]:.0f} to {ordered[-1]:.0f} samples, {ordered[len(ordered) // 2]:.0f} in the middle."
