"""`fedtrust.client`: what the decorator refuses, and what is read off a behaviour."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from fedtrust.client import Behaviour, View, behaviour, capabilities, overrides
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY
from tests.clients.behaviour_kit import make, view

CAPABILITIES = {
    "honest": (),
    "fedprox": ("training",),
    "label-flip": ("data",),
    "gaussian": ("update",),
    "sign-flip": ("update",),
    "badnets": ("data",),
    "model-replacement": ("data", "update"),
    "malformed": ("message",),
}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests register what they like."""
    REGISTRY.load()
    monkeypatch.setattr(REGISTRY, "_entries", dict(REGISTRY._entries))


@pytest.mark.parametrize(("name", "wanted"), CAPABILITIES.items())
def test_capabilities_are_read_off_the_hooks(name: str, wanted: tuple[str, ...]) -> None:
    assert capabilities(REGISTRY.get("behaviour", name).target) == wanted


def test_roles_of_the_behaviours_that_come_along() -> None:
    roles = {e.name: e.target.role for e in REGISTRY if e.kind == "behaviour" and e.name in CAPABILITIES}
    assert roles == {name: "honest" if name in ("honest", "fedprox") else "malicious" for name in CAPABILITIES}


def test_an_attack_of_a_students_hand() -> None:
    """The first example of the design."""

    @behaviour("ipm-of-a-student", knowledge="coalition", paper="Xie et al., UAI 2019")
    class InnerProduct(Behaviour):
        """Send -tau times the mean of the updates in view."""

        tau: float = 2.0

        def craft(self, updates: Tensor, view: View) -> Tensor:
            seen = updates if view.others is None else view.others
            return (-self.tau * seen.mean(0)).expand_as(updates)

    entry = REGISTRY.get("behaviour", "ipm-of-a-student")
    assert entry.target is InnerProduct
    assert entry.plugin
    assert entry.summary == "Send -tau times the mean of the updates in view."
    assert entry.meta["paper"] == "Xie et al., UAI 2019"
    assert (InnerProduct.role, InnerProduct.needs_knowledge) == ("malicious", "coalition")
    assert entry.check({}) == {"tau": 2.0}
    updates = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert make("ipm-of-a-student", tau=3).craft(updates, view()).tolist() == [[-6.0, -9.0]] * 2
    others = torch.tensor([[10.0, 0.0]])
    assert make("ipm-of-a-student").craft(updates, view(others=others)).tolist() == [[-20.0, 0.0]] * 2
    assert make("ipm-of-a-student") == make("ipm-of-a-student", tau=2.0) != make("ipm-of-a-student", tau=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        make("ipm-of-a-student").tau = 5.0  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        InnerProduct(3.0)  # type: ignore[call-arg]  # parameters go by name only
    with pytest.raises(InputError, match=r"behaviour 'ipm-of-a-student' has no parameter 'tua' \(parameters: tau\); did you mean 'tau'\?"):
        make("ipm-of-a-student", tua=1.0)


def test_what_is_no_behaviour_is_refused() -> None:
    def craft(updates: Tensor, view: View) -> Tensor:
        return updates

    class Loner:
        def craft(self, updates: Tensor, view: View) -> Tensor:
            return updates

    for thing in (craft, Loner):
        with pytest.raises(InputError, match=r"a behaviour is a subclass of fedtrust\.Behaviour"):
            behaviour("a-loner")(thing)  # type: ignore[type-var]
    assert REGISTRY.find("a-loner") == []


def test_an_attack_that_attacks_nothing_is_refused() -> None:
    hooks = "poison, loss, per_sample, project, craft, reply, claim"
    with pytest.raises(InputError, match=f"'idle' overrides none of {hooks}: it would attack nothing"):

        @behaviour("idle")
        class Idle(Behaviour):
            tau: float = 2.0

            def crafts(self, updates: Tensor, view: View) -> Tensor:
                return -updates

    assert REGISTRY.find("idle") == []

    @behaviour("idle", role="honest")
    class Patient(Behaviour):
        """An honest client may leave everything as it is."""

    assert Patient.role == "honest"


def test_a_hook_may_be_inherited() -> None:
    class Base(Behaviour):
        def poison(self, x: Tensor, y: Tensor, view: View) -> tuple[Tensor, Tensor]:
            return -x, y

    @behaviour("heir")
    class Heir(Base):
        """Does what its parent does."""

    assert capabilities(Heir) == ("data",)
    assert overrides(Heir(), "poison")
    assert not overrides(Heir, "craft")


def test_a_taken_name_is_refused_and_keeps_its_owner() -> None:
    owner = REGISTRY.get("behaviour", "sign-flip").target
    with pytest.raises(InputError, match=r"behaviour 'sign-flip' is already defined in fedtrust\.clients\.byzantine\.SignFlip"):

        @behaviour("sign-flip")
        class Mine(Behaviour):
            def craft(self, updates: Tensor, view: View) -> Tensor:
                return -updates

    assert REGISTRY.get("behaviour", "sign-flip").target is owner


@pytest.mark.parametrize("name", ["Sign-Flip", "sign_flip", "", "-flip", "flip-", "sign flip", "flwr:flip", "a--b"])
def test_names_are_lower_case_words_joined_by_hyphens(name: str) -> None:
    with pytest.raises(InputError, match="is not a component name"):

        @behaviour(name)
        class Odd(Behaviour):
            def craft(self, updates: Tensor, view: View) -> Tensor:
                return -updates


def test_bounds_of_a_parameter_are_kept() -> None:
    @behaviour("bounded")
    class Bounded(Behaviour):
        share: Annotated[float, Field(gt=0, le=1)] = 0.5
        label: int

        def craft(self, updates: Tensor, view: View) -> Tensor:
            return -updates

    entry = REGISTRY.get("behaviour", "bounded")
    assert entry.check({"label": 3}) == {"share": 0.5, "label": 3}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "^label: is required and not set$"),
        ({"label": 3, "share": 1.5}, r"^share: .*less than or equal to 1 \(got 1\.5\)$"),
        ({"label": 3, "share": float("nan")}, "^share: "),
        ({"label": True}, "^label: .*integer"),
        ({"label": "3"}, "^label: .*integer"),
    ]
    for params, why in wrong:
        with pytest.raises(InputError, match=why):
            entry.check(params)


def test_a_value_error_of_the_author_is_an_input_error() -> None:
    @behaviour("picky")
    class Picky(Behaviour):
        even: int = 2

        def __post_init__(self) -> None:
            if self.even % 2:
                raise ValueError(f"even must be even,\n got {self.even}")

        def craft(self, updates: Tensor, view: View) -> Tensor:
            return -updates

    with pytest.raises(InputError, match=r"^even must be even, got 3$"):
        make("picky", even=3)
    assert make("picky", even=4) is not None
