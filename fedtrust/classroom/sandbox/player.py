"""A game, inside the sandbox: loads a submission, finds what the exercise asks for in it, and answers the host's calls.

| role | file | what is looked for | what it is asked |
|---|---|---|---|
| attack | attack.py | a `@behaviour` class, or `craft(updates, view)` | `remember`, `agree`, `poison`, `craft`, `goal` |
| defence | defence.py | an `@aggregator` function, or `aggregate(updates, ctx)` | `aggregate` |
| audit | audit.py | a `@probe` function, or `score(ctx)`, `reconstruct(ctx)`, `steal(ctx)` | the same |
| evasion | evasion.py | `perturb(x, y, query)` | `perturb` |

Everything here happens in the submission's own process. What it says is a stranger's word to the host.
"""

from __future__ import annotations

import linecache
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtrust.classroom.sandbox import channel
from fedtrust.errors import FedTrustError, said

Tensors = dict[str, Tensor]
MODULE = "submission"


class Role(NamedTuple):
    """What is looked for in a submission.

    Attributes:
        kind: the registry's kind of a decorated component; `None`: only plain functions.
        plain: names of plain functions that do as well.
    """

    kind: str | None
    plain: tuple[str, ...]


ROLES: dict[str, Role] = {
    "attack": Role("behaviour", ("craft",)),
    "defence": Role("aggregator", ("aggregate",)),
    "audit": Role("probe", ("score", "reconstruct", "steal")),
    "evasion": Role(None, ("perturb",)),
}


class Budget(Exception):  # noqa: N818  # what a student reads
    """A question too many: the exercise's budget is used up."""


class Refused(Exception):  # noqa: N818
    """A submission that cannot be played; says of which kind and why."""

    def __init__(self, kind: str, why: str) -> None:
        self.kind = kind
        super().__init__(why)


class Host:
    """The way to the host during a call: questions that it may be asked."""

    def __init__(self, inward: int, outward: int) -> None:
        self._inward, self._outward = inward, outward

    def next(self) -> channel.Frame | None:
        """Return the host's next order."""
        return channel.read(self._inward)

    def tell(self, data: Mapping[str, Any], tensors: Tensors | None = None) -> None:
        """Answer the order."""
        channel.write(self._outward, channel.pack(data, tensors))

    def ask(self, name: str, tensors: Tensors, data: Mapping[str, Any] | None = None) -> Tensors:
        """Ask the host something in the middle of a call.

        Raises:
            Budget: it may not be asked so often.
            ValueError: the host cannot answer that.
        """
        self.tell({"ask": name, "data": dict(data or {})}, {key: value.detach() for key, value in tensors.items()})
        frame = self.next()
        if frame is None:
            raise SystemExit
        if "refused" in frame.data:
            raise (Budget if frame.data.get("budget") else ValueError)(frame.data["refused"])
        return channel.load(frame.payload)


def play(inward: int, outward: int) -> None:
    """Answer the host's orders until it closes the pipe."""
    host = Host(inward, outward)
    found: Any = None
    while (frame := host.next()) is not None:
        try:
            if frame.data["op"] == "load":
                from fedtrust.classroom.sandbox import parts

                found, about = parts.load(frame.data)
                host.tell(about)
                continue
            data, tensors = found.answer(frame.data, channel.load(frame.payload), host)
            reply = channel.pack({"done": True, **data}, {name: _plain(value, name) for name, value in tensors.items()})
        except BaseException as error:  # whatever a submission raises is an answer
            reply = channel.pack(_fault(error))
        channel.write(outward, reply)


def _plain(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise Refused("reply", f"'{name}' is {type(value).__name__}, not a tensor")
    if value.dtype not in (torch.float32, torch.int64, torch.bool):
        raise Refused("reply", f"'{name}' is {value.dtype}; expected torch.float32 (or int64 and bool, where they are asked for)")
    return value.detach().cpu()


def _fault(error: BaseException) -> dict[str, Any]:
    kind, text = "crash", f"{type(error).__name__}: {error}"
    if isinstance(error, Refused):
        kind, text = error.kind, str(error)
    elif isinstance(error, FedTrustError):
        kind, text = "unusable", said(error)
    elif isinstance(error, Budget):
        kind = "budget"
    elif isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "not enough memory" in str(error):
        kind, text = "memory", f"it asked for more memory than it may have ({text})"
    line = 0
    for frame in traceback.extract_tb(error.__traceback__):
        line = frame.lineno or line if frame.filename.startswith(f"<{MODULE}") else line
    return {"fault": kind, "text": str(text)[:300], "line": line}


def execute(source: str, file: str) -> types.ModuleType:
    """Return a submission as a module; it is known to Python as `submission`.

    Raises:
        Refused: it cannot be executed; says on which line.
    """
    name = f"<{MODULE}: {file}>"
    module = types.ModuleType(MODULE)
    module.__file__ = name
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    sys.modules[MODULE] = module
    try:
        exec(compile(source, name, "exec"), module.__dict__)  # noqa: S102  # what a sandbox is for
    except SyntaxError as error:
        raise Refused("unusable", f"{file}:{error.lineno}: {error.msg}") from None
    except MemoryError:
        raise
    except FedTrustError as error:
        raise Refused("unusable", said(error)) from None
    except BaseException as error:
        line = max((f.lineno or 0 for f in traceback.extract_tb(error.__traceback__) if f.filename == name), default=0)
        raise Refused("unusable", f"{file}:{line}: {type(error).__name__}: {error}") from None
    return module


def component(module: types.ModuleType, role: str, params: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return what the exercise asks for in a module, bound to its parameters, and its registration.

    Returns:
        A behaviour instance or a function; plain functions come in a dictionary by name. And `{"name": …, …}`.

    Raises:
        Refused: it holds none, or several.
    """
    from fedtrust.registry import REGISTRY

    wanted = ROLES[role]
    entries = [e for e in REGISTRY if e.kind == wanted.kind and e.target.__module__ == MODULE]
    plain: dict[str, Callable[..., Any]] = {n: f for n in wanted.plain if callable(f := getattr(module, n, None))}
    if len(entries) > 1:
        raise Refused("unusable", f"it registers {len(entries)} components ({', '.join(e.name for e in entries)}); hand in one")
    if entries:
        return entries[0].make(params), {"name": entries[0].name, **{k: v for k, v in entries[0].meta.items() if isinstance(v, str)}}
    if plain:
        return plain, {"name": next(iter(plain)), "plain": True}
    hoped = " or ".join(([f"a @{wanted.kind}"] if wanted.kind else []) + [f"a function `{name}`" for name in wanted.plain])
    raise Refused("unusable", f"it holds none of what is asked for: {hoped}")
