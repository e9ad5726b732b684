"""`fedtrust new`: templates that pass `fedtrust check`."""

from __future__ import annotations

import keyword
import re
import shlex
from pathlib import Path

from fedtrust import templates
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY, Kind

_NAME = re.compile(r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$")


def new(kind: str, name: str, folder: Path) -> str:
    """Write a template and return what to do with it.

    Raises:
        InputError: the name cannot be used, or a file is there already; nothing was written.
    """
    if not _NAME.match(name) or len(name) > 60:
        raise InputError(f"'{name}' should be lower-case words joined by hyphens, for instance my-{kind}", "NAME")
    if not folder.is_dir():
        raise InputError("no such folder", str(folder))
    module = name.replace("-", "_")
    if keyword.iskeyword(module):
        module += "_"
    words = {"name": name, "module": module, "function": module, "title": "".join(w.capitalize() for w in name.split("-"))}
    path = folder / f"{module}.toml"
    command = f"fedtrust run {shlex.quote(str(path))}"
    if kind == "scenario":
        _write({path: templates.SCENARIO.format(**words)})
        return f"wrote {path}\nrun it with:  {command}"
    wanted: Kind = "behaviour" if kind == "behaviour" else "aggregator"
    if any(e.name == name and e.kind == wanted and not e.plugin for e in REGISTRY):
        raise InputError(f"{wanted} '{name}' comes with fedtrust already; choose another name", "NAME")
    code = templates.BEHAVIOUR if kind == "behaviour" else templates.AGGREGATOR
    scenario = templates.ATTACK_SCENARIO if kind == "behaviour" else templates.DEFENCE_SCENARIO
    file = folder / f"{module}.py"
    _write({file: code.format(**words), path: scenario.format(**words)})
    grant = f"--allow-plugin {module}"
    return f"wrote {file} and {path}\ntry it with:  fedtrust check {shlex.quote(str(file))} {grant}\nrun it with:  {command} {grant}"


def _write(files: dict[Path, str]) -> None:
    for path in files:
        if path.exists() or path.is_symlink():
            raise InputError("is there already; nothing was written", str(path))
    for path, text in files.items():
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", str(path)) from None
