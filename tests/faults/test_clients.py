"""Clients that send rubbish, and clients whose code goes wrong: each costs its own reply and nobody else's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest

from fedtrust.clients.broken import Fault

from .conftest import Note
from .kit import HERE, Ended, Starter, rows, status
from .table import MALFORMED, MISBEHAVES

BASE = """
title = "broken clients"
rounds = 2
seed = 5
[data]
source = { name = "digits", limit = 400 }
[model]
name = "logistic"
[clients]
count = COUNT
quorum = 0.1
train = { lr = 0.1, batch_size = 16 }
[strategy]
aggregator = "median"
[engine]
path = "loop"
"""

MALFORMED_IDS = {fault: number for number, fault in enumerate(get_args(Fault))}
HOOKS = ("poison", "loss", "craft", "reply")


def attackers(behaviours: list[tuple[str, dict[str, Any]]]) -> str:
    """Return one attacker after the other, each with its own client."""
    tables = []
    for number, (name, params) in enumerate(behaviours):
        inline = ", ".join(f"{k} = {json.dumps(v)}" for k, v in params.items())
        tables.append(f'[[attackers]]\nbehaviour = "{name}"\nids = [{number}]\nparams = {{ {inline} }}\n')
    return "".join(tables)


def play(starter: Starter, text: str, out: str) -> Ended:
    (starter.folder / "faulty.py").write_text((HERE / "plugin.py").read_text())
    return starter.play("run", starter.scenario(text), "--engine", "local", "--allow-plugin", "faulty", "--out", out, "--quiet")


@pytest.fixture(scope="module")
def malformed(zygote: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of broken reply in one run; beside it a run in which those clients say nothing at all."""
    starter = Starter(zygote, tmp_path_factory.mktemp("malformed"), "malformed")
    base = BASE.replace("COUNT", str(len(MALFORMED_IDS) + 4))
    for out, faults in (("run", list(MALFORMED_IDS)), ("silent", ["no-reply"] * len(MALFORMED_IDS))):
        ended = play(starter, base + attackers([("malformed", {"fault": fault}) for fault in faults]), out)
        assert (ended.code, ended.err) == (0, "")
    return starter.folder


@pytest.mark.parametrize("fault", MALFORMED_IDS)
def test_a_malformed_reply_is_dropped_by_name(malformed: Path, happened: Note, fault: str) -> None:
    played = rows(malformed / "run")[1:]
    reasons = {record["faults"][str(MALFORMED_IDS[fault])] for record in played}
    assert [record["valid"] for record in played] == [4, 4]
    assert len(reasons) == 1
    summaries = [json.loads((malformed / out / "summary.json").read_text()) for out in ("run", "silent")]
    assert summaries[0]["model_sha256"] == summaries[1]["model_sha256"]
    happened(MALFORMED[fault], f'dropped: "{reasons.pop()}"; exit 0, the model is that of the others alone')


@pytest.mark.parametrize("how", MISBEHAVES)
def test_a_client_whose_code_goes_wrong_is_dropped_by_name(starter: Starter, happened: Note, how: str) -> None:
    text = BASE.replace("COUNT", "8") + attackers([("faulty:faulty", {"hook": hook, "how": how}) for hook in HOOKS])
    ended = play(starter, text, "run")
    assert (ended.code, ended.err) == (0, "")
    said = set()
    for record in rows(starter.folder / "run")[1:]:
        assert (record["valid"], list(record["faults"])) == (4, ["0", "1", "2", "3"])
        for hook, reason in zip(HOOKS, record["faults"].values(), strict=True):
            assert reason.startswith("training: " if hook == "loss" else f"{hook}: ")
            said.add(reason.split(": ", 1)[1].split(":")[0])
    assert len(said) == 1, said
    happened(MISBEHAVES[how], f"each of the four dropped by name ({said.pop()}), exit 0, the other four valid")


def test_remember_that_fails_ends_the_run(starter: Starter, happened: Note) -> None:
    heard = set()
    for how in ("raise", "sys.exit", "os._exit"):
        text = BASE.replace("COUNT", "8") + attackers([("faulty:faulty", {"hook": "remember", "how": how})])
        ended = play(starter, text, how)
        assert ended.code == 1
        assert "`remember` of Faulty fails" in ended.complaint
        heard.add((ended.code, status(starter.folder / how)))
    assert len(heard) == 1
    happened("`remember` raises, calls sys.exit(0) or os._exit(0)", "exit 1, status failed, the hook is named")


@pytest.mark.slow
@pytest.mark.parametrize(("hook", "how"), [("poison", "hang"), ("loss", "spin")])
def test_a_client_past_its_deadline_is_dropped_by_name(starter: Starter, happened: Note, hook: str, how: str) -> None:
    text = BASE.replace("COUNT", "8").replace('path = "loop"', 'path = "loop"\ndeadline = 5.0')
    text += attackers([("faulty:faulty", {"hook": hook, "how": how, "when": 1})])
    ended = play(starter, text, "run")
    assert (ended.code, ended.err) == (0, "")
    first, second = rows(starter.folder / "run")[1:]
    assert (list(first["faults"]), first["valid"]) == (["0"], 7)
    assert (second["faults"], second["valid"]) == ({}, 8)
    reason = first["faults"]["0"]
    happened(f"a client {how}s in `{hook}`, local", f'dropped: "{reason}"; nobody else, exit 0, full capacity in the next round')


def test_a_client_that_crashes_the_process(starter: Starter, happened: Note) -> None:
    """On `local` clients run in the process itself; the checkpoint is what is left, and Ray is where such a client costs only itself."""
    text = BASE.replace("COUNT", "8") + attackers([("faulty:faulty", {"how": "segfault", "when": 2})])
    ended = play(starter, text, "run")
    out = starter.folder / "run"
    assert ended.code < 0
    assert (status(out), len(rows(out))) == ("running", 2)
    happened("a client crashes the process, local", f"{ended.how}; status running, the checkpoint of the round before stands")
