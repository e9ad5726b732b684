"""What clients that protect themselves spend: a behaviour that adds noise says what ε its client pays for having taken part.

Nobody but the client adds the noise, so nobody's sampling helps: an observer who sees who took part is assumed. A behaviour with the two
methods of `ClientAccount` is asked by the framework, whatever its unit (a client's whole data, or one record of it).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from fedtrust.privacy.accountants import Relation

Unit = Literal["client", "record"]


class Participation(NamedTuple):
    """How far one client took part.

    Attributes:
        client: its id.
        rounds: in how many rounds it was asked; whether its reply arrived does not matter, an update may have been seen on the way.
        examples: its number of samples.
        batch_size: samples a local step, as the run uses it.
        steps: local steps a round.
    """

    client: int
    rounds: int
    examples: int
    batch_size: int
    steps: int


class Spent(NamedTuple):
    """What a client has paid.

    Attributes:
        unit: whose presence is hidden: a `client`'s whole data, or one `record`.
        relation: which data sets are neighbours.
        sampling: what the accounting assumes of it, in a few words.
        clip: the L2 bound on what is noised.
        noise_multiplier: standard deviation of the noise ÷ sensitivity.
        releases: how many noised values there were.
        delta: δ.
        epsilon: ε at δ; by privacy loss distributions where they are known.
        epsilon_rdp: ε at δ by Rényi divergences.
    """

    unit: Unit
    relation: Relation
    sampling: str
    clip: float
    noise_multiplier: float
    releases: int
    delta: float
    epsilon: float
    epsilon_rdp: float


Self = TypeVar("Self", bound="ClientAccount")


@runtime_checkable
class ClientAccount(Protocol):
    """A behaviour that protects its client by noise of its own."""

    def calibrated(self: Self, parts: Sequence[Participation]) -> Self:
        """Return the behaviour with its noise fixed for these clients, each asked in every planned round; called before round 1.

        A behaviour whose noise is given as it is returns itself; one with a target ε returns a copy that keeps it for each of them.
        """
        ...

    def account(self, part: Participation) -> Spent:
        """Return what a client with this participation has spent; of its data only their number may enter.

        Its ε must not fall with more rounds or steps, nor rise with more samples.
        """
        ...


class Worst(NamedTuple):
    """The client that paid most, and what; `clients` is how many paid anything."""

    client: int
    spent: Spent
    clients: int


def worst(account: ClientAccount, parts: Iterable[Participation]) -> Worst | None:
    """Return a client with the largest ε among those that took part, or `None` if nobody did.

    An ε takes a while, and clients with different numbers of samples are many. So a group of clients is left alone once one who had the
    fewest samples of them, and the most rounds and steps, would not have paid more than the worst that is known.
    """
    taking = sorted(part for part in parts if part.rounds)
    if not taking:
        return None
    known: dict[tuple[int, ...], Spent] = {}

    def spent(part: Participation) -> Spent:
        if part[1:] not in known:
            known[part[1:]] = account.account(part)
        return known[part[1:]]

    first = max(taking, key=lambda part: part.rounds * part.steps * min(1.0, part.batch_size / part.examples) ** 2)
    best, groups = first, [sorted({part[1:]: part for part in reversed(taking)}.values(), key=lambda part: part.examples)]
    while groups:
        group = groups.pop()
        bound = group[0]._replace(rounds=max(p.rounds for p in group), steps=max(p.steps for p in group))
        if spent(bound).epsilon <= spent(best).epsilon:
            continue
        if len(group) == 1:
            best = bound
        else:
            groups += [group[len(group) // 2 :], group[: len(group) // 2]]
    return Worst(best.client, spent(best), len(taking))
