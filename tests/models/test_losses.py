"""Losses against closed forms, torch's own functions, their limits, and under vmap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from fedtrust.engine.loss_gradient import with_gradient
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY

CASES = [
    ("cross-entropy", {}),
    ("cross-entropy", {"label_smoothing": 0.1}),
    ("gce", {"q": 0.3}),
    ("sce", {"alpha": 0.5, "beta": 2.0, "log_zero": -6.0}),
    ("apl", {"alpha": 2.0, "beta": 0.5, "passive": "rce", "log_zero": -6.0}),
    ("apl", {"alpha": 0.5, "beta": 3.0, "passive": "mae"}),
    ("focal", {"gamma": 0.5}),
    ("focal", {"gamma": 2.0}),
    ("mse", {}),
    ("mae", {}),
    ("huber", {"delta": 0.3}),
]
REGRESSION = ("mse", "mae", "huber")


def logits(b: int = 7, c: int = 5, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(b * c)
    return scale * torch.randn(b, c, generator=g, dtype=torch.float64), torch.randint(0, c, (b,), generator=g)


def value(name: str, output: torch.Tensor, y: torch.Tensor, **params: object) -> torch.Tensor:
    return REGISTRY.make("loss", name, params)(output, y)


def by_hand(name: str, output: torch.Tensor, y: torch.Tensor, p: dict[str, float]) -> torch.Tensor:
    """The papers' formulas, sample by sample, straight from the probabilities."""
    return torch.stack([one_by_hand(name, row, int(label), p) for row, label in zip(output, y, strict=True)]).mean()


def one_by_hand(name: str, row: torch.Tensor, label: int, p: dict[str, float]) -> torch.Tensor:
    prob = row.exp() / row.exp().sum()
    hot = torch.zeros_like(row)
    hot[label] = 1
    r = prob - hot
    delta, smooth = p.get("delta", 1.0), p.get("label_smoothing", 0.0)
    log_hot = torch.where(hot > 0, 0.0, p.get("log_zero", -4.0))
    formulas = {
        "cross-entropy": lambda: -(((1 - smooth) * hot + smooth / len(row)) * prob.log()).sum(),
        "gce": lambda: (1 - prob[label] ** p["q"]) / p["q"],
        "sce": lambda: -p["alpha"] * (hot * prob.log()).sum() - p["beta"] * (prob * log_hot).sum(),
        "apl": lambda: (
            p["alpha"] * (hot * prob.log()).sum() / prob.log().sum()
            + p["beta"] * (r.abs().sum() if p["passive"] == "mae" else -(prob * log_hot).sum())
        ),
        "focal": lambda: -((1 - prob[label]) ** p["gamma"]) * prob[label].log(),
        "mse": lambda: (r**2).sum(),
        "mae": lambda: r.abs().sum(),
        "huber": lambda: torch.stack([0.5 * e**2 if abs(e) <= delta else delta * (abs(e) - 0.5 * delta) for e in r]).sum(),
    }
    return formulas[name]()


@pytest.mark.parametrize(("name", "params"), CASES)
def test_closed_form(name: str, params: dict[str, float]) -> None:
    output, y = logits()
    torch.testing.assert_close(value(name, output, y, **params), by_hand(name, output, y, params), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    output, y = logits()
    expected = F.cross_entropy(output, y, label_smoothing=smoothing)
    torch.testing.assert_close(value("cross-entropy", output, y, label_smoothing=smoothing), expected)


@pytest.mark.parametrize(
    ("name", "params", "reference"),
    [("mse", {}, F.mse_loss), ("mae", {}, F.l1_loss), ("huber", {"delta": 0.4}, lambda a, b: F.huber_loss(a, b, delta=0.4))],
)
def test_regression_is_torchs(name: str, params: dict[str, float], reference) -> None:
    output, _ = logits(c=1)
    y = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(value(name, output, y, **params), reference(output.squeeze(1), y))
    mine = grad(lambda o: value(name, o, y, **params))(output)
    torch.testing.assert_close(mine, grad(lambda o: reference(o.squeeze(1), y))(output))


def test_limits() -> None:
    output, y = logits()
    ce = F.cross_entropy(output, y)
    p_y = output.softmax(1)[torch.arange(7), y]
    torch.testing.assert_close(value("gce", output, y, q=1e-9), ce, atol=1e-7, rtol=0)
    torch.testing.assert_close(value("gce", output, y, q=1.0), value("mae", output, y) / 2)
    torch.testing.assert_close(value("mae", output, y), (2 - 2 * p_y).mean())
    torch.testing.assert_close(value("focal", output, y, gamma=0.0), ce)
    torch.testing.assert_close(value("sce", output, y, alpha=0.3, beta=0.0), 0.3 * ce)
    torch.testing.assert_close(value("apl", output, y, alpha=0.0, passive="mae"), value("mae", output, y))
    torch.testing.assert_close(value("apl", output, y, alpha=0.0, beta=2.0), 2 * value("sce", output, y, alpha=0.0))
    torch.testing.assert_close(value("sce", output, y, alpha=0.0, beta=1.0, log_zero=-4.0), 2 * value("mae", output, y))
    torch.testing.assert_close(value("huber", output, y, delta=2.0), value("mse", output, y) / 2)


def test_defaults_are_the_papers() -> None:
    assert REGISTRY.get("loss", "gce").check({}) == {"q": 0.7}
    assert REGISTRY.get("loss", "sce").check({}) == {"alpha": 0.1, "beta": 1.0, "log_zero": -4.0}
    assert REGISTRY.get("loss", "apl").check({}) == {"alpha": 1.0, "beta": 1.0, "passive": "rce", "log_zero": -4.0}
    assert REGISTRY.get("loss", "focal").check({}) == {"gamma": 2.0}


@pytest.mark.parametrize(("name", "params"), CASES)
@pytest.mark.parametrize("extreme", [1e2, 1e4, 1e30])
def test_gradients_stay_finite_at_extreme_logits(name: str, params: dict[str, float], extreme: float) -> None:
    output = torch.tensor([[extreme, -extreme, 0.0], [-extreme, extreme, 0.0], [extreme, extreme, extreme]])
    y = torch.tensor([0, 0, 1])
    slope = grad(lambda o: value(name, o, y, **params))(output)
    assert torch.isfinite(value(name, output, y, **params))
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_gradient_where_the_label_is_almost_certain(gamma: float) -> None:
    for margin in (5.0, 15.0, 17.0, 50.0, 200.0):
        output = torch.tensor([[margin, 0.0]])
        slope = grad(lambda o: value("focal", o, torch.tensor([0]), gamma=gamma))(output)
        exact = grad(lambda o: value("focal", o, torch.tensor([0]), gamma=gamma))(output.double())
        torch.testing.assert_close(slope, exact.float(), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("name", "params"), CASES)
def test_vmap_is_the_loop(name: str, params: dict[str, float]) -> None:
    function = REGISTRY.make("loss", name, params)
    outputs = torch.stack([logits()[0] * s for s in (0.5, 1.0, 3.0)])
    ys = torch.stack([logits()[1].roll(s) for s in range(3)])
    together = vmap(grad(function))(outputs, ys)
    alone = torch.stack([grad(function)(o, y) for o, y in zip(outputs, ys, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(vmap(function)(outputs, ys), torch.stack([function(o, y) for o, y in zip(outputs, ys, strict=True)]))


@pytest.mark.parametrize("name", REGRESSION)
def test_vmap_is_the_loop_for_a_regression(name: str) -> None:
    function = REGISTRY.make("loss", name, {})
    g = torch.Generator().manual_seed(0)
    outputs, ys = torch.randn(3, 6, 1, generator=g), torch.randn(3, 6, generator=g)
    torch.testing.assert_close(vmap(function)(outputs, ys), torch.stack([function(o, y) for o, y in zip(outputs, ys, strict=True)]))


def test_every_loss_says_which_tasks_it_is_for() -> None:
    for name in REGISTRY.names("loss"):
        assert ("regression" in REGISTRY.get("loss", name).meta["tasks"]) == (name in REGRESSION), name


@pytest.mark.parametrize(
    ("name", "params"),
    [("gce", {"q": 0.0}), ("gce", {"q": 1.5}), ("huber", {"delta": 0.0}), ("focal", {"gamma": -1.0}), ("sce", {"log_zero": 0.0})],
)
def test_values_out_of_bounds_are_refused(name: str, params: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"Input should be (greater|less)"):
        REGISTRY.make("loss", name, params)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("text", [False, True])
def test_the_written_out_gradient_is_autograds(smoothing: float, text: bool) -> None:
    g = torch.Generator().manual_seed(0)
    shape = (3, 4, 6) if text else (3, 4)
    output, y = torch.randn(*shape, 5, generator=g), torch.randint(0, 5, shape, generator=g)
    named = REGISTRY.make("loss", "cross-entropy", {"label_smoothing": smoothing})
    losses, slope = with_gradient(named)(output.clone(), y)
    wanted, expected = with_gradient(lambda o, t: named(o, t))(output.clone(), y)  # a function that nobody knows: by autograd
    torch.testing.assert_close(losses, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(slope, expected, atol=1e-7, rtol=1e-5)
    one = torch.stack([F.cross_entropy(o.flatten(0, -2), t.flatten(), label_smoothing=smoothing) for o, t in zip(output, y, strict=True)])
    torch.testing.assert_close(losses, one, atol=1e-6, rtol=1e-6)
