"""`fedtrust list` and `fedtrust describe`."""

from __future__ import annotations

import inspect
import shutil
import textwrap
import types
import typing
from typing import Annotated, Any, Literal

from pydantic_core import PydanticUndefined

from fedtrust.errors import InputError, allowed_list, nearest
from fedtrust.registry import KINDS, REGISTRY, Entry, Kind

_ABOUT: dict[Kind, str] = {
    "behaviour": "clients.behaviour (honest), [[attackers]] (malicious): what they do",
    "filter": "strategy.filters: updates to updates",
    "aggregator": "strategy.aggregator: updates to one change of the model",
    "step": "strategy.steps: the change of the model to another",
    "repair": "strategy.repairs: the model to another, after the last round",
    "sender": "[malicious_server]: what clients are sent in place of the model",
    "answer": "release.defences: what users are told of the probabilities",
    "probe": "[[probes]]: what is measured, and by whom",
    "model": "[model]",
    "loss": "clients.train.loss",
    "optimiser": "clients.train.optimiser",
    "source": "data.source",
    "partition": "data.partition",
    "feature-skew": "data.feature_skew",
}


def _width() -> int:
    return min(100, shutil.get_terminal_size((80, 24)).columns)


def listing(kind: str | None) -> str:
    """Return the registered names with the first line of what they do.

    Raises:
        InputError: there is no such kind.
    """
    kinds: tuple[Kind, ...] = KINDS
    if kind is not None:
        wanted = kind.lower().replace("_", "-").removesuffix("s") if kind not in ("loss", "losses") else "loss"
        if wanted not in KINDS:
            raise InputError(f"no kind '{kind}' (kinds: {', '.join(KINDS)}){nearest(wanted, KINDS)}")
        kinds = (wanted,)
    return "\n\n".join(_block(k) for k in kinds)


def _block(kind: Kind) -> str:
    entries = [e for e in REGISTRY if e.kind == kind and ":" not in e.name]
    pad = max([len(e.name) for e in entries] + [8]) + 2
    rows = [f"{kind}: {_ABOUT[kind]}"]
    for entry in entries:
        mark = "(honest) " if entry.meta.get("role") == "honest" and kind == "behaviour" else ""
        rows.append(_row(entry.name, pad, mark + entry.summary))
    if kind == "aggregator":
        rows.append(_row("flwr:NAME", pad, f"A stock Flower strategy: {', '.join(stock_names())}."))
    return "\n".join(rows)


def _row(name: str, pad: int, text: str) -> str:
    lines = textwrap.wrap(text, max(20, _width() - pad - 2)) or [""]
    return "\n".join([f"  {name:{pad}}{lines[0]}", *(" " * (pad + 2) + line for line in lines[1:])])


def stock_names() -> list[str]:
    """Return Flower's strategies that run here."""
    import flwr.serverapp.strategy as stock

    from fedtrust.engine.flower import stock_check

    names = []
    for name in stock.__all__:
        try:
            stock_check(name, {"client_learning_rate": 0.1} if name == "QFedAvg" else {})
        except InputError:
            continue
        names.append(name)
    return names


def description(name: str) -> str:
    """Return all that is known about a component, of whatever kind.

    Raises:
        InputError: there is none of that name.
    """
    if name.startswith("flwr:"):
        return _stock(name)
    entries = REGISTRY.find(name)
    if not entries:
        names = sorted({e.name for e in REGISTRY if ":" not in e.name})
        raise InputError(f"no component '{name}' (known: {allowed_list(names, 60)}){nearest(name, names)}")
    return "\n\n".join(_entry(entry) for entry in entries)


def _stock(name: str) -> str:
    from fedtrust.engine.flower import stock_check, stock_parameters
    from fedtrust.scenario_toml import value

    plain = name.removeprefix("flwr:")
    example = {"client_learning_rate": 0.1} if plain == "QFedAvg" else {}
    cls = stock_check(plain, example)
    first = (inspect.getdoc(cls) or "").split("\n\n", 1)[0]
    rows = [f"    {p.name}: {'required' if p.default is p.empty else f'default {p.default!r}'}" for p in stock_parameters(cls)]
    ref = value({"name": name, **example})
    blocks = [
        f"{name} · aggregator (a stock Flower strategy; takes no filters or steps)",
        _prose(f"{first} The cohort, the sample counts and the record names are set by the simulation."),
        "\n".join(["  parameters", *rows]) if rows else "  no parameters",
        f"  in a scenario\n    [strategy]\n    aggregator = {ref}",
    ]
    return "\n\n".join(blocks)


def _entry(entry: Entry) -> str:
    head = f"{entry.name} · {entry.kind}"
    role = "protects itself, attacks nobody" if entry.meta.get("protects") else entry.meta.get("role")
    facts = [("paper", entry.meta.get("paper")), ("role", role), ("when", entry.meta.get("when"))]
    if entry.kind == "behaviour":
        from fedtrust.client import capabilities

        facts.append(("knowledge", f"{entry.meta.get('knowledge', 'own')} or more"))
        facts.append(("manipulates", ", ".join(capabilities(entry.target)) or "nothing"))
    shown = [_row(key, 13, str(value)) for key, value in facts if value]
    blocks = [head, "\n".join(shown), _prose(entry.doc), _parameters(entry), _example(entry)]
    return "\n\n".join(block for block in blocks if block)


def _prose(text: str) -> str:
    """Return a docstring wrapped to the terminal; lists and indented lines stay as they are."""
    width = min(100, shutil.get_terminal_size().columns) - 2
    blocks = []
    for block in text.split("\n\n"):
        laid_out = any(line[:1] in (" ", "*", "-") for line in block.splitlines())
        blocks.append(block if laid_out else textwrap.fill(" ".join(block.split()), width, break_on_hyphens=False))
    return textwrap.indent("\n\n".join(blocks), "  ")


def _parameters(entry: Entry) -> str:
    if not entry.schema.model_fields:
        return "  no parameters"
    rows = ["  parameters"]
    for name, field in entry.schema.model_fields.items():
        default = "required" if field.default is PydanticUndefined else f"default {field.default!r}"
        bounds = " and ".join(text for m in field.metadata for text in _bounds(m))
        said = f"{name}: {_type(field.annotation)}{f' ({bounds})' if bounds else ''}, {default}"
        width = min(100, shutil.get_terminal_size().columns)
        rows.append(textwrap.fill(said, width, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False))
    return "\n".join(rows)


def _type(annotation: Any) -> str:
    """Return a type as a student would write it."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        bounds = " and ".join(text for m in inside[1:] for text in _bounds(m))
        return _type(inside[0]) + (f" ({bounds})" if bounds else "")
    if origin is Literal:
        return " | ".join(repr(v) for v in inside)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(a) for a in inside if a is not type(None))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type(a) for a in inside)}]"
    return getattr(annotation, "__name__", str(annotation))


def _bounds(metadata: Any) -> list[str]:
    signs = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
    own = [f"{sign} {getattr(metadata, key)}" for key, sign in signs if getattr(metadata, key, None) is not None]
    return own + [text for m in getattr(metadata, "metadata", ()) for text in _bounds(m)]


def _example(entry: Entry) -> str:
    from fedtrust.scenario_toml import value

    params = {n: f.default for n, f in entry.schema.model_fields.items() if f.default not in (None, PydanticUndefined)}
    try:
        flat = value({"name": entry.name, **params})
        given = value(params)
    except TypeError:
        return ""
    lines: dict[Kind, str] = {
        "filter": f"[strategy]\nfilters = [{flat}]",
        "aggregator": f"[strategy]\naggregator = {flat}",
        "step": f"[strategy]\nsteps = [{flat}]",
        "repair": f"[strategy]\nroot_samples = 200\nrepairs = [{flat}]",
        "sender": f'[malicious_server]\nsender = "{entry.name}"\nparams = {given}',
        "answer": f'[release]\nanswers = "probabilities"\ndefences = [{flat}]',
        "probe": "[[probes]]\n" + "\n".join(f"{k} = {value(v)}" for k, v in {"name": entry.name, **params}.items()),
        "model": f"model = {flat}",
        "loss": f"[clients]\ntrain = {{ loss = {flat} }}",
        "optimiser": f"[clients]\ntrain = {value({'optimiser': entry.name, **params})}",
        "source": f"[data]\nsource = {flat}",
        "partition": f"[data]\npartition = {value({'kind': entry.name, **params})}",
        "feature-skew": f"[data]\nfeature_skew = {value({'kind': entry.name, **params})}",
    }
    attacker = f'[[attackers]]\nbehaviour = "{entry.name}"\nshare = 0.2\nparams = {given}'
    honest = f"[clients]\nbehaviour = {flat}"
    text = lines.get(entry.kind) or (honest if entry.meta.get("role") == "honest" else attacker)
    return "  in a scenario\n" + textwrap.indent(text, "    ")
