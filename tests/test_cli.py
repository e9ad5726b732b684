"""The command line: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtrust import plugins, runner
from fedtrust.cli import main
from fedtrust.errors import RunError
from fedtrust.registry import REGISTRY

SMALL = """\
title = "small"
rounds = 2
data = { source = { name = "digits", limit = 240 } }
model = "logistic"
clients = { count = 6 }
"""


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Forget the plugins of a test."""
    REGISTRY.load()
    entries, loaded = dict(REGISTRY._entries), dict(plugins._LOADED)
    yield
    for now, before in ((REGISTRY._entries, entries), (plugins._LOADED, loaded)):
        now.clear()  # type: ignore[attr-defined]
        now.update(before)  # type: ignore[attr-defined]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDTRUST_DEBUG", raising=False)
    monkeypatch.delenv("FEDTRUST_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "s.toml").write_text(SMALL, encoding="utf-8")
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "pydantic", "ray", "flwr", "numpy", "fedtrust.registry", "fedtrust.scenario")
    code = f"import sys; from fedtrust.cli import main; code = main(['--help']); print([m for m in {heavy} if m in sys.modules], code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert "fedtrust run scenarios/quickstart.toml" in done.stdout


def test_every_command_has_help(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "report", "list", "describe", "check", "schema", "new", "doctor"):
        code, out, err = call(capsys, command, "--help")
        assert (code, err) == (0, "")
        assert f"fedtrust {command}" in out
    code, out, err = call(capsys)
    assert code == 0
    assert "Commands:" in out
    assert call(capsys, "--version")[1].startswith("fedtrust ")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["rnu"],
            "no such command 'rnu' (commands: run, report, list, describe, check, audit, schema, new, doctor, exercise, tournament); "
            "did you mean 'run'?",
        ),
        (["run"], "name a scenario file, or a folder with --resume"),
        (["run", "s.toml", "--resume", "x"], "name a scenario file, or a folder with --resume"),
        (["run", "--resume", "x", "--set", "a=1"], "--set does not go with --resume"),
        (["run", "--resume", "x", "--out", "y"], "--out does not go with --resume"),
        (["run", "--resume", "gone"], "gone: no such folder"),
        (["run", "--resume", "."], "scenario.toml is missing"),
        (["run", "s.toml", "--engine", "rey"], "'rey'"),
        (["run", "s.toml", "--workers", "0"], "--workers"),
        (["run", "s.toml", "--cells", "0"], "--cells"),
        (["run", "s.toml", "--cells", "2"], "--cells: is for a scenario with [sweep]; this one is a single run"),
        (["run", "s.toml", "--wrokers", "1"], "--wrokers"),
        (["run", "s.toml", "--out", "."], "exists already and is not empty"),
        (["run", "s.toml", "--out", "s.toml"], "exists already"),
        (["list", "behavoiur"], "no kind 'behavoiur'"),
        (["describe", "multikrum"], "did you mean 'multi-krum'?"),
        (["describe", "flwr:Krun"], "no strategy 'Krun'"),
        (["check", "gone.toml"], "gone.toml: no such file"),
        (["check", "gone.py"], "gone.py: no such file"),
        (["check", "p.py"], "p.py: checking a plugin runs its code; if you trust it, add --allow-plugin p"),
        (["check", "p.py", "--allow-plugin", "p"], "p.py: registers no component"),
        (["new", "attack", "x"], "'attack'"),
        (["new", "behaviour", "My Attack"], "lower-case words joined by hyphens"),
        (["new", "behaviour", "label-flip"], "behaviour 'label-flip' comes with fedtrust already"),
        (["new", "behaviour", "x", "--dir", "gone"], "gone: no such folder"),
        (["report", "gone"], "gone"),
        (["doctor", "gone.toml"], "gone.toml: no such file"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(
    arguments: list[str], wanted: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "p.py").write_text("x = 1\n", encoding="utf-8")
    before = sorted(folder.rglob("*"))
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert wanted in err
    assert sorted(folder.rglob("*")) == before


def test_run_writes_a_folder_and_says_who_won(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "run", "s.toml", "--engine", "local", "--workers", "1")
    assert (code, err) == (0, "")
    assert "round 2/2: accuracy" in out
    assert "report: runs/s/report.html" in out
    status = json.loads((folder / "runs/s/status.json").read_text())
    assert status["status"] == "finished"
    assert (folder / "runs/s/report.html").is_file()
    code, out, err = call(capsys, "run", "s.toml", "--quiet", "--set", "rounds=1")
    assert (code, out, err) == (0, "runs/s-2\n", "")
    assert (folder / "runs/s/summary.json").is_file()
    code, out, err = call(capsys, "run", "runs/s/scenario.toml", "--out", "again", "-q")
    assert (code, out) == (0, "again\n")
    hashes = [json.loads((folder / d / "summary.json").read_text())["model_sha256"] for d in ("runs/s", "again")]
    assert hashes[0] == hashes[1]
    code, out, err = call(capsys, "run", "--resume", "runs/s")
    assert code == 2
    assert "nothing to resume" in err


def test_a_matrix_ends_with_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = "sweep={strategies=['mean','median'], attackers={none=[], flip=[{behaviour='label-flip', share=0.34}]}}"
    code, out, err = call(capsys, "run", "s.toml", "--set", sweep, "--set", "rounds=1", "--out", "m")
    assert (code, err) == (0, "")
    assert [line[:5] for line in out.splitlines() if line.startswith("[")] == [f"[{n}/4]" for n in range(1, 5)]
    assert " flip__median__iid__seed0: accuracy" in out  # whichever of them ended last
    table = out[out.index("small") :]
    assert "flip" in table
    assert "median" in table
    assert max(map(len, out.splitlines())) <= 80 or "left" in out
    assert "report: m/report.html" in out
    code, out, err = call(capsys, "report", "m", "m", "--out", "both.html")
    assert (code, out, err) == (0, "both.html\n", "")
    (folder / "m/report.html").unlink()
    assert call(capsys, "report", "m") == (0, "m/report.html\n", "")


class Fake:
    """A runner that does as it is told."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("result", "code", "wanted"),
    [
        (RunError("worker 3 died\nand stayed dead"), 1, "error: worker 3 died and stayed dead"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (ZeroDivisionError("oops"), 1, "error: ZeroDivisionError: oops (a fault in fedtrust; FEDTRUST_DEBUG=1 shows where)"),
        (SimpleNamespace(status="interrupted", directory=Path("d"), summary={}, why=""), 130, "go on with: fedtrust run --resume d"),
    ],
)
def test_how_a_run_can_end(
    result: Any, code: int, wanted: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run", Fake(result))
    got, _, err = call(capsys, "run", "s.toml")
    assert got == code
    assert wanted in err
    assert err.strip().count("\n") == 0


def test_a_missed_quorum_is_exit_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text(
        "from fedtrust.client import Behaviour, behaviour\n"
        "@behaviour('silent-test')\n"
        "class Silent(Behaviour):\n"
        "    '''Send nothing.'''\n"
        "    def reply(self, reply, view):\n"
        "        return None\n",
        encoding="utf-8",
    )
    attack = "attackers=[{behaviour='mine:Silent', count=4}]"
    code, _, err = call(capsys, "run", "s.toml", "--set", attack, "--allow-plugin", "mine", "--out", "q")
    assert code == 1
    assert err.startswith("error: q: ")
    assert "quorum" in err
    assert json.loads((folder / "q/status.json").read_text())["status"] == "failed"


def test_debug_shows_the_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTRUST_DEBUG", "1")
    monkeypatch.setattr(runner, "run", Fake(ZeroDivisionError("oops")))
    with pytest.raises(ZeroDivisionError):
        main(["run", "s.toml"])


def test_a_reader_that_leaves_early_is_fine(folder: Path) -> None:
    command = f"{sys.executable} -m fedtrust.cli list | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("behaviour")


def test_list_and_describe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "list")
    assert code == 0
    assert all(f"\n{kind}: " in "\n" + out for kind in ("behaviour", "aggregator", "probe", "source", "feature-skew"))
    assert max(map(len, out.splitlines())) <= 85
    code, out, _ = call(capsys, "list", "aggregators")
    assert out.startswith("aggregator: ")
    assert "flwr:NAME" in out
    assert "QFedAvg" in " ".join(out.split())
    assert "label-flip" not in out
    code, out, _ = call(capsys, "describe", "label-flip")
    assert code == 0
    for words in (
        "Biggio",
        "knowledge    own or more",
        "manipulates  data",
        "mode: 'mirror' | 'next' | 'targeted' | 'random'",
        "[[attackers]]",
    ):
        assert words in out
    code, out, _ = call(capsys, "describe", "flwr:Krum")
    assert "Flower" in out


def test_what_describe_shows_can_be_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    for entry in REGISTRY:
        if entry.plugin or any(f.is_required() for f in entry.schema.model_fields.values()):
            continue
        _, out, _ = call(capsys, "describe", entry.name)
        for example in out.split("  in a scenario\n")[1:]:
            lines = [line[4:] for line in example.split("\n\n")[0].splitlines()]
            assert tomllib.loads("\n".join(lines)), entry.name


@pytest.mark.parametrize("kind", ["behaviour", "aggregator", "scenario"])
def test_new_writes_what_check_accepts(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"test-{kind}"
    code, out, err = call(capsys, "new", kind, name)
    assert (code, err) == (0, "")
    module = name.replace("-", "_")
    grant = [] if kind == "scenario" else ["--allow-plugin", module]
    assert " ".join(["fedtrust run", f"{module}.toml", *grant]) in out
    code, out, err = call(capsys, "check", f"{module}.toml", *grant)
    assert (code, err) == (0, "")
    assert f"{module}.toml: fine" in out
    if kind != "scenario":
        assert call(capsys, "check", f"{module}.toml")[0] == 2
        code, out, err = call(capsys, "check", f"{module}.py", *grant)
        assert (code, err) == (0, "")
        assert f"{kind} {module}:{name}: played 2 rounds" in out
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    code, _, err = call(capsys, "new", kind, name)
    assert code == 2
    assert "is there already" in err
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_check_plays_a_plugin_and_finds_what_is_broken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "from fedtrust.server import aggregator\n@aggregator('broken-test')\ndef broken(updates, ctx, *, k: int = 1):\n    return updates\n"
    )
    (folder / "bad.py").write_text(code, encoding="utf-8")
    got, out, err = call(capsys, "check", "bad.py", "--allow-plugin", "bad")
    assert (got, out) == (2, "")
    assert "aggregator 'broken-test'" in err
    assert "shape" in err
    (folder / "bad2.py").write_text(code.replace("broken-test", "broken-2").replace(" = 1", ""), encoding="utf-8")
    assert "parameter 'k' has no default" in call(capsys, "check", "bad2.py", "--allow-plugin", "bad2")[2]


def test_schema_is_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "schema")
    assert code == 0
    assert json.loads(out)["title"] == "fedtrust scenario"


def test_doctor(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtrust import cli_doctor

    monkeypatch.setattr(cli_doctor, "_imports", lambda name: "works")
    code, out, _ = call(capsys, "doctor", "s.toml")
    assert code == 0
    for words in ("python", "torch", "flwr", "import ray", "sandbox bubblewrap", "sandbox landlock", "estimate", "logistic"):
        assert words in out


def test_an_override_reaches_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "run", "s.toml", "--set", "rounds=1", "--set", "seed=5", "-q", "--out", "o")[0] == 0
    text = (folder / "o/scenario.toml").read_text()
    assert "rounds = 1\n" in text
    assert "seed = 5\n" in text


def test_live_table_fits_a_terminal(folder: Path) -> None:
    from rich.console import Console

    from fedtrust.console import RichListener

    console = Console(width=80, force_terminal=True, color_system=None)
    listener = RichListener(console)
    cells = [f"{a}__{s}__dirichlet__seed{n}" for a in ("none", "a-very-long-attack-name") for s in ("mean", "multi-krum") for n in (1, 2)]
    listener.matrix_started(cells, 4)
    listener.cell_done(cells[0], {"status": "finished", "metrics": {"accuracy": 0.5, "attack-success": 0.25}})
    listener.cell_done(cells[1], {"status": "failed", "metrics": {}, "why": "no"})
    listener.cell_done(cells[2], {"status": "failed", "metrics": {}, "why": "no"})
    listener.cell_started(cells[4], {}, 4, 1)
    listener.round_done(cells[4], {"round": 2, "counted": True, "metrics": {"accuracy": 0.125}, "seconds": {}})
    time.sleep(0.001)
    with console.capture() as capture:
        console.print(listener.render())
    text = capture.get()
    assert "3/8 runs" in text
    assert "43 %" in text  # three cells of four rounds and two rounds, of 32
    assert "50.0 / 25.0" in text
    assert "failed" in text
    assert "left" in text
    assert max(map(len, text.splitlines())) <= 80
    single = RichListener(console)
    single.matrix_started(["one"], 3)
    single.cell_started("one", {}, 3, 0)
    for number in range(3):
        single.round_done(
            "one", {"round": number, "counted": number < 2, "cohort": [1, 2], "valid": 1, "metrics": {"accuracy": 0.1}, "seconds": {}}
        )
    with console.capture() as capture:
        console.print(single.render())
    assert "too few" in capture.get()
    assert max(map(len, capture.get().splitlines())) <= 80
