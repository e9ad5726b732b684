"""Rules and probes of students that raise, leave or hang."""

from __future__ import annotations

import signal

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


ATTACK = '[[attackers]]\nbehaviour = "faulty:faulty"\ncount = 1\nparams = { hook = "HOOK", how = "HOW", when = 2 }\n'


@pytest.mark.parametrize("part", HANGS)
def test_a_part_that_hangs_can_be_interrupted(starter: Starter, happened: Note, part: str) -> None:
    out = starter.folder / "run"
    more = ATTACK.replace("HOOK", part) if part not in PLACES else ""
    playing = starter.start("run", scenario(starter, part, "hang", more), *RUN, "--out", out)
    playing.until(lambda: (out / "rounds.jsonl").exists() and len(rows(out)) == 2)
    playing.still_runs(1.0)
    playing.signal(signal.SIGINT)
    ended = playing.wait(15.0)
    assert (ended.code, status(out), len(rows(out))) == (130, "interrupted", 2)
    happened(HANGS[part], f"it waits for ever: nothing guards this yet. Ctrl-C: {ended.said}; status interrupted")
