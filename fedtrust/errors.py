"""The two ways in which fedtrust says no, and the help it gives with the first.

`InputError` is the user's to mend (exit 2), `RunError` is a run that could not do what it promised (exit 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedTrustError(Exception):
    """Base of every error that is shown to the user as one line, without a traceback."""


class InputError(FedTrustError):
    """The input is wrong; nothing was run.

    Args:
        message: what is wrong and what is allowed, in one line.
        where: the file, the file and line, or the dotted key it is about.
    """

    def __init__(self, message: str, where: str = "") -> None:
        self.where = where
        self.message = " ".join(message.split())
        super().__init__(f"{where}: {self.message}" if where else self.message)

    def at(self, where: str) -> InputError:
        """Return the same error, placed under `where` (a file or a parent key)."""
        if not self.where:
            return InputError(self.message, where)
        glue = "" if self.where.startswith("[") else "."
        return InputError(self.message, f"{where}{glue}{self.where}")


class RunError(FedTrustError):
    """The run failed: a quorum was missed, a worker pool died, a disk is full."""


class TooFewError(ValueError):
    """A server rule was given fewer updates than it can work with: the clients' fault, not the rule's."""


def said(error: BaseException) -> str:
    """Return an error in one line; one that nobody foresaw with its type."""
    return str(error) if isinstance(error, FedTrustError) else f"{type(error).__name__}: {' '.join(str(error).split())}"


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the allowed name closest to `name`, or `""`."""
    by_case = {known.lower(): known for known in allowed}
    match = difflib.get_close_matches(name.lower(), list(by_case), n=1, cutoff=0.5)
    return f"; did you mean '{by_case[match[0]]}'?" if match else ""


def allowed_list(allowed: Iterable[str], limit: int = 12) -> str:
    """Return the allowed names as a short readable list."""
    names = sorted(allowed)
    shown = ", ".join(names[:limit])
    return f"{shown}, … ({len(names)} in all)" if len(names) > limit else shown
