"""`fedtrust audit`: what is claimed about privacy, against what an adversary can be shown to learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtrust.errors import InputError

if TYPE_CHECKING:
    from fedtrust.privacy.audit import Finding
    from fedtrust.privacy.audit_plan import Audit
    from fedtrust.setup import Setup


def audit(
    target: Path,
    overrides: Sequence[str],
    allow_plugins: Sequence[str],
    data_root: str | None,
    *,
    trials: int,
    confidence: float,
    seed: int,
    as_json: bool,
    told: Callable[[str], None] = lambda line: None,
) -> tuple[str, int]:
    """Return what was found as text, and the exit status: 0, or 1 if something is not as claimed.

    Args:
        target: a scenario file or a run's folder.
        overrides: `--set`.
        allow_plugins: `--allow-plugin`.
        data_root: where data files lie.
        trials: how many a test.
        confidence: the probability that sound mechanisms pass.
        seed: of everything that the audit draws.
        as_json: whether the text is JSON.
        told: hears how far it is.

    Raises:
        InputError: nothing claims an ε, or the target is none.
    """
    if not 0.5 <= confidence < 1:
        raise InputError(f"lies in [0.5, 1), not {confidence:g}", "--confidence")
    from fedtrust import setup as setups
    from fedtrust.privacy import audit_plan
    from fedtrust.scenario import load
    from fedtrust.scenario_io import load_run

    if target.is_dir():
        if overrides:
            raise InputError("does not go with a run: it is audited as it was played", "--set")
        if not (target / "scenario.toml").is_file():
            raise InputError("is no run: it has no scenario.toml", str(target))
        scenario = load_run(target, allow_plugins, data_root)
    else:
        scenario = load(target, overrides, allow_plugins, data_root)
    if scenario.sweep is not None:
        raise InputError("has a [sweep]: audit a scenario without one, or the folder of one of its cells", str(target))
    try:
        setup = setups.build(scenario)
        found = audit_plan.audit(setup, trials, confidence, seed, told)
    except InputError as error:
        raise error.at(str(target)) from None
    recorded = recorded_findings(setup, target) if target.is_dir() else []
    passed = found.passed and all(f.passed for f in recorded)
    text = json.dumps(_plain(found, recorded, passed), indent=2) if as_json else "\n".join(_lines(found, recorded, passed))
    return text, 0 if passed else 1


def recorded_findings(setup: Setup, directory: Path) -> list[Finding]:
    """Hold what a run has written down against its mechanisms: whom it asked, and the ε in its summary."""
    from fedtrust.privacy.accounts import ClientAccount
    from fedtrust.privacy.audit import Finding
    from fedtrust.privacy.server import PrivateStrategy
    from fedtrust.privacy.summary import guarantees
    from fedtrust.runs import CLIENTS, ROUNDS, RunDirectory, read_json

    run, found = RunDirectory(directory), []
    try:
        rounds, rows = [r for r in run.records(ROUNDS) if 1 <= r["round"] <= setup.scenario.rounds], run.records(CLIENTS)
    except ValueError as error:
        raise InputError(f"a record is damaged: {error}", str(directory)) from None
    if isinstance(setup.strategy, PrivateStrategy):
        mechanism = setup.strategy.mechanism
        odd = [r["round"] for r in rounds if sorted(r["cohort"]) != mechanism.cohort(r["round"])]
        said = f"round {odd[0]} asked others than the sampler drew" if odd else "every round asked whom the sampler drew"
        found.append(Finding("cohorts of the run", f"{len(rounds)} rounds", None, None, mechanism.delta, not odd, said, len(rounds)))
    summary = directory / "summary.json"
    if not summary.is_file():
        return found
    told = read_json(summary)
    claimed = {claim.get("by") for claim in told.get("privacy", []) if "mechanism" not in claim or claim.get("by") == "server"}
    owed = {"server"} if isinstance(setup.strategy, PrivateStrategy) else set()
    owed |= {"clients"} if isinstance(setup.roster.honest, ClientAccount) else set()
    for by in sorted(owed - claimed):
        said = f"summary.json names no guarantee by the {by}, though the run gave one"
        found.append(Finding("ε of the run", f"by the {by}", None, None, 0.0, False, said, len(rounds)))
    for claim in told.get("privacy", []):
        if missing := {"by", "epsilon", "delta"} - claim.keys():
            raise InputError(f"summary.json is damaged: a guarantee without its {min(missing)}", str(directory))
        true: float | None
        delta: float | None
        if claim["by"] == "clients" and "mechanism" in claim:  # the noise of a filter, which has no audit: see docs/audit.md
            continue
        if claim["by"] == "server" and isinstance(setup.strategy, PrivateStrategy):
            # Every round up to the last that is recorded was released, whether its line is still there or not.
            releases = max((r["round"] for r in rounds), default=0)
            releases = setup.scenario.rounds if told.get("status") == "finished" else releases
            true, delta = setup.strategy.mechanism.epsilon(releases), setup.strategy.mechanism.delta
        else:
            own = [g for g in guarantees(None, setup.roster, setup.world, rows) if g["by"] == claim["by"]]
            true, delta = (own[0]["epsilon"], own[0]["delta"]) if own else (None, None)
        fits = true is not None and claim["epsilon"] is not None and claim["epsilon"] >= true - 1e-6 and claim["delta"] == delta
        said = f"summary.json says ε = {claim['epsilon']} at δ = {claim['delta']}, the accountant {true} at {delta}"
        found.append(Finding("ε of the run", f"by the {claim['by']}", claim["epsilon"], None, claim["delta"], fits, said, len(rounds)))
    return found


def _lines(found: Audit, recorded: Sequence[Finding], passed: bool) -> list[str]:
    lines = []
    for subject, findings in found.subjects:
        lines.append(f"{subject.name}: claims {subject.claims}, for one {subject.unit}")
        lines += [_line(f) for f in findings]
    if recorded:
        lines += ["the run's records", *(_line(f) for f in recorded)]
    failed = [(subject.name, f) for subject, findings in found.subjects for f in findings if not f.passed]
    failed += [("run", f) for f in recorded if not f.passed]
    lines += [f"FAIL: {name}, {f.name} ({f.setting}): {f.said}" for name, f in failed]
    if passed:
        sure = f"{100 * found.confidence:g} % confidence over all tests, {found.trials} trials each"
        lines.append(f"PASS: no lower bound exceeds what is claimed ({sure})")
    return lines


def _line(finding: Finding) -> str:
    verdict = "ok  " if finding.passed else "FAIL"
    if finding.claimed is None or finding.bound is None:
        return f"  {verdict}  {finding.name}: {finding.setting}; {finding.said}"
    line = f"  {verdict}  {finding.name}: {finding.setting}; at δ = {finding.delta:g} claimed ε = {finding.claimed:.4g}"
    line += f", measured ε ≥ {finding.bound:.4g}"
    if finding.sharpest is not None and finding.sharpest[0] != finding.delta:
        delta, claimed, bound = finding.sharpest
        line += f"; closest at δ = {delta:g}: {claimed:.4g}, ≥ {bound:.4g}"
    return line


def _plain(found: Audit, recorded: Sequence[Finding], passed: bool) -> dict[str, Any]:
    subjects = [
        {"name": s.name, "unit": s.unit, "claims": s.claims, "findings": [f.plain() for f in findings]} for s, findings in found.subjects
    ]
    return {
        "passed": passed,
        "confidence": found.confidence,
        "trials": found.trials,
        "subjects": subjects,
        "records": [f.plain() for f in recorded],
    }
