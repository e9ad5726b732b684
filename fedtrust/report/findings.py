"""What adversaries beside the clients found out, in sentences: reconstructions, members, copies, secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

#: What is said of the first of these measures that a guess was given, and from which value on it counts as found; `{}` is the value.
_SAID: tuple[tuple[str, str, bool, float], ...] = (
    ("exact", "gets {} of the samples exactly", True, 0.05),
    ("psnr", "reconstructs samples at {} dB (median)", False, 20.0),
    ("auc", "tells which is which with an AUC of {}", False, 0.6),
    ("fidelity", "has a copy that agrees in {} of the answers", True, 0.9),
    ("found", "gets {} of the secrets", True, 0.05),
    ("likeness", "draws the class with a likeness of {}", False, 0.5),
    ("samples", "knows the labels of {} of the samples", True, 0.9),
)
#: A measure of that name is a guess's only beside one of these.
_BESIDE = {
    "exact": {"exact"},
    "psnr": {"mse"},
    "auc": {"auc-low"},
    "fidelity": {"queries"},
    "found": {"claims", "precision"},
    "likeness": {"taken-for-it"},
    "samples": {"classes"},
}
#: So many strategies are named in a sentence.
_MOST = 6
_SHOWN = {"psnr": "{:.1f}", "auc": "{:.2f}", "likeness": "{:.2f}"}


class Finding(NamedTuple):
    """What a guess was worth.

    Attributes:
        name: the guess.
        words: what is said of it, with a place for the value.
        value: the measure, as it is shown.
        plain: whether it found something worth the name.
    """

    name: str
    words: str
    value: str
    plain: bool


def measures(metrics: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the metrics that say what the guesses of a matrix were worth, guess by guess.

    Args:
        metrics: name → its values in the cells. The share of exact samples is left out where nobody gets any: the PSNR says it better.
    """
    guesses: dict[str, set[str]] = {}
    for key in metrics:
        name, _, measure = key.partition("/")
        guesses.setdefault(name, set()).add(measure)
    found = []
    for name, scores in guesses.items():
        for measure, _, _, _ in _SAID:
            nothing = measure == "exact" and max(metrics.get(f"{name}/exact", [0.0])) < 0.05
            if measure in scores and scores & _BESIDE[measure] and not nothing:
                found.append(f"{name}/{measure}")
    return found


def findings(metrics: Mapping[str, float]) -> list[Finding]:
    """Return, for every guess that was scored, what is to be said of it.

    Args:
        metrics: of the last round, by name; those of a guess are called `name/measure`.
    """
    guesses: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        name, _, measure = key.partition("/")
        if measure:
            guesses.setdefault(name, {})[measure] = value
    told = (_finding(name, scores) for name, scores in guesses.items())
    return [finding for finding in told if finding is not None]


def _finding(name: str, scores: Mapping[str, float]) -> Finding | None:
    blurred = "psnr" in scores and scores.get("exact", 0.0) < 0.05  # nothing exact: how sharp is it?
    for measure, words, percent, enough in _SAID:
        if measure in scores and scores.keys() & _BESIDE[measure] and not (measure == "exact" and blurred):
            value = scores[measure]
            shown = f"{100 * value:.1f} %" if percent else _SHOWN[measure].format(value)
            return Finding(name, words, shown, value >= enough)
    return None


def sentences(metrics: Mapping[str, float]) -> list[str]:
    """Say what was found out in a run, what was found most plainly first."""
    ordered = sorted(findings(metrics), key=lambda finding: not finding.plain)
    return [f"{_start(finding.name)} {finding.words.format(finding.value)}." for finding in ordered]


def by_strategy(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Say what was found out against each strategy of a matrix, from strategy → metrics."""
    found: dict[str, list[tuple[str, Finding]]] = {}
    for strategy, values in metrics.items():
        for finding in findings(values):
            found.setdefault(finding.name, []).append((strategy, finding))
    said = []
    for name, each in found.items():
        words: dict[str, list[str]] = {}  # a guess may be worth another measure where it found less
        for strategy, finding in each:
            words.setdefault(finding.words, []).append(f"{finding.value} ({strategy})")
        parts = [text.format(_listed(values[:_MOST], len(values))) for text, values in words.items()]
        said.append((not any(finding.plain for _, finding in each), f"{_start(name)} {'; it '.join(parts)}."))
    return [text for _, text in sorted(said, key=lambda entry: entry[0])]


def _listed(values: list[str], count: int) -> str:
    if count > len(values):
        return f"{', '.join(values)} and {count - len(values)} more"
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def _start(text: str) -> str:
    return text[:1].upper() + text[1:]
