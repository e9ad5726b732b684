"""Rules and probes of students that raise, leave or hang, and clients that hang after training."""

from __future__ import annotations

import pytest

from .conftest import Note
from .kit import HERE, Starter, rows, status
from .table import HANGS, PARTS

BASE = """
title = "a student's server"
rounds = 3
seed = 5
PROBES
[data]
source = { name = "digits", limit = 300 }
[model]
name = "logistic"
[clients]
count = 6
train = { lr = 0.1, batch_size = 16 }
[strategy]
STRATEGY
"""

#: Component → what stands in the scenario.
PLACES = {
    "aggregator": ("", 'aggregator = { name = "faulty:faulty-rule", how = "HOW" }'),
    "filter": ("", 'filters = [{ name = "faulty:faulty-filter", how = "HOW" }]'),
    "step": ("", 'steps = [{ name = "faulty:faulty-step", how = "HOW" }]'),
    "probe": ('probes = [{ name = "faulty:faulty-probe", how = "HOW" }]', ""),
}
RUN = ("--engine", "local", "--allow-plugin", "faulty", "--quiet")


def scenario(starter: Starter, part: str, how: str, more: str = "") -> str:
    (starter.folder / "faulty.py").write_text((HERE / "plugin.py").read_text())
    probes, strategy = PLACES.get(part, ("", ""))
    return str(starter.scenario((BASE.replace("PROBES", probes).replace("STRATEGY", strategy) + more).replace("HOW", how)))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_server_that_fails_ends_the_run(starter: Starter, happened: Note, part: str) -> None:
    for how in ("raise", "sys.exit", "os._exit", "memory", "recursion"):
        out = starter.folder / how
        ended = starter.play("run", scenario(starter, part, how), *RUN, "--out", out)
        assert ended.code == 1, (how, ended)
        assert f"faulty-{'rule' if part == 'aggregator' else part}" in ended.complaint, (how, ended)
        assert (status(out), len(rows(out))) == ("failed", 2), how
    happened(PARTS[part], "every time exit 1, status failed, the component is named, the round before is the last")


DEADLINE = "[engine]\ndeadline = 4.0\n"  # the first round of a process on a busy machine has taken two seconds
ATTACK = """
[[attackers]]
behaviour = "faulty:faulty"
ids = IDS
knowledge = "coalition"
params = { hook = "HOOK", how = "HOW", when = 2 }
"""


@pytest.mark.parametrize(("hook", "ids"), [("craft", ["1", "4"]), ("reply", ["3"])])
def test_who_hangs_after_training_is_dropped_by_name(starter: Starter, happened: Note, hook: str, ids: list[str]) -> None:
    out = starter.folder / "run"
    more = ATTACK.replace("HOOK", hook).replace("IDS", f"[{', '.join(ids)}]") + DEADLINE
    ended = starter.play("run", scenario(starter, hook, "hang", more), *RUN, "--out", out)
    starter.nothing_left()
    assert (ended.code, ended.err, status(out)) == (0, "", "finished")
    _, first, second, third = rows(out)
    assert (first["faults"], third["faults"]) == ({}, {})
    assert (list(second["faults"]), second["valid"], second["counted"]) == (ids, 6 - len(ids), True)
    (reason,) = set(second["faults"].values())
    who = f"the {len(ids)} clients of the coalition are" if len(ids) > 1 else "the client is"
    happened(HANGS[hook], f'{who} dropped ("{reason}"), nobody else; exit 0, everybody is back in the next round, no process left')


@pytest.mark.parametrize(("part", "named"), [("aggregator", "aggregator 'faulty:faulty-rule'"), ("probe", "probe 'faulty:faulty-probe'")])
def test_a_part_of_the_server_that_hangs_ends_the_run(starter: Starter, happened: Note, part: str, named: str) -> None:
    out = starter.folder / "run"
    ended = starter.play("run", scenario(starter, part, "hang", DEADLINE), *RUN, "--out", out)
    starter.nothing_left()
    assert (ended.code, status(out), len(rows(out))) == (1, "failed", 2)
    assert f"{named} failed" in ended.complaint
    assert "TimeoutError: no answer within 4 s" in ended.complaint
    happened(HANGS[part], f"{ended.said}; status failed, no process left")
