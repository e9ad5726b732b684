"""What a client does in a round. Honest by default; an attack overrides one hook."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, dataclass_transform

import numpy as np
from torch import Generator, Tensor

from fedtrust.data.base import Task
from fedtrust.errors import InputError
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.privacy.record import RecordMechanism
from fedtrust.probes.guesses import Guess
from fedtrust.registry import REGISTRY

Knowledge = Literal["own", "coalition", "omniscient", "omniscient+defence"]
#: From the least to the most that an adversary may know.
KNOWLEDGE: tuple[Knowledge, ...] = ("own", "coalition", "omniscient", "omniscient+defence")

#: What a client keeps between rounds, by name; tensors only, saved in the checkpoint.
ClientMemory = dict[str, Tensor]


class Predict:
    """The client's local model as a function, `predict(x [b, *shape]) -> output [b, classes]`.

    Attributes:
        parameters: the current local parameters by name; differentiable.
    """

    def __init__(self, call: Callable[..., Tensor], parameters: Mapping[str, Tensor], layout: Layout) -> None:
        self._call = call
        self._layout = layout
        self.parameters = parameters

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        """Return the outputs [b, classes] for samples `x` [b, *shape]; `options` are further arguments of the module, if it knows any."""
        return self._call(self.parameters, x, **options)

    def frozen(self) -> Predict:
        """Return the same model with its parameters as constants: for gradients of the inputs alone."""
        return Predict(self._call, {name: value.detach() for name, value in self.parameters.items()}, self._layout)

    @property
    def params(self) -> Tensor:
        """The current local parameters as one vector [d]; differentiable (for proximal terms and the like)."""
        return self._layout.flatten(self.parameters)


class View(NamedTuple):
    """What a client (or a coalition) knows in a round; built only by `fedtrust.views`.

    What every participant of the protocol knows is always there; what only the scenario's `knowledge` grants is `None` unless granted.

    Attributes:
        params: the global model it was sent [d].
        round: the round, from 1.
        task: what is learnt (classes, sample shape, value range).
        layout: where each layer lies in [d].
        model: the architecture, `model(params [d], x [b, *shape]) -> [b, classes]`; shows its hidden layers too.
        criterion: the loss that the protocol prescribes, `criterion(output, y) -> scalar`.
        memory: what it stored in earlier rounds, see `Behaviour.remember`; in the `craft` of a coalition what they keep together.
        server: what the server sent beside the model, by name.
        rng: its own source of randomness; `None` inside `loss`, which must be deterministic.
        client: its id; `None` in a coalition's `craft` and inside `loss`.
        coalition: the ids of the clients that act together this round, sorted (with `own`: itself alone).
        rank: its place in the whole coalition as recruited, and `recruits` how many were (roles can be shared out beforehand).
        cohort: how many clients were asked this round.
        targets: the inputs that it wants misjudged and the labels it wants for them (x [t, *shape], y [t]), as its own `goal` made them
            of the test samples; only in `poison` and `craft` of a behaviour registered with `targets=True`.
        shared: in `poison`, what its coalition agreed on this round: the coalition's memory after `Behaviour.agree`; `None` without one.
        marks: in `loss`, what `poison` returned as a third for the samples of the batch [b]; `None` if it did not.
        data: in `agree` and `craft`, the coalition's own samples (x [b, *shape], y [b]); `None` elsewhere.
        others: the honest updates of this round [m, d]; from `omniscient` on.
        defence: the server's rule as a function, `defence(updates [n, d]) -> delta [d]`; only with `omniscient+defence`. It has the rule's
            past. Rows as many as `others` and the coalition's together are taken for theirs, `others` first: the rule then knows its
            clients again, and weighs them as registered. Any other number of rows are nobody's, of equal weight.
        private: in `agree` and `craft`, `private(purpose, *counters)`: NumPy generators of its own with keys of 128 bits (`rng` has 32),
            the same at every call in a round; for noise that a guarantee of privacy rests on.
    """

    params: Tensor
    round: int
    task: Task
    layout: Layout
    model: Architecture
    criterion: Callable[[Tensor, Tensor], Tensor]
    memory: ClientMemory
    server: Mapping[str, Tensor]
    rng: Generator | None = None
    client: int | None = None
    coalition: tuple[int, ...] = ()
    rank: int = 0
    recruits: int = 1
    cohort: int = 1
    targets: tuple[Tensor, Tensor] | None = None
    shared: Mapping[str, Tensor] | None = None
    marks: Tensor | None = None
    data: Callable[[], tuple[Tensor, Tensor]] | None = None
    others: Tensor | None = None
    defence: Callable[[Tensor], Tensor] | None = None
    private: Callable[..., np.random.Generator] | None = None


class Reply(NamedTuple):
    """What one client sends back, before it is put into a message.

    Attributes:
        arrays: its local model, name → tensor.
        examples: on how many samples it says it trained.
    """

    arrays: dict[str, Any]
    examples: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Behaviour:
    """A client that follows the protocol. Annotated fields of a subclass are its parameters in a scenario.

    Hooks, in the order of a round: `agree` → `poison` → training with `loss`, `per_sample` and `project` → `craft` → `reply`. A hook that
    is not overridden costs nothing.
    """

    #: `honest` or `malicious`; set by the `behaviour` decorator.
    role: ClassVar[Literal["honest", "malicious"]] = "malicious"
    #: The least knowledge it can work with.
    needs_knowledge: ClassVar[Knowledge] = "own"
    #: Whether it attacks nobody: it departs from the protocol to protect itself, and a server that shuts it out wrongs an honest client.
    protects: ClassVar[bool] = False

    def check(self, task: Task) -> str | None:
        """Return why this behaviour cannot work on the task (asked before anything runs), or `None`."""
        return None

    def remember(self, size: int) -> ClientMemory:
        """Return the client's memory before its first round, for a model of `size` parameters; names and shapes stay as they are here."""
        return {}

    def agree(self, view: View) -> None:
        """Settle in `view.memory`, its coalition's, what its members share this round; they find it in `view.shared`.

        Only asked of an adversary with at least `coalition` knowledge. `view` is that of `craft`, before anybody has trained.
        """

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Return the data it trains on this round, from its own `x` [b, *shape] and `y` [b]; do not change these in place.

        A third tensor [b], float32, marks the samples for `loss`, which finds the marks of its batch in `view.marks`.
        """
        return x, y

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        """Return what it minimises on a batch `x` [b, *shape], `y` [b], a scalar. Must work under `torch.func.vmap`."""
        return view.criterion(predict(x), y)

    def per_sample(self, samples: int, batch_size: int) -> RecordMechanism | None:
        """Return how it makes its local steps of the gradients of single samples; `None`: of the gradient of a batch, like everybody.

        Such a client draws its batches by that object too, and `loss` is asked of one sample at a time (`x` [1, *shape], `y` [1]).

        Args:
            samples: on how many samples it trains.
            batch_size: samples a local step, as the scenario has it.
        """
        return None

    def project(self, update: Tensor, view: View) -> Tensor:
        """Return what it keeps of its movement away from the global model [d], after every local step; `view` is that of `loss`.

        Must work under `torch.func.vmap`. For projections on a ball, frozen coordinates and the like.
        """
        return update

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return what its coalition sends [k, d], from the updates that training gave [k, d] (local minus global model)."""
        return updates

    def reply(self, reply: Reply, view: View) -> Reply | None:
        """Return the message it sends; an honest client leaves it as it is. `None` sends nothing."""
        return reply

    def claim(self, view: View) -> Mapping[str, Guess]:
        """Return what it has found out after the last round, by name; for adversaries who extract something.

        Asked once, with the view of `craft` (no update is made): of a coalition, or with `own` knowledge of its first member. A teacher
        scores the guesses (`fedtrust.probes.guesses`) and records them under the behaviour's name.
        """
        return {}

    def goal(self, x: Tensor, y: Tensor, task: Task) -> tuple[Tensor, Tensor] | None:
        """Return what the attacker wants the model to say, or `None` without such a goal: inputs and the labels he wants for them.

        Used by the teacher's probes: the attack success rate is the share of these inputs that the global model gives these labels.
        Made from the test samples `x` [n, *shape], `y` [n] in their order, samples whose wanted label is the true one are not counted.
        """
        return None

    def goal_now(self, x: Tensor, y: Tensor, task: Task, memory: ClientMemory) -> tuple[Tensor, Tensor] | None:
        """Return the goal of this round, given what its coalition remembers; for an attacker who learns what he wants (a trigger, say).

        Before the coalition remembers anything `goal` is asked; by default always.
        """
        return self.goal(x, y, task)


BehaviourClass = TypeVar("BehaviourClass", bound=type[Behaviour])

_HOOKS: dict[str, str] = {
    "poison": "data",
    "loss": "training",
    "per_sample": "training",
    "project": "training",
    "craft": "update",
    "reply": "message",
}


def overrides(behaviour: Behaviour | type[Behaviour], hook: str) -> bool:
    """Return whether a behaviour overrides the hook."""
    if isinstance(behaviour, Poisoned):
        return hook == "poison" or overrides(behaviour.honest, hook) or (hook == "remember" and overrides(behaviour.attack, hook))
    cls = behaviour if isinstance(behaviour, type) else type(behaviour)
    known = _OVERRIDES.get((cls, hook))
    if known is None:
        known = _OVERRIDES[cls, hook] = getattr(cls, hook) is not getattr(Behaviour, hook)
    return known


#: What `overrides` has said: it is asked several times a client and round.
_OVERRIDES: dict[tuple[type[Behaviour], str], bool] = {}
#: The same of `capabilities`.
_CAPABILITIES: dict[type[Behaviour], tuple[str, ...]] = {}


def capabilities(cls: type[Behaviour]) -> tuple[str, ...]:
    """Return what a behaviour manipulates (`data`, `training`, `update`, `message`), read off the hooks it overrides."""
    known = _CAPABILITIES.get(cls)
    if known is None:
        known = _CAPABILITIES[cls] = tuple(dict.fromkeys(word for hook, word in _HOOKS.items() if overrides(cls, hook)))
    return known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisoned(Behaviour):
    """A client whose data somebody poisons and whose software is honest: it does with these data whatever honest clients do.

    Both remember what they like; neither sees the other's memory.
    """

    attack: Behaviour
    honest: Behaviour

    def remember(self, size: int) -> ClientMemory:
        """Return both memories, under names that tell them apart."""
        return _named("attack", self.attack.remember(size)) | _named("honest", self.honest.remember(size))

    def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Return what the honest software makes of the poisoned data; an attacker's marks have no loss that would read them."""
        here = _seen("attack", view)
        x, y = self.attack.poison(x, y, here)[:2]
        view.memory.update(_named("attack", here.memory))
        here = _seen("honest", view)
        made = self.honest.poison(x, y, here)
        view.memory.update(_named("honest", here.memory))
        return made

    def loss(self, predict: Predict, x: Tensor, y: Tensor, view: View) -> Tensor:
        """Return the honest loss."""
        return self.honest.loss(predict, x, y, _seen("honest", view))

    def per_sample(self, samples: int, batch_size: int) -> RecordMechanism | None:
        """Return what the honest software protects its records with; poisoned ones are records too."""
        return self.honest.per_sample(samples, batch_size)

    def project(self, update: Tensor, view: View) -> Tensor:
        """Return what honest clients keep."""
        return self.honest.project(update, _seen("honest", view))

    def craft(self, updates: Tensor, view: View) -> Tensor:
        """Return what honest clients send."""
        here = _seen("honest", view)
        updates = self.honest.craft(updates, here)
        view.memory.update(_named("honest", here.memory))
        return updates

    def reply(self, reply: Reply, view: View) -> Reply | None:
        """Return the honest message."""
        return self.honest.reply(reply, _seen("honest", view))


def _named(name: str, memory: ClientMemory) -> ClientMemory:
    return {f"{name}.{key}": value for key, value in memory.items()}


def _seen(name: str, view: View) -> View:
    """Return the view with that memory alone; the honest software knows of no targets and of nothing that a coalition shares."""
    memory = {key.removeprefix(f"{name}."): value for key, value in view.memory.items() if key.startswith(f"{name}.")}
    mine = name == "attack"
    return view._replace(memory=memory, targets=view.targets if mine else None, shared=view.shared if mine else None)


def played(attack: Behaviour, honest: Behaviour) -> Behaviour:
    """Return what the clients of an adversary do: one who only poisons data leaves everything else to the honest software."""
    if capabilities(type(attack)) == ("data",) and capabilities(type(honest)):
        return Poisoned(attack=attack, honest=honest)
    return attack


@dataclass_transform(frozen_default=True, kw_only_default=True)
def behaviour(
    name: str, *, role: Literal["honest", "malicious"] = "malicious", knowledge: Knowledge = "own", paper: str = "", **meta: Any
) -> Callable[[BehaviourClass], BehaviourClass]:
    """Register a `Behaviour` subclass under `name`.

    Args:
        name: its name in a scenario.
        role: `honest` behaviours may be every client's, `malicious` ones are for `[[attackers]]`.
        knowledge: the least knowledge it can work with.
        paper: authors, venue, section.
        meta: further declarations, kept in the registry: `targets=True`, see `View.targets`; `spread=True` says that it works on how far
            updates lie apart, so that one that is alone with `coalition` knowledge is refused; `protects=True` that its clients protect
            themselves and attack nobody: the truth then counts them among the honest.

    Raises:
        InputError: it is not a `Behaviour`, overrides no hook, or its parameters cannot be read.
    """

    def decorate(cls: BehaviourClass) -> BehaviourClass:
        where = f"{cls.__module__}.{cls.__qualname__}"
        if not (isinstance(cls, type) and issubclass(cls, Behaviour)):
            raise InputError("a behaviour is a subclass of fedtrust.Behaviour", where)
        if role == "malicious" and not capabilities(cls) and not overrides(cls, "claim"):
            raise InputError(f"behaviour '{name}' overrides none of {', '.join(_HOOKS)}, claim: it would attack nothing", where)
        if knowledge == "own" and overrides(cls, "agree"):
            raise InputError(f"behaviour '{name}' agrees on something, so it needs knowledge 'coalition' at least", where)
        try:
            made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        except (TypeError, ValueError) as error:  # a mutable default, a field without one after …
            raise InputError(f"the fields of behaviour '{name}' cannot be read: {error}", where) from None
        made.role = role
        made.needs_knowledge = knowledge
        made.protects = bool(meta.get("protects"))
        REGISTRY.add("behaviour", name, made, role=role, knowledge=knowledge, paper=paper, **meta)
        return made  # type: ignore[return-value]  # dataclass() keeps the class

    return decorate
