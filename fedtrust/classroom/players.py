"""Submissions in the sandbox as the tournament meets them: a player is one sandbox, a seat one game of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtrust.classroom.exercise import EVADED, FILES, Exercise
from fedtrust.classroom.sandbox import audits, crossing, proxy, static, submission
from fedtrust.classroom.sandbox.faults import SubmissionFault
from fedtrust.classroom.sandbox.limits import MIB, Limits
from fedtrust.classroom.submissions import Submission, read
from fedtrust.client import Behaviour
from fedtrust.data.base import Task
from fedtrust.engine import seeds
from fedtrust.errors import InputError
from fedtrust.probes import evasion
from fedtrust.probes.base import Probe, ProbeContext, Result, need
from fedtrust.probes.guesses import Copy, Membership, Reconstruction, Reconstructions
from fedtrust.server import Rule
from fedtrust.setup import Setup
from fedtrust.views import at_least

_ROUNDING = 1e-5


def limits(exercise: Exercise) -> Limits:
    """Return an exercise's budget as the sandbox's limits."""
    budget = exercise.budget
    return Limits(
        memory=budget.memory * MIB,
        cpu_seconds=max(1, round(budget.cpu_seconds)),
        call_seconds=budget.call_seconds,
        load_seconds=max(budget.call_seconds, 20.0),
    )


class SandboxedSeat:
    """One game of a submission."""

    def __init__(self, handed: submission.Submission, exercise: Exercise) -> None:
        self._submission, self._exercise = handed, exercise
        self._playing: submission.Playing | None = None
        self._own: SubmissionFault | None = None

    @property
    def fault(self) -> tuple[str, str] | None:
        """What went wrong first in this game; a budget that is overdrawn is wrong, too."""
        found = self._own
        if found is None and self._playing is not None:
            faults = self._playing.faults
            found = faults[0] if faults else self._overdrawn()
        return None if found is None else (found.kind, found.sentence)

    def _overdrawn(self) -> SubmissionFault | None:
        budget, used = self._exercise.budget, self.costs
        for unit in ("calls", "bytes"):
            most = getattr(budget, unit)
            if most is not None and used[unit] > most:
                return SubmissionFault("budget", f"it took {used[unit]:,.0f} {unit} in a game, the budget is {most:,}")
        if used["wall_seconds"] > budget.wall_seconds:
            return SubmissionFault(
                "timeout", f"its calls took {used['wall_seconds']:.0f} s in a game, the budget is {budget.wall_seconds:g} s"
            )
        return None

    @property
    def costs(self) -> Mapping[str, float]:
        """What the game took so far, as counted on this side of the sandbox."""
        if self._playing is None:
            return {}
        report = self._playing.report
        return {
            "calls": report.calls,
            "bytes": report.bytes_in + report.bytes_out,
            "queries": report.asked.get("query", 0) + report.asked.get("defence", 0),
            "gradients": report.asked.get("train", 0) + report.asked.get("gradient", 0),
            "cpu_seconds": round(report.cpu_seconds, 3),
            "wall_seconds": round(report.wall_seconds, 3),
        }

    def _begin(self, setup: Setup) -> submission.Playing:
        scenario, world = setup.scenario, setup.world
        budget = self._exercise.budget
        asked = {"defence": budget.queries, "query": budget.queries, "train": budget.gradients, "gradient": budget.gradients}
        self._playing = submission.Playing(
            self._submission,
            crossing.setting_of(scenario, world.data.task, world.layout),
            number=seeds.key(scenario.seed, "sandbox") & (2**62 - 1),
            population=scenario.clients.count,
            budgets={name: most for name, most in asked.items() if most is not None},
        )
        self._playing.open()
        return self._playing

    def behaviour(self, setup: Setup) -> Behaviour:
        """Return it as clients.

        Raises:
            SubmissionFault: it cannot be loaded, or needs to know more than the exercise grants.
        """
        made = proxy.sandboxed_behaviour(self._begin(setup))
        granted = self._exercise.knowledge
        if not at_least(granted, made.needs_knowledge):
            self._own = SubmissionFault("unusable", f"it needs knowledge '{made.needs_knowledge}', the exercise grants '{granted}'")
            raise self._own
        return made

    def rule(self, setup: Setup) -> Rule:
        """Return it as an aggregator.

        Raises:
            SubmissionFault: it cannot be loaded.
        """
        return proxy.sandboxed_aggregator(self._begin(setup))

    def auditor(self, setup: Setup) -> Probe:
        """Return it as somebody who looks at the finished model.

        Raises:
            SubmissionFault: it cannot be loaded.
        """
        playing = self._begin(setup)
        audit = audits.SandboxedAudit(playing)

        def membership(ctx: ProbeContext) -> Result:
            return {"submission": Membership(audit.score(ctx))}

        def stealing(ctx: ProbeContext) -> Result:
            params, model = audit.steal(ctx), need(ctx.model, "the architecture")

            def predict(x: Tensor) -> Tensor:
                with torch.no_grad():
                    return torch.cat([model(params, part) for part in torch.split(x, 512)])

            return {"submission": Copy(predict, playing.report.asked.get("query", 0))}

        def reconstruction(ctx: ProbeContext) -> Result:
            examples, classes = need(ctx.examples, "the registered samples"), ctx.task.classes
            most = sum(examples[client] for client in ctx.clients or need(ctx.sent, "what was sent"))
            x, y = audit.reconstruct(ctx, most)
            why = ""
            if len(x) > most:
                why = f"it reconstructed {len(x)} samples, the most is {most}: those of the clients that replied"
            elif y is not None and len(y) != len(x):
                why = f"it reconstructed {len(x)} samples and {len(y)} labels"
            elif y is not None and len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
                why = f"it says labels from {int(y.min())} to {int(y.max())}, the classes are 0 to {classes - 1}"
            if why:
                self._own = SubmissionFault("reply", why)
                raise self._own
            return {"submission": Reconstructions((Reconstruction(None, x, y),))}

        def evading(ctx: ProbeContext) -> Result:
            return {"submission/evaded": self._evaded(audits.SandboxedEvasion(playing), ctx)}

        games = {"membership": membership, "stealing": stealing, "reconstruction": reconstruction}
        return games.get(self._exercise.game or "", evading)

    def _evaded(self, made: audits.SandboxedEvasion, ctx: ProbeContext) -> float:
        """Return how many of the samples that the model gets right it gets wrong once they were changed, as a share."""
        exercise = self._exercise
        x, y = evasion.right(ctx, EVADED)
        white = exercise.access == "parameters"

        def slope(at: Tensor, of: Tensor) -> Tensor:
            return evasion.slope(ctx, at, (lambda output: (of * output).sum()) if of.is_floating_point() else evasion.missed(of))

        changed = made.perturb(
            x.clone(),
            y.clone(),
            need(ctx.released, "the model"),
            ctx.task,
            eps=exercise.budget.eps,
            rng=ctx.rng,
            slope=None if exercise.access == "answers" else slope,
            params=ctx.params if white else None,
        )
        why = _outside(changed, x, exercise.budget.eps, ctx.task)
        if why:
            self._own = SubmissionFault("budget", why)
            raise self._own
        return evasion.evaded(ctx, changed, y)

    def leave(self) -> None:
        """End the game."""
        if self._playing is not None:
            self._playing.end()


def _outside(changed: Tensor, x: Tensor, eps: float, task: Task) -> str:
    """Return in what way changed samples are farther than eps from x, or no samples of the task; "" if they are fine."""
    if not len(x):
        return ""
    far = float((changed - x).abs().max())
    if far > eps + _ROUNDING:
        return f"it moved a feature by {far:.4g}, eps is {eps:g}"
    low, high = task.low, task.high
    if low is None or high is None or low - _ROUNDING <= float(changed.min()) <= float(changed.max()) <= high + _ROUNDING:
        return ""
    return f"a feature left the range from {low:g} to {high:g}"


class SandboxedPlayer:
    """A submission and its sandbox."""

    def __init__(self, handed: submission.Submission, exercise: Exercise) -> None:
        self._submission, self._exercise = handed, exercise

    def seat(self) -> SandboxedSeat:
        """Return its place in a new game; the process that plays it is a fresh fork.

        Raises:
            RunError: no sandbox comes up.
        """
        self._submission.sandbox.start()
        return SandboxedSeat(self._submission, self._exercise)

    def close(self) -> None:
        """End the sandbox."""
        self._submission.close()


def findings(source: str) -> list[str]:
    """Return what the static check says against a file; it is no protection, the sandbox is."""
    return [str(finding) for finding in static.check(source)]


def sandboxed(one: Submission, exercise: Exercise) -> SandboxedPlayer:
    """Bring a submission up in a sandbox; its process starts with the first game.

    Raises:
        SubmissionFault: it is no Python file, or the static check finds something; nothing was run.
        RunError: no sandbox works on this machine.
    """
    try:
        source = read(one.path).decode("utf-8-sig")
    except (InputError, UnicodeDecodeError) as error:
        raise SubmissionFault("unusable", f"{FILES[one.side]}: {error}") from None
    found = findings(source)
    if found:
        raise SubmissionFault("unusable", "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else ""))
    return SandboxedPlayer(submission.Submission(source, FILES[one.side], one.side, limits=limits(exercise)), exercise)
