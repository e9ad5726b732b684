"""A friendly look at a file before it is played: what will not work is said at once, with the line.

This is not the protection. Whoever means harm gets past it; the sandbox is what holds. It spares an honest student a wait.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

from fedtrust.errors import nearest

#: What may be imported. Of fedtrust, the names that `fedtrust` itself offers, and modules below it.
ALLOWED = ("collections", "dataclasses", "fedtrust", "functools", "itertools", "math", "numpy", "pydantic", "statistics", "torch", "typing")
_ALWAYS = ("__future__", "abc", "enum", "operator", "random")
_ENGINE = ("fedtrust.classroom", "fedtrust.cli", "fedtrust.data", "fedtrust.engine", "fedtrust.runner", "fedtrust.runs", "fedtrust.setup")
#: Parts of torch that load code or data, or start processes.
_TORCH = ("torch.hub", "torch.multiprocessing", "torch.distributed", "torch.utils", "torch.package", "torch.jit", "torch.serialization")
#: Built-in functions that no attack or defence needs.
_CALLS = frozenset(
    {
        "exec",
        "eval",
        "open",
        "compile",
        "globals",
        "locals",
        "vars",
        "input",
        "breakpoint",
        "__import__",
        "memoryview",
        "help",
        "exit",
        "quit",
    }
)
_LOADERS = frozenset({"load", "save", "fromfile", "tofile", "memmap", "loadtxt", "savetxt", "genfromtxt"})
#: Dunder names that everybody writes.
_DUNDERS = frozenset(
    {"__init__", "__post_init__", "__name__", "__call__", "__len__", "__repr__", "__doc__", "__all__", "__iter__", "__getitem__"}
)
MOST_BYTES = 64 * 1024


class Finding(NamedTuple):
    """Something that will not work.

    Attributes:
        line: where, from 1.
        sentence: what, for the author.
    """

    line: int
    sentence: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.sentence}"


def check(source: str, most: int = MOST_BYTES) -> list[Finding]:
    """Return what will not work in a submission, by line; an empty list if nothing is seen.

    Args:
        source: its text.
        most: bytes that it may have.
    """
    size = len(source.encode())
    if size > most:
        return [Finding(1, f"the file has {size} bytes, the most is {most}")]
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        return [Finding(getattr(error, "lineno", None) or 1, f"this is not Python: {getattr(error, 'msg', error)}")]
    except (RecursionError, MemoryError):
        return [Finding(1, "it is nested too deeply to be read")]
    looker = _Looker()
    try:
        looker.visit(tree)
    except RecursionError:
        return [Finding(1, "it is nested too deeply to be read")]
    return sorted(set(looker.found))


class _Looker(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[Finding] = []

    def _say(self, node: ast.AST, sentence: str) -> None:
        self.found.append(Finding(getattr(node, "lineno", 1), sentence))

    def _import(self, node: ast.AST, name: str) -> None:
        top = name.split(".")[0]
        if top not in ALLOWED and top not in _ALWAYS:
            self._say(node, f"'{name}' cannot be imported here (allowed: {', '.join(ALLOWED)}){nearest(top, ALLOWED)}")
        elif any(name == inner or name.startswith(inner + ".") for inner in (*_ENGINE, *_TORCH)):
            self._say(node, f"'{name}' cannot be imported here; what you need of it is in the view or the context")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._import(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            self._say(node, "there is no other file to import from: hand in one file")
        elif node.module:
            self._import(node, node.module)
            for alias in node.names:
                if f"{node.module}.{alias.name}" in (*_ENGINE, *_TORCH):
                    self._import(node, f"{node.module}.{alias.name}")

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in _CALLS:
            self._say(node, f"`{node.func.id}` cannot be used here")
        match node.func:
            case ast.Attribute(value=ast.Name(id="torch" | "np" | "numpy" as home), attr=name) if name in _LOADERS:
                self._say(node, f"`{home}.{name}` cannot be used here: there are no files to read or write")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self._dunder(node, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._dunder(node, node.attr)
        self.generic_visit(node)

    def _dunder(self, node: ast.AST, name: str) -> None:
        if name.startswith("__") and name.endswith("__") and name not in _DUNDERS and name not in _CALLS:
            self._say(node, f"`{name}` reaches into Python itself, which no submission needs")
