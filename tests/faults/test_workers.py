"""Ray workers that die, hang or eat up the memory, and what becomes of Ray when the driver goes."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from .conftest import Note
from .kit import HERE, Starter, rows, status
from .test_signals import at_round

BASE = """
title = "a bad night"
rounds = ROUNDS
seed = 5
[data]
source = { name = "digits", limit = 400 }
[model]
name = "logistic"
[clients]
count = 12
behaviour = { name = "faulty:diary", folder = "FOLDER", company = COMPANY }
train = { lr = 0.1, batch_size = 16 }
[strategy]
aggregator = "median"
[engine]
deadline = DEADLINE
"""
RUN = ("--engine", "ray", "--workers", "2", "--allow-plugin", "faulty", "--quiet")

#: Fault of the table → how a client brings it about, and whether only the first time.
HOW = {
    "a Ray worker is killed once": ("SIGKILL", True),
    "a Ray worker is killed whenever it trains a client": ("SIGKILL", False),
    "a Ray worker hangs past its deadline": ("hang", False),
    "a Ray worker dies of SIGSEGV": ("segfault", False),
    "a Ray worker leaves with os._exit(0)": ("os._exit", False),
    "a Ray worker has not enough memory": ("memory", False),
    "eats": ("eat", False),
}
ORDINARY, WORSE = list(HOW)[:2], list(HOW)[2:6]


def scenario(starter: Starter, faults: list[str], deadline: float = 60.0) -> Path:
    """One fault after the other, each by a client of its own in an even round, with a calm round between.

    Honest clients wait for the other worker, nearly as long as they may: a calm round shows whether it comes back.
    """
    (starter.folder / "faulty.py").write_text((HERE / "plugin.py").read_text())
    (starter.folder / "notes").mkdir()
    text = BASE.replace("ROUNDS", str(2 * len(faults) + 1 if faults else 3)).replace("FOLDER", str(starter.folder / "notes"))
    text = text.replace("COMPANY", str(0.8 * deadline)).replace("DEADLINE", str(deadline))
    for number, fault in enumerate(faults):
        how, once = HOW[fault]
        flag = str(starter.folder / f"once-{number}") if once else ""
        params = f'{{ how = "{how}", when = {2 * number + 2}, once = "{flag}" }}'
        text += f'[[attackers]]\nbehaviour = "faulty:faulty"\nids = [{number}]\nparams = {params}\n'
    return starter.scenario(text)


def workers(starter: Starter, number: int) -> int:
    """Return how many processes trained honest clients in a round."""
    return len(list((starter.folder / "notes").glob(f"{number}-*")))


def a_bad_night(starter: Starter, happened: Note, faults: list[str], deadline: float = 60.0) -> None:
    out = starter.folder / "run"
    ended = starter.real("run", scenario(starter, faults, deadline), *RUN, "--out", out).wait(280.0)
    assert (ended.code, ended.err) == (0, "")
    played = rows(out)
    for number, fault in enumerate(faults):
        struck, calm = played[2 * number + 2], played[2 * number + 3]
        assert (calm["valid"], calm["faults"], workers(starter, calm["round"])) == (12, {}, 2), fault
        if HOW[fault][1]:
            assert (struck["valid"], struck["faults"]) == (12, {})
            what = "the clients are trained again: nobody is dropped"
        else:
            assert (struck["valid"], list(struck["faults"])) == (11, [str(number)])
            reason = struck["faults"][str(number)].split(":")[0].split(" (")[0]
            what = f'the client is dropped ("{reason}"), nobody else'
        happened(fault, f"{what}; two workers in the next round; exit 0, no process left")
    starter.nothing_left()


@pytest.mark.slow
def test_a_night_with_ray(starter: Starter, happened: Note) -> None:
    a_bad_night(starter, happened, ORDINARY)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worse_night_with_ray(starter: Starter, happened: Note) -> None:
    a_bad_night(starter, happened, WORSE, 15.0)


@pytest.mark.slow
def test_rays_memory_monitor(starter: Starter, happened: Note) -> None:
    """The threshold is set a little above what this machine uses now; the client eats until Ray's monitor kills its worker."""
    total, free = (int(re.search(rf"{key}: +(\d+)", Path("/proc/meminfo").read_text())[1]) for key in ("MemTotal", "MemAvailable"))  # type: ignore[index]
    if free < 8 << 20:
        pytest.skip("less than 8 GiB are free")
    share = (total - free + (3 << 20)) / total
    env = {"RAY_memory_usage_threshold": f"{share:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    out = starter.folder / "run"
    ended = starter.real("run", scenario(starter, ["eats"]), *RUN, "--out", out, env=env).wait(200.0)
    assert (ended.code, ended.err) == (0, "")
    struck, calm = rows(out)[2:]
    assert (struck["valid"], list(struck["faults"])) == (11, ["0"])
    assert "memory" in struck["faults"]["0"].lower()
    assert (calm["valid"], workers(starter, 3)) == (12, 2)
    happened("Ray's memory monitor kills a worker", "the client is dropped by name, nobody else; two workers in the next round; exit 0")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_the_driver_leaves_nothing_of_ray_behind(starter: Starter, happened: Note, how: str) -> None:
    out = starter.folder / "run"
    playing = starter.real("run", scenario(starter, []), *RUN, "--out", out)
    at_round(playing, out, 1)
    if how == "SIGINT":
        os.killpg(playing.pid, signal.SIGINT)
    else:
        playing.signal(signal.SIGKILL)
    ended = playing.wait(15.0)
    starter.nothing_left(90.0)  # two small agents of Ray's own look after their dead raylet once a minute
    assert (ended.code, status(out)) == ((130, "interrupted") if how == "SIGINT" else (-9, "running"))
    for number, other in ((n, o) for n in (1, 2, 3) for o in "ab"):  # on `local` there is no other process to wait for
        (starter.folder / "notes" / f"{number}-{other}").touch()
    calm = starter.play("run", "--resume", out, "--engine", "local", "--allow-plugin", "faulty", "--quiet")
    assert (calm.code, [r["valid"] for r in rows(out)[1:]]) == (0, [12, 12, 12])
    fault = "Ctrl-C with Ray" if how == "SIGINT" else "the driver is killed with Ray"
    happened(fault, f"{ended.said}; status {status(out)} after a resume with exit 0, no process left")
