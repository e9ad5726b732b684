"""What protected clients send, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtrust.client import View
from fedtrust.clients.protected import largest, telling
from fedtrust.errors import InputError
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from tests.clients.behaviour_kit import IMAGES, LAYOUT, NUMBERS, linear, make, view

UPDATE = torch.tensor([[5.0, -1.0, 0.5, 0.0, 3.0, -4.0, 0.1, 0.2, 0.3, 9.0, -9.5, 9.5, 0.01, 0.03, -0.02]])  # 12 weights, 3 biases


def test_the_largest_are_found_layer_by_layer() -> None:
    kept = largest(UPDATE[0], LAYOUT, 0.25)
    assert kept.nonzero().flatten().tolist() == [9, 10, 11, 13]  # ⌈0.25 · 12⌉ = 3 weights, ⌈0.25 · 3⌉ = 1 bias
    assert int(largest(torch.arange(15.0), LAYOUT, 0.1).sum()) == 2 + 1


def test_sparsified_sends_the_largest_and_the_rest_later() -> None:
    client, memory = make("sparsified", keep=0.25), {"rest": torch.zeros(15)}
    sent = []
    for _ in range(4):
        here = view()._replace(memory=memory)
        sent.append(client.craft(UPDATE.clone(), here))
        memory = here.memory
    assert torch.equal(sent[0][0].nonzero().flatten(), torch.tensor([9, 10, 11, 13]))
    assert torch.equal(sent[0][0, [9, 10, 11, 13]], UPDATE[0, [9, 10, 11, 13]])
    assert torch.allclose(sum(sent)[0] + memory["rest"], 4 * UPDATE[0])  # nothing is lost
    assert sent[1][0, 12] == pytest.approx(0.0)
    assert sent[1][0, 14] == pytest.approx(-0.04)  # it waited for a round: twice 0.02 is more than 0.03


def test_sparsified_remembers_a_vector() -> None:
    assert make("sparsified").remember(7)["rest"].tolist() == [0.0] * 7


def test_pruned_drops_the_smallest_for_good() -> None:
    client = make("pruned", rate=0.5)
    sent = client.craft(UPDATE.clone(), view())[0]
    assert sent.nonzero().flatten().tolist() == [0, 4, 5, 9, 10, 11, 13, 14]
    assert torch.equal(client.craft(UPDATE.clone(), view())[0], sent)


@pytest.mark.parametrize(("noise", "kurtosis"), [("gaussian", 3.0), ("laplace", 6.0)])
def test_noise_of_the_right_size_and_kind(noise: str, kurtosis: float) -> None:
    n = 200_000
    sent = make("gradient-noise", std=0.5, noise=noise).craft(torch.full((1, n), 2.0), view())[0].double() - 2
    assert abs(float(sent.mean())) < 5 * 0.5 / math.sqrt(n)
    assert float(sent.std()) == pytest.approx(0.5, rel=0.02)
    assert float((sent**4).mean() / sent.var() ** 2) == pytest.approx(kurtosis, rel=0.1)
    assert abs(float((sent**3).mean())) < 0.02  # symmetric


@pytest.mark.parametrize("norm", ["euclidean", "max"])
def test_quantised_entries_lie_on_the_levels_next_to_them(norm: str) -> None:
    bits, bucket = 4, 8
    update = torch.randn(1, 44, generator=torch.Generator().manual_seed(2))
    sent = make("quantised", bits=bits, bucket=bucket, norm=norm).craft(update, view())
    assert sent.shape == update.shape
    assert sent.dtype == torch.float32
    for start in range(0, 44, bucket):
        part, got = update[0, start : start + bucket].double(), sent[0, start : start + bucket].double()
        size = part.norm() if norm == "euclidean" else part.abs().max()
        step = float(size) / (2 ** (bits - 1) - 1)
        levels = got / step
        assert torch.allclose(levels, levels.round(), atol=1e-4)
        assert float((got - part).abs().max()) <= step * (1 + 1e-5)
        assert bool((got * part >= 0).all())


def test_quantising_moves_nothing_on_average_and_spreads_as_the_theory_says() -> None:
    """QSGD, lemma 3.1: unbiased, with a variance of at most min(d ÷ s², √d ÷ s) ‖v‖²."""
    update, times, bits = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)), 4000, 3
    client = make("quantised", bits=bits, bucket=64)
    drawn = torch.stack([client.craft(update, view(seed=i))[0] for i in range(times)]).double()
    step = float(update.norm()) / 3
    assert float((drawn.mean(0) - update[0]).abs().max()) < 5 * step / 2 / math.sqrt(times)
    variance = float((drawn - update[0]).square().sum(1).mean())
    assert variance <= min(64 / 9, 8 / 3) * float(update.norm()) ** 2
    exact = (update[0].double().abs() / step) % 1
    assert variance == pytest.approx(float((exact * (1 - exact)).sum()) * step**2, rel=0.05)


def test_zeros_stay_zeros_and_two_bits_are_signs() -> None:
    assert not make("quantised").craft(torch.zeros(1, 20), view()).any()
    sent = make("quantised", bits=2, bucket=5, norm="max").craft(torch.tensor([[1.0, -3.0, 2.0, 0.0, 3.0]]), view())[0]
    assert set(sent.abs().tolist()) <= {0.0, 3.0}
    assert sent[[1, 3, 4]].tolist() == [-3.0, 0.0, 3.0]


class Net(nn.Module):
    """x ↦ V tanh(U x): features tanh(U x), whose slopes are known."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.act(self.body(x.flatten(1))))
        return out


def seen(x: Tensor, **given: Any) -> tuple[View, Layout, Net]:
    torch.manual_seed(4)
    net = Net()
    layout = Layout.of(net)
    model = Architecture(net, layout)
    return view(params=layout.vector(net), **given)._replace(layout=layout, model=model, data=lambda: (x, torch.zeros(len(x)))), layout, net


def by_hand(net: Net, x: Tensor) -> Tensor:
    """Σ |r_i| ÷ ‖∂r_i/∂x‖, where ∂r_i/∂x = (1 − r_i²) u_i."""
    r = (x.flatten(1) @ net.body.weight.T + net.body.bias).tanh()
    total: Tensor = (r.abs() / ((1 - r**2) * net.body.weight.norm(dim=1))).sum(0).detach()
    return total


def test_what_features_tell_of_the_input() -> None:
    x = torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    here, _, net = seen(x)
    assert torch.allclose(telling(here, x), by_hand(net, x), rtol=1e-4)
    assert not x.requires_grad


def test_a_feature_that_does_not_depend_on_the_input_tells_nothing() -> None:
    x = torch.rand(2, 1, 6, 6)
    here, layout, _ = seen(x)
    parameters = layout.unflatten(here.params.clone())
    parameters["body.weight"][2] = 0.0
    told = telling(here._replace(params=layout.flatten(parameters)), x)
    assert told[2] == 0
    assert bool((told[[0, 1, 3, 4, 5]] > 0).all())


@pytest.mark.parametrize(("rate", "pruned"), [(0.2, 2), (0.5, 3), (0.8, 5)])
def test_soteria_leaves_the_telling_columns_as_they_were_and_the_rest_alone(rate: float, pruned: int) -> None:
    x = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    here, layout, net = seen(x)
    update = torch.randn(1, layout.size)
    sent = make("soteria", rate=rate).craft(update.clone(), here)[0]
    got, given = layout.unflatten(sent), layout.unflatten(update[0])
    hidden = by_hand(net, x).topk(pruned).indices
    shown = [i for i in range(6) if i not in hidden.tolist()]
    assert not got["head.weight"][:, hidden].any()
    assert torch.equal(got["head.weight"][:, shown], given["head.weight"][:, shown])
    for name in ("head.bias", "body.weight", "body.bias"):
        assert torch.equal(got[name], given[name])


def test_soteria_looks_at_some_samples_only() -> None:
    x = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(3))
    layout = seen(x)[1]
    update = torch.ones(1, layout.size)
    few = [make("soteria", rate=0.5, samples=1).craft(update.clone(), seen(x, seed=s)[0]) for s in range(12)]
    assert any(not torch.equal(few[0], other) for other in few)
    again = make("soteria", rate=0.5, samples=1).craft(update.clone(), seen(x, seed=0)[0])
    assert torch.equal(few[0], again)


def test_smoothed_labels_are_those_of_cross_entropy() -> None:
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    task = IMAGES.__class__("classification", (4,), 3)
    weight = torch.randn(15)
    loss = make("label-smoothing", smoothing=0.3).loss(linear(weight), x, y, view(task))
    output = linear(weight)(x)
    assert torch.allclose(loss, F.cross_entropy(output, y, label_smoothing=0.3))
    assert not torch.allclose(loss, F.cross_entropy(output, y))


def test_smoothed_labels_hide_the_sign_that_gives_the_label_away() -> None:
    """With plain labels only the true class has a negative gradient at the bias (iDLG's rule); with smooth ones others may have, too."""
    x, y = torch.randn(1, 4), torch.tensor([2])
    weight = torch.zeros(15)
    weight[-3:] = torch.tensor([4.0, 0.0, -4.0])  # class 1 is given about 1.8 %, less than the 10 % that smoothing wants
    task = IMAGES.__class__("classification", (4,), 3)

    def negative(name: str, **params: float) -> list[int]:
        at = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(make(name, **params).loss(linear(at), x, y, view(task)), at)
        return (gradient[-3:] < 0).nonzero().flatten().tolist()

    assert len(negative("honest")) == 1
    assert len(negative("label-smoothing", smoothing=0.3)) == 2


@pytest.mark.parametrize("name", ["label-smoothing"])
def test_tasks_without_classes_are_refused(name: str) -> None:
    assert "no" in str(make(name).check(NUMBERS))
    assert make(name).check(IMAGES) is None
    assert make("soteria").check(NUMBERS) is None


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("sparsified", {"keep": 0.0}),
        ("sparsified", {"keep": 1.0}),
        ("pruned", {"rate": 1.5}),
        ("gradient-noise", {"std": 0.0}),
        ("quantised", {"bits": 1}),
        ("soteria", {"rate": 0.0}),
        ("label-smoothing", {"smoothing": 1.0}),
    ],
)
def test_parameters_that_mean_nothing_are_refused(name: str, params: dict[str, float]) -> None:
    with pytest.raises(InputError):
        make(name, **params)
