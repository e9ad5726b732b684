"""What the README says is true: its code runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedtrust.cli import main
from fedtrust.registry import REGISTRY

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAPERS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]

SCENARIO = """
title = "the README's attack against the README's defence"
rounds = 1
[data]
source = { name = "digits", limit = 300 }
[model]
name = "logistic"
[clients]
count = 6
[[attackers]]
behaviour = "mine:InnerProduct"
count = 1
[strategy]
aggregator = "mine:norm-median"
"""


def test_its_attack_and_its_defence_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    REGISTRY.load()
    monkeypatch.setattr(REGISTRY, "_entries", {k: e for k, e in REGISTRY._entries.items() if not e.plugin})
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "mine.py").write_text("\n".join(blocks))
    (tmp_path / "mine.toml").write_text(SCENARIO)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "mine.toml", "--quiet", "--out", "out"]) == 2  # code needs leave
    assert main(["run", "mine.toml", "--quiet", "--out", "out", "--allow-plugin", "mine", "--engine", "local"]) == 0
    assert (tmp_path / "out" / "report.html").exists()


def test_its_commands_and_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in set(re.findall(r"fedtrust (run|report|list|describe|check|schema|new|doctor)\b", README)):
        assert main([command, "--help"]) == 0
        said = capsys.readouterr().out
        for line in re.findall(rf"^fedtrust {command} .*$", README, re.MULTILINE):
            for option in re.findall(r"--[a-z-]+", line):
                assert option in said, f"{command} {option}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= set(targets)


def test_every_component_it_names_is_registered() -> None:
    known = {e.name for e in REGISTRY}
    named = set(re.findall(r'(?:behaviour|aggregator) = "([a-z-]+)"', README)) | set(re.findall(r"fedtrust describe ([a-z-]+)", README))
    assert named - {"multi-krum"} <= known | {"mine"}


@pytest.mark.parametrize("paper", PAPERS)
def test_its_links_lead_somewhere(paper: str) -> None:
    text = (ROOT / paper).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / paper).parent / target).exists(), target


def test_scenarios_that_come_with_it_are_sound() -> None:
    files = sorted((ROOT / "scenarios").rglob("*.toml"))
    assert files
    for file in files:
        assert main(["check", str(file)]) == 0
        comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert len(comments) >= 3, f"{file.name}: what to look at, what to try next, the paper"
