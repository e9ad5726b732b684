"""The scenario: one TOML file that says everything about a run.

`load` reads a file, refuses what is wrong with one line (place, what is allowed, nearest match) and returns a frozen `Scenario` in which
every parameter of every component is written out. Its parts lie in `scenario_parts`, reading TOML in `scenario_io`, writing it in
`scenario_toml`, the checks in `scenario_checks` (without the data) and `scenario_data` (with them).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
from pydantic import Field, PrivateAttr

from fedtrust import scenario_profiles
from fedtrust.errors import InputError
from fedtrust.scenario_io import Document, expand_sweep, slugs
from fedtrust.scenario_parts import (
    BIG,
    AttackerSpec,
    ClientsSpec,
    DataSpec,
    EngineSpec,
    MaliciousServerSpec,
    ProbeSpec,
    Ref,
    ReleaseSpec,
    Spec,
    StrategySpec,
    TrainSpec,
)
from fedtrust.scenario_privacy import PrivacySpec
from fedtrust.scenario_sweep import Attack, ClaimSpec, SweepSpec, attacks, expand_shares

__all__ = [
    "AttackerSpec", "Cell", "ClaimSpec", "ClientsSpec", "DataSpec", "EngineSpec", "MaliciousServerSpec", "Origin", "ProbeSpec", "Ref",
    "ReleaseSpec", "Scenario", "StrategySpec",
    "SweepSpec", "TrainSpec", "check", "load", "parse", "schema",
]  # fmt: skip

#: More cells than this in one sweep is taken for a slip.
MAX_CELLS = 10_000


class Cell(NamedTuple):
    """One run of a matrix: a name that is safe as a folder's, the labels by axis, the scenario without sweep.

    `refused` says why it is not played, where its strategy cannot work as it stands and the sweep skips such cells.
    """

    name: str
    labels: dict[str, Any]
    scenario: Scenario
    refused: str = ""


class Origin(NamedTuple):
    """Where a scenario came from; what a resume needs to load it the same way again."""

    folder: Path
    allow_plugins: tuple[str, ...] = ()
    data_root: str | None = None


class Scenario(Spec):
    """Everything about a run.

    Attributes:
        title: one line for the reader.
        week: the row of the course it belongs to.
        description: what to look at.
        rounds: how many.
        seed: of every random draw.
        data, model, clients, attackers, strategy, malicious_server, release, probes, engine, sweep: its parts.
        claims: what somebody says will come out of the matrix.
    """

    title: str = Field(min_length=1)
    week: str | None = None
    description: str = ""
    rounds: int = Field(ge=1, le=1_000_000)
    seed: int = Field(default=0, ge=0, le=BIG)
    data: DataSpec
    model: Ref
    clients: ClientsSpec
    attackers: list[AttackerSpec] = Field(default_factory=list)
    strategy: StrategySpec = StrategySpec()
    malicious_server: MaliciousServerSpec | None = None
    release: ReleaseSpec = ReleaseSpec()
    probes: list[Ref] = Field(default_factory=list)
    engine: EngineSpec = EngineSpec()
    sweep: SweepSpec | None = None
    claims: list[ClaimSpec] = Field(default_factory=list)

    _origin: Origin | None = PrivateAttr(None)
    _document: Document | None = PrivateAttr(None)

    @classmethod
    def expand(cls, given: Any) -> Any:
        """Lay a sweep's strategies over `[strategy]`, and give its attackers their shares; `[privacy]` is the strategy's."""
        return expand_shares(expand_sweep(_private(given))) if isinstance(given, Mapping) else given

    @classmethod
    def keys(cls) -> list[str]:
        """Return the keys that a file may use at the top; a profile is laid over the document before it is read as a scenario."""
        return [*super().keys(), "privacy", "profile", "profiles"]

    def __eq__(self, other: object) -> bool:
        """Return whether both say the same, wherever they were loaded from."""
        return isinstance(other, Scenario) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @property
    def origin(self) -> Origin | None:
        """Where it was loaded from; `None` for one built in Python."""
        return self._origin

    @property
    def privacy(self) -> PrivacySpec | None:
        """How the server protects its clients: `strategy.privacy`."""
        return self.strategy.privacy

    def attacks(self) -> dict[str, Attack]:
        """Return the entries of the attackers axis by the label of their cells."""
        sweep = self.sweep or SweepSpec()
        label = " + ".join(group.behaviour for group in self.attackers) or "none"
        return attacks(dict(sweep.attackers) or {label: self.attackers}, sweep.shares)

    def axes(self) -> dict[str, dict[Any, Any]]:
        """Return label → value for each of the four axes; without a sweep each has one label."""
        sweep = self.sweep or SweepSpec()
        return {
            "attackers": {label: attack.groups for label, attack in self.attacks().items()},
            "strategies": dict(sweep.strategies) or {self.strategy.label: self.strategy},
            "partitions": dict(sweep.partitions) or {self.data.partition.name: self.data.partition},
            "seeds": {seed: seed for seed in sweep.seeds or [self.seed]},
        }

    def cells(self) -> list[Cell]:
        """Return the runs of the matrix, in the order of the file; one for a scenario without sweep."""
        return list(self._cells())

    def _cells(self) -> Iterator[Cell]:
        sweep, axes, attacks = self.sweep or SweepSpec(), self.axes(), self.attacks()
        names = {axis: slugs(labels) for axis, labels in axes.items() if axis != "seeds"}
        played = {(a, s): self._defence(attack, axes["strategies"][s]) for a, attack in attacks.items() for s in axes["strategies"]}
        for attack, defence, spread, seed in itertools.product(*axes.values()):
            folder = "__".join([names["attackers"][attack], names["strategies"][defence], names["partitions"][spread], f"seed{seed}"])
            strategy, refused = played[attack, defence]
            own: dict[str, Any] = {} if strategy.behaviour is None else {"behaviour": strategy.behaviour}
            if strategy.loss is not None:
                own["train"] = self.clients.train.model_copy(update={"loss": strategy.loss})
            scenario = self.model_copy(
                update={
                    "clients": self.clients.model_copy(update=own),
                    "attackers": axes["attackers"][attack],
                    "strategy": strategy.model_copy(update={"behaviour": None, "loss": None}),
                    "data": self.data.model_copy(update={"partition": axes["partitions"][spread]}),
                    "seed": seed,
                    "sweep": None,
                    "claims": [],
                }
            )
            labels = {"attackers": attack, "strategies": defence, "partitions": spread, "seed": seed}
            if sweep.shares:
                labels |= {"attack": attacks[attack].label, "share": attacks[attack].share}
            if sweep.assumed != "written":
                labels["assumed_malicious"] = strategy.assumed_malicious
            yield Cell(folder, labels, scenario, refused)

    def _defence(self, attack: Attack, strategy: StrategySpec) -> tuple[StrategySpec, str]:
        """Return a strategy with what it assumes against an attack, and why it is not played, if it is not."""
        if self.sweep is None:
            return strategy, ""
        from fedtrust.scenario_cells import assuming, refusal

        told = assuming(strategy, attack.groups, self.sweep.assumed, self.clients)
        reason = refusal(told, self.clients) if self.sweep.infeasible == "skip" else None
        return told, "" if reason is None else reason[1]

    def resolved_toml(self) -> str:
        """Return it as TOML with every default written out; loading that gives an equal scenario."""
        from fedtrust.scenario_toml import to_toml

        return to_toml(self)


def _private(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a raw document in which `[privacy]` stands where it belongs, in the strategy."""
    strategy = given.get("strategy", {})
    if "privacy" not in given or not isinstance(strategy, Mapping):
        return given
    if "privacy" in strategy:
        raise InputError("stands in [strategy] too; write it once", "privacy")
    return {**{k: v for k, v in given.items() if k != "privacy"}, "strategy": {**strategy, "privacy": given["privacy"]}}


def parse(
    document: Mapping[str, Any], folder: str | os.PathLike[str] = ".", allow_plugins: Sequence[str] = (), data_root: str | None = None
) -> Scenario:
    """Return the scenario that a parsed TOML document describes, with its profile; see `load`.

    Raises:
        InputError: placed at the dotted key.
    """
    from fedtrust.scenario_checks import resolve, translated

    try:
        scenario = Scenario.model_validate(scenario_profiles.chosen(document))
    except pydantic.ValidationError as error:
        raise translated(error) from None
    root = data_root or os.environ.get("FEDTRUST_DATA") or None
    origin = Origin(Path(folder).resolve(), tuple(allow_plugins), root)
    resolved = resolve(scenario, origin)
    resolved._origin = origin
    return resolved


def load(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    allow_plugins: Sequence[str] = (),
    data_root: str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Scenario:
    """Read a scenario file.

    Args:
        path: the file.
        overrides: `a.b=v`, laid over the document before it is validated; `profile=NAME` comes first, whatever the order.
        allow_plugins: modules beside the file whose code the scenario may run (`module:attr`).
        data_root: the user's own word on where data files lie; may be anywhere. The environment variable FEDTRUST_DATA says the same.
        folder: where paths and plugins are looked up, if not beside the file (a resume looks where the scenario first lay).

    Raises:
        InputError: `file:line` or `file: dotted.key`, what is wrong, what is allowed, the nearest match.
    """
    document = Document.read(Path(path))
    document.override(scenario_profiles.lay(document, overrides))
    try:
        scenario = parse(document.data, Path(path).parent if folder is None else folder, allow_plugins, data_root)
    except InputError as error:
        raise document.placed(error) from None
    scenario._document = document
    return scenario


def check(scenario: Scenario) -> list[str]:
    """Ask everything that needs the data, without training; return what is worth knowing about the run, a line each.

    Raises:
        InputError: placed at the dotted key.
    """
    from fedtrust.scenario_data import check_data

    try:
        return check_data(scenario)
    except InputError as error:
        raise (error if scenario._document is None else scenario._document.placed(error)) from None


def schema() -> dict[str, Any]:
    """Return the JSON schema of a scenario file, for editors; the names of the registered components are enumerated."""
    from fedtrust.scenario_schema import build

    return build()
