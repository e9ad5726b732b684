"""What a malicious server sends, what comes out of it exactly, and what a client that looks first sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedtrust.clients.inspecting import Inspecting, RefusedError, block_before_convolution, silent, twins
from fedtrust.data.build import load
from fedtrust.errors import InputError
from fedtrust.models.entrance import entrance, head
from fedtrust.models.losses import cross_entropy
from fedtrust.probes.scores_images import EXACT, assigned
from fedtrust.registry import REGISTRY
from fedtrust.runner import run
from fedtrust.scenario import check, parse
from fedtrust.sending import SendContext
from fedtrust.strategies.malicious_server import edges_of
from tests.clients.behaviour_kit import view
from tests.conftest import SMALL, merged
from tests.probes.inversion_kit import DIGITS, Play, recipe, samples
from tests.probes.probe_kit import measure


def pictures(n: int, first: int = 0) -> tuple[Tensor, Tensor]:
    raw = load("digits", {})
    return raw.x_train[first : first + n], raw.y_train[first : first + n]


def context(play: Play, **given: Any) -> SendContext:
    clients = tuple(range(len(play.data)))
    base: dict[str, Any] = {
        "round": 1,
        "clients": clients,
        "examples": {c: len(x) for c, (x, _) in enumerate(play.data)},
        "layout": play.layout,
        "task": play.task,
        "model": play.model,
        "criterion": cross_entropy,
        "recipe": play.how,
        "rng": torch.Generator().manual_seed(0),
        "population": pictures(500, 800),
    }
    return SendContext(**(base | given))


def sent(name: str, play: Play, **params: Any) -> Tensor:
    made = REGISTRY.make("sender", name, params)(play.start.clone(), context(play))
    model: Tensor = made[0]
    return model


@pytest.mark.parametrize(("model", "params"), [("mlp", {"hidden": [256, 32]}), ("mlp", {"hidden": [256]}), ("imprint", {"bins": 256})])
def test_whoever_is_alone_in_a_bin_is_recovered_exactly(model: str, params: dict[str, Any]) -> None:
    """A batch of 40; how many share a bin is counted by hand, the others must come out above 40 dB."""
    data = [pictures(40)]
    how = recipe(batch_size=40)
    honest = Play(model, DIGITS, data, how, **params)
    start = sent("robbing-the-fed", honest)
    play = Play(model, DIGITS, data, how, start=start, **params)
    found = measure("robbing-the-fed-readout", play.seen())["robbing-the-fed"].items[0].x
    layer = entrance(play.model, play.layout)
    assert layer is not None
    weight, bias = layer.of(start.double())
    bins = (data[0][0].flatten(1).double() @ weight[0] + bias[:, None].sort(dim=0, descending=True).values > 0).sum(0)  # [samples]
    alone = sum(int((bins == b).sum()) == 1 for b in bins)
    _, _, each = assigned(found.clamp(0, 1), data[0][0], 1.0)
    assert alone >= 20
    assert int((each > EXACT).sum()) >= alone
    assert measure("robbing-the-fed-readout", honest.seen()) == {}  # nothing is planted in the true model


@pytest.mark.parametrize("how", ["quantiles", "normal"])
def test_bins_are_equally_likely(how: str) -> None:
    measured = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    edges = edges_of(measured, 8, how)
    assert bool((edges.diff() > 0).all())
    assert float(edges[0]) < float(measured.min())
    counts = torch.histogram(measured.double(), torch.cat([edges, torch.tensor([1e9], dtype=torch.float64)])).hist
    assert (counts / 20_000 - 1 / 8).abs().max() < 0.01


@pytest.mark.parametrize(("model", "params"), [("lenet", {}), ("logistic", {}), ("mlp", {"activation": "tanh"})])
def test_robbing_the_fed_refuses_a_model_without_room_for_bins(model: str, params: dict[str, Any]) -> None:
    play = Play(model, DIGITS, [samples(DIGITS, 2)], recipe(batch_size=2), **params)
    with pytest.raises(ValueError, match="linear, ReLU, linear"):
        sent("robbing-the-fed", play)


def fished(model: str, **params: Any) -> tuple[Any, Tensor]:
    x, y = pictures(60)
    one = int((y == 3).nonzero()[0])
    rows = [one, *[i for i in range(60) if int(y[i]) != 3][:31]]  # one three among 32
    data = [(x[rows], y[rows])]
    how = recipe(batch_size=32)
    start = sent("fishing", Play(model, DIGITS, data, how), target=3)
    return measure("fishing-readout", Play(model, DIGITS, data, how, start=start).seen(), target=3, **params), x[one]


@pytest.mark.parametrize(("model", "least"), [("logistic", 40), ("mlp", 40), ("lenet", 35)])
def test_one_sample_of_the_class_is_fished_out_of_a_batch(model: str, least: float) -> None:
    found, truth = fished(model, iterations=200)
    assert found["fishing-readout/of-the-class"] == 1
    (item,) = found["fishing"].items
    assert item.y.tolist() == [3]
    assert float(assigned(item.x.clamp(0, 1), truth[None], 1.0)[2]) > least


def test_nothing_is_fished_where_the_class_is_missing() -> None:
    x, y = pictures(60)
    rows = y != 3
    data, how = [(x[rows][:20], y[rows][:20])], recipe(batch_size=20)
    start = sent("fishing", Play("lenet", DIGITS, data, how), target=3)
    found = measure("fishing-readout", Play("lenet", DIGITS, data, how, start=start).seen(), target=3)
    assert found == {"fishing-readout/of-the-class": 0.0}


def test_nothing_is_fished_from_a_client_that_was_sent_the_true_model() -> None:
    x, y = pictures(60)
    play = Play("mlp", DIGITS, [(x[y == 3][:1], y[y == 3][:1])], recipe())  # its update would give the three away all the same
    assert measure("fishing-readout", play.seen(), target=3) == {"fishing-readout/of-the-class": 0.0}


@pytest.mark.parametrize(("name", "params"), [("robbing-the-fed", {}), ("fishing", {"target": 0})])
def test_a_readout_counts_the_victims_alone(name: str, params: dict[str, Any], tmp_path: Path) -> None:
    """Two of eight are sent the trap: to ask for more clients finds neither more nor less."""
    document = merged(SMALL, {"model": "mlp", "rounds": 2, "clients": {"train": {"batch_size": 64}}})  # it reads in the first of them
    document["malicious_server"] = {"sender": name, "params": {**params, "victims": 2}}
    found = []
    for clients in (2, 8):
        document["probes"] = ["accuracy", {"name": f"{name}-readout", "clients": clients, **params}]
        found.append(run(parse(document), tmp_path / str(clients), engine="local").summary["metrics"])
    assert found[0] == found[1]
    assert f"{name}/psnr" in found[0]


def test_a_class_that_does_not_exist_is_refused() -> None:
    for part in (
        {"malicious_server": {"sender": "fishing", "params": {"target": 10}}},
        {"probes": [{"name": "fishing-readout", "target": 10}]},
    ):
        document = merged(SMALL, {"malicious_server": {"sender": "fishing", "params": {"target": 0}}})
        with pytest.raises(InputError, match="classes are 0 to 9"):
            check(parse({**document, **part}))


def test_only_the_victims_are_sent_the_bait() -> None:
    play = Play("mlp", DIGITS, [samples(DIGITS, 1, s) for s in range(4)], recipe())
    for name, params in (("robbing-the-fed", {}), ("fishing", {"target": 0})):
        made = REGISTRY.make("sender", name, {**params, "victims": 2})(play.start, context(play))
        assert sorted(made) == [0, 1]
        assert sorted(REGISTRY.make("sender", name, params)(play.start, context(play))) == [0, 1, 2, 3]


def suspicion(play: Play, params: Tensor) -> str | None:
    return Inspecting().suspicion(params, play.model, play.layout)


@pytest.mark.parametrize(("name", "params"), [("robbing-the-fed", {}), ("fishing", {"target": 0})])
def test_more_victims_than_are_asked_in_a_round_are_refused(name: str, params: dict[str, Any]) -> None:
    document = merged(SMALL, {"model": "mlp", "clients": {"per_round": 5}})
    document["malicious_server"] = {"sender": name, "params": {**params, "victims": 6}}
    with pytest.raises(InputError, match="`victims` is 6, but 5 clients are asked in a round"):
        check(parse(document))
    document["malicious_server"]["params"]["victims"] = 5
    check(parse(document))


def test_each_check_sees_its_trap() -> None:
    play = Play("mlp", DIGITS, [samples(DIGITS, 1)], recipe())
    assert suspicion(play, play.start) is None
    assert "over and over" in str(suspicion(play, sent("robbing-the-fed", play)))
    assert "silent" in str(suspicion(play, sent("fishing", play, target=1)))
    block = Play("imprint", DIGITS, [samples(DIGITS, 1)], recipe(), bins=16)
    assert block_before_convolution(block.model) == "1"
    assert "before the first convolution" in str(suspicion(block, block.start))


def test_twins_and_silent_rows_written_out() -> None:
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert twins(rows, 0.999) == 0.5  # the first two; a row of zeros points nowhere
    assert twins(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 0.999) == 0.0
    assert silent(rows, 0.01) == 0.25
    assert silent(torch.tensor([[1.0, 0.0], [0.005, 0.0], [0.02, 0.0]]), 0.01) == pytest.approx(1 / 3)


def test_the_client_refuses_before_it_trains() -> None:
    play = Play("mlp", DIGITS, [samples(DIGITS, 3)], recipe())
    x, y = play.data[0]
    here = view(DIGITS, params=play.start)._replace(model=play.model, layout=play.layout)
    assert Inspecting().poison(x, y, here) == (x, y)
    with pytest.raises(RefusedError, match="over and over"):
        Inspecting().poison(x, y, here._replace(params=sent("robbing-the-fed", play)))


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn", "lenet", {"name": "mlp", "hidden": [512]}])
@pytest.mark.parametrize("partition", ["iid", {"kind": "pathological"}])
def test_no_false_alarm_while_a_model_learns(model: Any, partition: Any, tmp_path: Path) -> None:
    """Ten rounds of three epochs, label skew included: nobody refuses the true model."""
    document = merged(SMALL, {"rounds": 10, "clients": {"behaviour": "inspecting", "train": {"epochs": 3}}})
    document |= {"model": model, "data": {**SMALL["data"], "partition": partition}}
    result = run(parse(document), tmp_path / "run", engine="local")
    assert result.status == "finished"
    assert '"faults": {"' not in (tmp_path / "run" / "rounds.jsonl").read_text()
    assert partition != "iid" or result.summary["metrics"]["accuracy"] > 0.3  # it has learnt something


def test_victims_drop_out_by_name_and_the_round_counts(tmp_path: Path) -> None:
    planted = {"sender": "robbing-the-fed", "params": {"victims": 2}, "rounds": [2, 2]}
    document = merged(SMALL, {"model": "mlp", "malicious_server": planted, "clients": {"behaviour": "inspecting"}})
    result = run(parse(document), tmp_path / "run", engine="local")
    assert result.status == "finished"
    last = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert '"faults": {}' in last[1]
    assert last[2].count("RefusedError") == 2
    assert "measures the same thing over and over" in last[2]


def test_head_and_entrance_are_found() -> None:
    play = Play("mlp", DIGITS, [samples(DIGITS, 1)], recipe())
    first, last = entrance(play.model, play.layout), head(play.model, play.layout)
    assert first is not None
    assert last is not None
    assert first.shape == (128, 64)
    assert last.shape == (10, 64)
    torch.testing.assert_close(first.of(play.start)[0].flatten(), play.start[: 128 * 64])
    assert entrance(Play("cnn", DIGITS, [samples(DIGITS, 1)], recipe()).model, play.layout) is None
