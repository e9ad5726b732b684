"""From the values of a page to one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from fedtrust.errors import RunError

_HERE = Path(__file__).parent


@cache
def _environment() -> Environment:
    made = Environment(loader=PackageLoader("fedtrust.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters["tight"] = lambda words: re.sub(r"(?<=\d) %", "\u202f%", words)  # the sign never stands alone on the next line
    return made


def html(page: dict[str, Any]) -> str:
    """Fill the template; everything that comes from a file is escaped there.

    The content policy lets nothing be fetched and no script run but the page's own, should a text ever slip through.
    """
    return _environment().get_template("template.html").render(page=page, **assets()).lstrip()


def assets() -> dict[str, Any]:
    """Return what every page carries with it: script, style, and the content policy that lets nothing else in."""
    script, style = (_HERE / "page.js").read_text("utf-8"), (_HERE / "style.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return {"script": Markup(script), "style": Markup(_themed(style)), "policy": policy}  # noqa: S704


def _themed(style: str) -> str:
    """Put the dark colours where they apply: by the system's wish and by the reader's. CSS itself would have them written out twice."""
    start, end = style.index("/* dark */"), style.index("/* end of dark */")
    dark = style[start + len("/* dark */") : end].strip()
    system = f"@media screen and (prefers-color-scheme: dark) {{ :root:not([data-theme='light']) {{ {dark} }} }}"
    return style[:start] + f"{system}\n@media screen {{ :root[data-theme='dark'] {{ {dark} }} }}" + style[end + len("/* end of dark */") :]


def save(text: str, path: Path) -> Path:
    """Write the file in one step, so that a reader never meets half of it."""
    half = path.with_name(f".{path.name}.half")
    try:
        half.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        os.replace(half, path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise RunError(f"{path}: the report cannot be written: {error.strerror or error}") from error
    return path
