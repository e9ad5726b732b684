"""`fedtrust audit`, from the command line, on scenarios and on runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtrust.cli import main
from tests.privacy import audit_kit as kit

RECORD = """
title = "audited"
rounds = 3
seed = 3
model = "logistic"
[data]
source = { name = "digits", limit = 300 }
[clients]
count = 6
behaviour = { name = "dp-sgd", clip = 0.5, noise_multiplier = 1.0 }
train = { lr = 0.1, batch_size = 16 }
"""
SERVER = RECORD.replace('behaviour = { name = "dp-sgd", clip = 0.5, noise_multiplier = 1.0 }', "per_round = 3").replace(
    "[data]", "[privacy]\nclip = 0.5\nnoise_multiplier = 1.0\n[data]"
)


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    file = tmp_path / "record.toml"
    file.write_text(RECORD)
    return file


def test_a_sound_scenario_passes(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(scenario), "--trials", "400"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("dp-sgd: claims ε = ")
    assert told[0].endswith("(add-or-remove-one), for one record")
    assert sum(line.startswith("  ok  ") for line in told) == 6
    assert told[-1] == "PASS: no lower bound exceeds what is claimed (95 % confidence over all tests, 400 trials each)"


def test_a_broken_one_fails_and_says_by_how_much(
    scenario: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.record_known_noise(monkeypatch)
    assert main(["audit", str(scenario), "--trials", "400"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith("FAIL: dp-sgd, ")
    failed = [line for line in told if line.startswith("FAIL: dp-sgd, a canary record (σ = 0.5")]
    assert len(failed) == 1
    assert "claimed ε = " in failed[0]
    assert "measured ε ≥ " in failed[0]
    assert main(["audit", str(scenario), "--trials", "400", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    worst = next(f for f in found["subjects"][0]["findings"] if f["name"] == "a canary record")
    assert worst["sharpest"]["bound"] > worst["sharpest"]["claimed"]


def test_json_says_what_the_lines_say(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["audit", str(scenario), "--trials", "200", "--confidence", "0.9", "--json", "--set", "clients.behaviour.clip=2.0"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["confidence"], found["trials"], found["records"]) == (True, 0.9, 200, [])
    (subject,) = found["subjects"]
    assert {f["name"] for f in subject["findings"]} == {"a canary record", "one run, many canaries", "batches", "noise"}
    assert all(f["bound"] <= f["claimed"] for f in subject["findings"] if f["bound"] is not None)


@pytest.mark.parametrize("document", [RECORD, SERVER], ids=["record", "server"])
def test_a_run_is_held_against_its_records(document: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.toml").write_text(document)
    out = tmp_path / "run"
    assert main(["run", str(tmp_path / "s.toml"), "--out", str(out), "--quiet"]) == 0
    capsys.readouterr()
    server = document is SERVER
    assert main(["audit", str(out), "--trials", "200"]) == 0
    told = capsys.readouterr().out
    assert ("every round asked whom the sampler drew" in told) == server
    summary = json.loads((out / "summary.json").read_text())
    summary["privacy"][0]["epsilon"] /= 2
    (out / "summary.json").write_text(json.dumps(summary))
    assert main(["audit", str(out), "--trials", "200"]) == 1
    assert "FAIL: run, ε of the run" in capsys.readouterr().out


def test_a_run_with_other_cohorts_than_drawn_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.toml").write_text(SERVER)
    out = tmp_path / "run"
    assert main(["run", str(tmp_path / "s.toml"), "--out", str(out), "--quiet"]) == 0
    lines = (out / "rounds.jsonl").read_text().splitlines()
    record = json.loads(lines[2])
    record["cohort"] = [c for c in range(6) if c not in record["cohort"]]
    lines[2] = json.dumps(record)
    (out / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    capsys.readouterr()
    assert main(["audit", str(out), "--trials", "200"]) == 1
    assert "FAIL: run, cohorts of the run (3 rounds): round 2 asked others than the sampler drew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{plain}"], "plain.toml: claims no ε"),
        (["{plain}", "--set", "strategy.filters=['distributed-discrete-gaussian']"], "cannot be audited: the ε of 'distributed-discrete"),
        (["{record}", "--confidence", "1.5"], "--confidence: lies in [0.5, 1), not 1.5"),
        (["{record}", "--trials", "3"], "3 is not in the range"),
        (["{missing}"], "missing.toml"),
        (["{folder}"], "is no run: it has no scenario.toml"),
        (["{sweep}"], "has a [sweep]"),
    ],
)
def test_what_cannot_be_audited(arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "record": RECORD,
        "plain": RECORD.replace('behaviour = { name = "dp-sgd", clip = 0.5, noise_multiplier = 1.0 }\n', ""),
        "sweep": RECORD + "[sweep]\nseeds = [1, 2]\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    places = {name: str(tmp_path / f"{name}.toml") for name in (*files, "missing")} | {"folder": str(tmp_path)}
    assert main(["audit", *(a.format(**places) for a in arguments)]) == 2
    assert told in capsys.readouterr().err
