"""docs/arsenal.md says what there is; it is written from the registry (`make arsenal`)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fedtrust.client import capabilities
from fedtrust.registry import REGISTRY, Entry

DOCUMENT = Path(__file__).parent.parent / "docs" / "arsenal.md"
WRITING = bool(os.environ.get("FEDTRUST_WRITE_ARSENAL"))

HEAD = """\
# The arsenal

Every attack, defence and measure that comes with fedtrust, with its source. `fedtrust describe NAME` says how each is to be understood
where its paper leaves a choice, and which parameters it takes. Written from the code by `make arsenal`.

*Knows* is the least that an attack works with: its own client (`own`), the other members of its coalition (`coalition`), what the honest
clients send in the round (`omniscient`), or also the server's rule (`omniscient+defence`); a scenario may grant more. *Manipulates* says at
which moments it departs from the protocol: its `data`, its `training`, the `update` that its coalition sends, or the `message` itself.
"""


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(cell(text) for text in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def attack(entry: Entry) -> tuple[str, ...]:
    return (
        f"`{entry.name}`",
        entry.summary,
        str(entry.meta["knowledge"]),
        ", ".join(capabilities(entry.target)),
        str(entry.meta["paper"]),
    )


def plain(entry: Entry) -> tuple[str, ...]:
    return f"`{entry.name}`", entry.summary, str(entry.meta.get("paper", ""))


def written() -> str:
    """What the document should say."""
    entries = [e for e in REGISTRY if not e.plugin]
    behaviours = [e for e in entries if e.kind == "behaviour" and not e.meta.get("broken")]
    parts = [HEAD, "## Attacks\n"]
    malicious = [e for e in behaviours if e.meta["role"] == "malicious"]
    parts.append(table(("name", "what it does", "knows", "manipulates", "source"), map(attack, malicious)))
    parts.append("## What honest clients do\n")
    parts.append(table(("name", "what it does", "source"), (plain(e) for e in behaviours if e.meta["role"] == "honest")))
    titles = {
        "filter": "Filters: what is done to the updates before they are combined",
        "aggregator": "Aggregators",
        "step": "Steps: what is done to the aggregate",
        "repair": "Repairs: what the server does to the model after the last round",
        "sender": "What a malicious server sends",
        "loss": "Losses",
    }
    for kind, title in titles.items():
        parts.append(f"## {title}\n")
        parts.append(table(("name", "what it does", "source"), (plain(e) for e in entries if e.kind == kind)))
    parts.append("## Probes: what is measured\n")
    probes = (e for e in entries if e.kind == "probe")
    rows = ((f"`{e.name}`", e.summary, f"{e.meta['role']}, {'at the end' if e.meta['when'] == 'end' else 'every round'}") for e in probes)
    parts.append(table(("name", "what it measures", "who looks, when"), rows))
    return "\n".join(parts)


def test_the_document_is_the_registrys() -> None:
    if WRITING:
        DOCUMENT.write_text(written(), encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == written(), "run `make arsenal`"


def test_every_attack_and_defence_says_what_it_does_and_where_it_comes_from() -> None:
    for entry in REGISTRY:
        if entry.plugin or entry.kind not in ("behaviour", "filter", "aggregator", "step", "repair", "sender", "loss"):
            continue
        assert entry.summary.endswith((".", ")")), f"{entry.name}: {entry.summary}"
        if entry.name not in ("mean", "malformed"):
            assert entry.meta.get("paper"), f"{entry.name} names no source"
