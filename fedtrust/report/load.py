"""Read a run directory back, forgiving what is merely missing and refusing what is broken.

A report has to be possible for a run that failed, was interrupted or knows no accuracy, so nearly everything may be absent or null.
What cannot be read at all (torn JSON, a list where an object must stand) is an `InputError` of one line.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from fedtrust.errors import InputError

_INFINITE = 1e150


def number(value: object) -> float | None:
    """Return a finite float, or `None` for null, NaN, infinities (from 1e150 on: nothing can be drawn there) and whatever is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if abs(result) < _INFINITE else None


def _text(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _metrics(value: object) -> object:
    return {str(k): number(v) for k, v in value.items()} if isinstance(value, dict) else value


def _or_empty(kind: type) -> BeforeValidator:
    return BeforeValidator(lambda value: kind() if value is None else value)


Text = Annotated[str, BeforeValidator(_text)]
Number = Annotated[float | None, BeforeValidator(number)]
Metrics = Annotated[dict[str, float | None], BeforeValidator(_metrics), _or_empty(dict)]
Texts = Annotated[list[Text], _or_empty(list)]
Ints = Annotated[list[int], _or_empty(list)]
Table = Annotated[dict[str, Any], _or_empty(dict)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Threat(_Record):
    """One group of adversaries, as the run recorded it."""

    behaviour: Text = "?"
    paper: Text = ""
    summary: Text = ""
    role: Text = ""
    knowledge: Text = ""
    capability: Texts = []
    clients: Ints = []
    share: Number = None
    rounds: Any = None
    params: Table = {}
    malicious: Annotated[bool, _or_empty(lambda: True)] = True  # no: clients that depart from the protocol to protect themselves
    goal: Text = ""  # what attack success counts, as in "triggered inputs go to class 2"; "" where the record does not say


Threats = Annotated[list[Threat], _or_empty(list)]


class Federation(_Record):
    """Who holds what: samples by client and class, and who is malicious."""

    labels: Texts = []
    label_counts: Annotated[list[Annotated[list[Number], _or_empty(list)]], _or_empty(list)] = []
    malicious: Ints = []
    samples: Number = None


class Guarantee(_Record):
    """What a run promises about privacy, and what it has spent."""

    by: Text = "server"
    mechanism: Text = ""
    unit: Text = "client"
    relation: Text = ""
    sampling: Text = ""
    sampled: Text = ""
    sensitivity: Text = ""
    clip_kind: Text = ""
    clip: Number = None
    clip_norm: Number = None
    noise_multiplier: Number = None
    noise_to_clip: Number = None
    delta: Number = None
    releases: Number = None
    epsilon: Number = None
    epsilon_pld: Number = None
    epsilon_rdp: Number = None
    worst_client: Number = None
    clients: Number = None


class Round(_Record):
    """One line of rounds.jsonl."""

    round: int
    repair: Text = ""  # the repair that was made, where it is none of the rounds but what came after them
    counted: bool = True
    cohort: Ints = []
    valid: Number = None
    quorum: Number = None
    faults: Annotated[dict[str, Text], _or_empty(dict)] = {}
    metrics: Metrics = {}
    train_loss: Number = None
    delta_norm: Number = None
    epsilon: Number = None
    clock: Number = None
    duration: Number = None
    reachable: Number = None
    unreachable: Ints = []
    fates: Annotated[dict[str, Ints], _or_empty(dict)] = {}


class RunSummary(_Record):
    """summary.json of a single run."""

    title: Text = ""
    status: Text = ""
    rounds: Number = None
    rounds_counted: Number = None
    seed: Text = ""
    strategy: Text = ""
    attack: Text = ""
    metrics: Metrics = {}
    model_sha256: Text = ""
    seconds: Number = None
    engine: Text = ""
    threats: Threats = []
    observers: Threats = []
    federation: Annotated[Federation, _or_empty(dict)] = Federation()
    privacy: Annotated[list[Guarantee], _or_empty(list)] = []
    assumed_malicious: Number = None
    trust_mean: Metrics = {}
    warnings: Texts = []


class RoundMeans(_Record):
    """Means over the rounds that counted: metrics about trust, and seconds by place."""

    metrics: Metrics = {}
    seconds: Metrics = {}


class Cell(_Record):
    """One cell of a matrix, as its summary lists it."""

    cell: Text = ""
    attackers: Text = "none"
    attack: Text = ""  # the attackers' label without the share, where the matrix sweeps shares
    share: Number = None
    strategies: Text = ""
    partitions: Text = ""
    seed: Text = ""
    assumed_malicious: Number = None
    status: Text = "finished"
    why: Text = ""
    metrics: Metrics = {}
    model_sha256: Text = ""
    seconds: Number = None
    rule: Text = ""  # the strategy's components, whatever its label says
    floor: Number = None
    privacy: Annotated[list[Guarantee], _or_empty(list)] = []
    clean_success: Metrics = {}
    round_means: Annotated[RoundMeans, _or_empty(dict)] = RoundMeans()
    repair_seconds: Number = None

    @property
    def ok(self) -> bool:
        """Whether the cell has a result."""
        return self.status == "finished"

    @property
    def refused(self) -> bool:
        """Whether the cell was never played, because its strategy cannot work as it stands."""
        return self.status == "refused"


class Axes(_Record):
    """The names along each axis of a matrix."""

    attackers: Texts = []
    strategies: Texts = []
    partitions: Texts = []
    seeds: Texts = []


class MatrixSummary(_Record):
    """summary.json of a matrix; axes that it does not name are taken from the cells."""

    title: Text = ""
    status: Text = ""
    seconds: Number = None
    engine: Text = ""
    axes: Annotated[Axes, _or_empty(dict)] = Axes()
    cells: Annotated[list[Cell], _or_empty(list)] = []
    threats: Annotated[dict[str, Threats], _or_empty(dict)] = {}
    observers: Threats = []
    warnings: Texts = []

    def model_post_init(self, context: object) -> None:
        """Complete the axes, so that no cell is left out of a table."""
        for axis, key in (("attackers", "attackers"), ("strategies", "strategies"), ("partitions", "partitions"), ("seeds", "seed")):
            named: list[str] = getattr(self.axes, axis)
            object.__setattr__(self.axes, axis, list(dict.fromkeys([*named, *(getattr(cell, key) for cell in self.cells)])))


@dataclass(frozen=True)
class ClientLog:
    """What clients.jsonl says, by client."""

    malicious: frozenset[int] = frozenset()
    trust: dict[int, dict[int, float]] = field(default_factory=dict)  # client → round → trust
    examples: dict[int, float] = field(default_factory=dict)

    def trust_mean(self) -> dict[int, float]:
        """Mean trust over the rounds in which a client had any."""
        return {client: sum(by_round.values()) / len(by_round) for client, by_round in self.trust.items() if by_round}


@dataclass(frozen=True)
class Folder:
    """The files that a run and a matrix have in common."""

    path: Path
    raw: dict[str, Any]  # summary.json as it stands, for the verdict
    status: str
    why: str
    scenario: str  # text of scenario.toml, "" where there is none
    environment: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """The scenario as a table; empty where it is missing or no TOML."""
        try:
            return tomllib.loads(self.scenario)
        except (tomllib.TOMLDecodeError, RecursionError):
            return {}


@dataclass(frozen=True)
class Run:
    """A single run, read."""

    folder: Folder
    summary: RunSummary
    rounds: list[Round]
    clients: ClientLog
    artefacts: list[dict[str, Any]]

    @property
    def malicious(self) -> list[int]:
        """Ids of the malicious clients, from whichever record names them."""
        named = {*self.summary.federation.malicious, *self.clients.malicious, *(c for t in self.summary.threats for c in t.clients)}
        return sorted(named)

    @property
    def trust(self) -> dict[int, float]:
        """Mean trust by client; empty for a rule without such a notion."""
        given = {int(k): v for k, v in self.summary.trust_mean.items() if v is not None and k.isdecimal()}
        return given or self.clients.trust_mean()


@dataclass(frozen=True)
class Matrix:
    """A matrix, read; `runs` holds the cells whose folder could be read, by the cell's name."""

    folder: Folder
    summary: MatrixSummary
    runs: dict[str, Run]


def read(directory: Path) -> Run | Matrix:
    """Read a run directory.

    Args:
        directory: what `fedtrust run` wrote.

    Returns:
        The run or the matrix, by the kind that summary.json names.

    Raises:
        InputError: the folder is missing, not a run directory, or damaged.
    """
    if not directory.is_dir():
        raise InputError("no such run directory", str(directory))
    folder = _folder(directory)
    kind = folder.raw.get("kind", "run")
    if kind == "matrix":
        summary = validated(MatrixSummary, folder.raw, str(directory / "summary.json"))
        places = {
            cell.cell: directory / "cells" / cell.cell
            for cell in summary.cells
            if re.fullmatch(r"[^/\\]+", cell.cell) and cell.cell != ".."
        }
        return Matrix(folder, summary, {name: _run(_folder(place), long=False) for name, place in places.items() if place.is_dir()})
    if kind != "run":
        raise InputError(f"unknown kind {json.dumps(kind)[:40]}; allowed: run, matrix", str(directory / "summary.json"))
    return _run(folder, long=True)


def _folder(directory: Path) -> Folder:
    summary, rounds = directory / "summary.json", directory / "rounds.jsonl"
    if not (summary.is_file() or rounds.is_file() or directory.parent.name == "cells"):
        raise InputError("neither summary.json nor rounds.jsonl; finish it with `fedtrust run --resume`", str(directory))
    raw = _json(summary) if summary.is_file() else {}
    state = _json(directory / "status.json") if (directory / "status.json").is_file() else {}
    environment = _json(directory / "environment.json") if (directory / "environment.json").is_file() else {}
    scenario = _read(directory / "scenario.toml") if (directory / "scenario.toml").is_file() else ""
    status = _text(state.get("status")) or _text(raw.get("status")) or "unknown"
    return Folder(directory, raw, status, _text(state.get("why")), scenario, environment)


def _run(folder: Folder, *, long: bool) -> Run:
    """Read what a single run left; a cell's clients and artefacts are read only as far as the matrix shows them (`long`)."""
    summary = validated(RunSummary, folder.raw, str(folder.path / "summary.json"))
    rounds = _rounds(folder.path / "rounds.jsonl")
    if not folder.raw and rounds:  # killed before the summary: the records say as much as they can
        title = _text(folder.settings().get("title"))
        summary = summary.model_copy(update={"title": title, "metrics": rounds[-1].metrics, "status": folder.status})
    clients = _clients(folder.path / "clients.jsonl") if long or not summary.trust_mean else ClientLog()
    return Run(folder, summary, rounds, clients, _artefacts(folder.path / "artefacts"))


def _rounds(path: Path) -> list[Round]:
    """A round that was played again after a resume counts once, as it was played last."""
    found = {entry.round: entry for line, row in _lines(path) for entry in [validated(Round, row, f"{path}:{line}")]}
    return [found[key] for key in sorted(found)]


def _clients(path: Path) -> ClientLog:
    """Collected by hand, without a model a line: a thousand clients over 200 rounds are 200 000 lines."""
    malicious: set[int] = set()
    log = ClientLog()
    for line, row in _lines(path):
        client, at = number(row.get("client")), number(row.get("round"))
        if client is None or at is None:
            raise InputError("a client's line needs the numbers 'client' and 'round'", f"{path}:{line}")
        if row.get("malicious") is True:
            malicious.add(int(client))
        trust, examples = number(row.get("trust")), number(row.get("examples"))
        if trust is not None:
            log.trust.setdefault(int(client), {})[int(at)] = trust
        if examples is not None:
            log.examples[int(client)] = examples
    return ClientLog(frozenset(malicious), log.trust, log.examples)


def _artefacts(folder: Path) -> list[dict[str, Any]]:
    if not folder.is_dir():
        return []
    return [{"file": path.name, **_json(path)} for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", str(path)) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", str(path)) from None


def _json(path: Path) -> dict[str, Any]:
    return _object(_read(path), str(path))


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where) from None
    if not isinstance(value, dict):
        raise InputError("a JSON object is expected", where)
    return value


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read JSON lines; a last line without its end is what a kill leaves behind, and is left out."""
    if not path.is_file():
        return
    text = _read(path)
    whole = text[: text.rfind("\n") + 1]
    for n, line in enumerate(whole.split("\n"), start=1):
        if line.strip():
            yield n, _object(line, f"{path}:{n}")


M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], value: dict[str, Any], where: str) -> M:
    """Read a record, or say in one line (`InputError`) which of its keys is damaged."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"damaged at {key}: {first['msg']}", where) from None
