"""The page: whole, escaped, small, offline, and possible for every odd folder."""

from __future__ import annotations

import copy
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sample

from fedtrust.errors import InputError, RunError
from fedtrust.report import compare, write

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


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.matrix(tmp_path_factory.mktemp("report") / "matrix")


def test_a_matrix_has_every_section(matrix: Path) -> None:
    assert write(matrix) == matrix / "report.html"
    found = page(matrix / "report.html")
    assert {"verdict", "heat", "curves", "clients", "artefacts", "threats", "faults", "repeat"} <= found.ids()
    assert "Median and multi-krum held against both attacks" in found.words
    assert "fedtrust run matrix/scenario.toml" in found.words
    assert "assumes 20\u202f% malicious (about 4 of 20 clients); there are 4, which is right" in found.words
    assert found.count("img") == 8, "each attack's pictures once"
    assert found.count("table") >= 4
    for value in ("69.7", "99.8", "1.2", "94.1"):
        assert value in found.words
    heads = [attributes for tag, attributes in found.tags if tag == "th"]
    assert heads
    assert all(attributes.get("scope") in ("row", "col") for attributes in heads)


def test_a_run_has_every_section(tmp_path: Path) -> None:
    found = page(write(sample.run(tmp_path / "run", faults=True)))
    assert {"verdict", "result", "curves", "clients", "artefacts", "threats", "faults", "repeat"} <= found.ids()
    assert "0.1\u202f% of the triggered inputs go to class 2" in found.words
    assert "NaN in the update" in found.words
    assert "2 (rounds 3–5, 9)" in found.words
    assert "Quorum missed: round 9 (17 valid, 18 needed)" in found.words
    assert "doi:10.1109/ACCESS.2019.2909068" in found.words
    assert "Trust by client and round" in found.words
    assert "Recall by round" in found.words


def test_two_writes_are_the_same_bytes(matrix: Path) -> None:
    first = write(matrix).read_bytes()
    assert write(matrix).read_bytes() == first
    assert not list(matrix.glob("*.half"))


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;{{ 7*7 }}"
    folder = sample.run(tmp_path / "run")
    threat = {"behaviour": evil, "paper": f'https://x.org/?a="><script> {evil}', "role": evil, "params": {evil: evil}, "capability": [evil]}
    federation = {"labels": [evil] * 2, "label_counts": [[1, 2]] * 3, "malicious": [1]}
    change(
        folder,
        title=evil,
        strategy=evil,
        attack=evil,
        threats=[threat],
        federation=federation,
        warnings=[evil],
        engine=evil,
        metrics={evil: 0.5},
    )
    entry = {"round": 1, "faults": {evil: evil}, "metrics": {evil: 0.4, "accuracy": 0.5}}
    sample.write_lines(folder / "rounds.jsonl", [entry, entry | {"round": 2}])
    sample.write_json(folder / "environment.json", {evil: {evil: evil}})
    (folder / "scenario.toml").write_text(f"title = '''{evil}'''", encoding="utf-8")
    sample.write_json(
        folder / "artefacts" / "a.json", {"kind": "table", "title": evil, "caption": evil, "columns": [evil], "rows": [[evil]]}
    )
    sample.write_json(
        folder / "artefacts" / "b.json", {"kind": "curve", "title": evil, "x": evil, "y": evil, "series": {evil: [[0, 1], [1, 2]]}}
    )
    images = [{"png": '" onerror="alert(1)', "label": evil}, {"png": sample.png(1), "label": evil}]
    sample.write_json(folder / "artefacts" / "c.json", {"kind": "images", "title": evil, "images": images})
    for found in (page(write(folder)), page(compare([folder, folder], tmp_path / "out.html"))):
        assert found.count("script") == 1
        assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
        assert evil in found.words
        assert "{{ 7*7 }}" in found.words
    matrix = sample.matrix(tmp_path / "matrix", rounds=2)
    raw = json.loads((matrix / "summary.json").read_text("utf-8"))
    cells = [
        cell | {"attackers": f"{cell['attackers']}{evil}", "why": evil, "status": evil if n == 3 else "finished"}
        for n, cell in enumerate(raw["cells"])
    ]
    change(matrix, cells=cells, axes={}, title=evil, threats={f"label flip{evil}": [threat]})
    assert page(write(matrix)).count("script") == 1


def test_failed_cells_are_shown(tmp_path: Path) -> None:
    folder = sample.matrix(tmp_path / "matrix", failed=("label-flip__median",))
    text = write(folder).read_text("utf-8")
    found = page(folder / "report.html")
    assert 'class="failed"' in text
    assert "label flip against median failed: quorum missed in round 5: 9 of 20 replies were valid." in found.words
    assert "1 of 9 cells did not finish and is left out (label flip against median)." in found.words
    assert found.words.index("label flip against median failed") < found.words.index("Multi-krum held"), "what failed comes first"


def test_an_interrupted_run_says_so_first(tmp_path: Path) -> None:
    folder = sample.run(tmp_path / "run", status="interrupted", rounds=4)
    words = page(write(folder)).words
    assert words.index("This run was interrupted after round 4") < words.index(
        "The run was interrupted; the numbers are those of its last round"
    )


def test_seeds_and_partitions(tmp_path: Path) -> None:
    folder = sample.matrix(tmp_path / "matrix", seeds=(1, 2, 3), partitions=("iid", "dirichlet 0.1"), rounds=4)
    found = page(write(folder))
    assert "± is the standard deviation over the seeds" in found.words
    assert "Accuracy, dirichlet 0.1" in found.words
    assert any(attributes.get("class", "") == "band s0" for tag, attributes in found.tags if tag == "polygon")


def test_a_thousand_clients(tmp_path: Path) -> None:
    found = page(write(sample.run(tmp_path / "run", clients=1000, rounds=3)))
    assert "malicious · 4" in found.words
    assert "most 3 · " in found.words
    assert page(write(sample.matrix(tmp_path / "matrix", clients=200, rounds=2))).count("svg") > 4


def test_a_long_wide_run_stays_small(tmp_path: Path) -> None:
    folder = sample.run(tmp_path / "run", clients=60, rounds=120)
    change(folder, warnings=["w" * 5000] * 200, title="t" * 3000)
    (folder / "scenario.toml").write_text("# " + "x" * 900_000, encoding="utf-8")
    images = [{"png": sample.png(n, 200), "label": "big"} for n in range(40)] * 8
    sample.write_json(folder / "artefacts" / "many.json", {"kind": "images", "title": "many", "images": images})
    assert "more not shown" in page(write(folder)).words


def test_a_matrix_of_four_hundred_cells_stays_small(tmp_path: Path) -> None:
    folder = sample.matrix(tmp_path / "matrix", rounds=2)
    raw = json.loads((folder / "summary.json").read_text("utf-8"))
    cells = [c | {"strategies": f"{c['strategies']}-{n}", "seed": seed} for c in raw["cells"] for n in range(12) for seed in range(4)]
    change(folder, cells=cells, axes={})
    found = page(write(folder))
    assert "432 cells" in found.words
    assert "32 more cells are in summary.json" in found.words


ODD: dict[str, dict[str, Any]] = {
    "nothing": {"metrics": {}, "threats": [], "assumed_malicious": None,
                 "federation": {}, "trust_mean": {}, "title": None, "strategy": None, "attack": None},
    "nulls": {"metrics": None, "threats": None, "engine": None,
               "federation": None, "trust_mean": None, "warnings": None, "seconds": None, "assumed_malicious": None},
    "not a number": {"metrics": {"accuracy": float("nan"), "loss": float("inf")}},
    "no trust": {"trust_mean": dict.fromkeys(map(str, range(20)))},
    "a count assumed": {"assumed_malicious": 5},
    "unknown metrics": {"metrics": {"plugin/psnr": 31.5, "exposure": 7, "note": "text", "flag": True}},
    "uneven counts": {"federation": {"labels": ["a"], "label_counts": [[1, 2, 3], [], [4]], "malicious": [99, -4]}},
    "a hundred classes": {"federation": {"labels": [f"class number {n}" for n in range(100)], "label_counts": [[1, 2, 3, 4] * 25] * 20}},
    "an absurd id": {"federation": {"malicious": [10**12]}, "trust_mean": {"999999999999": 0.5, "x": 0.5}},
    "odd threats": {"threats": [{}, {"rounds": "all", "params": None, "clients": None, "share": None, "knowledge": None, "paper": None}]},
    "a lone surrogate": {"title": "\ud800 \u202e\x00"},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_summaries(tmp_path: Path, name: str) -> None:
    folder = sample.run(tmp_path / "run", rounds=2)
    (folder / "summary.json").write_text(json.dumps(json.loads((folder / "summary.json").read_text("utf-8")) | ODD[name]), encoding="utf-8")
    page(write(folder))
    if name != "a lone surrogate":
        (folder / "clients.jsonl").unlink()
        (folder / "rounds.jsonl").write_text("", encoding="utf-8")
        page(write(folder))


def test_a_regression_run_has_only_a_loss(tmp_path: Path) -> None:
    folder = change(sample.run(tmp_path / "run", "none", "mean"), metrics={"loss": 0.31}, federation={"labels": [], "label_counts": []})
    sample.write_lines(folder / "rounds.jsonl", [{"round": n, "metrics": {"loss": 1 / (n + 1)}} for n in range(5)])
    found = page(write(folder))
    assert "Mean without an attack ends at a loss of 0.31" in found.words
    assert "Loss by round" in found.words


def test_the_command_allows_what_the_run_was_allowed(tmp_path: Path) -> None:
    folder = sample.run(tmp_path / "my run", rounds=1)
    sample.write_json(folder / "environment.json", {"plugins": ["mine.py:attack", 3], "data_root": "/data", "git": None})
    expected = "fedtrust run 'my run/scenario.toml' --allow-plugin mine.py:attack --data-root /data"
    assert expected in page(write(folder)).words


def test_one_client(tmp_path: Path) -> None:
    assert "1 clients" in page(write(sample.run(tmp_path / "run", "none", "mean", clients=1))).words


def test_a_killed_run_without_summary(tmp_path: Path) -> None:
    folder = sample.run(tmp_path / "run", rounds=3)
    (folder / "summary.json").unlink()
    sample.write_json(folder / "status.json", {"status": "running", "why": ""})
    with (folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 4, "metr')
    words = page(write(folder)).words
    assert "This run has not ended after round 3" in words
    assert "Accuracy: accuracy" not in words


def test_a_round_played_twice_counts_once(tmp_path: Path) -> None:
    folder = sample.run(tmp_path / "run", rounds=3)
    with (folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "metrics": {"accuracy": 0.123}}\n')
    assert "accuracy ends at 12.3 %" in page(write(folder)).words.lower()


DAMAGE: dict[str, tuple[str, str, str]] = {
    "no json": ("summary.json", "{", "not valid JSON"),
    "a list": ("summary.json", "[]", "JSON object"),
    "an unknown kind": ("summary.json", '{"kind": "zoo"}', "unknown kind"),
    "a wrong type": ("summary.json", '{"metrics": [1]}', "damaged at metrics"),
    "a torn line inside": ("rounds.jsonl", '{"round": 1}\n{"rou\n{"round": 3}\n', "rounds.jsonl:2"),
    "a line without round": ("rounds.jsonl", "{}\n", "damaged at round"),
    "a client without id": ("clients.jsonl", '{"round": 1}\n', "clients.jsonl:1"),
    "status": ("status.json", "nope", "not valid JSON"),
    "nested without end": ("environment.json", "[" * 100_000, "environment.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(tmp_path: Path, name: str) -> None:
    file, text, expected = DAMAGE[name]
    folder = sample.run(tmp_path / "run", rounds=1)
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        write(folder)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


def test_folders_that_are_none(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError):
            write(folder)
    (tmp_path / "summary.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="UTF-8"):
        write(tmp_path)
    with pytest.raises(InputError, match="nothing to compare"):
        compare([], tmp_path / "out.html")


def test_a_cell_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    sample.run(tmp_path / "other")
    folder = sample.matrix(tmp_path / "matrix", rounds=1)
    raw = json.loads((folder / "summary.json").read_text("utf-8"))
    change(folder, cells=[cell | {"cell": "../../other"} for cell in raw["cells"][:1]])
    assert "Triggered images" not in page(write(folder)).words


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    folder = sample.run(tmp_path / "run", rounds=1)
    with pytest.raises(RunError, match="cannot be written"):
        compare([folder], tmp_path / "no such folder" / "out.html")


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in _places(part, (*path, key)))]


def test_no_mutation_of_a_summary_escapes_as_a_traceback(tmp_path: Path) -> None:
    """Any value anywhere becomes any other: a page or one InputError, nothing else."""
    r = random.Random(5)
    odd = [
        None,
        "",
        "x",
        "<b>",
        -1,
        0,
        10**400,
        1e308,
        -1e308,
        5e-324,
        float("nan"),
        True,
        [],
        {},
        [[]],
        [None],
        {"a": None},
        [1, "2"],
        {"1": {}},
    ]
    folders = [sample.run(tmp_path / "run", rounds=2, faults=True), sample.matrix(tmp_path / "matrix", rounds=1)]
    good, lines = 0, list[str]()
    for turn in range(100):
        folder = folders[turn % 2]
        whole = json.loads((folder / "summary.json").read_text("utf-8"))
        broken = copy.deepcopy(whole)
        for _ in range(r.choice((1, 1, 2))):
            *way, last = r.choice([place for place in _places(broken) if place])
            target = broken
            for key in way:
                target = target[key]
            target[last] = r.choice(odd)
        (folder / "summary.json").write_text(json.dumps(broken), encoding="utf-8")
        try:
            write(folder)
            good += 1
        except InputError as error:
            lines.append(str(error))
        (folder / "summary.json").write_text(json.dumps(whole), encoding="utf-8")
    assert good > 50
    assert lines
    assert not any("\n" in line for line in lines)


def test_comparison_of_runs(tmp_path: Path) -> None:
    folders = [
        sample.run(tmp_path / name, attack, rule, rounds=3)
        for name, attack, rule in (("calm", "none", "mean"), ("hit", "label flip", "mean"))
    ]
    path = folders[1] / "scenario.toml"
    path.write_text(path.read_text("utf-8").replace("lr = 0.05", "lr = 0.1"), encoding="utf-8")
    found = page(compare(folders, tmp_path / "out.html"))
    assert "Mean lost to label flip." in found.words
    assert "The runs differ in other things too (clients.train.lr)" in found.words
    assert {"numbers", "curves", "differences", "repeat"} <= found.ids()


def test_comparison_with_a_matrix(tmp_path: Path, matrix: Path) -> None:
    folder = sample.run(tmp_path / "matrix", rounds=3)
    found = page(compare([folder, matrix], tmp_path / "out.html"))
    assert f"{matrix.parent.name}/matrix: Median and multi-krum held" in found.words
    assert {"heat", "numbers", "curves"} <= found.ids()
