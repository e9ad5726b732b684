"""Scenario files as text: reading with guards, `--set` overrides, where a key stands, and writing TOML."""

from __future__ import annotations

import math
import re
import stat
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtrust.errors import InputError
from fedtrust.registry import dotted

if TYPE_CHECKING:
    from fedtrust.scenario import Scenario

MAX_BYTES = 1_000_000
MAX_DEPTH = 32

Keys = tuple[str | int, ...]

# Everything in TOML that can hide a bracket, a dot or a quote; a multi-line string first, an unclosed one runs to the end.
_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?(?:"""+|\Z)|\'\'\'.*?(?:\'\'\'+|\Z)|"(?:\\.|[^"\\\n])*"?|\'[^\'\n]*\'?|#[^\n]*|\n|[][{}=,.]|[^][{}=,.\n"\'#]+',
    re.DOTALL,
)
_HEADER = re.compile(r"^\s*(\[\[?)(.*?)\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"^\s*((?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*'))*)\s*=")
_PART = re.compile(r"\"([^\"]*)\"|'([^']*)'|([A-Za-z0-9_-]+)")


@dataclass
class Document:
    """A scenario file as parsed, with what is needed to say where something stands.

    Attributes:
        name: the file, as the user wrote it.
        data: the parsed document.
        lines: key path → line number, for keys that begin a line.
        overridden: for each override the key path and the words of the user.
    """

    name: str
    data: dict[str, Any]
    lines: Mapping[Keys, int] = field(default_factory=dict)
    overridden: list[tuple[Keys, str]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Document:
        """Read and parse a file.

        Raises:
            InputError: it cannot be read, is too large or too deep, is not UTF-8 or not TOML, or holds a number that is not finite.
        """
        name = str(path)
        text = _text(path)
        data = _parse(text, name)
        lines = key_lines(text)
        document = cls(name, data, lines)
        try:
            _refuse_odd(data)
        except InputError as error:
            raise document.placed(error) from None
        return document

    def override(self, overrides: Sequence[str]) -> None:
        """Lay `a.b=v` over the document; the value is TOML, or else a string."""
        for text in overrides:
            key, equals, value = text.partition("=")
            where = f"--set {key.strip() or text}"
            if not equals or not key.strip():
                raise InputError("should read KEY=VALUE, for instance clients.count=10", where)
            if not text.isprintable() and any(0xD800 <= ord(c) < 0xE000 for c in text):
                raise InputError("is not UTF-8 text", where)
            keys = _split_key(key.strip(), where)
            parsed = _value(value.strip(), where)
            _refuse_odd({"": parsed}, where)
            self.overridden.append((_put(self.data, keys, parsed, where), where))

    def placed(self, error: InputError) -> InputError:
        """Return an error about a dotted key, placed at the file and line or at the override that it is about."""
        if error.where.startswith("strategy.privacy") and "privacy" in self.data:  # written at the top
            error = InputError(error.message, error.where.removeprefix("strategy."))
        keys = tuple(_parts(error.where))
        for given, where in reversed(self.overridden):
            if keys[: len(given)] == given:
                return InputError(f"{error.where}: {error.message}" if len(keys) > len(given) else error.message, where)
        under = next((where for given, where in self.overridden if keys and given[: len(keys)] == keys), "")
        message = f"{error.message} (after {under})" if under else error.message
        line = next((self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), None)
        place = self.name if line is None else f"{self.name}:{line}"
        return InputError(message, f"{place}: {error.where}" if error.where else place)


def _text(path: Path) -> str:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError("is a folder, not a scenario file", str(path))
        if not stat.S_ISREG(status.st_mode):
            raise InputError("is not a regular file", str(path))
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError("no such file", str(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"cannot be read ({getattr(error, 'strerror', None) or error})", str(path)) from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"is larger than {MAX_BYTES // 1_000_000} MB, which no scenario is", str(path))
    try:
        return raw.decode("utf-8-sig")  # Windows' editor puts a mark in front
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError("is not UTF-8 text", f"{path}:{line}") from None


def _parse(text: str, name: str) -> dict[str, Any]:
    deep = _too_deep(text)
    if deep:
        raise InputError(f"is nested deeper than {MAX_DEPTH} levels", f"{name}:{deep}")
    try:
        data = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and int() on thousands of digits
        found = re.search(r"\(at line (\d+), column \d+\)", str(error))
        if not found:
            last = text.count("\n") + 1
            raise InputError(f"is not TOML: {error}", f"{name}:{last}" if "end of document" in str(error) else name) from None
        message = re.sub(r"\s*\(at line.*", "", str(error))
        line = int(found[1])
        if message.startswith(("Cannot overwrite", "Cannot declare", "Cannot mutate")):
            # tomllib notices after the value, which may be a line further on
            key = text.splitlines()[min(line, len(text.splitlines())) - 1].split("=")[0].strip()
            message = f"'{key}' is set twice"
        raise InputError(f"is not TOML: {message}", f"{name}:{line}") from None
    except RecursionError:
        raise InputError(f"is nested deeper than {MAX_DEPTH} levels", name) from None
    return data


def _too_deep(text: str) -> int | None:
    """Return the line on which brackets or a dotted key nest too deep, without parsing (tomllib would run out of stack)."""
    depth, dots, line = 0, 0, 1
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in ("[", "{"):
            depth, dots = depth + 1, 0
        elif token in ("]", "}"):
            depth, dots = max(0, depth - 1), 0
        elif token in ("=", ",", "\n"):
            dots = 0
        elif token == ".":  # noqa: S105 - a token of TOML
            dots += 1
        if max(depth, dots) > MAX_DEPTH:
            return line
        line += token.count("\n")
    return None


def _refuse_odd(data: Mapping[str, Any], where: str | None = None) -> None:
    """Refuse numbers that are not finite and tables that are too deep; place it at the key, or at `where`."""
    todo: list[tuple[Keys, Any]] = [((key,), value) for key, value in data.items()]
    while todo:
        keys, value = todo.pop()
        place = dotted(keys) if where is None else where
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"should be a finite number (got {value})", place)
        if len(keys) > MAX_DEPTH:
            raise InputError(f"is nested deeper than {MAX_DEPTH} levels", dotted(keys[:3]) if where is None else where)
        if isinstance(value, Mapping):
            todo += [((*keys, key), v) for key, v in value.items()]
        elif isinstance(value, list):
            todo += [((*keys, index), v) for index, v in enumerate(value)]


def _parts(text: str) -> Iterator[str | int]:
    """Yield the keys of a dotted key such as `a[0].b`."""
    for word, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", text):
        yield int(index) if index else word


def _split_key(text: str, where: str) -> Keys:
    """Return the keys of an override; `a[0].b`, `a.0.b` and quoted parts are understood."""
    keys: list[str | int] = []
    rest = text
    while rest:
        match = re.match(r"\.?(?:\[(\d{1,6})\]|\"([^\"]*)\"|'([^']*)'|(\d{1,6})(?=[.\[]|$)|([A-Za-z0-9_-]+))", rest)
        if not match or (keys and rest[0] not in ".[") or (not keys and rest[0] in ".["):
            raise InputError(f"'{text}' is not a dotted key", where)
        index, double, single, number, bare = match.groups()
        if index is not None or number is not None:
            keys.append(int(index or number))
        else:
            keys.append(next(part for part in (double, single, bare) if part is not None))
        rest = rest[match.end() :]
    if len(keys) > MAX_DEPTH:
        raise InputError(f"is nested deeper than {MAX_DEPTH} levels", where)
    return tuple(keys)


def _value(text: str, where: str) -> Any:
    if _too_deep(text):
        raise InputError(f"is nested deeper than {MAX_DEPTH} levels", where)
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _put(data: dict[str, Any], keys: Keys, value: Any, where: str) -> Keys:
    """Set the value at a place, opening the way to it; return the place as it is in the document (a number may be a table's key)."""
    here: Any = data
    real: list[str | int] = []
    for place, key in enumerate(keys):
        if isinstance(here, dict):
            key = str(key)
            here.setdefault(key, {})
        elif not isinstance(here, list):
            raise InputError(f"{dotted(keys[:place])} is {here!r} and has no keys below it", where)
        elif not isinstance(key, int) or not 0 <= key < len(here):
            raise InputError(f"{dotted(keys[:place])} is a list of {len(here)}; '{key}' is none of its places (they start at 0)", where)
        real.append(key)
        if place == len(keys) - 1:
            here[key] = value
        elif isinstance(here[key], str):
            here[key] = {"name": here[key]}  # the short form of a component opens up
        here = here[key]
    return tuple(real)


def key_lines(text: str) -> dict[Keys, int]:
    """Return the line of every table header and of every key that begins a line."""
    lines: dict[Keys, int] = {}
    table: Keys = ()
    counts: dict[Keys, int] = {}
    number, depth, begin = 1, 0, True
    rows = text.split("\n")
    for match in _TOKEN.finditer(text):
        token = match[0]
        if begin and depth == 0:
            row = rows[number - 1]
            if header := _HEADER.match(row):
                table = _names(header[2])
                # a header below an array of tables belongs to its last item
                for size in range(1, len(table)):
                    if table[:size] in counts:
                        table = (*table[:size], counts[table[:size]] - 1, *table[size:])
                if header[1] == "[[":
                    counts[table] = counts.get(table, 0) + 1
                    table = (*table, counts[table] - 1)
                lines.setdefault(table, number)
            elif key := _KEY.match(row):
                lines.setdefault((*table, *_names(key[1])), number)
        begin = token == "\n"  # noqa: S105 - a token of TOML
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        number += token.count("\n")
    return lines


def _names(text: str) -> tuple[str, ...]:
    return tuple(next(part for part in groups if part or not any(groups)) for groups in _PART.findall(text))


def expand_sweep(given: Any) -> Any:
    """Return a raw document whose sweep is in the full form: every strategy laid over `[strategy]`, lists of names as tables."""
    if not isinstance(given, Mapping) or not isinstance(given.get("sweep"), Mapping):
        return given
    sweep = dict(given["sweep"])
    base = given.get("strategy", {})
    if "strategies" in sweep:
        sweep["strategies"] = {
            label: {**base, **entry} if isinstance(entry, Mapping) and isinstance(base, Mapping) else entry
            for label, entry in _labelled(sweep["strategies"], "sweep.strategies", "aggregator").items()
        }
    if "partitions" in sweep:
        sweep["partitions"] = _labelled(sweep["partitions"], "sweep.partitions", "name")
    return {**given, "sweep": sweep}


def _labelled(given: Any, where: str, key: str) -> dict[str, Any]:
    """Return label → table from a list of names or a table whose values may be names."""
    if isinstance(given, list):
        for index, name in enumerate(given):
            if not isinstance(name, str):
                raise InputError("should be a name; to set parameters write a table, label = { … }", f"{where}[{index}]")
            if name in given[:index]:
                raise InputError(f"'{name}' stands there twice", f"{where}[{index}]")
        given = {name: name for name in given}
    if not isinstance(given, Mapping):
        raise InputError("should be a list of names or a table with a label for each entry", where)
    return {label: {key: value} if isinstance(value, str) else value for label, value in given.items()}


def slugs(labels: Iterable[Any]) -> dict[Any, str]:
    """Return a short name that is safe in a file system for each label, all different."""
    made: dict[Any, str] = {}
    for label in labels:
        text = unicodedata.normalize("NFC", str(label)).lower()
        kept = re.sub(r"[-\s]+", "-", "".join(c if c.isalnum() or c in ".-" else "-" for c in text)).strip("-.")
        kept = kept.encode()[:48].decode(errors="ignore").strip("-.") or "x"
        name, number = kept, 1
        while name in made.values():
            number += 1
            name = f"{kept}-{number}"
        made[label] = name
    return made


def load_run(directory: Path, allow_plugins: Sequence[str] = (), data_root: str | None = None) -> Scenario:
    """Return the scenario of a run directory, in which plugin files lie beside `scenario.toml`; see `fedtrust.scenario.load`."""
    from fedtrust.scenario import load

    return load(directory / "scenario.toml", allow_plugins=allow_plugins, data_root=data_root)
