"""A small exercise and small hand-ins, for the tests."""

from __future__ import annotations

from pathlib import Path

EXERCISE = """
name = "small"
title = "A small exercise"
kind = "both"
task = "Attack, and defend."
knowledge = "coalition"
attackers = { count = 2 }

[public]
seeds = [1, 2]

[hidden]
seeds = 2

[house.attacks]
"sign flip" = "sign-flip"

[house.defences]
FedAvg = "mean"
median = "median"

[scenario]
title = "small"
rounds = 2
data = { source = { name = "digits", limit = 300 }, partition = { kind = "dirichlet", alpha = 1.0 } }
model = "logistic"
clients = { count = 6, train = { lr = 0.3, batch_size = 16 } }
strategy = { assumed_malicious = 2 }
"""


def exercise_file(folder: Path, text: str = EXERCISE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "exercise.toml"
    path.write_text(text)
    return path


def hand_in(folder: Path, files: dict[str, str]) -> Path:
    """Write `student/attack.py` → content; what trusted players read is a comment."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


STUDENTS = {
    "ann/attack.py": "# play: ipm\n",
    "ann/defence.py": "# play: trimmed-mean\n",
    "bob/attack.py": "# fault: crash\n",
    "bob/defence.py": "# fault: timeout\n",
    "cleo/defence.py": "# play: mean\n",
}
