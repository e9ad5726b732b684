"""What can go wrong with something that was handed in, in words that can stand in a student's feedback."""

from __future__ import annotations

from typing import Literal, get_args

from fedtrust.errors import RunError

Kind = Literal[
    "unusable", "unsupported", "crash", "timeout", "cpu", "memory", "flood", "reply", "not-finite", "budget", "forbidden", "killed"
]  # fmt: skip
#: What each kind means, for the page that explains a mark.
MEANING: dict[Kind, str] = {
    "unusable": "the file cannot be loaded, or holds nothing of what the exercise asks for",
    "unsupported": "it uses something that cannot be run in the sandbox",
    "crash": "it raised an error",
    "timeout": "it gave no answer within its time",
    "cpu": "it used more processor time than it may",
    "memory": "it asked for more memory than it may",
    "flood": "it wrote more than it may",
    "reply": "its answer has another shape, type or form than asked for",
    "not-finite": "its answer holds NaN or infinity",
    "budget": "it asked for more queries than its budget allows",
    "forbidden": "it went on asking the system for what no submission may have",
    "killed": "its process ended in the middle of a call",
}
KINDS: tuple[Kind, ...] = get_args(Kind)


def printable(text: str) -> str:
    """Return a stranger's text without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in text)


class SubmissionFault(RunError):  # noqa: N818  # it is a finding about a submission, not an error of ours
    """A submission failed; the run that it took part in has not.

    Attributes:
        kind: one of `KINDS`.
        sentence: what happened, for the student.
    """

    def __init__(self, kind: Kind, sentence: str) -> None:
        self.kind: Kind = kind
        self.sentence = " ".join(printable(sentence).split())[:400]
        super().__init__(f"{kind}: {self.sentence}")

    def __reduce__(self) -> tuple[type[SubmissionFault], tuple[Kind, str]]:
        return SubmissionFault, (self.kind, self.sentence)
