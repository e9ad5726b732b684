"""The package as it is installed: what it exports, what it refuses, what a wheel holds."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fedtrust
from fedtrust import _HOME

ROOT = Path(__file__).parent.parent


def test_everything_exported_exists_and_is_what_it_is_at_home() -> None:
    assert set(fedtrust.__all__) == set(_HOME) | {"__version__"}
    for name, home in _HOME.items():
        assert getattr(fedtrust, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = fedtrust.nothing  # type: ignore[attr-defined]


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import sys, fedtrust, fedtrust.cli; print(sorted({'torch', 'ray', 'flwr', 'pydantic', 'numpy', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["clients", "strategies"])
def test_the_two_folders_cannot_be_imported_under_their_bare_names(name: str) -> None:
    """Both names exist on PyPI, and a second import name would be a second registry."""
    done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert f"import fedtrust.{name}" in done.stderr
    assert (ROOT / "fedtrust" / name).resolve() == ROOT / name


def test_arrows_run_one_way() -> None:
    """The engine knows no particular attack or defence, and nothing imports the command line."""
    forbidden = re.compile(r"^\s*(?:from|import) fedtrust\.(clients|strategies)\b", re.MULTILINE)
    command_line = re.compile(r"^\s*(?:from|import) fedtrust\.cli\w*\b(?<!client)", re.MULTILINE)
    for file in (ROOT / "fedtrust").rglob("*.py"):
        if {"clients", "strategies"} & set(file.relative_to(ROOT).parts):
            continue
        text = file.read_text()
        assert not forbidden.search(text), file
        if not file.name.startswith(("cli.", "cli_", "__main__")):
            assert not command_line.search(text), file


@pytest.mark.slow
def test_a_wheel_holds_every_module_once(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True, capture_output=True
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    modules = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "fedtrust").rglob("*.py")
        if not {"clients", "strategies"} & set(p.relative_to(ROOT).parts)
    }
    modules |= {f"fedtrust/{p.relative_to(ROOT)}" for folder in ("clients", "strategies") for p in (ROOT / folder).glob("*.py")}
    modules |= {str(p.relative_to(ROOT)) for p in (ROOT / "fedtrust" / "report").iterdir() if p.suffix in (".css", ".js", ".html")}
    classroom = ROOT / "fedtrust" / "classroom"
    modules |= {str(p.relative_to(ROOT)) for folder in ("pages", "exercise_files") for p in (classroom / folder).rglob("*.*")}
    assert modules <= set(names)
    assert len(names) == len(set(names))
    assert not [n for n in names if n.startswith(("clients/", "strategies/", "tests/"))]
