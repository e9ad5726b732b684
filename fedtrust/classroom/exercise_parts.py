"""The parts of an exercise file as pydantic models: budget, attackers, what is public and hidden, the house, scoring."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fedtrust.classroom.scoring import Rules
from fedtrust.scenario_parts import Ref, Spec

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Label = Annotated[str, Field(pattern=r"^[^@\s][^@\n]{0,39}$")]


class BudgetSpec(Spec):
    """What a submission may use in one game (a cell: one run of the scenario); `None`: not limited, and not counted in the cost.

    Attributes:
        calls: how often it is asked for something.
        gradients: gradient evaluations, through the counted interface only: what it computes by itself cannot be counted from outside.
        queries: samples it may ask the model about, or calls of the server's rule where `knowledge` grants that.
        bytes: what it is sent and sends, together.
        cpu_seconds, wall_seconds: of its process, in a game.
        call_seconds: wall-clock seconds of a single call.
        memory: megabytes.
        eps: how far an evasion may move a feature, in the features' units.
    """

    calls: int | None = Field(default=None, ge=1)
    gradients: int | None = Field(default=None, ge=1)
    queries: int | None = Field(default=None, ge=1)
    bytes: int | None = Field(default=None, ge=1)
    cpu_seconds: float = Field(default=60.0, gt=0, le=3600)
    wall_seconds: float = Field(default=120.0, gt=0, le=3600)
    call_seconds: float = Field(default=10.0, gt=0, le=600)
    memory: int = Field(default=2048, ge=256, le=65536)
    eps: float = Field(default=0.1, gt=0)

    def counted(self) -> dict[str, float | None]:
        """Return the units whose use is part of the cost."""
        return {"gradients": self.gradients, "queries": self.queries, "bytes": self.bytes}


class AttackersSpec(Spec):
    """Which clients a handed-in attack gets; house attacks get the same.

    Attributes:
        count, share: how many (one of the two).
        rounds: the first and the last round in which they act; `None`: all.
    """

    count: int | None = Field(default=None, ge=1)
    share: float | None = Field(default=None, gt=0, lt=1)
    rounds: list[int] | None = Field(default=None, min_length=2, max_length=2)

    @model_validator(mode="after")
    def _one_of_two(self) -> AttackersSpec:
        if (self.count is None) == (self.share is None):
            raise PydanticCustomError("who", "needs exactly one of count, share", {})
        return self

    def table(self) -> dict[str, Any]:
        """Return it as the keys of an `[[attackers]]` entry."""
        return {k: v for k, v in self.model_dump().items() if v is not None}


class PublicSpec(Spec):
    """What students may try on.

    Attributes:
        seeds: the scenario's seeds.
        partitions: label → partition; empty: the scenario's own.
    """

    seeds: list[Seed] = Field(default=[1, 2, 3], min_length=1, max_length=50)
    partitions: dict[Label, Ref] = Field(default_factory=dict)


class HiddenSpec(Spec):
    """What is graded on.

    Attributes:
        seeds: how many; they are derived from the teacher's secret file.
        partitions: label → partition; empty: the public ones.
    """

    seeds: int = Field(default=3, ge=1, le=50)
    partitions: dict[Label, Ref] = Field(default_factory=dict)


class HouseSpec(Spec):
    """Whom students meet beside each other: registered components.

    Attributes:
        attacks: label → behaviour.
        defences: label → strategy, as in a sweep; plain FedAvg is always among them. Of an evasion: how the models are made that are to be
            fooled.
        audits: label → probe.
    """

    attacks: dict[Label, Ref] = Field(default_factory=dict)
    defences: dict[Label, Any] = Field(default_factory=dict)
    audits: dict[Label, Ref] = Field(default_factory=dict)


class GatesSpec(Spec):
    """When a defence is worth nothing, whatever it resists: what it may lose against FedAvg without an attack.

    Attributes:
        clean_loss: accuracy.
        worst_client: accuracy of the worst client.
    """

    clean_loss: float = Field(default=0.03, ge=0, le=1)
    worst_client: float = Field(default=0.10, ge=0, le=1)


class PenaltiesSpec(Spec):
    """What failures cost of the score.

    Attributes:
        per_fault: for every game in which the submission failed.
        most: for all of them together.
    """

    per_fault: float = Field(default=0.05, ge=0, le=1)
    most: float = Field(default=0.25, ge=0, le=1)


class ScoringSpec(Spec):
    """How a submission is scored and marked; `fedtrust.classroom.scoring` has the formulas.

    Attributes:
        measure: what an attack, an audit or an evasion is after; by default the kind's first: `damage` (attack, defence), `auc`, `evaded`.
        mean, worst, clean: what a defence's effectiveness is made of.
        effect, thrift: score = effect · E + thrift · E · (1 − C / C_max).
        prices: what each counted unit weighs in C / C_max.
        stealth: most accuracy that an attack with a goal may take, or it is no longer one that nobody notices; `None`: any.
        bands: marks of the groups, best first.
        zero: the mark of a score of zero.
        gates, penalties: see there.
    """

    measure: str = ""
    mean: float = Field(default=0.5, ge=0, le=1)
    worst: float = Field(default=0.25, ge=0, le=1)
    clean: float = Field(default=0.25, ge=0, le=1)
    effect: float = Field(default=0.5, ge=0, le=1)
    thrift: float = Field(default=0.5, ge=0, le=1)
    prices: dict[Literal["gradients", "queries", "bytes"], Annotated[float, Field(ge=0)]] = Field(
        default={"gradients": 1.0, "queries": 1.0, "bytes": 1.0}
    )
    stealth: float | None = Field(default=None, ge=0, le=1)
    bands: list[Annotated[int, Field(ge=0, le=100)]] = Field(default=[100, 90, 80, 70, 60, 50], min_length=1)
    zero: int = Field(default=0, ge=0, le=100)
    gates: GatesSpec = GatesSpec()
    penalties: PenaltiesSpec = PenaltiesSpec()

    @model_validator(mode="after")
    def _adds_up(self) -> ScoringSpec:
        for names in (("mean", "worst", "clean"), ("effect", "thrift")):
            total = sum(getattr(self, name) for name in names)
            if abs(total - 1) > 1e-6:
                raise PydanticCustomError("weights", "{names} should add up to 1, not {total}", {"names": ", ".join(names), "total": total})
        if sorted(self.bands, reverse=True) != self.bands:
            raise PydanticCustomError("bands", "bands should fall from the best to the last", {})
        return self

    def rules(self) -> Rules:
        """Return the numbers as the scoring takes them."""
        same = {name: getattr(self, name) for name in ("mean", "worst", "clean", "effect", "thrift", "stealth", "zero")}
        return Rules(
            **same,
            prices={str(unit): price for unit, price in self.prices.items()},
            bands=tuple(self.bands),
            clean_loss=self.gates.clean_loss,
            worst_client=self.gates.worst_client,
            per_fault=self.penalties.per_fault,
            most=self.penalties.most,
        )


class PhasesSpec(Spec):
    """How much students are told before the end.

    Attributes:
        daily_step: to what the scores of the daily hidden phase are rounded, so that the hidden seeds cannot be learnt from them.
    """

    daily_step: float = Field(default=0.05, gt=0, le=0.5)
