"""The parts of a page that a run and a matrix share: threat cards, artefacts, faults, scenario and environment."""

from __future__ import annotations

import base64
import binascii
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fedtrust.report.load import Axes as MatrixAxes
from fedtrust.report.load import Cell, Folder, Round, Run, Threat, number
from fedtrust.report.svg import Axes, Series, clipped, line_chart
from fedtrust.report.verdict import is_none, listed, percent

MOST_CLIENTS = 100_000  # an id above is a damaged record, not a client
_SHARES = ("accuracy", "attack-success", "released-accuracy")
_SHARE_FAMILIES = (
    "recall/", "client-accuracy/", "detection/", "rare/", "common/", "attack-success/", "dpa-certificate/", "crfl-certificate/",
)  # fmt: skip
#: Of what a guess is worth: samples that came out exactly, labels that are right, answers that agree with the owner's, …
_SHARE_ENDS = ("/exact", "/labels", "/fidelity", "/accuracy", "/balanced-accuracy", "/taken-for-it", "/at-stop", "/at-end")
_MOST_SCENARIO, _MOST_IMAGES, _MOST_ROWS, _MOST_COLUMNS = 60_000, 24, 60, 12
STATUS_WORDS = {"finished": "finished", "failed": "failed", "interrupted": "was interrupted", "running": "has not ended"}


@dataclass
class Budget:
    """How many characters a section may take, so that the page stays under a megabyte; counts what did not fit."""

    left: int
    refused: int = 0

    def take(self, markup: str) -> bool:
        """Return whether it still fits, and book it if so."""
        if len(markup) > self.left:
            self.refused += 1
            return False
        self.left -= len(markup)
        return True

    def note(self, what: str) -> str:
        """Say what was left out, or nothing."""
        return f"{self.refused} more {what} left out to keep this file small." if self.refused else ""


def is_share(metric: str) -> bool:
    """Return whether a metric is a fraction that is shown as a percentage."""
    return metric in _SHARES or metric.startswith(_SHARE_FAMILIES) or metric.endswith(_SHARE_ENDS) or "/tpr-at-" in metric


def shown(metric: str, value: float | None) -> str:
    """Format a metric's value."""
    return "–" if value is None else percent(value) if is_share(metric) else f"{value:.4g}"


def metric_title(metric: str) -> str:
    """Write a metric's name as a heading."""
    words = metric.replace("-", " ").replace("_", " ").replace("/", ": ")
    return words[:1].upper() + words[1:]


def duration(seconds: float | None) -> str:
    """Write seconds as one says them."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cell_name(cell: Cell, axes: MatrixAxes) -> str:
    """Name a cell of a matrix; an axis with a single value goes without saying."""
    rest = [cell.partitions] if len(axes.partitions) > 1 else []
    rest += [f"seed {cell.seed}"] if len(axes.seeds) > 1 else []
    where = f" ({', '.join(rest)})" if rest else ""
    return (
        f"{cell.strategies} without an attack{where}"
        if is_none(cell.attackers, {})
        else f"{cell.attackers} against {cell.strategies}{where}"
    )


def population(run: Run) -> int:
    """Count the clients: by the federation where it is known, by the highest id otherwise."""
    if run.summary.federation.label_counts:
        return min(len(run.summary.federation.label_counts), MOST_CLIENTS)
    ids = [*run.malicious, *run.trust, *run.clients.examples, *(c for entry in run.rounds for c in entry.cohort)]
    return max((i + 1 for i in ids if 0 <= i < MOST_CLIENTS), default=0)


def window(threats: Sequence[Threat]) -> tuple[float, float] | None:
    """Return the first and last round in which any of them attacks, where they say so."""
    spans = [tuple(number(v) for v in t.rounds) for t in threats if isinstance(t.rounds, list) and len(t.rounds) == 2]
    known = [(a, b) for a, b in spans if a is not None and b is not None]
    return (min(a for a, _ in known), max(b for _, b in known)) if known else None


# ------------------------------------------------------------------------------------------------------------------ threat cards


def threat_card(threat: Threat, clients: int, assumed: float | None, malicious: int) -> dict[str, Any]:
    """Lay out one adversary: who it is, what it knows and can do, and what the defender believed."""
    who = f"{len(threat.clients)} of {clients} clients" if clients else f"{len(threat.clients)} clients"
    share = f" ({_share(threat.share)})" if threat.share is not None else ""
    ids = ", ".join(map(str, threat.clients[:30])) + (", …" if len(threat.clients) > 30 else "")
    params = ", ".join(f"{key} = {_short(value)}" for key, value in list(threat.params.items())[:30] if value is not None)
    facts = [
        ("Role", threat.role),
        (
            "Knows",
            {"own": "only its own data and update", "coalition": "what the other adversaries know"}.get(threat.knowledge, threat.knowledge),
        ),
        ("Does" if threat.share is None and not threat.clients else "Can change", listed(threat.capability)),
        ("Share", f"{who}{share}" if threat.clients else _share(threat.share) if threat.share is not None else ""),
        ("Clients", ids),
        ("Rounds", _span(threat.rounds)),
        ("Parameters", params),
        ("Defender", defender(assumed, malicious, clients) if threat.malicious else ""),
    ]
    return {"name": threat.behaviour, "summary": threat.summary, "paper": linked(threat.paper), "facts": [(k, v) for k, v in facts if v]}


def observer_groups(observers: Sequence[Threat]) -> list[dict[str, Any]]:
    """Lay out those who attack without being clients; nothing where there is nobody."""
    cards = [threat_card(observer, 0, None, 0) for observer in observers]
    return [{"title": "Beside the clients", "cards": cards}] if cards else []


def defender(assumed: float | None, malicious: int, clients: int) -> str:
    """Compare what the defender assumed with the truth. `assumed` is a share, or a count if it is a whole number above zero."""
    if assumed is None:
        return ""
    believed = assumed * clients if assumed < 1 else assumed
    if not clients:
        return f"assumes {assumed:g} malicious"
    off = believed - malicious
    verdict = "which is right" if abs(off) < 0.5 else "fewer than there are" if off < 0 else "more than there are"
    amount = (
        f"{_share(assumed)} malicious (about {believed:.3g} of {clients} clients)" if assumed < 1 else f"{assumed:.0f} malicious clients"
    )
    return f"assumes {amount}; there are {malicious}, {verdict}"


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _span(rounds: object) -> str:
    if isinstance(rounds, list) and len(rounds) == 2:
        return f"{_short(rounds[0])} to {_short(rounds[1])}"
    return "" if rounds is None else _short(rounds)


def _short(value: object) -> str:
    return clipped(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), 200)


_LINK = re.compile(r"https?://[^\s<>\"']+|\bdoi:\s?10\.\d+/[^\s,;)]+|\barXiv:\s?\d{4}\.\d{4,5}", re.IGNORECASE)


def linked(words: str) -> Markup:
    """Escape a text and turn the papers it names into links; nothing is fetched unless a reader follows one."""
    parts, end = [], 0
    for match in _LINK.finditer(words):
        found = match.group()
        kind, _, rest = found.partition(":")
        url = {"doi": "https://doi.org/", "arxiv": "https://arxiv.org/abs/"}.get(kind.lower(), f"{kind}:") + rest.strip()
        parts += [Markup("{}").format(words[end : match.start()]), Markup('<a href="{}" rel="noreferrer">{}</a>').format(url, found)]
        end = match.end()
    return Markup("").join([*parts, Markup("{}").format(words[end:])])


# --------------------------------------------------------------------------------------------------------------------- artefacts


def artefact(raw: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
    """Lay out what a probe left: pictures, a table or curves; of anything else only that it exists."""
    kind = raw.get("kind")
    base = {
        "kind": "other",
        "title": words(raw.get("title")) or words(raw.get("file")),
        "caption": words(raw.get("caption")),
        "note": "",
    }
    if kind == "images" and isinstance(raw.get("images"), list):
        images = [image for item in raw["images"][:_MOST_IMAGES] if (image := _image(item)) and budget.take(image["png"])]
        missing = len(raw["images"]) - len(images)
        return {
            **base,
            "kind": "images",
            "images": images,
            "note": f"{missing} more not shown; see artefacts/{raw['file']}." if missing else "",
        }
    if kind == "table" and isinstance(raw.get("columns"), list) and isinstance(raw.get("rows"), list):
        rows = [[words(value) for value in row[:_MOST_COLUMNS]] for row in raw["rows"][:_MOST_ROWS] if isinstance(row, list)]
        rows = [row for row in rows if budget.take("".join(row))]
        missing = len(raw["rows"]) - len(rows)
        columns = [words(name) for name in raw["columns"][:_MOST_COLUMNS]]
        return {**base, "kind": "table", "columns": columns, "rows": rows, "note": f"{missing} more rows not shown." if missing else ""}
    if kind == "curve" and isinstance(raw.get("series"), dict):
        series = [Series(name, points_of(points), n) for n, (name, points) in enumerate(list(raw["series"].items())[:COLUMNS_OF_LINES])]
        chart = line_chart(base["title"], series, Axes(words(raw.get("x")) or "x", words(raw.get("y")) or "y"))
        if budget.take(chart):
            return {**base, "kind": "curve", "svg": chart}
    return {**base, "note": f"This report has no picture for it; see artefacts/{words(raw.get('file'))}."}


COLUMNS_OF_LINES = 12  # more lines than this in one chart cannot be told apart


def words(value: object) -> str:
    """Return a value that a component wrote as words of a bounded length."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else clipped(value if isinstance(value, str) else json.dumps(value, default=str), 600)


def _image(item: object) -> dict[str, str] | None:
    """Check that it is a PNG in base64: nothing else gets into a data: address."""
    png = item.get("png") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(png, str):
        return None
    try:
        content = base64.b64decode(png, validate=True)
    except (binascii.Error, ValueError):
        return None
    return (
        {"png": base64.b64encode(content).decode(), "label": words(item.get("label"))} if content.startswith(b"\x89PNG\r\n\x1a\n") else None
    )


def points_of(points: object) -> list[tuple[float, float]]:
    """Return the points of a line as far as they are pairs of finite numbers."""
    found = []
    for pair in points if isinstance(points, list) else []:
        if isinstance(pair, list) and len(pair) == 2:
            x, y = number(pair[0]), number(pair[1])
            if x is not None and y is not None:
                found.append((x, y))
    return found


# -------------------------------------------------------------------------------------------------------------- faults and files


@dataclass
class Trouble:
    """What went wrong in a run: who was dropped and why, and which rounds did not count."""

    dropped: list[dict[str, Any]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


def trouble(rounds: Sequence[Round], limit: int = 20) -> Trouble:
    """Collect the faults by reason and the rounds without a quorum."""
    reasons: dict[str, dict[str, list[int]]] = {}
    for entry in rounds:
        simulated = {str(client) for fate, ids in entry.fates.items() if fate != "partial" for client in ids}
        for client, reason in entry.faults.items():
            if client in simulated:  # "late: needed 12.3 s, deadline 10 s": every one would have a line of its own
                reason = reason.partition(":")[0]
            reasons.setdefault(clipped(reason, 200), {}).setdefault(client, []).append(entry.round)
    dropped = []
    for reason, clients in sorted(reasons.items(), key=lambda item: -sum(map(len, item[1].values()))):
        ordered = sorted(clients.items(), key=lambda item: (len(item[0]), item[0]))  # the ids are strings: 2 before 10
        named = [f"{clipped(client, 20)} (round{'s' if len(at) > 1 else ''} {_runs(at)})" for client, at in ordered[:limit]]
        more = f", and {len(clients) - limit} more clients" if len(clients) > limit else ""
        dropped.append({"reason": reason, "clients": f"{', '.join(named)}{more}", "times": sum(map(len, clients.values()))})
    missed = [
        f"round {e.round} (nobody could be reached)"
        if e.reachable == 0
        else f"round {e.round}" + (f" ({e.valid:.0f} valid, {e.quorum:.0f} needed)" if e.valid is not None and e.quorum is not None else "")
        for e in rounds
        if not e.counted
    ]
    more_missed = [f"{len(missed) - limit} more"] if len(missed) > limit else []
    return Trouble(dropped[:limit], missed[:limit] + more_missed)


def _runs(rounds: list[int]) -> str:
    """Write 1, 2, 3, 7 as 1–3, 7."""
    spans: list[list[int]] = []
    for value in sorted(rounds):
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans[:12]) + (", …" if len(spans) > 12 else "")


def _from_here(path: Path) -> str:
    """Return a folder as the user who stands where we stand would write it; elsewhere only its name, never a machine's paths."""
    full, here = path.resolve(), Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) and full != here else full.name


def command(folder: Folder) -> str:
    """The command that repeats the run from the scenario in its folder, with the plugins and the data folder that it was allowed."""
    words = ["fedtrust", "run", f"{_from_here(folder.path)}/scenario.toml"]
    plugins, root = folder.environment.get("plugins"), folder.environment.get("data_root")
    for name in plugins if isinstance(plugins, list) else []:
        words += ["--allow-plugin", name] if isinstance(name, str) else []
    words += ["--data-root", root] if isinstance(root, str) and root else []
    return clipped(shlex.join(words), 2000)


def scenario(folder: Folder) -> str:
    """The scenario's text, cut where it is monstrous."""
    cut = len(folder.scenario) > _MOST_SCENARIO
    return folder.scenario[:_MOST_SCENARIO] + ("\n# … cut here; the whole file is scenario.toml" if cut else "")


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a table to dotted keys."""
    found: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict) and value and prefix.count(".") < 6:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _short(value)
    return found


def environment(folder: Folder) -> list[tuple[str, str]]:
    """Versions, git state and devices, a row each."""
    return [(clipped(key, 80), value) for key, value in list(flat(folder.environment).items())[:80]]
