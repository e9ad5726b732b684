"""Setting an exercise and starting on it: `fedtrust exercise list`, `new` and `start`."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

from fedtrust.classroom import exercise as exercises
from fedtrust.classroom.exercise import FILES, SIDES, Exercise
from fedtrust.classroom.exercise_parts import HiddenSpec
from fedtrust.errors import InputError, RunError
from fedtrust.scenario_io import Document
from fedtrust.scenario_toml import key as toml_key
from fedtrust.scenario_toml import value as toml_value

_NAME = re.compile(r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$")
_KINDS = {
    "attack": "an attack",
    "defence": "a defence",
    "both": "an attack and a defence",
    "audit": "an audit",
    "evasion": "an evasion",
}
ACCESS = {
    "answers": "its answers, `query(x)`",
    "gradients": "its answers, `query(x)`, and its gradients, `query.gradient(x, y)`",
    "parameters": "its answers and gradients, and the model itself: `query.model(x)`, `query.params`",
}
#: Game of an audit → the ready exercise whose template plays it; the plain one plays membership.
_READY = {"stealing": "steal-the-model", "reconstruction": "what-one-update-gives-away"}
_WIDTH = 78


def listing() -> str:
    """Return the ready exercises, a paragraph each."""
    lines = []
    for name, path in exercises.ready().items():
        exercise = exercises.load(path)
        files = " and ".join(FILES[side] for side in exercise.sides)
        seeds = f"public seeds {', '.join(map(str, exercise.public.seeds))}, {exercise.hidden.seeds} hidden ones"
        about = f"{exercise.title.rstrip('?.')}: hand in {files}; {seeds}."
        lines += [name, *textwrap.wrap(about, _WIDTH, initial_indent="  ", subsequent_indent="  ")]
    return "\n".join([*lines, "", "begin with:  fedtrust exercise start NAME"])


# ---------------------------------------------------------------------------------------------------------------------------- start


def start(name: str, out: Path | None) -> str:
    """Write the folder that a student begins with, and return what to do next.

    Raises:
        InputError: there is no such exercise, or the folder is taken.
    """
    path = exercises.find(name)
    exercise = exercises.load(path)
    target = out or Path(exercise.name)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError("is there already, and not empty; nothing was written", str(target))
    files = {"task.md": task(exercise), "exercise.toml": public(exercise), "README.md": readme(exercise)}
    files |= {FILES[side]: template(exercise, side, path.parent) for side in exercise.sides}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (target / file).write_text(text, encoding="utf-8")
        if isinstance(exercise.scenario, str):
            (target / exercise.scenario).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path.parent / exercise.scenario, target / exercise.scenario)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}") from error
    first = target / FILES[exercise.sides[0]]
    return (
        f"wrote {target} ({', '.join(sorted(files))})\nread task.md, change {first.name}, and try it with:  fedtrust exercise check {first}"
    )


def public(exercise: Exercise) -> str:
    """Return the exercise file as students get it: without what is hidden. The rest of the file stays as it was written."""
    kept, skipping = [], False
    for line in exercise.text.splitlines():
        header = re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", line)
        if header:
            skipping = header[1] == "hidden" or header[1].startswith("hidden.")
        elif not skipping and re.match(r"\s*hidden\s*[.=]", line):
            if not re.fullmatch(r"\s*hidden\s*(\.\s*\w+\s*)?=\s*(\{[^{}]*\}|[^{}\[\]]*)\s*(#.*)?", line):
                raise InputError("write it as a table of its own, [hidden]: it has to be taken out for students", "hidden")
            continue
        if not skipping:
            kept.append(line)
    made = "\n".join(kept).rstrip() + "\n"
    seen = exercises.parse(document(made), exercise._folder, made)
    if seen.hidden != HiddenSpec():
        raise InputError("could not be taken out for students; write it as a table of its own, [hidden]", "hidden")
    return made


def document(text: str) -> dict[str, Any]:
    """Return the document that a TOML text holds."""
    import tomllib

    return tomllib.loads(text)


def template(exercise: Exercise, side: str, folder: Path) -> str:
    """Return a file that already runs: the exercise's own, or the side's plain one."""
    own = folder / FILES[side]  # type: ignore[index]
    ready = own if own.is_file() else exercises.READY / "templates" / FILES[side]  # type: ignore[index]
    if exercise.game in _READY and not own.is_file():
        ready = exercises.READY / _READY[exercise.game] / "audit.py"
    return ready.read_text(encoding="utf-8")


def task(exercise: Exercise) -> str:
    """Return the task with what follows from the exercise file: role, budget, opponents, scoring."""
    from fedtrust.classroom.feedback import scoring_words

    scenario = exercise.matrix(exercise.public.seeds[:1])
    files = " and ".join(f"`{FILES[side]}`" for side in exercise.sides)
    budget = {k: v for k, v in exercise.budget.model_dump().items() if v is not None and (k != "eps" or exercise.kind == "evasion")}
    words = {
        "memory": "MB of memory",
        "cpu_seconds": "seconds of processor time",
        "wall_seconds": "seconds in all",
        "call_seconds": "seconds a call",
        "eps": "is how far you may move a feature",
    }
    lines = [f"# {exercise.title}", "", exercise.task.strip(), "", "## What you hand in", ""]
    lines += [f"{files}. Every game of yours runs in a sandbox: no network, no files, nothing but your own side of the game.", ""]
    if "attack" in exercise.sides:
        lines += [
            "A `Behaviour` may override `remember`, `agree`, `poison`, `craft` and `goal`. One that overrides `loss`, `per_sample`, "
            "`project`, `reply` or `claim` is refused: these run inside the training and the protocol, which are not in the sandbox. Who "
            "wants another loss trains in `craft`, with `view.data()`, `view.model` and torch.",
            "",
        ]
    lines += [
        "## The game",
        "",
        f"- Rounds: {scenario.rounds}; clients: {scenario.clients.count}; model: {scenario.model.name}; data: {scenario.data.source.name}.",
    ]
    if exercise.sides[0] in ("attack", "defence") and exercise.attackers is not None:
        who = exercise.attackers
        size = f"{who.count} clients" if who.count is not None else f"{100 * (who.share or 0):g} % of the clients"
        span = "" if who.rounds is None else f", in rounds {who.rounds[0]} to {who.rounds[1]}"
        lines += [f"- Attackers: {size}{span}. An attack knows: {exercise.knowledge}."]
        lines += [f"- The house attacks: {', '.join(exercise.house.attacks)}.", f"- The house defences: {', '.join(exercise.defences)}."]
    else:
        lines += [f"- The house: {', '.join(exercise.house.audits) or 'nobody'}."]
        lines += [f"- The models: {', '.join(exercise.models)}."] if exercise.models else []
        lines += [f"- What you have of a model: {ACCESS[exercise.access]}."] if exercise.kind == "evasion" else []
    lines += [f"- You play: {exercise.role}."] if exercise.role else []
    lines += ["", "## Your budget in one game", ""] + [f"- {v:,} {words.get(k, k)}" for k, v in budget.items()]
    lines += ["", "## How it is scored", ""] + [f"- {words}" for words in scoring_words(exercise, exercise.hidden.seeds)]
    if exercise.commitment:
        lines += ["", f"The hidden seeds follow from a file whose SHA-256 is `{exercise.commitment}`."]
    return "\n".join(lines) + "\n"


def readme(exercise: Exercise) -> str:
    """Return the few lines on the checker."""
    checks = "\n".join(f"    fedtrust exercise check {FILES[side]}" for side in exercise.sides)
    return (
        f"# {exercise.title}\n\nThe task is in `task.md`. Check what you hand in, as often as you like; it takes seconds:\n\n{checks}\n\n"
        "It plays the first public seed (`--all`: each of them) against the house, in the same sandbox and by the same code as the\n"
        "grading; only the seeds differ. Hand in nothing but the file named there.\n"
    )


# ------------------------------------------------------------------------------------------------------------------------------ new


def new(name: str, scenario: Path, kind: str, folder: Path) -> str:
    """Make an exercise file of a scenario, and return what to do next.

    The house's baselines are the scenario's own attackers and strategies, or those of its sweep.

    Raises:
        InputError: the scenario cannot be read, or the file is there already.
    """
    if not _NAME.match(name):
        raise InputError(f"'{name}' should be lower-case words joined by hyphens", "NAME")
    target = folder / f"{name}.toml"
    if target.exists():
        raise InputError("is there already; nothing was written", str(target))
    data = Document.read(scenario).data
    sweep = data.get("sweep", {})
    base = {k: v for k, v in data.items() if k not in ("sweep", "seed", "claims", "attackers", "profiles", "profile", "week")}
    house = {"attacks": _attacks(data, sweep), "defences": sweep.get("strategies", {})}
    if isinstance(house["defences"], list):
        house["defences"] = {entry: entry for entry in house["defences"]}
    entries = [e for group in [data.get("attackers", []), *_groups(sweep)] for e in group]
    who = next(({k: e[k] for k in ("count", "share") if k in e} for e in entries if "ids" not in e), {"share": 0.2})
    fights = SIDES[kind][0] in ("attack", "defence")
    text = _NEW.format(name=name, kind=kind, what=_KINDS[kind], title=toml_value(str(data.get("title", name))))
    text += 'game = "membership"              # or "stealing", "reconstruction"\n' if kind == "audit" else ""
    text += _FIGHT.format(who=_inline(who)) if fights else ""
    text += _REST
    if fights:
        text += "".join(
            f"\n[house.{side}]\n" + "".join(f"{toml_key(k)} = {_inline(v)}\n" for k, v in table.items()) for side, table in house.items()
        )
    elif kind == "audit":
        text += _AUDITS
    text += "\n[scenario]\n" + "".join(f"{toml_key(k)} = {_inline(v)}\n" for k, v in base.items())
    try:
        exercises.parse(document(text), scenario.parent, text)
        target.write_text(text, encoding="utf-8")
    except InputError as error:
        raise InputError(f"no exercise can be made of it: {error}", str(scenario)) from None
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}") from error
    return f"wrote {target}\nwrite the task into it, then try:  fedtrust exercise start {target}"


def _groups(sweep: Any) -> list[Any]:
    given = sweep.get("attackers", {})
    return list(given.values()) if isinstance(given, dict) else []


def _attacks(data: Any, sweep: Any) -> dict[str, Any]:
    """Return label → behaviour of the attacks that consist of one group."""
    given = sweep.get("attackers", {}) if isinstance(sweep.get("attackers", {}), dict) else {}
    own = {" + ".join(e["behaviour"] for e in data.get("attackers", [])): data.get("attackers", [])}
    found = {}
    for label, entries in (given or own).items():
        if len(entries) == 1:
            found[label] = {"name": entries[0]["behaviour"], **entries[0].get("params", {})}
    return found


def _inline(given: Any) -> str:
    if isinstance(given, dict):
        return "{ " + ", ".join(f"{toml_key(k)} = {_inline(v)}" for k, v in given.items()) + " }" if given else "{}"
    if isinstance(given, list):
        return "[" + ", ".join(_inline(v) for v in given) + "]"
    return str(toml_value(given))


_NEW = '''# An exercise for {what}: `fedtrust exercise start` writes the students' folder, `fedtrust tournament run` grades.
# What is not written here has the default that docs/classroom.md lists.
name = "{name}"
title = {title}
kind = "{kind}"
task = """
Say here what is to be done, and what to look at.
"""
# commitment = ""                # what `fedtrust tournament commit SECRET` prints, published before anything is handed in
'''
_FIGHT = """knowledge = "coalition"          # own | coalition | omniscient | omniscient+defence
attackers = {who}
"""
_AUDITS = """
[house.audits]                   # for reconstruction: "closed form" = { name = "analytic-inversion", clients = 10 }
"loss threshold" = "loss-threshold"
"""
_REST = """
[budget]                         # in one game; queries, gradients and bytes are counted in the cost where they have a budget
cpu_seconds = 60.0
call_seconds = 10.0

[public]
seeds = [1, 2, 3]

[hidden]
seeds = 3

[scoring]
bands = [100, 90, 80, 70, 60, 50]
"""
