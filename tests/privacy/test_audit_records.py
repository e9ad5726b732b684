"""What `fedtrust audit` makes of a run's folder that says something else than was played."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedtrust.cli import main
from fedtrust.privacy.accountants import epsilon_gaussian, epsilon_poisson
from fedtrust.privacy.build import advice
from fedtrust.privacy.clipping import FixedClip
from fedtrust.privacy.mechanisms import Mechanism
from fedtrust.privacy.samplers import Poisson
from tests.privacy.test_audit_command import RECORD, SERVER


def played(tmp_path: Path, scenario: str) -> Path:
    """Return the folder of a run."""
    file, out = tmp_path / "run.toml", tmp_path / "out"
    file.write_text(scenario)
    assert main(["run", str(file), "--out", str(out), "--engine", "local"]) == 0
    return out


def changed(out: Path, **values: Any) -> None:
    """Write other values into the first guarantee of a summary; `None` takes one away."""
    summary = json.loads((out / "summary.json").read_text())
    claim = summary["privacy"][0]
    claim.update(values)
    summary["privacy"][0] = {key: value for key, value in claim.items() if value is not None}
    (out / "summary.json").write_text(json.dumps(summary))


def test_another_delta_than_the_accountants_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = played(tmp_path, SERVER)
    changed(out, delta=1e-12)
    assert main(["audit", str(out), "--trials", "200"]) == 1
    assert "at δ = 1e-12, the accountant" in capsys.readouterr().out.splitlines()[-1]


def test_a_guarantee_without_its_epsilon_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = played(tmp_path, SERVER)
    changed(out, epsilon=None)
    assert main(["audit", str(out), "--trials", "200"]) == 2
    assert "summary.json is damaged: a guarantee without its epsilon" in capsys.readouterr().err


def test_a_filters_own_guarantee_is_not_held_against_the_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noisy = '[strategy]\nfilters = [{ name = "distributed-discrete-gaussian", clip = 0.5, noise_multiplier = 20.0 }]\n[data]'
    out = played(tmp_path, RECORD.replace("[data]", noisy))
    claims = json.loads((out / "summary.json").read_text())["privacy"]
    assert claims[0]["epsilon"] < claims[1]["epsilon"]  # the sum is noisier than the records: an honest smaller ε
    assert main(["audit", str(out), "--trials", "200"]) == 0
    assert sum("ε of the run" in line for line in capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("sigma", [1e-300, 1e-160])
def test_next_to_no_noise_has_no_finite_epsilon(sigma: float) -> None:
    assert math.isinf(epsilon_gaussian(sigma, 3, 1e-5))
    assert math.isinf(epsilon_poisson(0.1, sigma, 3, 1e-5))


@pytest.mark.parametrize(("sigma", "lax"), [(0.01, False), (0.05, True), (1.0, False)])
def test_only_a_target_can_be_lax(sigma: float, lax: bool) -> None:
    everybody = Mechanism(sampler=Poisson(4, 4, 1), clip=FixedClip(1.0), sigma=sigma, delta=1e-5, rounds=2, seed=1)
    assert any("so lax" in line for line in advice(everybody, 10)) == lax


def test_a_summary_that_keeps_quiet_about_the_guarantee_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = played(tmp_path, SERVER)
    summary = json.loads((out / "summary.json").read_text())
    (out / "summary.json").write_text(json.dumps(summary | {"privacy": []}))
    assert main(["audit", str(out), "--trials", "200"]) == 1
    assert "names no guarantee by the server" in capsys.readouterr().out


def test_rounds_that_were_cut_off_do_not_make_it_cheaper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = played(tmp_path, SERVER)
    lines = (out / "rounds.jsonl").read_text().splitlines(keepends=True)
    (out / "rounds.jsonl").write_text("".join(lines[:-1]))
    changed(out, epsilon=json.loads(lines[-2])["epsilon"])
    assert main(["audit", str(out), "--trials", "200"]) == 1
    assert "the accountant" in capsys.readouterr().out


def test_a_record_that_is_no_record_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = played(tmp_path, SERVER)
    with (out / "rounds.jsonl").open("a") as file:
        file.write("garbage\n")
    assert main(["audit", str(out), "--trials", "200"]) == 2
    assert "damaged" in capsys.readouterr().err
