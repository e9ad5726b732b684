"""The exercise: one TOML file that says what students are asked, what they may use, whom they meet, and how they are marked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic
from pydantic import Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from fedtrust import scenario as scenarios
from fedtrust.classroom.exercise_parts import AttackersSpec, BudgetSpec, HiddenSpec, HouseSpec, PhasesSpec, PublicSpec, ScoringSpec
from fedtrust.classroom.scoring import Side
from fedtrust.client import Knowledge
from fedtrust.errors import InputError, allowed_list, nearest
from fedtrust.scenario import Scenario
from fedtrust.scenario_checks import translated
from fedtrust.scenario_io import Document
from fedtrust.scenario_parts import AttackerSpec, Ref, Spec

Kind = Literal["attack", "defence", "both", "audit", "evasion"]
AuditGame = Literal["membership", "stealing", "reconstruction"]
Access = Literal["answers", "gradients", "parameters"]
#: What a student hands in, by kind.
FILES: dict[Side, str] = {"attack": "attack.py", "defence": "defence.py", "audit": "audit.py", "evasion": "evasion.py"}
SIDES: dict[str, tuple[Side, ...]] = {
    "attack": ("attack",),
    "defence": ("defence",),
    "both": ("attack", "defence"),
    "audit": ("audit",),
    "evasion": ("evasion",),
}
#: The label of plain FedAvg, against which clean accuracy is counted; added where the house has no plain mean.
FEDAVG = "FedAvg"
#: The label of whoever is handed in, among the house's.
SUBMISSION = "@submission"
#: How many samples an evasion is asked to change in a game.
EVADED = 100
#: Where the ready exercises lie.
READY = Path(__file__).parent / "exercise_files"

_MEASURES: dict[str, tuple[str, ...]] = {
    "attack": ("damage", "success", "lasting-success"),
    "defence": ("damage",),
    "both": ("damage", "success", "lasting-success"),
    "audit": (),  # by its game
    "evasion": ("evaded",),
    "membership": ("auc", "tpr-at-1pct"),
    "stealing": ("fidelity", "accuracy"),
    "reconstruction": ("recovered",),
}
_NAME = re.compile(r"^[a-z0-9]+(-[a-z0-9]+)*$")
_PLACEHOLDER = "sign-flip"  # a behaviour that every level of knowledge suits; the submission takes its place


class Exercise(Spec):
    """Everything about an exercise.

    Attributes:
        name, title: lower-case words joined by hyphens; one line.
        kind: what is handed in; `both` sides, attack and defence.
        game: for `audit`: `membership` (who was in the training set), `stealing` (a copy of the model) or `reconstruction` (the samples
            behind the updates of the last round).
        task: what students are asked, in Markdown.
        scenario: the base scenario, a table or a path beside the exercise file.
        role: whom a submission plays, in words.
        knowledge: what an attack is granted.
        access: what an evasion has of the model: its `answers`; also `gradients`, each asked for and counted; or also the `parameters`.
        attackers: which clients it gets.
        goal: what it is after: a registered behaviour, whose `goal` is measured; `None`: to make the model wrong.
        commitment: SHA-256 of the teacher's secret file, published beforehand.
        budget, public, hidden, house, scoring, phases: see there.
    """

    name: str
    title: str = Field(min_length=1)
    kind: Kind
    game: AuditGame | None = None
    task: str = Field(min_length=1)
    scenario: Any
    role: str = ""
    knowledge: Knowledge = "coalition"
    access: Access = "answers"
    attackers: AttackersSpec | None = None
    goal: Ref | None = None
    commitment: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    budget: BudgetSpec = BudgetSpec()
    public: PublicSpec = PublicSpec()
    hidden: HiddenSpec = HiddenSpec()
    house: HouseSpec = HouseSpec()
    scoring: ScoringSpec = ScoringSpec()
    phases: PhasesSpec = PhasesSpec()

    _folder: Path = PrivateAttr(default=Path())
    _text: str = PrivateAttr(default="")
    _base: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Exercise:
        if not _NAME.match(self.name):
            raise PydanticCustomError("name", "name should be lower-case words joined by hyphens, not '{name}'", {"name": self.name})
        if (self.kind == "audit") != (self.game is not None):
            raise PydanticCustomError(
                "game", "an audit needs a `game`, {games}, and nothing else has one", {"games": " or ".join(get_args(AuditGame))}
            )
        if self.kind != "evasion" and self.access != "answers":
            raise PydanticCustomError("access", "`access` is what an evasion has of the model; this is no evasion", {})
        if self.sides[0] in ("attack", "defence") and self.attackers is None:
            raise PydanticCustomError("attackers", "needs [attackers]: which clients an attack gets", {})
        known = _MEASURES[self.game or self.kind]
        if self.scoring.measure and self.scoring.measure not in known:
            raise PydanticCustomError(
                "measure",
                "scoring.measure of this {what} is one of {allowed}, not '{got}'{near}",
                {
                    "what": "game" if self.game else "kind",
                    "allowed": ", ".join(known),
                    "got": self.scoring.measure,
                    "near": nearest(self.scoring.measure, known),
                },
            )
        if self.measure in ("success", "lasting-success") and self.goal is None:
            raise PydanticCustomError("goal", "measure '{m}' needs a `goal`", {"m": self.measure})
        if self.measure == "lasting-success" and (self.attackers is None or self.attackers.rounds is None):
            raise PydanticCustomError("rounds", "measure 'lasting-success' needs attackers.rounds: after which round it is measured", {})
        return self

    @property
    def sides(self) -> tuple[Side, ...]:
        """What is handed in."""
        return SIDES[self.kind]

    @property
    def measure(self) -> str:
        """What an attack, an audit or an evasion is after."""
        default = _MEASURES[self.game or self.kind][0]
        return self.scoring.measure or ("success" if self.goal is not None and default == "damage" else default)

    @property
    def text(self) -> str:
        """The file as it was read."""
        return self._text

    @property
    def defences(self) -> dict[str, Any]:
        """The house's defences by label, plain FedAvg among them."""
        house = {label: {"aggregator": entry} if isinstance(entry, str) else entry for label, entry in self.house.defences.items()}
        plain = any(_plain(entry) for entry in house.values())
        return house if plain else {FEDAVG: {"aggregator": "mean"}, **house}

    @property
    def models(self) -> dict[str, Any]:
        """How the models that an evasion meets are made, by label; none: one, of the scenario as it is."""
        given = self.house.defences if self.kind == "evasion" else {}
        return {label: {"aggregator": entry} if isinstance(entry, str) else entry for label, entry in given.items()}

    @property
    def reference(self) -> str:
        """The label of plain FedAvg."""
        return next(label for label, entry in self.defences.items() if _plain(entry))

    def partitions(self, hidden: bool) -> dict[str, Any]:
        """Return label → partition of a phase; one, the scenario's own, if the exercise names none."""
        chosen = self.hidden.partitions if hidden and self.hidden.partitions else self.public.partitions
        if chosen:
            return {label: {"name": ref.name, **ref.params} for label, ref in chosen.items()}
        own = self._base.get("data", {}).get("partition", "iid")
        ref = Ref.model_validate(own)
        return {ref.name: {"name": ref.name, **ref.params}}

    def matrix(self, seeds: Sequence[int], *, hidden: bool = False, submissions: bool = True) -> Scenario:
        """Return the house's matrix on these seeds as a scenario with a sweep.

        Args:
            seeds: the scenario's seeds.
            hidden: whether the hidden partitions are played.
            submissions: whether it also has a row and a column, labelled `SUBMISSION`, for what is handed in.

        Raises:
            InputError: the house cannot play it; placed at the dotted key.
        """
        fights = self.sides[0] in ("attack", "defence")
        attackers: dict[str, Any] = {"none": []}
        defences = dict(self.defences)
        if fights and self.attackers is not None:
            who = self.attackers.table()
            for label, ref in self.house.attacks.items():
                attackers[label] = [{"behaviour": ref.name, "params": ref.params, **self._knows(ref), **who}]
            if submissions:
                attackers[SUBMISSION] = [{"behaviour": _PLACEHOLDER, "knowledge": self.knowledge, **who}]
                defences[SUBMISSION] = {"aggregator": "mean"}
        sweep: dict[str, Any] = {"seeds": list(seeds), "partitions": self.partitions(hidden)}
        if fights:
            sweep |= {"attackers": attackers, "strategies": defences, "infeasible": "refuse"}
        elif self.models:
            sweep["strategies"] = self.models
        probes = list(self._base.get("probes", []))
        known = {p if isinstance(p, str) else p.get("name") for p in probes}
        wanted = ["accuracy", "client-accuracy", *(["attack-success"] if fights else [])]
        document = {**self._base, "probes": probes + [{"name": p} for p in wanted if p not in known], "sweep": sweep}
        return scenarios.parse(document, self._folder)

    def _knows(self, ref: Ref) -> dict[str, Any]:
        """Return the knowledge of a house attack: what it needs, if that is more than nothing."""
        from fedtrust.registry import REGISTRY

        needs = REGISTRY.get("behaviour", ref.name).meta.get("knowledge", "own")
        return {"knowledge": needs}

    def goal_spec(self) -> list[AttackerSpec]:
        """Return the exercise's goal as an attacker whose goal it is; nothing without one."""
        return [] if self.goal is None else [AttackerSpec(behaviour=self.goal.name, params=self.goal.params, count=1)]


def _plain(entry: Any) -> bool:
    """Return whether a strategy's table is plain FedAvg."""
    if not isinstance(entry, Mapping):
        return False
    aggregator = entry.get("aggregator", "mean")
    name = aggregator.get("name") if isinstance(aggregator, Mapping) else aggregator
    return name == "mean" and not any(entry.get(key) for key in ("filters", "steps", "repairs", "privacy", "behaviour"))


def parse(document: Mapping[str, Any], folder: Path = Path(), text: str = "") -> Exercise:
    """Return the exercise that a parsed TOML document describes, checked against its base scenario and the registry.

    Raises:
        InputError: placed at the dotted key.
    """
    try:
        made = Exercise.model_validate(dict(document))
    except pydantic.ValidationError as error:
        raise translated(error) from None
    made._folder, made._text = folder, text
    made._base = _base(made, folder)
    _check(made)
    return made


def load(path: Path) -> Exercise:
    """Read an exercise file.

    Raises:
        InputError: `file:line` or `file: dotted.key`, what is wrong, what is allowed, the nearest match.
    """
    document = Document.read(path)
    try:
        return parse(document.data, path.parent, path.read_text(encoding="utf-8-sig"))
    except InputError as error:
        raise document.placed(error) from None


def _base(exercise: Exercise, folder: Path) -> dict[str, Any]:
    """Return the raw base scenario, without what the exercise itself says."""
    given = exercise.scenario
    if isinstance(given, str):
        path = (folder / given).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise InputError("should lie beside the exercise file", "scenario")
        given = Document.read(path).data
    if not isinstance(given, Mapping):
        raise InputError("should be a table, or the path of a scenario file beside this one", "scenario")
    taken = [
        key for key in ("sweep", "seed", "claims", *(["attackers"] if exercise.sides[0] in ("attack", "defence") else [])) if given.get(key)
    ]
    if taken and isinstance(exercise.scenario, Mapping):
        raise InputError(f"'{taken[0]}' is the exercise's own affair (house, public, attackers)", f"scenario.{taken[0]}")
    return {key: value for key, value in given.items() if key not in taken}


def _check(exercise: Exercise) -> None:
    """Refuse what cannot be played: the scenario itself, a house component, a goal that is none, rounds beyond the end."""
    from fedtrust.registry import REGISTRY

    rounds, whole = None if exercise.attackers is None else exercise.attackers.rounds, exercise._base.get("rounds")
    if rounds is not None and isinstance(whole, int):
        if not 1 <= rounds[0] <= rounds[1] <= whole:
            raise InputError(f"should be [first, last] within 1 and {whole} (got {rounds})", "attackers.rounds")
        if exercise.measure == "lasting-success" and rounds[1] >= whole:
            raise InputError(f"measure 'lasting-success' needs rounds after the attack; there are {whole}", "attackers.rounds")
    try:
        exercise.matrix(exercise.public.seeds[:1])
        if exercise.hidden.partitions:
            exercise.matrix(exercise.public.seeds[:1], hidden=True)
    except InputError as error:
        raise InputError(error.message, _place(error.where)) from None
    for label, ref in exercise.house.audits.items():
        try:
            REGISTRY.get("probe", ref.name).check(ref.params)
        except InputError as error:
            raise error.at(f"house.audits.{label}") from None
    if exercise.goal is not None:
        try:
            REGISTRY.make("behaviour", exercise.goal.name, exercise.goal.params)
        except InputError as error:
            raise error.at("goal") from None


def _place(where: str) -> str:
    """Return where in an exercise file something of its matrix stands."""
    for ours, theirs in (
        ("house.defences", "sweep.strategies"),
        ("house.attacks", "sweep.attackers"),
        ("public.partitions", "sweep.partitions"),
        ("public.seeds", "sweep.seeds"),
    ):
        if where.startswith(theirs):
            return ours + where.removeprefix(theirs)
    return f"scenario.{where}" if where else "scenario"


# --------------------------------------------------------------------------------------------------------------------- ready ones


def ready() -> dict[str, Path]:
    """Return the exercises that come with fedtrust: name → exercise file."""
    return {path.parent.name: path for path in sorted(READY.glob("*/exercise.toml"))}


def find(name: str) -> Path:
    """Return the file of an exercise: the name of a ready one, a folder with an exercise.toml, or a path.

    Raises:
        InputError: there is none.
    """
    path = Path(name)
    if name in ready():  # a folder of that name is the student's copy, without what is hidden
        return ready()[name]
    if path.is_dir() and (path / "exercise.toml").is_file():
        return path / "exercise.toml"
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise InputError("no such exercise file", name)
        return path
    known = ready()
    if name not in known:
        raise InputError(
            f"no such exercise (ready ones: {allowed_list(known)}; or the path of an exercise file){nearest(name, known)}", name
        )
    return known[name]
