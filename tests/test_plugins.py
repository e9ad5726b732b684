"""Code beside a scenario: only with leave, only from that folder, with errors that say where."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtrust import plugins
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY
from fedtrust.scenario import load

STUDENT = '''
from fedtrust.client import Behaviour, behaviour
from fedtrust.server import Verdict, aggregator

@behaviour("ipm-of-a-student")
class InnerProduct(Behaviour):
    """Send -tau times the mean of the updates in view (Xie et al., UAI 2019, section 3)."""
    tau: float = 2.0

    def craft(self, updates, view):
        seen = updates if view.others is None else view.others     # [m, d]
        return (-self.tau * seen.mean(0)).expand_as(updates)       # [k, d]

@aggregator("norm-median-of-a-student")
def norm_median(updates, ctx, *, scale: float = 1.0):
    """Clip each update to `scale` times the median norm, then average."""
    norms = updates.norm(dim=1, keepdim=True).clamp(min=1e-12)     # [n, 1]
    factor = (scale * norms.median() / norms).clamp(max=1)         # [n, 1]
    return Verdict((factor * updates).mean(0), trust=factor.squeeze(1))
'''

SCENARIO = """\
title = "with plugins"
rounds = 2
data = { source = { name = "digits", limit = 240 } }
model = "logistic"
clients = { count = 10 }
attackers = [{ behaviour = "mine:InnerProduct", count = 2, params = { tau = 3 } }]
strategy = { aggregator = "mine:norm-median-of-a-student" }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(STUDENT, encoding="utf-8")
    (tmp_path / "s.toml").write_text(SCENARIO, encoding="utf-8")
    REGISTRY.load()
    for name in [n for n in sys.modules if n.startswith(plugins.PREFIX)]:
        del sys.modules[name]  # another file's tests may have left them
    entries, modules, loaded = dict(REGISTRY._entries), dict(sys.modules), dict(plugins._LOADED)
    yield tmp_path
    REGISTRY._entries.clear()
    REGISTRY._entries.update(entries)
    plugins._LOADED.clear()
    plugins._LOADED.update(loaded)
    for name in set(sys.modules) - set(modules):
        if name.startswith(plugins.PREFIX):
            del sys.modules[name]


def test_nothing_is_executed_without_leave(folder: Path) -> None:
    (folder / "mine.py").write_text("raise SystemExit('executed')", encoding="utf-8")
    with pytest.raises(InputError, match=r"s.toml:6: attackers\[0\].behaviour: .* would run code from mine.py.*--allow-plugin mine"):
        load("s.toml")
    with pytest.raises(InputError, match="would run code"):
        load("s.toml", allow_plugins=["other", "mine2"])


def test_a_granted_plugin_is_found_by_class_or_by_registered_name(folder: Path) -> None:
    made = load("s.toml", allow_plugins=["mine"])
    assert made.attackers[0].params == {"tau": 3.0}
    assert made.strategy.aggregator.params == {"scale": 1.0}
    load("s.toml", ["attackers[0].behaviour='mine:ipm-of-a-student'"], ["mine"])
    behaviour = REGISTRY.make("behaviour", "mine:InnerProduct", {"tau": 3.0})
    assert behaviour.tau == 3.0
    assert REGISTRY.get("behaviour", "mine:InnerProduct").plugin
    assert [e.name for e in plugins.components(plugins.loaded_modules()[-1])] == ["norm-median-of-a-student", "ipm-of-a-student"]
    assert plugins.loaded_files()["mine"] == (folder / "mine.py").resolve()
    assert pickle.loads(pickle.dumps(behaviour)) == behaviour
    assert not list(folder.rglob("*.pyc"))


def test_a_resolved_scenario_needs_leave_again(folder: Path) -> None:
    made = load("s.toml", allow_plugins=["mine"])
    (folder / "again.toml").write_text(made.resolved_toml(), encoding="utf-8")
    assert load("again.toml", allow_plugins=["mine"]) == made
    with pytest.raises(InputError, match="would run code"):
        load("again.toml")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mine:InnerProdukt", r"registers no behaviour 'InnerProdukt' \(known: mine:ipm-of-a-student\)"),
        ("mine:norm-median-of-a-student", "registers no behaviour"),
        ("gone:X", "no file gone.py beside the scenario"),
        ("mine:a.b", "module:name"),
        ("os.path:join", "module:name"),
        (":x", "module:name"),
        ("link:X", "leaves the scenario's folder"),
    ],
)
def test_what_cannot_be_found(name: str, wanted: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "link.py"
    elsewhere.write_text(STUDENT, encoding="utf-8")
    (folder / "link.py").symlink_to(elsewhere)
    with pytest.raises(InputError, match=wanted):
        load("s.toml", [f"attackers[0].behaviour='{name}'"], ["mine", "gone", "link", "os"])


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("import nonsense_that_is_not_there", r"mine.py:1: ModuleNotFoundError"),
        ("x = 1\n\ndef f(:\n", r"mine.py:3: SyntaxError"),
        ("x = 1\ny = 1 / 0\n", r"mine.py:2: ZeroDivisionError"),
        ("raise SystemExit(3)", r"mine.py:1: SystemExit"),
        ("x = 1", r"registers no behaviour 'InnerProduct' \(known: none; is there a decorator"),
        (STUDENT.replace("norm-median-of-a-student", "median"), "aggregator 'median' is already defined in"),
        (STUDENT.replace("def craft", "def kraft"), "overrides none of"),
    ],
)
def test_a_plugin_that_fails_says_where(code: str, wanted: str, folder: Path) -> None:
    (folder / "mine.py").write_text(code, encoding="utf-8")
    with pytest.raises(InputError, match=wanted):
        load("s.toml", allow_plugins=["mine"])
    assert plugins.PREFIX + "mine" not in sys.modules or "mine" in plugins._LOADED


def test_a_changed_file_is_read_again(folder: Path) -> None:
    load("s.toml", allow_plugins=["mine"])
    first = plugins.load_module(folder / "mine.py")
    assert plugins.load_module(folder / "mine.py") is first
    other = folder / "copy"
    other.mkdir()
    (other / "mine.py").write_text(STUDENT.replace("2.0", "5.0"), encoding="utf-8")
    (other / "s.toml").write_text(SCENARIO.replace(", params = { tau = 3 }", ""), encoding="utf-8")
    assert load(other / "s.toml", allow_plugins=["mine"]).attackers[0].params == {"tau": 5.0}


def test_the_folder_can_be_another_one(folder: Path) -> None:
    run = folder / "runs"
    run.mkdir()
    (run / "scenario.toml").write_text(SCENARIO, encoding="utf-8")
    with pytest.raises(InputError, match=r"no file mine\.py"):
        load(run / "scenario.toml", allow_plugins=["mine"])
    made = load(run / "scenario.toml", allow_plugins=["mine"], folder=folder)
    assert made.origin is not None
    assert made.origin.folder == folder.resolve()
