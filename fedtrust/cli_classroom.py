"""`fedtrust exercise …` and `fedtrust tournament …`: the classroom on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

exercise = typer.Typer(rich_markup_mode=None, help="Set an exercise, work on it, check what you hand in.")
tournament = typer.Typer(rich_markup_mode=None, help="Play what was handed in, and mark it.")

KINDS = click.Choice(["attack", "defence", "both", "audit", "evasion"])
PHASES = click.Choice(["public", "hidden", "final"])
Name = Annotated[str, typer.Argument(metavar="NAME", help="A ready exercise, or the path of an exercise file.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `fedtrust tournament run` wrote.")]
Secret = Annotated[Path | None, typer.Option("--seed-file", metavar="SECRET", help="The secret file that hidden seeds follow from.")]


@exercise.callback(invoke_without_command=True)
@tournament.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@exercise.command("list")
def list_() -> None:
    """List the exercises that come with fedtrust."""
    from fedtrust.classroom import setting

    typer.echo(setting.listing())


@exercise.command("new")
def new(
    name: Annotated[str, typer.Argument(help="Its name: lower-case words joined by hyphens.")],
    scenario: Annotated[Path, typer.Option("--scenario", metavar="FILE", help="The scenario that is played.")],
    kind: Annotated[
        str,
        typer.Option(
            "--kind", click_type=KINDS, metavar="KIND", show_default=False, help="attack (default), defence, both, audit or evasion."
        ),
    ] = "attack",
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where to write NAME.toml.")] = Path(),
) -> None:
    """Make an exercise file of a scenario; what is to be decided stands in it with its default."""
    from fedtrust.classroom import setting

    typer.echo(setting.new(name, scenario, kind, folder))


@exercise.command("start")
def start(
    name: Name,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="A new folder; by default NAME.")] = None,
) -> None:
    """Write the folder that a student begins with: the task, a template that runs, the public set-up."""
    from fedtrust.classroom import setting

    typer.echo(setting.start(name, out))


@exercise.command("check")
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="attack.py, defence.py, audit.py or evasion.py.")],
    of: Annotated[str | None, typer.Option("--exercise", metavar="NAME", help="By default exercise.toml beside FILE.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every public seed, not the first one alone.")] = False,
) -> None:
    """Say in seconds whether a file is valid, what it costs, and how it does on the public seeds; graded by the same code."""
    from fedtrust.classroom import checking

    text, code = checking.check(file, of, every=every, told=_told)
    _told("")
    typer.echo(text)
    raise typer.Exit(code)


def _told(line: str) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


@tournament.command("commit")
def commit(
    secret: Annotated[Path, typer.Argument(metavar="SECRET", help="The secret file.")],
    fresh: Annotated[bool, typer.Option("--new", help="Write a new secret first; never overwrites.")] = False,
) -> None:
    """Print the SHA-256 of the secret file, to be published before anything is handed in."""
    from fedtrust.classroom import secret as secrets_

    content = secrets_.create(secret) if fresh else secrets_.read(secret)
    typer.echo(secrets_.commitment(content))


@tournament.command("run")
def run(
    submissions: Annotated[Path | None, typer.Argument(metavar="[SUBMISSIONS]", help="One folder or file a student.")] = None,
    of: Annotated[str | None, typer.Option("--exercise", metavar="NAME", help="The exercise.")] = None,
    seed_file: Secret = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="A new folder for the tournament.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=256, metavar="N", help="Games side by side; by default one a core.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="DIR", help="Go on with a tournament that stopped.")] = None,
    phase: Annotated[
        str | None,
        typer.Option("--phase", click_type=PHASES, metavar="PHASE", show_default=False, help="public, hidden (daily) or final (default)."),
    ] = None,
    day: Annotated[str, typer.Option("--day", metavar="DATE", help="Of the hidden phase; by default today.")] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the leaderboard's file.")] = False,
) -> None:
    """Play every attack against every defence, the house's among them, and write the leaderboard."""
    from fedtrust.classroom import playing

    if resume is not None:
        for given, option in ((submissions, "SUBMISSIONS"), (of, "--exercise"), (out, "--out"), (phase, "--phase"), (day, "--day")):
            if given:
                raise click.UsageError(f"{option} does not go with --resume: a tournament goes on as it began")
        raise typer.Exit(playing.resume(resume, workers, seed_file, quiet=quiet))
    if submissions is None or of is None or out is None:
        raise click.UsageError("needs SUBMISSIONS, --exercise and --out; or a folder with --resume")
    raise typer.Exit(playing.begin(submissions, of, out, phase or "final", seed_file, day, workers, quiet=quiet))


@tournament.command("report")
def report(folder: Folder, seed_file: Secret = None) -> None:
    """Write leaderboard, feedback and marks again; with the secret file, verify the hidden seeds."""
    from fedtrust.classroom import playing

    typer.echo(playing.report(folder, seed_file))


def attach(app: Any) -> None:
    """Add both groups to the command line."""
    app.add_typer(exercise, name="exercise")
    app.add_typer(tournament, name="tournament")
