"""What a scenario file says about its matrix: profiles, shares, what defenders are told, refused cells, claims."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fedtrust import scenario, scenario_profiles
from fedtrust.cli import main
from fedtrust.errors import InputError
from fedtrust.scenario import Cell, Scenario, load, parse
from fedtrust.scenario_io import Document

BASE = """\
title = "whole"
rounds = 3
model = { name = "mlp", hidden = [16] }
[data]
source = { name = "digits", limit = 300 }
[clients]
count = 10
train = { lr = 0.1, momentum = 0.9 }
[strategy]
assumed_malicious = 0.1
[sweep]
seeds = [1, 2]
shares = [0.1, 0.2, 0.4]
[sweep.attackers]
none = []
"sign flip" = [{ behaviour = "sign-flip" }]
[sweep.strategies]
mean = "mean"
krum = "krum"
bulyan = "bulyan"
[sweep.partitions]
IID = "iid"
skewed = { kind = "dirichlet", alpha = 0.5 }
[[claims]]
text = "krum copes"
strategies = "krum"
partitions = ["IID", "skewed"]
shares = [0.1, 0.2]
expect = "copes"
[[claims]]
text = "on skewed data, too"
partitions = "skewed"
expect = "copes"
[profiles.small]
rounds = 1
model = { name = "logistic" }
clients.train.lr = 0.5
sweep.partitions = ["IID"]
sweep.seeds = [7]
sweep.shares = [0.2]
[profiles.more]
sweep.strategies.krum = { assumed_malicious = 0.2 }
sweep.strategies.trimmed = "trimmed-mean"
[profiles.odd]
rounds = 0
"""

Load = Callable[..., Scenario]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load the file above, changed by replacing text in it."""
    monkeypatch.chdir(tmp_path)

    def loaded(*overrides: str, **changes: str) -> Scenario:
        text = BASE
        for old, new in zip(list(changes.values())[::2], list(changes.values())[1::2], strict=True):
            assert old in text
            text = text.replace(old, new)
        Path("s.toml").write_text(text, encoding="utf-8")
        return load("s.toml", overrides)

    return loaded


# ------------------------------------------------------------------------------------------------------------------ profiles


def test_without_a_choice_the_profiles_change_nothing(made: Load) -> None:
    whole = made()
    assert (whole.rounds, whole.model.name, list(whole.axes()["partitions"])) == (3, "mlp", ["IID", "skewed"])
    assert "profile" not in whole.resolved_toml()


def test_a_profile_is_laid_over_the_document(made: Load) -> None:
    small = made("profile=small")
    assert (small.rounds, small.title) == (1, "whole")
    assert small.model.name == "logistic", "a component takes the place of the other, with its parameters"
    assert (small.clients.train.lr, small.clients.train.optimiser_params["momentum"]) == (0.5, 0.9), "a table is laid over key by key"
    assert list(small.axes()["partitions"]) == ["IID"], "a list of labels picks"
    assert list(small.axes()["seeds"]) == [7]
    assert "profile" not in small.resolved_toml()
    Path("again.toml").write_text(small.resolved_toml(), encoding="utf-8")
    assert load("again.toml") == small


def test_a_short_form_opens_up_and_labels_are_added(made: Load) -> None:
    more = made("profile=more")
    strategies = more.axes()["strategies"]
    assert list(strategies) == ["mean", "krum", "bulyan", "trimmed"]
    assert (strategies["krum"].aggregator.name, strategies["krum"].assumed_malicious) == ("krum", 0.2)
    assert strategies["mean"].assumed_malicious == 0.1


def test_claims_are_narrowed_to_what_the_profile_leaves(made: Load) -> None:
    (claim,) = made("profile=small").claims  # the one about skewed data only is gone
    assert (claim.text, claim.partitions, claim.shares) == ("krum copes", ["IID"], [0.2])
    assert len(made("profile=more").claims) == 2


def test_the_user_has_the_last_word(made: Load) -> None:
    assert made("rounds=5", "profile=small").rounds == 5
    assert made("profile=small", "profiles.small.rounds=4").rounds == 4
    assert made("profile=more", "profile=small").rounds == 1
    assert made(a="rounds = 3", b='rounds = 3\nprofile = "small"').rounds == 1


def test_a_document_in_python_may_have_a_profile(made: Load) -> None:
    document = tomllib.loads(BASE)
    assert parse({**document, "profile": "small"}).rounds == 1
    assert document == tomllib.loads(BASE), "and is not changed"
    assert scenario_profiles.names(document) == ["small", "more", "odd"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["profile=smal"], ["--set profile", "unknown profile 'smal'", "more, odd, small", "did you mean 'small'?"]),
        (["profile=3"], ["--set profile", "should be the name"]),
        (["profile=odd"], ["s.toml:", "rounds", "greater than or equal to 1"]),
        (["profile=small", "profiles.small.rounds=0"], ["--set profiles.small.rounds", "greater than or equal to 1"]),
        (["profile=small", "profiles.small.sweep.partitions=['iid']"], ["sweep.partitions", "there is no 'iid'", "IID"]),
        (["profiles.small.ruonds=3"], ["profiles.small.ruonds", "unknown key", "did you mean 'rounds'?"]),
        (["profiles.small=3"], ["profiles.small", "should be a table"]),
        (["profiles=[1]"], ["profiles", "a table for each profile"]),
    ],
)
def test_wrong_profiles_are_one_line(made: Load, overrides: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    made()
    assert main(["run", "s.toml", *[word for text in overrides for word in ("--set", text)]]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said
    assert not Path("runs").exists()


def test_a_mistake_in_a_profile_is_placed_at_its_line(made: Load) -> None:
    with pytest.raises(InputError) as caught:
        made("profile=odd")
    line = BASE.split("\n").index("rounds = 0") + 1
    assert caught.value.where == f"s.toml:{line}: rounds"


def test_a_scenario_without_profiles_says_so(made: Load) -> None:
    with pytest.raises(InputError, match="the scenario has none"):
        parse({**{k: v for k, v in tomllib.loads(BASE).items() if k != "profiles"}, "profile": "small"})


def test_check_counts_the_runs_of_each_profile(made: Load, capsys: pytest.CaptureFixture[str]) -> None:
    made(a="[profiles.odd]\nrounds = 0\n", b="")
    Path("s.toml").write_text(BASE.replace("bulyan = ", "median = ").replace('"bulyan"', '"median"').split("[profiles.odd]")[0])
    assert main(["check", "s.toml", "--set", "sweep.shares=[0.1, 0.2]"]) == 0
    said = capsys.readouterr().out
    assert "profile 'small': 9 runs of 1 rounds" in said  # two shares of the user's: (none + 2 attacks) × 3 rules
    assert main(["check", "s.toml", "--set", "profiles.small.rounds=0"]) == 2


def test_the_schema_knows_profiles_claims_and_shares(made: Load) -> None:
    validator = jsonschema.Draft202012Validator(scenario.schema())
    validator.validate(tomllib.loads(BASE))
    validator.validate(tomllib.loads(made("profile=small", "profiles.small.sweep.strategies=['mean', 'krum']").resolved_toml()))
    for old, new in (
        ("[profiles.small]\nrounds", "[profiles.small]\nruonds"),
        ('expect = "copes"', 'expect = "cope"'),
        ("[0.1, 0.2, 0.4]", "[0.0]"),
    ):
        assert not validator.is_valid(tomllib.loads(BASE.replace(old, new))), new
    assert json.dumps(scenario.schema())


def test_a_document_keeps_its_lines(made: Load) -> None:
    made()
    document = Document.read(Path("s.toml"))
    left = scenario_profiles.lay(document, ["profile=small", "rounds=9"])
    assert left == ["rounds=9"]
    assert document.data["rounds"] == 1
    assert document.lines["rounds",] == BASE.split("\n").index("rounds = 1") + 1
    assert document.lines["title",] == 1


# -------------------------------------------------------------------------------------------------------------------- shares


def labels(cells: list[Cell]) -> list[tuple[str, float | None]]:
    return list(dict.fromkeys((cell.labels["attack"], cell.labels["share"]) for cell in cells))


def test_every_attack_is_played_with_every_share_and_the_clean_run_once(made: Load) -> None:
    swept = made("sweep.infeasible=skip", a="bulyan = ", b="median = ", c='"bulyan"', d='"median"')
    cells = swept.cells()
    assert labels(cells) == [("none", None), ("sign flip", 0.1), ("sign flip", 0.2), ("sign flip", 0.4)]
    assert len(cells) == 4 * 3 * 2 * 2
    assert [cell.name for cell in cells if cell.labels["seed"] == 1 and cell.labels["partitions"] == "IID"][:4:3] == [
        "none__mean__iid__seed1",
        "sign-flip-10__mean__iid__seed1",
    ]
    assert {tuple((g.share, g.size(10)) for g in cell.scenario.attackers) for cell in cells} == {(), ((0.1, 1),), ((0.2, 2),), ((0.4, 4),)}
    assert all(cell.scenario.sweep is None and not cell.scenario.claims for cell in cells)
    assert list(swept.axes()["attackers"]) == ["none", "sign flip, 10 %", "sign flip, 20 %", "sign flip, 40 %"]
    for cell in cells[::7]:
        Path("cell.toml").write_text(cell.scenario.resolved_toml(), encoding="utf-8")
        assert load("cell.toml") == cell.scenario


def groups(made: Load, text: str) -> list[list[float | int | None]]:
    swept = made("sweep.strategies=['mean']", "sweep.shares=[0.2, 0.4]", "claims=[]", a='[{ behaviour = "sign-flip" }]', b=text)
    return [[g.share if g.count is None else g.count for g in attack.groups] for attack in swept.attacks().values() if attack.groups]


def test_several_groups_divide_the_share(made: Load) -> None:
    pair = '[{ behaviour = "sign-flip" }, { behaviour = "label-flip" }]'
    assert groups(made, pair) == [[0.1, 0.1], [0.2, 0.2]]
    uneven = '[{ behaviour = "sign-flip", share = 0.3 }, { behaviour = "label-flip", share = 0.1 }]'
    assert groups(made, uneven) == [pytest.approx([0.15, 0.05]), pytest.approx([0.3, 0.1])]
    counted = '[{ behaviour = "sign-flip" }, { behaviour = "label-flip", count = 2 }]'
    assert groups(made, counted) == [[0.2, 2], [0.4, 2]]


def test_shares_of_a_scenario_without_an_attackers_axis() -> None:
    document = {"title": "t", "rounds": 1, "data": {"source": "digits"}, "model": "logistic", "clients": {"count": 10}}
    swept = parse({**document, "attackers": [{"behaviour": "sign-flip"}], "sweep": {"shares": [0.1, 0.3]}})
    assert [cell.name for cell in swept.cells()] == ["sign-flip-10__mean__iid__seed0", "sign-flip-30__mean__iid__seed0"]


SHARES: list[tuple[str, str, list[str]]] = [
    ("shares = [0.1, 0.2, 0.4]", "shares = [0.1, 0.1]", ["sweep.shares", "share 0.1 stands there twice"]),
    ("shares = [0.1, 0.2, 0.4]", "shares = [0.1, 1.0]", ["sweep.shares", "less than 1"]),
    ("shares = [0.1, 0.2, 0.4]", "shares = [0.1, 0.01]", ["sweep.shares[1]", "'sign flip'", "0.01 of 10 clients is nobody"]),
    ("{ behaviour = \"sign-flip\" }", "{ behaviour = \"sign-flip\", count = 1 }", ["sweep.attackers.sign flip", "nothing to set"]),
    (
        '{ behaviour = "sign-flip" }',
        '{ behaviour = "sign-flip" }, { behaviour = "label-flip", share = 0.1 }',
        ["either every group has a share"],
    ),
    ("\"sign flip\" = [{ behaviour = \"sign-flip\" }]", "", ["sweep.shares", "no attackers"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), SHARES)
def test_wrong_shares(made: Load, old: str, new: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        made(a=old, b=new)
    for word in words:
        assert word in str(caught.value)


# --------------------------------------------------------------------------------------------- what defenders assume, refused cells


def assumed(cells: list[Cell], strategy: str) -> dict[float | None, float]:
    return {c.labels["share"]: c.scenario.strategy.assumed_malicious for c in cells if c.labels["strategies"] == strategy}


def test_defenders_assume_what_is_written_what_is_true_or_what_they_can_bear(made: Load) -> None:
    cells = made().cells()
    assert assumed(cells, "krum") == {None: 0.1, 0.1: 0.1, 0.2: 0.1, 0.4: 0.1}
    assert "assumed_malicious" not in cells[0].labels
    cells = made("sweep.assumed=truth", "sweep.infeasible=skip").cells()
    assert assumed(cells, "krum") == {None: 0.1, 0.1: 0.1, 0.2: 0.2, 0.4: 0.4}
    cells = made("sweep.assumed=bearable").cells()
    assert assumed(cells, "krum") == {None: 0.1, 0.1: 0.1, 0.2: 0.2, 0.4: 3}, "n ≥ 2f + 3"
    assert assumed(cells, "bulyan") == {None: 0.1, 0.1: 0.1, 0.2: 1, 0.4: 1}, "n ≥ 4f + 3"
    assert assumed(cells, "mean") == {None: 0.1, 0.1: 0.1, 0.2: 0.2, 0.4: 0.4}
    assert [cell.labels["assumed_malicious"] for cell in cells[-1:]] == [1]
    assert not any(cell.refused for cell in cells)


def test_a_rule_is_told_how_many_there_are_and_not_what_the_share_says(made: Load) -> None:
    cells = made("sweep.assumed=truth", "sweep.shares=[0.26]", "claims=[]", "sweep.strategies=['mean']").cells()
    assert assumed(cells, "mean") == {None: 0.1, 0.26: 0.3}, "0.26 of 10 clients are 3"


def test_a_cell_that_cannot_be_is_refused_with_the_whole_or_skipped(made: Load) -> None:
    with pytest.raises(InputError) as caught:
        made("sweep.assumed=truth")
    for word in ("sweep.strategies.bulyan.aggregator", "20 % sign flip", "n ≥ 4f + 3", "sweep.infeasible = 'skip'"):
        assert word in str(caught.value)
    cells = made("sweep.assumed=truth", "sweep.infeasible=skip").cells()
    refused = {(c.labels["strategies"], c.labels["share"]): c.refused for c in cells if c.refused}
    assert list(refused) == [("bulyan", 0.2), ("krum", 0.4), ("bulyan", 0.4)]
    assert "n = 10 and the defender assumes f = 4" in refused["krum", 0.4]


def test_a_rule_that_is_written_wrong_is_skipped_too(made: Load) -> None:
    wrong = {"a": 'bulyan = "bulyan"', "b": 'bulyan = { aggregator = "bulyan", assumed_malicious = 3 }'}
    with pytest.raises(InputError, match="n ≥ 4f"):
        made(**wrong)
    cells = made("sweep.infeasible=skip", **wrong).cells()
    assert {c.labels["strategies"] for c in cells if c.refused} == {"bulyan"}
    with pytest.raises(InputError, match="unknown aggregator 'bulyann'"):
        made("sweep.infeasible=skip", a='bulyan = "bulyan"', b='bulyan = "bulyann"')


def test_something_has_to_be_left_to_play(made: Load) -> None:
    with pytest.raises(InputError, match=r"every cell would be refused.*n ≥ 4f"):
        made("sweep.infeasible=skip", "strategy.assumed_malicious=4", "sweep.strategies=['bulyan']", "claims=[]")


# -------------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("claims[0].strategies='krun'", ["claims[0].strategies", "no 'krun'", "did you mean 'krum'?"]),
        ("claims[0].attackers=['sign flip, 10 %']", ["claims[0].attackers", "none, sign flip"]),
        ("claims[0].partitions=['iid']", ["claims[0].partitions", "did you mean 'IID'?"]),
        ("claims[0].baseline=median", ["claims[0].baseline", "no 'median'"]),
        ("claims[0].shares=[0.3]", ["claims[0].shares", "0.3 is none of sweep.shares (0.1, 0.2, 0.4)"]),
        ("claims[0].below=0.1", ["claims[0].below", "none of sweep.shares is below 0.1"]),
        ("claims[0].expect=cope", ["claims[0].expect", "'copes', 'fails'", "did you mean 'copes'?"]),
        ("claims[0].expect={metric='accuracy'}", ["claims[0].expect", "at_least, at_most or between"]),
        ("claims[0].expect={metric='accuracy', at_least=0.9, at_most=0.8}", ["at_least should not be above at_most"]),
        ("claims[0].expect={metric='accuracy', between=[0.9]}", ["[least, most]"]),
        ("claims[0].expect={metrik='accuracy', at_least=0.9}", ["claims[0].expect.metrik", "did you mean 'metric'?"]),
        ("claims[0].text=''", ["claims[0].text", "at least 1 character"]),
        ("claims[0].losss=0.2", ["claims[0].losss", "did you mean 'loss'?"]),
    ],
)
def test_wrong_claims(made: Load, override: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        made(override)
    for word in words:
        assert word in str(caught.value)


def test_claims_need_a_matrix_and_a_clean_run(made: Load) -> None:
    document = tomllib.loads(BASE)
    del document["sweep"], document["profiles"]
    with pytest.raises(InputError, match="no \\[sweep\\]"):
        parse(document)
    with pytest.raises(InputError, match="needs a run without an attack"):
        made(a="none = []\n", b="")
    with pytest.raises(InputError, match="sweeps no shares"):
        made(a="shares = [0.1, 0.2, 0.4]\n", b="", c='"sign-flip" }', d='"sign-flip", share = 0.2 }')


def test_the_lecture_table_claims_what_the_lecture_does() -> None:
    """Of seven rules, only FoolsGold is said to cope with non-IID data, and only RFA with model poisoning."""
    table = load(Path(__file__).parent.parent / "scenarios" / "lecture-table.toml")
    said = {(claim.column, rule): claim.expect.outcome for claim in table.claims for rule in claim.strategies}
    assert len(said) == 5 * 7
    assert [rule for (column, rule), outcome in said.items() if column == "non-IID data" and outcome == "copes"] == ["FoolsGold"]
    assert [rule for (column, rule), outcome in said.items() if column == "model poisoning" and outcome == "copes"] == ["RFA"]
    assert len(table.cells()) == 8 * 3 * 3 * (1 + 4 * 4)
    assert not any(cell.refused for cell in table.cells())


def test_each_strategy_may_have_clients_minimise_a_loss_of_its_own(tmp_path: Path) -> None:
    """The cells differ in the loss and in nothing else; what is written out reads back the same."""
    losses = {"plain": {}, "GCE": {"loss": {"name": "gce", "q": 0.3}}, "SCE": {"loss": "sce"}}
    given = {"title": "t", "rounds": 1, "model": "logistic", "clients": {"count": 4}, "data": {"source": {"name": "digits", "limit": 300}}}
    made = parse({**given, "sweep": {"strategies": losses}})
    cells = {cell.labels["strategies"]: cell.scenario for cell in made.cells()}
    found = {label: cell.clients.train.loss for label, cell in cells.items()}
    assert {label: loss.name for label, loss in found.items() if loss} == {"plain": "cross-entropy", "GCE": "gce", "SCE": "sce"}
    assert found["GCE"] is not None
    assert found["GCE"].params["q"] == 0.3
    assert [cell.strategy.loss for cell in cells.values()] == [None, None, None]
    alone = parse({**given, "clients": {"count": 4, "train": {"loss": {"name": "gce", "q": 0.3}}}})
    assert cells["GCE"].model_dump() == alone.model_dump()
    path = tmp_path / "resolved.toml"
    path.write_text(made.resolved_toml())
    assert load(path) == made


@pytest.mark.parametrize(
    ("changes", "where", "said"),
    [
        ({"sweep": {"strategies": {"a": {"loss": "gcee"}}}}, "sweep.strategies.a.loss", "did you mean 'gce'"),
        ({"sweep": {"strategies": {"a": {"loss": {"name": "gce", "p": 1}}}}}, "sweep.strategies.a.loss", "has no parameter 'p'"),
        ({"strategy": {"loss": "gce"}}, "strategy.loss", "here set clients.train.loss"),
    ],
)
def test_a_loss_of_a_strategy_that_cannot_be_is_refused(changes: dict[str, Any], where: str, said: str) -> None:
    given = {"title": "t", "rounds": 1, "model": "logistic", "clients": {"count": 4}, "data": {"source": {"name": "digits", "limit": 300}}}
    with pytest.raises(InputError, match=re.escape(said)) as refused:
        parse({**given, **changes})
    assert refused.value.where.startswith(where)


def test_a_loss_of_a_strategy_must_suit_the_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = BASE.replace('mean = "mean"', 'mean = { loss = "gce" }').replace('{ name = "digits", limit = 300 }', '"diabetes"')
    path = tmp_path / "s.toml"
    path.write_text(text)
    assert main(["check", str(path)]) == 2
    assert "sweep.strategies.mean.loss" in capsys.readouterr().err
