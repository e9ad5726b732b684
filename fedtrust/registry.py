"""Names → components.

A component is a class with annotated fields (a behaviour) or a function with keyword-only parameters (everything else). Its
fields or keyword-only parameters are what a scenario may set, with the types, bounds (`Annotated[float, Field(gt=0)]`) and
defaults written there; nothing else is accepted, nothing is dropped silently.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from fedtrust.errors import InputError, allowed_list, nearest

if TYPE_CHECKING:  # imported where a component is registered or checked: the training code runs without pydantic
    import pydantic

Kind = Literal[
    "behaviour", "filter", "aggregator", "step", "repair", "sender", "answer", "probe", "model", "loss", "optimiser", "source", "partition",
    "feature-skew",
]  # fmt: skip
KINDS: tuple[Kind, ...] = typing.get_args(Kind)

#: Packages whose modules register the components that come with fedtrust.
BUILTIN_PACKAGES = ("fedtrust.data", "fedtrust.models", "fedtrust.probes", "fedtrust.clients", "fedtrust.strategies")

_NAME = re.compile(r"^[a-z0-9]+(-[a-z0-9]+)*$")
_STRICT: pydantic.ConfigDict = {"extra": "forbid", "strict": True, "allow_inf_nan": False, "arbitrary_types_allowed": True}


@dataclass(frozen=True)
class Entry:
    """One registered component.

    Attributes:
        kind: what it is.
        name: its name in a scenario.
        target: the class or function.
        schema: pydantic model of its parameters.
        meta: what its author declared beside it (paper, role, exemptions, …).
    """

    kind: Kind
    name: str
    target: Any
    schema: type[pydantic.BaseModel]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def doc(self) -> str:
        """The whole docstring, cleaned."""
        return inspect.getdoc(self.target) or ""

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.doc.split("\n", 1)[0]

    @property
    def plugin(self) -> bool:
        """Whether it came from a plugin rather than with fedtrust."""
        return not str(self.target.__module__).startswith("fedtrust.")

    def check(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return `params` with every default filled in.

        Raises:
            InputError: an unknown parameter (with the nearest match), a wrong type or a value out of bounds.
        """
        import pydantic

        known = self.schema.model_fields
        for given in params:
            if given not in known:
                allowed = allowed_list(known) if known else "none"
                raise InputError(
                    f"{self.kind} '{self.name}' has no parameter '{given}' (parameters: {allowed}){nearest(given, known)}", given
                )
        try:
            checked = self.schema.model_validate(dict(params))
        except pydantic.ValidationError as error:
            raise from_pydantic(error) from None
        return {name: getattr(checked, name) for name in known}

    def make(self, params: Mapping[str, Any]) -> Any:
        """Return the component with its checked parameters bound: an instance of a class, or a partial of a function."""
        checked = self.check(params)
        if inspect.isclass(self.target):
            try:
                return self.target(**checked)
            except ValueError as error:
                raise InputError(str(error)) from None
        return functools.partial(self.target, **checked)


class Registry:
    """The components by kind and name."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Kind, str], Entry] = {}
        self._loaded = False

    def add(self, kind: Kind, name: str, target: Any, **meta: Any) -> Entry:
        """Register `target` under `name`.

        Raises:
            InputError: it is neither class nor function, the name is taken or not in lower-case words joined by hyphens, or the
                parameters cannot be read.
        """
        if not inspect.isclass(target) and not inspect.isfunction(target):
            raise InputError(f"{kind} '{name}' should be a class or a function, not {type(target).__name__}")
        if not _NAME.match(name):
            raise InputError(f"'{name}' is not a component name (lower-case words joined by hyphens)", _place(target))
        other = self._entries.get((kind, name))
        if other is not None and _place(other.target) != _place(target):
            raise InputError(f"{kind} '{name}' is already defined in {_place(other.target)}", _place(target))
        entry = Entry(kind, name, target, _schema(kind, name, target), MappingProxyType(dict(meta)))
        self._entries[kind, name] = entry
        return entry

    def alias(self, entry: Entry, name: str) -> Entry:
        """Let a plugin's component be found by its full name `module:name` too; return that entry."""
        named = dataclasses.replace(entry, name=name)
        self._entries[entry.kind, name] = named
        return named

    def load(self) -> None:
        """Import every module that registers built-in components (once)."""
        if self._loaded:
            return
        self._loaded = True  # first: a component's module may ask the registry while it is imported
        try:
            for package_name in BUILTIN_PACKAGES:
                package = importlib.import_module(package_name)
                for module in pkgutil.iter_modules(package.__path__, package_name + "."):
                    importlib.import_module(module.name)
        except BaseException:
            self._loaded = False  # half a registry must not pass for a whole one
            raise

    def get(self, kind: Kind, name: str) -> Entry:
        """Return the entry, or raise `InputError` with what is allowed and the nearest match."""
        self.load()
        entry = self._entries.get((kind, name))
        if entry is None:
            names = self.names(kind)
            raise InputError(f"unknown {kind} '{name}' (known: {allowed_list(names)}){nearest(name, names)}")
        return entry

    def make(self, kind: Kind, name: str, params: Mapping[str, Any] | None = None) -> Any:
        """Return the component `name` with `params` bound; see `Entry.make`."""
        return self.get(kind, name).make(params or {})

    def names(self, kind: Kind) -> list[str]:
        """Return the names of one kind, sorted."""
        self.load()
        return sorted(n for k, n in self._entries if k == kind)

    def find(self, name: str) -> list[Entry]:
        """Return every entry of that name, whatever its kind."""
        self.load()
        return [e for (_, n), e in sorted(self._entries.items()) if n == name]

    def __iter__(self) -> Iterator[Entry]:
        self.load()
        return iter([self._entries[key] for key in sorted(self._entries)])


def _place(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _parameters(target: Any) -> Iterable[tuple[str, Any, Any]]:
    """Yield (name, annotation, default) of the parameters that a scenario may set."""
    if inspect.isclass(target):
        hints = typing.get_type_hints(target, include_extras=True)
        fields = getattr(target, "__dataclass_fields__", {})
        for name in fields:
            yield name, hints[name], getattr(target, name, ...)
        return
    settable = {n: p for n, p in inspect.signature(target).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    # Only these annotations are read: what an author writes about the others is his own business.
    shim = types.SimpleNamespace(__annotations__={n: p.annotation for n, p in settable.items() if p.annotation is not p.empty})
    hints = typing.get_type_hints(shim, globalns=target.__globals__, include_extras=True)
    for name, parameter in settable.items():
        yield name, hints.get(name, Any), ... if parameter.default is parameter.empty else parameter.default


def _schema(kind: Kind, name: str, target: Any) -> type[pydantic.BaseModel]:
    import pydantic

    try:
        fields = {n: (annotation, default) for n, annotation, default in _parameters(target)}
        return pydantic.create_model(f"{kind}:{name}", __config__=_STRICT, **fields)  # type: ignore[call-overload, no-any-return]
    except (TypeError, NameError, pydantic.errors.PydanticUserError) as error:
        raise InputError(f"parameters of {kind} '{name}' cannot be read: {error}", _place(target)) from error


def dotted(location: Iterable[str | int]) -> str:
    """Return pydantic's location as a dotted key: ('a', 0, 'b') → 'a[0].b'."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def from_pydantic(error: pydantic.ValidationError) -> InputError:
    """Return the first finding of a pydantic error as one line."""
    first = error.errors(include_url=False)[0]
    message = first["msg"]
    if first["type"] == "missing":
        message = "is required and not set"
    elif "input" in first and not isinstance(first["input"], dict | list):
        message = f"{message} (got {first['input']!r})"
    return InputError(message, dotted(first["loc"]))


#: The one registry of this process.
REGISTRY = Registry()


def register(kind: Kind, name: str, **meta: Any) -> Callable[[Any], Any]:
    """Return a decorator that registers a class or function of `kind` under `name`.

    Keyword arguments are declarations about the component: `paper` (authors, venue, section) for all; see the kinds' own
    decorators for what else each understands.
    """

    def decorate(target: Any) -> Any:
        REGISTRY.add(kind, name, target, **meta)
        return target

    return decorate


model = functools.partial(register, "model")
loss = functools.partial(register, "loss")
optimiser = functools.partial(register, "optimiser")
source = functools.partial(register, "source")
partition = functools.partial(register, "partition")
feature_skew = functools.partial(register, "feature-skew")
