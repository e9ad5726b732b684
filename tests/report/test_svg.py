"""The drawing code, where a number can be checked."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from fedtrust.report.load import Round, Threat
from fedtrust.report.parts import linked, trouble, window
from fedtrust.report.svg import Axes, Series, el, line_chart, ticks


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 12, True, [0, 5, 10]),
        (0, 3, True, [0, 1, 2, 3]),
        (0.31, 0.94, False, [0.4, 0.6, 0.8]),
        (-40, 60, False, [-40, -20, 0, 20, 40, 60]),
        (5, 5, False, [5]),
    ],
)
def test_ticks(low: float, high: float, whole: bool, expected: list[float]) -> None:
    assert ticks(low, high, 5, whole=whole) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "shown"), [("centered-clipping", "centered-clipping"), ("norm-clip + centered-clipping", "norm-clip + cente…")]
)
def test_the_name_at_the_end_of_a_line_fits_beside_the_plot(name: str, shown: str) -> None:
    chart = line_chart("t", [Series(name, [(0, 0.0), (1, 0.5)]), Series("mean", [(0, 0.1), (1, 0.9)], 1)], Axes("Round", "Accuracy"))
    labels = re.findall(r'<text x="([\d.]+)" y="[\d.]+" class="label"><title>[^<]*</title>([^<]+)</text>', chart)
    assert {words for _, words in labels} == {shown, "mean"}
    assert all(float(x) + 6 * len(words) <= 340 for x, words in labels)


def test_who_was_dropped_is_listed_in_the_order_of_the_clients() -> None:
    rounds = [Round(round=1, faults={"10": "late", "2": "late"}), Round(round=2, faults={"7": "late"})]
    assert trouble(rounds).dropped[0]["clients"] == "2 (round 1), 7 (round 2), 10 (round 1)"


def test_attributes_and_text_are_escaped() -> None:
    assert el("text", '<b>&"', x=1.0, cls='"><x') == '<text x="1" class="&#34;&gt;&lt;x">&lt;b&gt;&amp;&#34;</text>'


def test_a_higher_value_lies_higher() -> None:
    chart = line_chart("t", [Series("a", [(0, 0.0), (1, 0.5), (2, 1.0)])], Axes("Round", "Accuracy", percent=True))
    points = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', chart).group(1).split()]  # type: ignore[union-attr]
    assert points[0][1] > points[1][1] > points[2][1]
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2)
    assert "a, round 1: 50.0 %" in chart
    assert "Accuracy (%)" in chart


def test_labels_do_not_overlap() -> None:
    chart = line_chart("t", [Series(f"rule{n}", [(0, 0.1), (1, 0.95)], n) for n in range(12)], Axes("Round", "Accuracy", percent=True))
    places = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="label"', chart))
    assert len(places) == 12
    assert min(b - a for a, b in pairwise(places)) > 11


def test_lines_differ_in_more_than_colour() -> None:
    chart = line_chart("t", [Series(f"rule{n}", [(0, 0.1), (1, n / 20)], n) for n in range(12)], Axes("Round", "Loss"))
    seen = {(cls, dash) for cls, dash in re.findall(r'class="line (s\d)"(?: stroke-dasharray="([^"]+)")?', chart)}
    assert len(seen) == 12


def test_a_long_line_is_thinned() -> None:
    chart = line_chart("t", [Series("a", [(n, n / 5000) for n in range(5000)])], Axes("Round", "Accuracy", percent=True))
    assert len(chart) < 6000
    assert "a ends at 100.0 %" in chart


def test_nothing_to_draw() -> None:
    assert "No values were recorded" in line_chart("t", [Series("a", [])], Axes("Round", "Loss"))


def test_the_attack_window_is_shaded_only_where_it_says_something() -> None:
    series = [Series("a", [(n, 0.5) for n in range(21)])]
    assert "attack active" in line_chart("t", series, Axes("Round", "Accuracy", True, window([Threat(rounds=[5, 20])])))
    assert "attack active" not in line_chart("t", series, Axes("Round", "Accuracy", True, window([Threat(rounds=[1, 20])])))
    assert window([Threat(rounds=[3, 9]), Threat(rounds=[5, 12]), Threat(rounds=None)]) == (3, 12)


def test_papers_become_links() -> None:
    text = linked("A <b> 2020, arXiv:2007.08432, doi:10.1/x(y and https://a.org/?q=1&r=2")
    assert '<a href="https://arxiv.org/abs/2007.08432" rel="noreferrer">arXiv:2007.08432</a>' in text
    assert '<a href="https://doi.org/10.1/x(y" rel="noreferrer">' in text
    assert 'href="https://a.org/?q=1&amp;r=2"' in text
    assert "&lt;b&gt;" in text


def test_faults_are_gathered_by_reason() -> None:
    rounds = [Round(round=n, faults={"2": "NaN"} | ({"4": "late"} if n == 2 else {}), counted=n != 3) for n in range(1, 5)]
    found = trouble(rounds)
    assert [(entry["reason"], entry["clients"], entry["times"]) for entry in found.dropped] == [
        ("NaN", "2 (rounds 1–4)", 4),
        ("late", "4 (round 2)", 1),
    ]
    assert found.missed == ["round 3"]
