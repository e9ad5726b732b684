"""`fedtrust run`: where results go, who is told, and what stands in the terminal at the end."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtrust import console
from fedtrust.errors import FedTrustError, InputError

_STYLES = {"won": "red", "held": "green", "partial": "yellow"}
_WORDS = {"won": "attack won", "held": "held", "partial": "partly", "unknown": ""}


class How(NamedTuple):
    """The options of `fedtrust run` that do not change the result."""

    engine: str = "auto"
    workers: int | None = None
    ray_address: str | None = None
    cells: int | None = None
    quiet: bool = False
    plain: bool = False
    plugins: tuple[str, ...] = ()


def unused(path: Path) -> Path:
    """Return the path, or with -2, -3, … before its suffix the first that is not taken."""
    tried, number = path, 1
    while tried.exists() or tried.is_symlink():
        number += 1
        tried = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return tried


def claim(stem: str) -> Path:
    """Make a new folder runs/<stem>, or runs/<stem>-2 …, and return it; two runs at once get two folders."""
    path = Path("runs") / stem
    number = 1
    while True:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
            path = Path("runs") / f"{stem}-{number}"
        except OSError as error:
            raise InputError(f"cannot be made: {error.strerror}; name a folder with --out", str(path)) from None
        else:
            return path


def run(path: Path, how: How, overrides: Sequence[str], out: Path | None, data_root: str | None) -> int:
    """Play a scenario and return the exit code.

    Raises:
        InputError: something is wrong; nothing was written.
    """
    from fedtrust import runner, scenario

    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("exists already and is not empty; name another folder, or go on with --resume", str(out))
    asked = scenario.load(path, overrides, how.plugins, data_root)
    scenario.check(asked)
    folder = claim(path.stem) if out is None else out
    try:
        return _play(how, lambda listener: runner.run(asked, folder, **_engine(how), listener=listener))
    except (InputError, KeyboardInterrupt) as error:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nothing was written
            folder.parent.rmdir() if out is None else None
        if isinstance(error, InputError):
            raise
        print("error: interrupted", file=sys.stderr)
        return 130


def resume(directory: Path, how: How) -> int:
    """Go on with a run and return the exit code."""
    from fedtrust import runner

    if not directory.is_dir():
        raise InputError("no such folder", str(directory))
    return _play(how, lambda listener: runner.resume(directory, **_engine(how), listener=listener, allow_plugins=how.plugins))


def _engine(how: How) -> dict[str, Any]:
    return {"engine": how.engine, "workers": how.workers, "ray_address": how.ray_address, "cells": how.cells}


@console.forgiving()
def _play(how: How, start: Callable[[Any], Any]) -> int:
    with console.listener(quiet=how.quiet, plain=how.plain) as listener:
        result = start(listener)
    screen = console.SafeConsole(highlight=False, soft_wrap=False)
    if result.status == "interrupted":
        grants = "".join(f" --allow-plugin {name}" for name in how.plugins)
        print(f"error: interrupted; go on with: fedtrust run --resume {shlex.quote(str(result.directory))}{grants}", file=sys.stderr)
        return 130
    page = _report(result.directory)
    if how.quiet:
        print(result.directory)
    else:
        show(screen, result.summary)
        screen.print(Text(f"\nreport: {page or 'could not be written'}\n", "bold"), soft_wrap=True)
    if result.status == "finished":
        return 0
    why = " ".join(str(result.why or result.summary.get("why") or result.status).split())
    print(f"error: {result.directory}: {why}", file=sys.stderr)
    return 1


def _report(directory: Path) -> Path | None:
    """Write the report; a run that went well is not lost because its report did not."""
    from fedtrust import report

    try:
        return report.write(directory)
    except FedTrustError as error:
        print(f"warning: no report: {error}", file=sys.stderr)
        return None


def show(screen: Console, summary: Mapping[str, Any]) -> None:
    """Print the result: the attack × defence matrix or the metrics, and the verdict in sentences."""
    from fedtrust.report import verdict

    screen.print()
    mended = bool(summary.get("repairs"))
    if summary.get("kind") == "matrix":
        screen.print(_claims(summary) if summary.get("claims") else _matrix(summary, screen.width))
    else:
        screen.print((_repairs if mended else _metrics)(summary))
    screen.print()
    for sentence in verdict.sentences(dict(summary)):
        screen.print(Text(sentence))


def _metrics(summary: Mapping[str, Any]) -> Table:
    table = Table(
        box=None, padding=(0, 2, 0, 0), title=str(summary.get("title", "")), title_justify="left", title_style="bold", show_header=False
    )
    for key, value in sorted((summary.get("metrics") or {}).items()):
        table.add_row(key, _number(key, value))
    return table


def _repairs(summary: Mapping[str, Any]) -> Table:
    """Return the metrics (down) after the last round and after each repair (across)."""
    stages = summary["repairs"]
    table = Table(box=None, padding=(0, 2, 0, 0), title=str(summary.get("title", "")), title_justify="left", title_style="bold")
    table.add_column("")
    for stage in stages:
        table.add_column(stage["repair"] or f"round {stage['round']}", justify="right")
    found = {f"{stage['repair']}/" for stage in stages if stage["repair"]}
    for key in sorted(stages[-1]["metrics"]):
        if not any(key.startswith(name) for name in found):  # what a repair found out is in the report
            table.add_row(key, *[_number(key, stage["metrics"].get(key)) for stage in stages])
    return table


def _number(key: str, value: Any) -> str:
    if value is None:
        return "–"
    from fedtrust.report.parts import is_share

    return console.share(value) if is_share(key) else f"{value:.4g}"


def _claims(summary: Mapping[str, Any]) -> Table:
    """Return the claims: rules down, columns of claims across; what is claimed, what was measured, and the verdict."""
    from fedtrust.report.claims import table

    found = table(dict(summary))
    made = Table(title=str(summary.get("title", "")), title_justify="left", title_style="bold", header_style="bold", padding=(0, 1))
    for name in ("", *found["columns"]):
        made.add_column(name, justify="left")
    styles = {"held": "green", "did not hold": "red", "depends": "yellow"}
    for row in found["rows"]:
        words = [
            [(f"{m['claimed']} → {m['measured']}  {m['verdict']}", styles.get(m["verdict"], "dim")) for m in marks]
            for marks in row["cells"]
        ]
        made.add_row(row["name"], *[Text("\n").join([Text(*word) for word in cell]) for cell in words])
    made.caption, made.caption_justify = "claimed → measured; every cell is in the report", "left"
    return made


def _matrix(summary: Mapping[str, Any], width: int) -> Table:
    """Return accuracy, attack success and verdict by attack (down) and strategy (across); turned where that fits better."""
    from fedtrust.report.load import MatrixSummary
    from fedtrust.report.verdict import duels

    found = duels(MatrixSummary.model_validate(dict(summary)))
    spread = len({duel.partition for duel in found}) > 1
    cells: dict[tuple[str, str], Any] = {}
    for duel in found:
        cells[f"{duel.attack} · {duel.partition}" if spread else duel.attack, duel.strategy] = duel
    down, across = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    turned = len(across) * 16 + 14 > width and len(down) < len(across)
    if turned:
        down, across = across, down
    table = Table(title=str(summary.get("title", "")), title_justify="left", title_style="bold", header_style="bold", padding=(0, 1))
    table.add_column("")
    for name in across:
        table.add_column(name, justify="right")
    for row in down:
        table.add_row(row, *[_cell(cells.get((column, row) if turned else (row, column))) for column in across])
    table.caption, table.caption_justify = "accuracy · attack success, mean over seeds", "left"
    return table


def _cell(duel: Any) -> Text:
    if duel is None:
        return Text("–")
    if not duel.seeds:
        return Text("refused", "dim") if duel.refused else Text("failed", "bold red")
    numbers = [console.share(v) for v in (duel.accuracy, duel.success) if v is not None]
    text = Text(" · ".join(numbers) or (f"loss {duel.loss:.3g}" if duel.loss is not None else "–"))
    from fedtrust.report.verdict import is_none

    word = "" if is_none(duel.attack, {}) else _WORDS[duel.outcome]
    return text.append(f"\n{word}", _STYLES.get(duel.outcome, "")) if word else text
