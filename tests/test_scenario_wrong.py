"""Wrong scenario files: each gives one line on stderr that says where and what, exit 2, and leaves nothing behind."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path

import pytest

from fedtrust.cli import main
from fedtrust.errors import InputError
from fedtrust.scenario import Scenario, load, parse

GOOD = """\
title = "a test"
rounds = 3
seed = 7

[data]
source = { name = "digits", limit = 240 }
partition = { kind = "dirichlet", alpha = 0.5 }

[model]
name = "logistic"

[clients]
count = 10
train = { optimiser = "sgd", lr = 0.1, momentum = 0.9 }

[[attackers]]
behaviour = "label-flip"
share = 0.2
params = { mode = "mirror" }

[strategy]
assumed_malicious = 0.2
aggregator = "median"
"""

MANY = f"[sweep]\nseeds = {list(range(101))}\n[sweep.strategies]\n" + "".join(f"s{i} = 'mean'\n" for i in range(100))

FISHING = "[malicious_server]\nsender = 'fishing'\n"

# probes that cannot find what they look for, and what the one line has to say
PROBES: list[tuple[str, list[str]]] = [
    ("[[probes]]\nname = 'r-gap'", ["s.toml:21", "probes[0]", "'r-gap' cannot work here", "lenet"]),
    ("[[probes]]\nname = 'robbing-the-fed-readout'", ["probes[0]", "nobody did", 'sender = "robbing-the-fed"']),
    ("[[probes]]\nname = 'fishing-readout'\ntarget = 1", ["probes[0]", 'sender = "fishing"']),
    (
        FISHING + "params = { target = 2 }\n[[probes]]\nname = 'fishing-readout'\ntarget = 1",
        ["probes[0]", "looks for class 1", "fishes for class 2"],
    ),
    (
        FISHING + "rounds = [2, 3]\nparams = { target = 1 }\n[[probes]]\nname = 'fishing-readout'\ntarget = 1",
        ["probes[0]", "acts in round 1", "rounds 2 to 3"],
    ),
    ("[[probes]]\nname = 'property-inference'", ["probes[0]", "'thick'", "data.feature_skew"]),
    ("[[probes]]\nname = 'knockoff'\nqueries = [181]", ["probes[0]", "181 samples of its own", "has 180"]),
    ("[release]\nqueries = 20\n[[probes]]\nname = 'knockoff'", ["probes[0]", "100 queries", "may ask 20"]),
    ("[release]\nqueries = 20\n[[probes]]\nname = 'equation-solving'", ["probes[0]", "65 queries", "may ask 20"]),
    ("[[probes]]\nname = 'jacobian-augmentation'\nseeds = 181\nqueries = 400", ["probes[0]", "181 samples of its own", "has 180"]),
    ("[[probes]]\nname = 'jacobian-augmentation'\nseeds = 30\nqueries = 20", ["probes[0]", "begins with 30", "about 20 at most"]),
    ("[release]\nqueries = 300\n[[probes]]\nname = 'loss-threshold'", ["probes[0]", "asks about at least 314 samples", "may ask 300"]),
    ("[release]\nqueries = 400\n[[probes]]\nname = 'lira'", ["probes[0]", "asks about at least 494 samples", "may ask 400"]),
    ("[release]\nqueries = 400\n[[probes]]\nname = 'rmia'", ["probes[0]", "asks about at least 494 samples", "may ask 400"]),
    ("[[probes]]\nname = 'dpa-certificate'", ["probes[0]", "no votes", "'ensemble'"]),
]

# what is replaced in GOOD, by what, and what the one line has to say
EDITS: list[tuple[str, str, list[str]]] = [
    # the file as TOML
    ("rounds = 3", "rounds = ", ["s.toml:2", "not TOML"]),
    ("rounds = 3", "rounds = 3\nrounds = 4", ["s.toml:3", "'rounds'", "twice"]),
    ("[model]", "[data]\n[model]", ["s.toml:9", "[data]", "twice"]),
    ('title = "a test"', 'title = "a test', ["s.toml:1", "not TOML"]),
    ("seed = 7", "seed = " + "9" * 5000, ["not TOML"]),
    ("seed = 7", "seed = " + "[" * 40 + "]" * 40, ["s.toml:3", "nested deeper than 32"]),
    ("seed = 7", "seed = " + "[" * 5000, ["s.toml:3", "nested deeper than 32"]),
    ("seed = 7", "seed = " + "{a=" * 40 + "1" + "}" * 40, ["nested deeper than 32"]),
    ("seed = 7", ".".join("a" * 40) + " = 7", ["s.toml:3", "nested deeper than 32"]),
    ("[model]", "[" + ".".join("a" * 40) + "]\n[model]", ["s.toml:9", "nested deeper than 32"]),
    # keys
    ("rounds = 3", "rounds = 3\nround = 4", ["s.toml:3", "round:", "unknown key 'round'", "did you mean 'rounds'"]),
    ("[model]", "[modle]", ["unknown key 'modle'", "did you mean 'model'"]),
    ("count = 10", "cuont = 10", ["s.toml:13", "clients.cuont", "keys: behaviour, count", "did you mean 'count'"]),
    ("[[attackers]]", "[clients.system]\ndropuot = 0.1\n[[attackers]]", ["s.toml:17", "clients.system.dropuot", "did you mean 'dropout'"]),
    ("[[attackers]]", "[clients.system]\ndropout = 1.5\n[[attackers]]", ["s.toml:17", "clients.system.dropout", "less than 1 (got 1.5)"]),
    ("[[attackers]]", "[clients.system]\ndeadline = 9\n[[attackers]]", ["s.toml:16", "clients.system", "deadline needs `speed`"]),
    ("share = 0.2", "share = 0.2\ntarget = 3", ["s.toml:19", "attackers[0].target", "go into `params`"]),
    ('"median"', '"median"\naggregators = "mean"', ["strategy.aggregators", "did you mean 'aggregator'"]),
    ('"a test"', '"a test"\n"odd\\u000akey" = 1', ["unknown key", "keys: "]),
    ("rounds = 3\n", "", ["s.toml", "rounds", "is required"]),
    ('name = "logistic"', "", ["s.toml:9", "model", "`name`"]),
    ("count = 10\n", "", ["s.toml:12", "clients.count", "is required"]),
    # types and bounds
    ('title = "a test"', "title = 3", ["s.toml:1", "title", "valid string", "got 3"]),
    ('title = "a test"', 'title = ""', ["title", "at least 1 character"]),
    ("rounds = 3", "rounds = 0", ["s.toml:2", "rounds", "greater than or equal to 1", "got 0"]),
    ("rounds = 3", "rounds = 3.0", ["rounds", "valid integer", "got 3.0"]),
    ("rounds = 3", "rounds = true", ["rounds", "valid integer", "got True"]),
    ("rounds = 3", 'rounds = "3"', ["rounds", "valid integer", "got '3'"]),
    ("seed = 7", "seed = -1", ["seed", "greater than or equal to 0"]),
    ("seed = 7", "seed = 2024-01-01", ["seed", "valid integer"]),
    ("lr = 0.1", "lr = nan", ["s.toml:14", "clients.train.lr", "finite", "nan"]),
    ("lr = 0.1", "lr = inf", ["clients.train.lr", "finite"]),
    ("alpha = 0.5", "alpha = -inf", ["data.partition.alpha", "finite"]),
    ("lr = 0.1", "lr = 0", ["clients.train.lr", "greater than 0"]),
    ("lr = 0.1", "batch_size = 0", ["clients.train.batch_size", "greater than or equal to 1"]),
    ("count = 10", "count = 10\nquorum = 1.5", ["clients.quorum", "less than or equal to 1", "got 1.5"]),
    ("count = 10", "count = 10\nper_round = 11", ["s.toml:14", "clients.per_round", "at most clients.count = 10", "got 11"]),
    ("[strategy]", "[engine]\npath = 'fast'\n[strategy]", ["engine.path", "'auto', 'loop', 'vmap' or 'fused'", "got 'fast'"]),
    ('name = "logistic"', "name = 3", ["s.toml:10", "model.name", "valid string", "got 3"]),
    ("[data]", "attackers = 3\n[data]", ["attackers"]),
    # components and their parameters
    ('name = "logistic"', 'name = "logistc"', ["model", "unknown model 'logistc'", "known: ", "did you mean 'logistic'"]),
    ('name = "logistic"', 'name = "mlp"\nhiden = [3]', ["s.toml:11", "model.hiden", "activation, hidden", "did you mean 'hidden'"]),
    ('name = "logistic"', 'name = "mlp"\nhidden = [0]', ["model.hidden", "greater than or equal to 1"]),
    ('"digits"', '"digit"', ["data.source", "unknown source 'digit'", "did you mean 'digits'"]),
    ("limit = 240", "limit = 0", ["data.source.limit", "greater than or equal to 1"]),
    ('"dirichlet"', '"dirichlett"', ["data.partition", "unknown partition", "did you mean 'dirichlet'"]),
    ("alpha", "alfa", ["data.partition.alfa", "has no parameter 'alfa'", "did you mean 'alpha'"]),
    ("[model]", 'feature_skew = "blur"\n[model]', ["data.feature_skew", "unknown feature-skew 'blur'"]),
    ("momentum", "momentun", ["clients.train.momentun", "optimiser 'sgd'", "did you mean 'momentum'"]),
    ('"sgd"', '"sgdd"', ["clients.train.optimiser", "unknown optimiser", "did you mean 'sgd'"]),
    ("lr = 0.1", 'loss = "cross-entrpy"', ["clients.train.loss", "did you mean 'cross-entropy'"]),
    ('"median"', '"medain"', ["strategy.aggregator", "unknown aggregator", "did you mean 'median'"]),
    ('"median"', '{ name = "median", f = 2 }', ["strategy.aggregator.f", "no parameter 'f'", "parameters: none"]),
    ('"median"', '"median"\nfilters = ["norm-clp"]', ["strategy.filters[0]", "did you mean 'norm-clip'"]),
    ('"median"', '"median"\nsteps = [{ name = "fedadam", beta_1 = 2 }]', ["strategy.steps[0].beta_1"]),
    ('"median"', '"median"\n[[probes]]\nname = "acuracy"', ["probes[0]", "did you mean 'accuracy'"]),
    ('"median"', '"median"\n[[probes]]\nname = "loss"\n[[probes]]\nname = "loss"', ["s.toml:26", "probes[1]", "twice"]),
    ("[strategy]", "[[attackers]]\nbehaviour = 'honest'\ncount = 1\n[strategy]", ["attackers[1].behaviour", "is honest"]),
    ("count = 10", "count = 10\nbehaviour = 'label-flip'", ["clients.behaviour", "is malicious", "[[attackers]]"]),
    # attackers
    ("[strategy]", "[[attackers]]\nbehaviour = 'alie'\ncount = 1\n[strategy]", ["attackers[1]", "a single 'alie'", "omniscient"]),
    ("share = 0.2", "share = 0.2\ncount = 2", ["attackers[0]", "exactly one of share, count, ids", "share, count"]),
    ("share = 0.2\n", "", ["attackers[0]", "exactly one of share, count, ids"]),
    ("share = 0.2", "share = 1.0", ["attackers[0].share", "less than 1"]),
    ("share = 0.2", "share = 0.01", ["attackers[0].share", "0.01 of 10 clients is nobody"]),
    ("share = 0.2", "count = 11", ["attackers", "11 attackers", "10 clients"]),
    ("share = 0.2", "ids = [3, 10]", ["attackers[0].ids", "no client 10", "0 to 9"]),
    ("share = 0.2", "ids = [3, 3]", ["attackers[0].ids", "client 3", "twice"]),
    ("[strategy]", "[[attackers]]\nbehaviour = 'sign-flip'\nshare = 0.85\n[strategy]", ["attackers", "add up to 1.05"]),
    ("share = 0.2", "share = 0.2\nknowledge = 'everything'", ["attackers[0].knowledge", "'own', 'coalition'"]),
    ("share = 0.2", "share = 0.2\nrounds = [2, 4]", ["attackers[0].rounds", "1 <= first <= last <= 3"]),
    ("share = 0.2", "share = 0.2\nrounds = 2", ["attackers[0].rounds", "[first, last]"]),
    ('"mirror"', '"mirrored"', ["attackers[0].params.mode", "'mirror', 'next', 'targeted' or 'random'"]),
    ('"mirror"', '"targeted"', ["attackers[0].params.source", "two different classes"]),
    ('"mirror"', '"targeted", source = 1, target = 10', ["attackers[0].behaviour", "classes 0 to 9"]),
    ('"label-flip"', '"my_attack:Flip"', ["attackers[0].behaviour", "would run code", "--allow-plugin my_attack"]),
    ('"label-flip"', '"os:system"', ["attackers[0].behaviour", "would run code", "--allow-plugin os"]),
    ('"label-flip"', '"../x:y"', ["attackers[0].behaviour", "module:name"]),
    # sizes that cannot work
    ("assumed_malicious = 0.2", "assumed_malicious = 1.0", ["strategy.assumed_malicious", "[0, 1)"]),
    ("assumed_malicious = 0.2", "assumed_malicious = 11", ["strategy.assumed_malicious", "11 of 10 clients"]),
    ("assumed_malicious = 0.2", "assumed_malicious = true", ["strategy.assumed_malicious", "share in [0, 1) or a"]),
    ('0.2\naggregator = "median"', '0.4\naggregator = "krum"', ["strategy.aggregator", "n ≥ 2f + 3", "n = 10", "f = 4"]),
    ('"median"', '"median"\nsteps = ["gaussian-noise"]', ["strategy.steps[0]", "gaussian-noise", "norm-clip"]),
    ('"median"', '{ name = "trimmed-mean", trim = 5 }', ["strategy.aggregator", "trimmed-mean"]),
    ('"median"', '"median"\nroot_samples = 9999', ["strategy.root_samples", "9999 root samples"]),
    ("count = 10", "count = 1000", ["s.toml:13", "clients.count", "1000 clients", "240"]),
    ("alpha = 0.5", "min_samples = 60", ["data.partition", "10 clients", "240"]),
    ('partition = { kind = "dirichlet", alpha = 0.5 }', "model = 3", ["s.toml:7", "data.model", "unknown key 'model'"]),
    ('{ name = "digits", limit = 240 }', '"diabetes"\n#', ["attackers[0]", "regression"]),
    # what does not go with the model, the sender or the data
    (
        '"label-flip"\nshare = 0.2\nparams = { mode = "mirror" }',
        '"chameleon"\nshare = 0.2',
        ["s.toml:17", "attackers[0].behaviour", "no encoder"],
    ),
    ('"median"', '"flare"\nroot_samples = 20', ["strategy.aggregator", "'flare' cannot work here", "no layer before its last"]),
    ("count = 10", "count = 10\nbehaviour = 'dpa'", ["s.toml:14", "clients.behaviour", "'ensemble' with at least two members"]),
    ("[strategy]", "[malicious_server]\nsender = 'robbing-the-fed'\n[strategy]", ["malicious_server.sender", "linear, ReLU, linear"]),
    ("[strategy]", "[malicious_server]\nsender = 'fishing'\nparams = { target = 10 }\n[strategy]", ["malicious_server.sender", "0 to 9"]),
    *(("[strategy]", f"{before}\n[strategy]", wanted) for before, wanted in PROBES),
    ('"sgd", lr = 0.1, momentum = 0.9 }', '"adam" }\n[[probes]]\nname = "dlg"', ["probes[0]", "clients.train.optimiser is 'adam'"]),
    # data
    ("[model]", 'root = "../elsewhere"\n[model]', ["data.root", "takes no root"]),
    ('{ name = "digits", limit = 240 }', '"mnist"\nroot = "../elsewhere"', ["s.toml:7", "data.root", "leaves the scenario's folder"]),
    ('{ name = "digits", limit = 240 }', '"mnist"\nroot = "/etc"', ["data.root", "leaves", "--data-root"]),
    ('{ name = "digits", limit = 240 }', '"mnist"\nroot = "link"', ["data.root", "leaves"]),
    ('{ name = "digits", limit = 240 }', '"mnist"\nroot = "."', ["data.source", "mnist"]),
    ('{ name = "digits", limit = 240 }', '{ name = "mnist", root = "." }', ["data.source.root", "data.root"]),
    ("[model]", "download = true\n[model]", ["data.download", "fetches nothing"]),
    # Flower's own strategies
    ('"median"', '"flwr:Krun"', ["strategy.aggregator", "no strategy 'Krun'", "Krum"]),
    ('"median"', '"flwr:FedXgbBagging"', ["strategy.aggregator", "trees"]),
    ('"median"', '{ name = "flwr:FedAdam", beta1 = 0.9 }', ["strategy.aggregator.beta1", "beta_1"]),
    ('"median"', '"flwr:FedAvg"\nfilters = ["norm-clip"]', ["strategy.filters", "runs alone"]),
    ('"label-flip"', '"flwr:FedAvg"', ["attackers[0].behaviour", "aggregator only"]),
    # sweeps
    ("[strategy]", "[sweep]\nseeds = [1, 1]\n[strategy]", ["sweep.seeds", "seed 1", "twice"]),
    ("[strategy]", "[sweep]\nstrategies = ['mean', 'medain']\n[strategy]", ["sweep.strategies.medain", "did you mean 'median'"]),
    ("[strategy]", "[sweep]\nstrategies = ['mean', 'mean']\n[strategy]", ["sweep.strategies[1]", "twice"]),
    ("[strategy]", "[sweep]\nstrategies = 3\n[strategy]", ["sweep.strategies", "list of names"]),
    ("[strategy]", "[sweep]\nattacks = 3\n[strategy]", ["sweep.attacks", "did you mean 'attackers'"]),
    (
        "[strategy]",
        "[sweep.attackers]\nnone = []\nbig = [{ behaviour = 'sign-flip', count = 12 }]\n[strategy]",
        ["s.toml:23", "sweep.attackers.big", "12 attackers"],
    ),
    ("[strategy]", "[sweep.partitions]\nfew = { kind = 'iid', alpha = 1 }\n[strategy]", ["s.toml:22", "sweep.partitions.few.alpha"]),
    ("[strategy]", "[sweep.partitions]\nfew = { kind = 'dirichlet', min_samples = 60 }\n[strategy]", ["sweep.partitions.few", "240"]),
    ("[strategy]", MANY + "[strategy]", ["sweep", "10100 runs"]),
]  # fmt: skip

OVERRIDES: list[tuple[list[str], list[str]]] = [
    (["clients.cuont=3"], ["--set clients.cuont", "unknown key 'cuont'", "did you mean 'count'"]),
    (["clients.count"], ["--set clients.count", "KEY=VALUE"]),
    (["=3"], ["--set =3", "KEY=VALUE"]),
    (["clients..count=3"], ["--set clients..count", "not a dotted key"]),
    (["rounds=nan"], ["--set rounds", "finite"]),
    (["rounds=[[[["], ["--set rounds", "valid integer", "'[[[['"]),
    (["rounds=" + "[" * 50], ["--set rounds", "nested deeper"]),
    (["model=cnm"], ["--set model", "unknown model 'cnm'"]),
    (["model.width=3"], ["--set model.width", "no parameter 'width'"]),
    (["attackers[0].share=2.0"], ["--set attackers[0].share", "less than 1"]),
    (["attackers.0.share=2.0"], ["--set attackers.0.share", "less than 1"]),
    (["attackers[7].share=0.1"], ["--set attackers[7].share", "list of 1"]),
    (["rounds.x=1"], ["--set rounds.x", "has no keys below it"]),
    (["title.x=1"], ["title", "valid string", "after --set title.x"]),
    (["strategy.aggregator={name='krum'}", "strategy.assumed_malicious=0.4"], ["--set strategy.aggregator", "2f + 3"]),
    (["clients.count=1000"], ["--set clients.count", "240 training samples"]),
]


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """Run the command line, and return the one line with which it refused."""
    before = sorted(folder.rglob("*"))
    code = main(["run", *arguments])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert err[:-1].isprintable()
    assert sorted(folder.rglob("*")) == before
    return err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDTRUST_DATA", raising=False)
    monkeypatch.delenv("FEDTRUST_DEBUG", raising=False)
    (tmp_path / "link").symlink_to("/etc")
    return tmp_path


@pytest.mark.parametrize(("old", "new", "wanted"), EDITS, ids=[f"{i}-{e[1][:30]!r}" for i, e in enumerate(EDITS)])
def test_wrong_file(old: str, new: str, wanted: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert GOOD.count(old) == 1 or old == "alpha"
    (folder / "s.toml").write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    line = refused(capsys, folder, "s.toml")
    for words in ["s.toml", *wanted]:
        assert words in line


@pytest.mark.parametrize(("overrides", "wanted"), OVERRIDES, ids=[" ".join(o)[:40] for o, _ in OVERRIDES])
def test_wrong_override(overrides: list[str], wanted: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "s.toml").write_text(GOOD, encoding="utf-8")
    line = refused(capsys, folder, "s.toml", *[part for o in overrides for part in ("--set", o)])
    for words in wanted:
        assert words in line


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"x = 1\n" * 200_000, "larger than 1 MB"),
        (b'title = "caf\xe9"\n', "s.toml:1: is not UTF-8"),
        (b"title = 1\n" + "rounds = 3".encode("utf-16"), "s.toml:2: is not UTF-8"),
        (b"", "is required"),
        (b"\x00", "not TOML"),
        (b"[[attackers]]\n" * 3, "is required"),
    ],
)
def test_wrong_bytes(content: bytes, wanted: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "s.toml").write_bytes(content)
    assert wanted in refused(capsys, folder, "s.toml")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("nowhere.toml", "no such file"),
        (".", "is a folder"),
        ("a/b/c.toml", "no such file"),
        ("s\nx.toml", "no such file"),
        ("/dev/null", "regular file"),
    ],
)
def test_no_such_file(name: str, wanted: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wanted in refused(capsys, folder, name)


def test_every_line_names_a_place_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "s.toml").write_text(GOOD.replace("count = 10", "cuont = 10"), encoding="utf-8")
    assert refused(capsys, folder, "s.toml") == (
        "error: s.toml:13: clients.cuont: unknown key 'cuont' (keys: behaviour, count, per_round, quorum, system, train); "
        "did you mean 'count'?\n"
    )


def test_a_spoilt_file_is_refused_or_read_never_more(folder: Path) -> None:
    pieces = [
        '"',
        "'",
        "[",
        "]",
        "{",
        "}",
        "=",
        ".",
        ",",
        "\n",
        "#",
        "-1",
        "nan",
        "true",
        "[]",
        "{}",
        '"""',
        "\\",
        "9" * 30,
        "name",
        "é",
        "\0",
    ]
    chance = random.Random(7)
    read = 0
    for _ in range(400):
        text = GOOD
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(text))
            text = text[:at] + chance.choice(pieces) + text[at + chance.choice([0, 0, 1, 3, 10]) :]
        (folder / "s.toml").write_text(text, encoding="utf-8")
        made, said = attempt("s.toml")
        assert (made is None) == said.startswith("s.toml"), said
        assert "\n" not in said
        if made is not None:
            read += 1
            assert parse(tomllib.loads(made.resolved_toml())) == made
    assert 0 < read < 200


def attempt(name: str) -> tuple[Scenario | None, str]:
    """Return the scenario, or why there is none."""
    try:
        return load(name), ""
    except InputError as error:
        return None, str(error)
