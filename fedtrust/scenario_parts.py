"""The parts of a scenario as pydantic models: frozen, strict, no unknown key; the short forms of the file are understood here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from fedtrust.client import Knowledge
from fedtrust.scenario_base import BIG as BIG
from fedtrust.scenario_base import Ref as Ref
from fedtrust.scenario_base import Spec as Spec
from fedtrust.scenario_privacy import PrivacySpec


class DataSpec(Spec):
    """Which data, and how they are spread over the clients.

    Attributes:
        source: the data set. Its parameters `root` and `download`, where it has them, come from the two keys below.
        partition: how samples are dealt out to clients.
        feature_skew: what differs between clients' features, if anything.
        root: folder of the data files, inside the scenario's folder.
        download: whether the source may fetch missing files.
    """

    source: Ref
    partition: Ref = Ref(name="iid")
    feature_skew: Ref | None = None
    root: str | None = None
    download: bool = False


class TrainSpec(Spec):
    """How a client trains. In the file every other key is a parameter of the optimiser (`momentum`, `weight_decay`, …).

    Attributes:
        optimiser: its name.
        lr: learning rate.
        batch_size: samples a step.
        epochs: passes over the client's data a round.
        loss: what the protocol prescribes to minimise; `None` until the task is known (cross-entropy, or mse for a regression).
        optimiser_params: the optimiser's parameters.
    """

    optimiser: str = "sgd"
    lr: float = Field(default=0.05, gt=0)
    batch_size: int = Field(default=20, ge=1)
    epochs: int = Field(default=1, ge=1)
    loss: Ref | None = None
    optimiser_params: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def expand(cls, given: Any) -> Any:
        """Move the optimiser's parameters into a table of their own."""
        if not isinstance(given, Mapping):
            return given
        known = {k: v for k, v in given.items() if k in cls.model_fields}
        rest = {k: v for k, v in given.items() if k not in cls.model_fields}
        nested = known.pop("optimiser_params", {})
        if not isinstance(nested, Mapping):
            raise PydanticCustomError("train", "`optimiser_params` should be a table", {})
        return {**known, "optimiser_params": {**nested, **rest}}


class AvailabilitySpec(Spec):
    """How likely a client can be reached: `mean + amplitude * cos(2 pi (time / period - phase))`, with a phase of its own for each client.

    In the file also a bare number: that probability, always.

    Attributes:
        mean: the probability, averaged over a period.
        amplitude: by how much it rises and falls; 0: it is constant.
        period: how long a day is, in `unit`.
        unit: `rounds` or virtual `seconds`.
        spread: over which share of the period the clients' phases lie: 1 evenly round the clock, 0 all alike.
    """

    mean: float = Field(default=1.0, gt=0, le=1)
    amplitude: float = Field(default=0.0, ge=0, le=0.5)
    period: float | None = Field(default=None, gt=0, le=1e12)
    unit: Literal["rounds", "seconds"] = "rounds"
    spread: float = Field(default=1.0, ge=0, le=1)

    @classmethod
    def expand(cls, given: Any) -> Any:
        """Understand a bare number."""
        return {"mean": given} if isinstance(given, int | float | str) else given

    @model_validator(mode="after")
    def _a_probability(self) -> AvailabilitySpec:
        if self.amplitude > 0 and self.period is None:
            raise PydanticCustomError("period", "an amplitude needs a period", {})
        if self.amplitude == 0 and self.period is not None:
            raise PydanticCustomError("period", "a period needs an amplitude above 0", {})
        if not self.amplitude - 1e-9 <= self.mean <= 1 - self.amplitude + 1e-9:
            raise PydanticCustomError(
                "swing",
                "mean ± amplitude should stay within 0 and 1 (got {mean} ± {amplitude})",
                {"mean": self.mean, "amplitude": self.amplitude},
            )
        return self


class RateSpec(Spec):
    """A speed that differs between clients, log-normally. In the file also a bare number: that speed for everybody.

    Attributes:
        median: the middle client's.
        sigma: standard deviation of the logarithm between clients.
        jitter: standard deviation of the logarithm from round to round.
    """

    median: float = Field(ge=1e-6, le=1e15)
    sigma: float = Field(default=0.0, ge=0, le=5)
    jitter: float = Field(default=0.0, ge=0, le=5)

    @classmethod
    def expand(cls, given: Any) -> Any:
        """Understand a bare number."""
        return {"median": given} if isinstance(given, int | float | str) else given


class SystemSpec(Spec):
    """The clients' devices and connections: who can be reached, who leaves, who is slow. Times are virtual seconds.

    Attributes:
        availability: how likely a client can be reached in a round.
        dropout: probability that a client that was asked leaves before it has replied.
        speed: training samples a second; `None`: training takes no time.
        bandwidth: bytes a second in either direction; `None`: sending takes no time.
        deadline: how long the server waits in a round; `None`: until everybody has replied or left.
        late: what a client does that cannot make it: `drop`, its reply comes too late; `partial`, it stops after fewer local steps.
        over_select: which share of clients is asked beyond `per_round`; the first `per_round` replies are taken.
        attackers_always_available: adversaries, while they act, can always be reached and never leave; they are as slow as others.
        idle: how long a round lasts in which nobody can be reached.
    """

    availability: AvailabilitySpec = AvailabilitySpec()
    dropout: float = Field(default=0.0, ge=0, lt=1)
    speed: RateSpec | None = None
    bandwidth: RateSpec | None = None
    deadline: float | None = Field(default=None, gt=0, le=1e12)
    late: Literal["drop", "partial"] = "drop"
    over_select: float = Field(default=0.0, ge=0, le=10)
    attackers_always_available: bool = False
    idle: float = Field(default=60.0, gt=0, le=1e12)

    @property
    def timed(self) -> bool:
        """Whether anything takes time."""
        return self.speed is not None or self.bandwidth is not None

    @model_validator(mode="after")
    def _means_something(self) -> SystemSpec:
        if self.deadline is not None and not self.timed:
            raise PydanticCustomError("timeless", "a deadline needs `speed` or `bandwidth`: without them nothing takes time", {})
        if self.availability.unit == "seconds" and not self.timed:
            raise PydanticCustomError("timeless", "a period in seconds needs `speed` or `bandwidth`: without them no time passes", {})
        if self.late == "partial" and (self.deadline is None or self.speed is None):
            raise PydanticCustomError("partial", "late = 'partial' needs a `deadline` and a `speed`", {})
        return self


class ClientsSpec(Spec):
    """The federation's clients.

    Attributes:
        count: how many there are.
        per_round: how many take part in a round; `None`: all.
        behaviour: what honest clients do.
        train: how they train.
        quorum: the share of a round's cohort whose replies must be valid for the round to count.
        system: their devices and connections; `None`: everybody can always be reached, nobody leaves and nothing takes time.
    """

    count: int = Field(ge=1, le=1_000_000)
    per_round: int | None = Field(default=None, ge=1)
    behaviour: Ref = Ref(name="honest")
    train: TrainSpec = TrainSpec()
    quorum: float = Field(default=0.5, gt=0, le=1)
    system: SystemSpec | None = None

    @property
    def cohort(self) -> int:
        """How many clients take part in a round."""
        return self.count if self.per_round is None else self.per_round


def _pair(given: Any) -> Any:
    if isinstance(given, list) and len(given) == 2:
        return tuple(given)
    if isinstance(given, tuple):
        return given
    raise PydanticCustomError("pair", "should be [first, last], not {got}", {"got": repr(given)})


class AttackerSpec(Spec):
    """A group of malicious clients.

    Attributes:
        behaviour: what they do.
        params: the behaviour's parameters.
        share, count, ids: who they are (exactly one of the three); a share is rounded half up.
        knowledge: what they know; by default the least that the behaviour needs.
        rounds: the first and the last round in which they misbehave; `None`: all.
    """

    behaviour: str = Field(min_length=1)
    params: dict[str, Any] = Field(default_factory=dict)
    share: float | None = Field(default=None, gt=0, lt=1)
    count: int | None = Field(default=None, ge=1)
    ids: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    knowledge: Knowledge | None = None
    rounds: Annotated[tuple[int, int], BeforeValidator(_pair)] | None = None

    @classmethod
    def hint(cls, key: str) -> str:
        """Say where a behaviour's parameters go."""
        return "; parameters of the behaviour go into `params`"

    @model_validator(mode="after")
    def _one_of_three(self) -> AttackerSpec:
        given = [k for k in ("share", "count", "ids") if getattr(self, k) is not None]
        if len(given) != 1:
            raise PydanticCustomError("who", "needs exactly one of share, count, ids ({got})", {"got": ", ".join(given) or "none given"})
        return self

    def size(self, clients: int) -> int:
        """Return how many of `clients` clients these are."""
        if self.ids is not None:
            return len(self.ids)
        if self.count is not None:
            return self.count
        return int((self.share or 0.0) * clients + 0.5)


class MaliciousServerSpec(Spec):
    """A server that sends its clients something else than the model.

    Attributes:
        sender: what it sends.
        params: the sender's parameters.
        rounds: the first and the last round in which it does so; `None`: all.
    """

    sender: str = Field(min_length=1)
    params: dict[str, Any] = Field(default_factory=dict)
    rounds: Annotated[tuple[int, int], BeforeValidator(_pair)] | None = None

    @classmethod
    def hint(cls, key: str) -> str:
        """Say where a sender's parameters go."""
        return "; parameters of the sender go into `params`"


def _assumed(given: Any) -> Any:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise PydanticCustomError("assumed", "should be a share in [0, 1) or a count, not {got}", {"got": repr(given)})
    if given < 0 or (isinstance(given, float) and not given < 1):
        raise PydanticCustomError("assumed", "should be a share in [0, 1) or a whole count from 0 (got {got})", {"got": repr(given)})
    return given


class StrategySpec(Spec):
    """What the server does: filters, one aggregator, steps, in this order, and repairs after the last round.

    Attributes:
        filters: rules [n, d] → [m, d].
        aggregator: the rule [n, d] → [d]; `flwr:NAME` is a stock Flower strategy.
        steps: rules [d] → [d].
        assumed_malicious: what the defender believes, a share of the cohort or a count; never the truth.
        root_samples: how many labelled samples the server owns.
        repairs: what it does to the model after the last round, one after another.
        privacy: how it protects the clients from whoever sees the models; in the file also at the top, as `[privacy]`.
        behaviour: what honest clients do beside this strategy, in place of `clients.behaviour`; for the entries of a sweep.
        loss: what clients minimise beside it, in place of `clients.train.loss`; for the entries of a sweep.
    """

    filters: list[Ref] = Field(default_factory=list)
    aggregator: Ref = Ref(name="mean")
    steps: list[Ref] = Field(default_factory=list)
    assumed_malicious: Annotated[int | float, BeforeValidator(_assumed)] = 0.0
    root_samples: int = Field(default=0, ge=0)
    repairs: list[Ref] = Field(default_factory=list)
    privacy: PrivacySpec | None = None
    behaviour: Ref | None = None
    loss: Ref | None = None

    @property
    def label(self) -> str:
        """A short name: the filters, the privacy mechanism, the aggregator, the steps and the repairs, joined by plus signs."""
        before, after = [ref.name for ref in self.filters], [ref.name for ref in (*self.steps, *self.repairs)]
        private = [] if self.privacy is None else [self.privacy.label]
        return " + ".join([*before, *private, self.aggregator.name, *after])


class ReleaseSpec(Spec):
    """How the model is released to its users.

    Attributes:
        answers: what a user is told: the model's `logits`, the `probabilities` of the classes, or the likeliest `label` alone.
        queries: how many samples each user may ask each released model about; `None`: as many as it likes.
        defences: what is done to the probabilities, in this order.
    """

    answers: Literal["logits", "probabilities", "label"] = "logits"
    queries: int | None = Field(default=None, ge=1)
    defences: list[Ref] = Field(default_factory=list)


#: A probe is a component by name; the field's own name says what it is for.
ProbeSpec = Ref


class EngineSpec(Spec):
    """How cohorts are computed; but for `precision` it never changes the result beyond float rounding.

    Attributes:
        path: one client at a time, `torch.func.vmap`, fused cohorts, or what is fastest.
        deadline: seconds that clients who are trained together, and then each of them alone, may take; likewise a coalition's craft, a
            server rule or a probe.
        retries: how often clients are tried again together after their Ray worker died, before each is tried alone.
        precision: what clients multiply in; `bfloat16` is faster and coarser: their models, updates and losses stay float32.
    """

    path: Literal["auto", "loop", "vmap", "fused"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    deadline: float = Field(default=600.0, gt=0)
    retries: int = Field(default=1, ge=0, le=100)
