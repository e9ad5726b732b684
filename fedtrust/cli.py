"""The command line: a thin front. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from fedtrust import cli_classroom
from fedtrust.errors import FedTrustError, InputError, nearest

#: Exit status of a run that was interrupted.
_INTERRUPTED = 130

ENGINES = click.Choice(["auto", "local", "ray"])
TEMPLATES = click.Choice(["behaviour", "aggregator", "scenario"])

app = typer.Typer(
    name="fedtrust",
    help="Play attacks against defences in federated learning and see who wins.",
    epilog="Start with: fedtrust run scenarios/quickstart.toml",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

cli_classroom.attach(app)

Plugins = Annotated[
    list[str] | None, typer.Option("--allow-plugin", metavar="NAME", help="Let the scenario run code from NAME.py beside it.")
]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, for instance clients.count=10.")]
DataRoot = Annotated[str | None, typer.Option("--data-root", metavar="DIR", help="Where data files lie (else FEDTRUST_DATA).")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"fedtrust {installed('fedtrust')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    scenario: Annotated[Path | None, typer.Argument(metavar="[SCENARIO]", help="A scenario file.")] = None,
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="A new folder for the results; by default runs/<scenario>.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with a run that stopped, instead of a scenario.")] = None,
    engine: Annotated[str, typer.Option(click_type=ENGINES, help="Who computes; never changes the result.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, max=4096, metavar="N", help="How many threads or Ray workers.")] = None,
    ray_address: Annotated[str | None, typer.Option(metavar="ADDRESS", help="A running Ray cluster.")] = None,
    cells: Annotated[int | None, typer.Option(min=1, max=4096, metavar="N", help="How many cells of a [sweep] at once.")] = None,
    allow_plugin: Plugins = None,
    data_root: DataRoot = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the folder of the results.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of a live table.")] = False,
) -> None:
    """Play a scenario: one run, or the matrix where the file has [sweep]."""
    from fedtrust import cli_run

    if (scenario is None) == (resume is None):
        raise click.UsageError("name a scenario file, or a folder with --resume")
    how = cli_run.How(engine, workers, ray_address, cells, quiet, plain, tuple(allow_plugin or ()))
    if resume is not None:
        for given, option in ((sets, "--set"), (out, "--out"), (data_root, "--data-root")):
            if given:
                raise click.UsageError(f"{option} does not go with --resume: a run goes on as it began")
        raise typer.Exit(cli_run.resume(resume, how))
    if scenario is not None:
        raise typer.Exit(cli_run.run(scenario, how, sets or [], out, data_root))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that `fedtrust run` wrote.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where a comparison goes; by default comparison.html.")] = None,
) -> None:
    """Write report.html again; several folders make one comparison."""
    from fedtrust import report as reports
    from fedtrust.cli_run import unused

    if len(directories) == 1 and out is None:
        typer.echo(str(reports.write(directories[0])))
    else:
        typer.echo(str(reports.compare(directories, out or unused(Path("comparison.html")))))


@app.command("list")
def list_(kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="behaviour, aggregator, probe, …")] = None) -> None:
    """List what a scenario can name."""
    from fedtrust import cli_show

    typer.echo(cli_show.listing(kind))


@app.command()
def describe(name: Annotated[str, typer.Argument(help="A component, for instance multi-krum or flwr:Krum.")]) -> None:
    """Say what a component does: paper, role, knowledge, parameters."""
    from fedtrust import cli_show

    typer.echo(cli_show.description(name))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A scenario (.toml) or a plugin (.py).")],
    sets: Sets = None,
    allow_plugin: Plugins = None,
    data_root: DataRoot = None,
) -> None:
    """Validate a scenario, or try every component of a plugin in a tiny run."""
    from fedtrust import cli_check

    typer.echo(cli_check.check(file, sets or [], allow_plugin or [], data_root))


@app.command()
def audit(
    target: Annotated[Path, typer.Argument(metavar="SCENARIO|DIR", help="A scenario (.toml), or a folder that `fedtrust run` wrote.")],
    trials: Annotated[int, typer.Option(min=200, max=1_000_000, metavar="N", help="Trials a test; more see smaller faults.")] = 3000,
    confidence: Annotated[float, typer.Option(metavar="P", help="Probability that sound mechanisms pass all tests.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**62, metavar="N", help="What the audit's own draws come from.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    sets: Sets = None,
    allow_plugin: Plugins = None,
    data_root: DataRoot = None,
) -> None:
    """Test the privacy that a scenario claims: an empirical lower bound on ε, against the ε that it reports."""
    from fedtrust import cli_audit

    def told(line: str) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    text, code = cli_audit.audit(
        target,
        sets or [],
        allow_plugin or [],
        data_root,
        trials=trials,
        confidence=confidence,
        seed=seed,
        as_json=as_json,
        told=told,
    )
    told("")
    typer.echo(text)
    raise typer.Exit(code)


@app.command()
def schema() -> None:
    """Print the JSON schema of scenario files, for editors."""
    import json

    from fedtrust.scenario import schema as made

    typer.echo(json.dumps(made(), indent=2, ensure_ascii=False))


@app.command()
def new(
    kind: Annotated[
        str,
        typer.Argument(click_type=TEMPLATES, metavar="KIND", help="behaviour, aggregator or scenario."),
    ],
    name: Annotated[str, typer.Argument(help="Its name: lower-case words joined by hyphens.")],
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where to write it.")] = Path(),
) -> None:
    """Write a template that works; never overwrites."""
    from fedtrust import cli_new

    typer.echo(cli_new.new(kind, name, folder))


@app.command()
def doctor(
    scenario: Annotated[Path | None, typer.Argument(metavar="[SCENARIO]", help="Estimate its memory, too.")] = None,
    allow_plugin: Plugins = None,
    data_root: DataRoot = None,
) -> None:
    """Show devices, versions and what is installed."""
    from fedtrust import cli_doctor

    typer.echo(cli_doctor.report(scenario, allow_plugin or [], data_root))


def one_line(text: str) -> str:
    """Return a message as one printable line."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _complain(message: str, code: int) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return code


def _usage(error: click.UsageError) -> str:
    message = error.format_message()
    if message.startswith("No such command"):
        group = typer.main.get_command(app) if error.ctx is None else error.ctx.command
        names = list(group.commands)  # type: ignore[attr-defined]
        given = message.split("'")[1] if "'" in message else ""
        message = f"no such command '{given}' (commands: {', '.join(names)}){nearest(given, names)}"
    return message


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 fine, 1 the run failed, 2 the input is wrong, 130 interrupted.

    `FEDTRUST_DEBUG=1` shows tracebacks. Without arguments of its own it takes those of the process, and may end it.
    """
    code = _answer(argv)
    if argv is None:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """End the process here and now if a thread of a run is still at it: one that hangs, or an interrupted rule in the middle of its work.

    Python would take itself apart under that thread, and the process abort with a status that says nothing. Whoever interrupts waits for
    nothing else either: everything of worth is on the disk.
    """
    import threading

    if code == _INTERRUPTED or any(thread.name.startswith("fedtrust-") for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed by the caller, or nobody reads
                stream.flush()
        os._exit(code)


def _answer(argv: Sequence[str] | None) -> int:
    debug = os.environ.get("FEDTRUST_DEBUG", "") not in ("", "0")
    try:
        result: Any = app(list(sys.argv[1:] if argv is None else argv), prog_name="fedtrust", standalone_mode=False)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
        return int(result or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it ends
        return 0
    except (KeyboardInterrupt, click.Abort):
        return _complain("interrupted", _INTERRUPTED)
    except click.UsageError as error:
        return _complain(_usage(error), 2)
    except click.ClickException as error:
        return _complain(error.format_message(), error.exit_code)
    except FedTrustError as error:
        if debug:
            raise
        return _complain(str(error), 2 if isinstance(error, InputError) else 1)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF):
            _drop_output()
            return _complain(f"cannot write to stdout: {error.strerror}", 1)
        if debug:
            raise
        return _complain(f"{type(error).__name__}: {error} (a fault in fedtrust; FEDTRUST_DEBUG=1 shows where)", 1)


def _drop_output() -> None:
    """Send what is still to be printed nowhere, or Python complains once more when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
