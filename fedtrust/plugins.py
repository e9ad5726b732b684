"""Code that comes with a scenario: `module:name` is a component in the loose file `module.py` beside the scenario.

Nothing is imported unless the user grants the module by name. A loaded module is known to Python as `fedtrust_plugin_<module>`, so
that it can never shadow another one; workers in other processes need it by value, see `loaded_modules`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from fedtrust.errors import FedTrustError, InputError, allowed_list, nearest
from fedtrust.registry import REGISTRY, Entry, Kind

PREFIX = "fedtrust_plugin_"
_SPEC = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*):([A-Za-z0-9_-]+)$")
_LOADED: dict[str, ModuleType] = {}


def is_plugin(name: str) -> bool:
    """Return whether a component's name means code beside the scenario."""
    return ":" in name and not name.startswith("flwr:")


def loaded_modules() -> list[ModuleType]:
    """Return the plugin modules of this process; hand each to `ray.cloudpickle.register_pickle_by_value`."""
    return list(_LOADED.values())


def loaded_files() -> dict[str, Path]:
    """Return module name → file of the plugins of this process."""
    return {name: Path(str(module.__file__)) for name, module in _LOADED.items()}


def load_module(file: Path) -> ModuleType:
    """Execute a loose file as a plugin module; the same unchanged file is executed once a process.

    Raises:
        InputError: there is no such file, or it fails; the message says on which line.
    """
    name = file.stem
    if not file.is_file():
        raise InputError(f"no file {file.name} beside the scenario", str(file))
    file = file.resolve()
    stamp = (str(file), file.stat().st_mtime_ns)
    old = _LOADED.get(name)
    if old is not None and getattr(old, "__fedtrust_stamp__", None) == stamp:
        return old
    REGISTRY.load()  # so that a name that is already taken is the plugin's fault
    spec = importlib.util.spec_from_file_location(PREFIX + name, file)
    if spec is None or spec.loader is None:
        raise InputError("cannot be loaded as Python", str(file))
    module = importlib.util.module_from_spec(spec)
    previous = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # dataclasses and pickle look it up while it runs
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a check writes nothing beside a student's file
    try:
        spec.loader.exec_module(module)
    except FedTrustError as error:
        _put_back(module.__name__, previous)
        raise InputError(str(error), str(file)) from error
    except (Exception, SystemExit) as error:
        _put_back(module.__name__, previous)
        raise InputError(f"{type(error).__name__}: {error}", f"{file}:{_line(error, file)}") from error
    finally:
        sys.dont_write_bytecode = writes
    module.__dict__["__fedtrust_stamp__"] = stamp
    _LOADED[name] = module
    return module


def _put_back(name: str, previous: ModuleType | None) -> None:
    if previous is None:
        sys.modules.pop(name, None)
    else:
        sys.modules[name] = previous


def _line(error: BaseException, file: Path) -> int:
    """Return the deepest line of `file` that an error passed through, or that a syntax error is on."""
    if isinstance(error, SyntaxError) and error.lineno:
        return error.lineno
    line, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def components(module: ModuleType) -> list[Entry]:
    """Return what a plugin module registered, under the plain names."""
    return [e for e in REGISTRY if e.target.__module__ == module.__name__ and ":" not in e.name]


def load_plugin(kind: Kind, spec: str, folder: Path, allowed: Sequence[str]) -> Entry:
    """Return the component `module:name` from the loose file `<folder>/<module>.py`, and let the registry know it by that name.

    Args:
        kind: what is wanted.
        spec: `module:name`; the name is the registered one or that of the class or function.
        folder: where the file lies.
        allowed: the modules that the user granted.

    Raises:
        InputError: not granted, no such file, the file fails, or it registers no such component.
    """
    match = _SPEC.match(spec)
    if not match:
        raise InputError(f"'{spec}' should read module:name, for the file module.py beside the scenario")
    stem, wanted = match.groups()
    if stem not in allowed:
        raise InputError(f"'{spec}' would run code from {stem}.py; if you trust it, add --allow-plugin {stem}")
    folder = folder.resolve()
    if (folder / f"{stem}.py").resolve().parent != folder:
        raise InputError(f"{stem}.py is a link that leaves the scenario's folder")
    module = load_module(folder / f"{stem}.py")
    found = components(module)
    for entry in found:
        if entry.kind == kind and wanted in (entry.name, entry.target.__qualname__):
            return REGISTRY.alias(entry, spec)
    names = [f"{stem}:{e.name}" for e in found if e.kind == kind]
    known = allowed_list(names) if names else "none; is there a decorator above it?"
    raise InputError(f"{stem}.py registers no {kind} '{wanted}' (known: {known}){nearest(spec, names)}")
