"""What a run says while it goes on: nothing, plain lines, or a live table with a progress bar."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedtrust.listener import SilentListener

#: So many of the last rounds are shown, and so many rows of a matrix.
ROUNDS_SHOWN, ROWS_SHOWN = 8, 14
#: More columns of a matrix do not fit into 80 characters.
COLUMNS_SHOWN = 5


class QuietListener(SilentListener):
    """Says nothing; opened and closed like the ones that do."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


class SafeConsole(Console):
    """A console that goes silent when nobody reads any more; a run does not end because of that."""

    def on_broken_pipe(self) -> None:
        """Write to nowhere from now on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def share(value: Any, digits: int = 1) -> str:
    """Return a fraction as a percentage, or a dash."""
    return f"{100 * value:.{digits}f} %" if isinstance(value, int | float) else "–"


def clock(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Tracker(QuietListener):
    """Keeps count: which cells are done, how far the present one is, how long the rest will take."""

    def __init__(self) -> None:
        self.cells: Sequence[str] = []
        self.rounds = 0
        self.current = ""
        self.results: dict[str, Mapping[str, Any]] = {}
        self.records: list[Mapping[str, Any]] = []
        self.reached = 0
        self._played = 0
        self._began = time.monotonic()

    def matrix_started(self, cells: Sequence[str], rounds: int) -> None:
        """See `Listener`."""
        self.cells, self.rounds = list(cells), rounds
        self._began = time.monotonic()

    def cell_started(self, name: str, labels: Mapping[str, Any], rounds: int, done_rounds: int) -> None:
        """See `Listener`."""
        self.current, self.reached, self.records = name, done_rounds, []

    def round_done(self, name: str, record: Mapping[str, Any]) -> None:
        """See `Listener`."""
        self.records.append(record)
        self.reached = int(record["round"])
        self._played += 1 if self.reached else 0  # round 0 is the untrained model, measured only

    def cell_done(self, name: str, summary: Mapping[str, Any]) -> None:
        """See `Listener`."""
        self.results[name] = summary
        if name == self.current:
            self.current, self.reached = "", 0

    @property
    def total(self) -> int:
        """How many rounds there are in all cells."""
        return max(1, len(self.cells) * self.rounds)

    @property
    def done(self) -> int:
        """How many of them are over."""
        return min(self.total, len(self.results) * self.rounds + self.reached)

    def left(self) -> float | None:
        """Return the seconds that are left at the pace so far; `None` before the first round."""
        if not self._played:
            return None
        return (time.monotonic() - self._began) / self._played * (self.total - self.done)


class PlainListener(Tracker):
    """A line a round for a single run, a line a cell for a matrix; for pipes, logs and dumb terminals."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or SafeConsole(highlight=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        self._console.print(Text(text))

    def matrix_started(self, cells: Sequence[str], rounds: int) -> None:
        """See `Listener`."""
        super().matrix_started(cells, rounds)
        self._say(f"{len(cells)} run{'s' if len(cells) > 1 else ''} of {rounds} rounds")

    def round_done(self, name: str, record: Mapping[str, Any]) -> None:
        """See `Listener`."""
        super().round_done(name, record)
        if len(self.cells) == 1:
            self._say(f"round {record['round']}/{self.rounds}: {measured(record)}{self._rest()}")

    def cell_done(self, name: str, summary: Mapping[str, Any]) -> None:
        """See `Listener`."""
        super().cell_done(name, summary)
        if len(self.cells) > 1:
            why = f": {summary['why']}" if summary.get("why") else ""
            said = measured(summary) if summary.get("status") == "finished" else f"{summary.get('status')}{why}"
            self._say(f"[{len(self.results)}/{len(self.cells)}] {name}: {said}{self._rest()}")

    def note(self, text: str) -> None:
        """See `Listener`."""
        self._say(text)

    def _rest(self) -> str:
        left = self.left()
        return f" ({clock(left)} left)" if left is not None and self.done < self.total else ""


def measured(record: Mapping[str, Any]) -> str:
    """Return the main metrics of a round or a cell as words."""
    metrics = record.get("metrics") or {}
    parts = [f"{key.replace('-', ' ')} {share(metrics[key])}" for key in ("accuracy", "attack-success") if key in metrics]
    if "loss" in metrics and not parts:
        parts.append(f"loss {metrics['loss']:.4g}")
    if not record.get("counted", True):
        parts.append(f"not counted ({record.get('why', 'quorum missed')})")
    return ", ".join(parts) or "no metric"


class RichListener(Tracker):
    """A progress bar with the time left, above the present run's last rounds or the matrix so far."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or SafeConsole(highlight=False)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True, get_renderable=self.render)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        """See `Listener`."""
        self._console.print(Text(text))

    def render(self) -> RenderableType:
        """Return what stands on the screen now."""
        if not self.cells:
            return Text("starting …")
        return Group(self._bar(), self._matrix() if len(self.cells) > 1 else self._rounds())

    def _bar(self) -> RenderableType:
        left = self.left()
        grid = Table.grid(padding=(0, 1), expand=False)
        rest = f"{clock(left)} left" if left is not None else "…"
        done = (
            f"run {min(len(self.results) + 1, len(self.cells))}/{len(self.cells)}"
            if len(self.cells) > 1
            else f"round {self.reached}/{self.rounds}"
        )
        grid.add_row(Text(done, "bold"), ProgressBar(self.total, self.done, width=30), f"{100 * self.done // self.total} %", rest)
        return grid

    def _rounds(self) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for title in ("round", "accuracy", "attack success", "train loss", "replies", "seconds"):
            table.add_column(title, justify="right")
        for record in self.records[-ROUNDS_SHOWN:]:
            metrics = record.get("metrics") or {}
            loss = record.get("train_loss")
            replies = f"{record['valid']}/{len(record['cohort'])}" if "cohort" in record else "–"
            table.add_row(
                str(record["round"]),
                share(metrics.get("accuracy")),
                share(metrics.get("attack-success")),
                f"{loss:.3g}" if loss is not None else "–",
                replies if record.get("counted", True) else f"{replies} too few",
                f"{sum(record.get('seconds', {}).values()):.1f}",
            )
        return table

    def _matrix(self) -> RenderableType:
        now = self.records[-1] if self.records else {}
        doing = Text(
            f"{self.current}  round {self.reached}/{self.rounds}  {measured(now) if now else ''}", overflow="ellipsis", no_wrap=True
        )
        return Group(doing, progress_table(self.cells, self.results, self.current))


def progress_table(cells: Sequence[str], results: Mapping[str, Mapping[str, Any]], current: str = "") -> Table:
    """Return the matrix so far: accuracy and attack success by attack and strategy, averaged over what else differs."""
    groups: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        attack, strategy = [*cell.split("__"), ""][:2]
        groups.setdefault((attack, strategy), []).append(cell)
    down, across = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    turned = len(across) > COLUMNS_SHOWN and len(down) < len(across)
    if turned:
        down, across = across, down
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", caption="accuracy / attack success", caption_justify="left")
    table.add_column("")
    for name in across[:COLUMNS_SHOWN]:
        table.add_column(name, justify="right", overflow="ellipsis", no_wrap=True)
    for row in down[:ROWS_SHOWN]:
        keys = [(column, row) if turned else (row, column) for column in across[:COLUMNS_SHOWN]]
        table.add_row(row, *[_entry(groups.get(key, []), results, current) for key in keys])
    return table


def _entry(cells: Sequence[str], results: Mapping[str, Mapping[str, Any]], current: str) -> Text:
    found = [results[c] for c in cells if c in results]
    good = [r["metrics"] for r in found if r.get("status", "finished") == "finished"]
    if not good:
        return Text("failed", "bold red") if found else Text("…" if current in cells else "·", "dim")
    parts = [[m[key] for m in good if key in m] for key in ("accuracy", "attack-success")]
    return Text(" / ".join(f"{100 * fmean(p):.1f}" for p in parts if p) or "done")


def listener(*, quiet: bool = False, plain: bool = False) -> QuietListener:
    """Return the listener for this terminal: a context manager that is also a `Listener`."""
    if quiet:
        return QuietListener()
    console = SafeConsole(highlight=False)
    if plain or not console.is_terminal or console.is_dumb_terminal:
        return PlainListener()
    return RichListener(console)
