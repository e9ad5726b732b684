"""A report read back by a strict little parser that holds it to what every page must keep."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import sample

MEGABYTE = 1_000_000


class Page(HTMLParser):
    """Tags and attributes of a page, its visible text, and whether every element was closed."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words += data

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page(path: Path) -> Page:
    text = path.read_text("utf-8")
    assert len(text.encode()) < MEGABYTE
    found = Page(text)
    for tag, attributes in found.tags:  # nothing is fetched: addresses lead only from links, pictures are inside the file
        for name, value in attributes.items():
            if name in ("src", "srcset", "data", "href", "xlink:href", "action") and value:
                assert value.startswith(("#", "data:")) or (tag == "a" and value.startswith("https://")), (
                    tag,
                    name,
                    value,
                )
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in re.sub(r"<a [^>]*>.*?</a>", "", text.replace("http-equiv", ""))
    for tag, attributes in found.tags:
        assert tag != "svg" or attributes.get("aria-label"), "every drawing has a name"
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return found


def change(folder: Path, **changes: Any) -> Path:
    path = folder / "summary.json"
    sample.write_json(path, json.loads(path.read_text("utf-8")) | changes)
    return folder
