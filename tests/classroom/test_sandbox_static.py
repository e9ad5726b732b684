"""The friendly check beforehand: what will not work is said with its line; what students write passes."""

from __future__ import annotations

import pytest

from fedtrust.classroom.sandbox import static

GOOD = '''
"""A student's attack."""
import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import nn
from fedtrust import Behaviour, behaviour
from fedtrust.clients.collusion import in_view
from pydantic import Field


@behaviour("mine", knowledge="coalition")
class Mine(Behaviour):
    tau: Annotated[float, Field(gt=0)] = 2.0

    def craft(self, updates, view):
        seen = in_view(updates, view)
        return (-self.tau * seen.mean(0)).expand_as(updates)
'''


def test_a_student_s_file_passes() -> None:
    assert static.check(GOOD) == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("import os", "'os' cannot be imported"),
        ("import os.path as p", "'os.path' cannot be imported"),
        ("from subprocess import run", "'subprocess' cannot be imported"),
        ("import socket, torch", "'socket' cannot be imported"),
        ("import maths", "did you mean 'math'"),
        ("from . import other", "hand in one file"),
        ("import torch.multiprocessing", "cannot be imported here"),
        ("from torch import hub", "'torch.hub' cannot be imported"),
        ("from fedtrust.engine import seeds", "in the view or the context"),
        ("import fedtrust.classroom.scoring", "in the view or the context"),
        ("open('labels.txt')", "`open`"),
        ("exec('1')", "`exec`"),
        ("__import__('os')", "`__import__`"),
        ("globals()", "`globals`"),
        ("().__class__.__bases__", "`__class__`"),
        ("f = (lambda: 0).__globals__", "`__globals__`"),
        ("torch.load('x.pt')", "`torch.load`"),
        ("np.fromfile('x')", "`np.fromfile`"),
        ("def broken(:", "not Python"),
    ],
)
def test_what_will_not_work_is_said_with_its_line(line: str, says: str) -> None:
    found = static.check(f"import torch\nimport numpy as np\n{line}\n")
    assert found
    assert found[0].line == 3
    assert any(says in finding.sentence for finding in found), found


def test_size_and_depth_are_said() -> None:
    assert "the most is 10" in static.check("x = 12345678901", most=10)[0].sentence
    assert static.check("x = " + "(" * 5000 + ")" * 5000)
    assert static.check("x = " + "-" * 50_000 + "1")
    assert "not Python" in static.check("x = '\x00'")[0].sentence


def test_every_hostile_file_that_imports_the_system_is_told_so() -> None:
    from pathlib import Path

    folder = Path(__file__).parent / "hostile/submissions"
    told = {path.stem for path in folder.glob("*.py") if static.check(path.read_text())}
    assert {"connect_tcp", "fork_bomb", "mount_something", "read_environment", "pickle_reply", "signal_parent"} <= told
    assert "endless_loop" not in told  # it is not the protection
