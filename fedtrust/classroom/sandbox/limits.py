"""How much a submission may use."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fedtrust.errors import InputError

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one game of one submission may use; a breach is a `SubmissionFault`, never an error of the host.

    Attributes:
        memory: bytes of address space beyond what Python and torch take.
        processes: processes and threads in a sandbox, ours included; the system-call filter keeps a submission to one thread anyway.
        file_size: bytes of one file.
        scratch: bytes of /tmp, where there is one (bubblewrap).
        open_files: file descriptors.
        cpu_seconds: processor time of a whole game.
        call_seconds: wall-clock time of one call; the host's own time for answering its questions is not counted.
        load_seconds: wall-clock time for loading the file.
        start_seconds: wall-clock time for the sandbox itself to come up (Python, torch).
        output: bytes of standard output and error that are kept; a thousand times as much is a flood.
        refused: forbidden system calls after which a game is ended.
    """

    memory: int = 1024 * MIB
    processes: int = 32
    file_size: int = 16 * MIB
    scratch: int = 32 * MIB
    open_files: int = 64
    cpu_seconds: int = 120
    call_seconds: float = 20.0
    load_seconds: float = 20.0
    start_seconds: float = 120.0
    output: int = 16 * 1024
    refused: int = 1000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
            if not number or (field.type == "int" and not isinstance(value, int)):
                raise InputError(f"should be a positive {'whole number' if field.type == 'int' else 'number'} (got {value!r})", field.name)

    def plain(self) -> dict[str, Any]:
        """Return the limits as plain numbers."""
        return dataclasses.asdict(self)
