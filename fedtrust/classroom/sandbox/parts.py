"""Inside the sandbox: what stands for a view or a context there, and the answers to the host's calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedtrust.classroom.sandbox import player
from fedtrust.classroom.sandbox.player import Host, Refused, Tensors
from fedtrust.client import Behaviour, View, overrides
from fedtrust.data.base import Task
from fedtrust.engine import seeds
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.models.build import build
from fedtrust.probes.base import ProbeContext
from fedtrust.probes.guesses import Membership, Reconstructions
from fedtrust.registry import REGISTRY
from fedtrust.sending import Recipe
from fedtrust.server import AggContext, Verdict
from fedtrust.views import check_memory

#: Hooks of a behaviour that cannot be played here, and why.
UNSUPPORTED = {
    "loss": "`loss` runs inside the engine's batched training, which is not in the sandbox; train by yourself in `craft`, with "
    "`view.data()`, `view.model` and torch, or poison the data",
    "per_sample": "`per_sample` runs inside the engine's training, which is not in the sandbox",
    "project": "`project` runs inside the engine's training, which is not in the sandbox; project in `craft`",
    "reply": "`reply` builds the protocol's message, which is the host's; change the update in `craft`",
    "claim": "`claim` is for adversaries who extract something; hand in an audit",
    "goal_now": "`goal_now` cannot cross; override `goal`",
}
#: Hooks that cross.
HOOKS = ("remember", "agree", "poison", "craft", "goal")


class Setting:
    """The game's protocol, rebuilt inside from what everybody knows: task, layout, model, loss."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        task: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given["task"].items()}
        self.task = Task(**task)
        self.layout = Layout(tuple(given["layout"]["names"]), tuple(tuple(s) for s in given["layout"]["shapes"]))
        model, loss = given["model"], given["loss"]
        self.model: Any = Architecture(build(model["name"], model["params"], self.task, 0), self.layout)
        self.criterion: Callable[[Tensor, Tensor], Tensor] = REGISTRY.make("loss", loss["name"], loss["params"])

    def random(self, number: int) -> dict[str, Any]:
        """Return the randomness of a call: a generator and named ones, both from a number that the host drew for this call."""
        return {
            "rng": seeds.torch_stream(number, "sandbox"),
            "private": lambda purpose, *counters: seeds.stream(number, f"private/{purpose}", *counters),
        }


def load(data: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load a submission; return who answers for it, and what the host is told about it."""
    setting = None if data["setting"] is None else Setting(data["setting"])
    module = player.execute(data["source"], data["file"])
    found, about = player.component(module, data["role"], data["params"])
    made = _ROLES[data["role"]](found, setting)
    return made, {"done": True, **about, **made.about()}


class Attack:
    """Answers for a behaviour, or for a plain `craft(updates, view)`."""

    def __init__(self, found: Any, setting: Setting | None) -> None:
        if isinstance(found, dict):
            craft = found["craft"]

            class Plain(Behaviour):
                def craft(self, updates: Tensor, view: View) -> Tensor:
                    result: Tensor = craft(updates, view)
                    return result

            found = Plain()
        for hook, why in UNSUPPORTED.items():
            if overrides(found, hook):
                raise Refused("unsupported", why)
        self.behaviour: Behaviour = found
        self.setting = setting

    def about(self) -> dict[str, Any]:
        """Return which hooks there are, what it needs to know, and why it cannot work on the task."""
        reason = self.behaviour.check(self.setting.task) if self.setting and overrides(self.behaviour, "check") else None
        hooks = [hook for hook in HOOKS if overrides(self.behaviour, hook)]
        return {"hooks": hooks, "knowledge": self.behaviour.needs_knowledge, "reason": None if reason is None else str(reason)[:300]}

    def answer(self, data: Mapping[str, Any], tensors: Tensors, host: Host) -> tuple[dict[str, Any], Tensors]:
        """Answer one call of a hook."""
        op = data["op"]
        if op == "remember":
            return {}, _named("memory", self.behaviour.remember(int(data["size"])))
        if op == "goal":
            made = self.behaviour.goal(tensors["x"], tensors["y"], _setting(self.setting).task)
            return ({"none": True}, {}) if made is None else ({}, {"x": made[0], "y": made[1]})
        view = self._view(data, tensors, host)
        if op == "agree":
            self.behaviour.agree(view)
            return {}, self._memory(view, tensors)
        if op == "poison":
            made_x, made_y, *marks = self.behaviour.poison(tensors["x"], tensors["y"], view)
            if marks:
                raise Refused("unsupported", "marks are for a `loss`, which cannot be played here")
            return {}, {"x": made_x, "y": made_y, **self._memory(view, tensors)}
        crafted = self.behaviour.craft(tensors["updates"], view)
        return {}, {"updates": crafted, **self._memory(view, tensors)}

    def _memory(self, view: View, tensors: Tensors) -> Tensors:
        """Return what it remembers, if that is still what it declared."""
        try:
            check_memory(view.memory, _part("memory", tensors))
        except ValueError as error:
            raise Refused("reply", str(error)) from None
        return _named("memory", view.memory)

    def _view(self, data: Mapping[str, Any], tensors: Tensors, host: Host) -> View:
        setting = _setting(self.setting)
        own = _part("data", tensors)

        def defence(updates: Tensor) -> Tensor:
            return host.ask("defence", {"updates": updates.float()})["delta"]

        targets = _part("targets", tensors)
        return View(
            params=tensors["params"],
            task=setting.task,
            layout=setting.layout,
            model=setting.model,
            criterion=setting.criterion,
            memory=_part("memory", tensors),
            server=_part("server", tensors),
            targets=(targets["x"], targets["y"]) if targets else None,
            shared=_part("shared", tensors) if data["shared"] else None,
            data=(lambda: (own["x"].clone(), own["y"].clone())) if own else None,
            others=tensors.get("others"),
            defence=defence if data["defence"] else None,
            coalition=tuple(data["coalition"]),
            **{name: data[name] for name in ("round", "client", "rank", "recruits", "cohort")},
            **setting.random(int(data["random"])),
        )


class Defence:
    """Answers for an aggregator, or a plain `aggregate(updates, ctx)`."""

    def __init__(self, found: Any, setting: Setting | None) -> None:
        self.rule: Callable[..., Any] = found["aggregate"] if isinstance(found, dict) else found
        self.setting = setting

    def about(self) -> dict[str, Any]:
        """Return nothing: a rule says nothing of itself beside its name."""
        return {}

    def answer(self, data: Mapping[str, Any], tensors: Tensors, host: Host) -> tuple[dict[str, Any], Tensors]:
        """Return the rule's verdict."""
        setting = _setting(self.setting)
        root = _part("root", tensors)

        def train(x: Tensor, y: Tensor, params: Tensor | None = None, epochs: int | None = None) -> Tensor:
            given = {"x": x, "y": y, **({} if params is None else {"params": params})}
            return host.ask("train", given, {"epochs": epochs})["update"]

        ctx = AggContext(
            params=tensors["params"],
            weights=tensors["weights"],
            clients=tuple(data["clients"]),
            layout=setting.layout,
            task=setting.task,
            model=setting.model,
            criterion=setting.criterion,
            root=(root["x"], root["y"]) if root else None,
            state=_part("state", tensors),
            train=train,
            **{name: data[name] for name in ("round", "rounds", "asked", "bound", "assumed_malicious")},
            **setting.random(int(data["random"])),
        )
        with torch.no_grad():
            made = self.rule(tensors["updates"], ctx)
        verdict = made if isinstance(made, Verdict) else Verdict(made)
        if verdict.members is not None:
            raise Refused("reply", "it returned members, which only a filter may")
        told: Tensors = {"delta": verdict.value}
        if verdict.trust is not None:
            told["trust"] = verdict.trust
        if verdict.state is not None:
            told |= _named("state", verdict.state)
        return {"state": verdict.state is not None, "numbers": {str(k)[:60]: float(v) for k, v in list(verdict.numbers.items())[:20]}}, told


class Audit:
    """Answers for a probe, or plain `score(ctx)`, `reconstruct(ctx)` and `steal(ctx)`."""

    def __init__(self, found: Any, setting: Setting | None) -> None:
        self.found, self.setting = found, setting

    def about(self) -> dict[str, Any]:
        """Return which questions it can answer."""
        return {"hooks": sorted(self.found) if isinstance(self.found, dict) else ["reconstruct", "score", "steal"]}

    def answer(self, data: Mapping[str, Any], tensors: Tensors, host: Host) -> tuple[dict[str, Any], Tensors]:
        """Return scores [q], pictures [m, *shape] and their labels [m], or the parameters of a stolen model [d]."""
        ctx = self._context(data, tensors, host)
        op = data["op"]
        if isinstance(self.found, dict) and op not in self.found:
            found = ", ".join(self.found)
            raise Refused("unusable", f"it has no function `{op}(ctx)`, which is what this exercise asks for (found: {found})")
        made = self.found[op](ctx) if isinstance(self.found, dict) else self.found(ctx)
        if isinstance(made, Mapping):
            kind = Membership if op == "score" else Reconstructions
            made = next((guess for guess in made.values() if isinstance(guess, kind)), None)
        if op == "score":
            scores = made.scores if isinstance(made, Membership) else made
            return {}, {"scores": scores.float() if isinstance(scores, Tensor) else scores}
        if op == "steal":
            return {}, {"params": made}
        x, y = _reconstructed(made, ctx)
        return {}, {"x": x, **({} if y is None else {"y": y})}

    def _context(self, data: Mapping[str, Any], tensors: Tensors, host: Host) -> ProbeContext:
        setting = _setting(self.setting)

        def query(x: Tensor) -> Tensor:
            return host.ask("query", {"x": x})["output"]

        pairs: dict[str, Any] = {n: (p["x"], p["y"]) for n in ("candidates", "population") if (p := _part(n, tensors))}
        sent = {int(name): value for name, value in _part("sent", tensors).items()}
        return ProbeContext(
            task=setting.task,
            query=query,
            rng=setting.random(int(data["random"]))["rng"],
            criterion=setting.criterion,
            layout=setting.layout,
            params=tensors.get("params"),
            model=setting.model if data["model"] else None,
            updates=tensors.get("updates"),
            trust=tensors.get("trust"),
            clients=tuple(data["clients"]),
            sent=sent or None,
            examples={int(k): v for k, v in data["examples"].items()} if data["examples"] is not None else None,
            queries=data["queries"],
            answers=data["answers"],
            round=data["round"],
            final=data["final"],
            recipe=None if data["recipe"] is None else Recipe(**data["recipe"]),
            **pairs,
        )


def _reconstructed(made: object, ctx: ProbeContext) -> tuple[Tensor, Tensor | None]:
    """Return the samples and labels in what `reconstruct` returned."""
    if isinstance(made, Reconstructions):
        labels = [item.y for item in made.items if item.y is not None]
        x = torch.cat([item.x for item in made.items]) if made.items else torch.zeros(0, *ctx.task.shape)
        return x, torch.cat(labels) if labels and len(labels) == len(made.items) else None
    given: tuple[object, object] = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(given[0], Tensor) or not isinstance(given[1], Tensor | None):
        raise Refused("reply", f"returned {type(made).__name__}; expected samples [m, *shape], or a pair (samples, labels [m])")
    return given[0], given[1]


class Evasion:
    """Answers for a plain `perturb(x, y, query)`; what `query` is, `Query` says."""

    def __init__(self, found: Any, setting: Setting | None) -> None:
        self.perturb, self.setting = found["perturb"], setting

    def about(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def answer(self, data: Mapping[str, Any], tensors: Tensors, host: Host) -> tuple[dict[str, Any], Tensors]:
        """Return the changed samples [n, *shape]."""
        task = None if self.setting is None else self.setting.task
        ask = Query(host, task, data["eps"], seeds.torch_stream(int(data["random"]), "sandbox"))
        if "params" in tensors:
            ask.params = tensors["params"]
            ask.model = functools.partial(_setting(self.setting).model, ask.params)
        return {}, {"x": self.perturb(tensors["x"], tensors["y"], ask)}


class Query:
    """The model as an evader has it.

    Attributes:
        task: what is learnt; `low` and `high` are the range of a feature, `None` where there is none.
        eps: how far a feature may be moved.
        rng: randomness.
        model: its own copy, differentiable, `model(x) -> output`; `None` unless the exercise grants the parameters.
        params: its parameters [d]; the same.
    """

    model: Callable[[Tensor], Tensor] | None = None
    params: Tensor | None = None

    def __init__(self, host: Host, task: Task | None, eps: float, rng: torch.Generator) -> None:
        self._host, self.task, self.eps, self.rng = host, task, eps, rng

    def __call__(self, x: Tensor) -> Tensor:
        """Return the model's outputs [n, C] for samples [n, *shape]; each sample counts."""
        return self._host.ask("query", {"x": x})["output"]

    def gradient(self, x: Tensor, of: Tensor) -> Tensor:
        """Return gradients in the samples, [n, *shape]; each sample counts. For exercises that grant gradients or parameters.

        Args:
            x: samples [n, *shape].
            of: labels [n]: of the cross-entropy at them; or weights [n, C]: of (weights · output).sum(), for any other loss.
        """
        return self._host.ask("gradient", {"x": x, ("weights" if of.is_floating_point() else "y"): of})["gradient"]


_ROLES: dict[str, Callable[[Any, Setting | None], Any]] = {"attack": Attack, "defence": Defence, "audit": Audit, "evasion": Evasion}


def _setting(setting: Setting | None) -> Setting:
    if setting is None:
        raise Refused("unusable", "the host has not said what is learnt")
    return setting


def _named(prefix: str, tensors: Mapping[str, Any]) -> Tensors:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
