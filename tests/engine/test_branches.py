"""Models with a `forward` of their own: read as stacks where they are stacks, fused where they branch, left alone where they do more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtrust.client import Behaviour
from fedtrust.data.base import Task
from fedtrust.engine import cohort, fused_rows, kernels_columns
from fedtrust.engine.cohort import choose_path, train
from fedtrust.engine.fused import Fused, fuse
from fedtrust.engine.fused_branches import Branched
from fedtrust.engine.kernels import Frame
from fedtrust.models.build import build, initialise
from fedtrust.registry import REGISTRY
from fedtrust.scenario import Scenario
from fedtrust.setup import build as set_up
from tests.engine.test_cohort import by_client, chunk_of
from tests.engine.test_fused import check, check_form


class Own(nn.Module):
    """Some layers, and what a function makes of them."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)
        initialise(self, torch.Generator().manual_seed(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def plain(m: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(m.a(x)), 2)
    x = F.avg_pool2d(torch.tanh(m.b(x)), kernel_size=2)
    return m.c(torch.flatten(x, 1))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "a": lambda: nn.Conv2d(3, 6, 3, padding=1),
    "b": lambda: nn.Conv2d(6, 6, 3, padding=1),
    "n": lambda: nn.GroupNorm(2, 6),
    "s": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
    "t": lambda: nn.Conv2d(6, 8, 1, stride=2),
    "r": lambda: nn.ReLU(),
}


def layers(names: str, **more: nn.Module) -> dict[str, nn.Module]:
    return {name: LAYERS[name]() for name in names} | more


STACKS: dict[str, nn.Module] = {
    "functions": Own(plain, **layers("ab", c=nn.Linear(24, 5))),
    "view": Own(lambda m, x: m.c(m.a(x).relu().view(x.size(0), -1)), **layers("a", c=nn.Linear(384, 5))),
    "shape": Own(lambda m, x: m.c(m.r(m.a(x)).reshape(x.shape[0], -1)), **layers("ar", c=nn.Linear(384, 5))),
    "pooled": Own(lambda m, x: m.c(F.adaptive_avg_pool2d(m.a(x), (2, 1)).flatten(1)), **layers("a", c=nn.Linear(12, 5))),
    "one relu twice": Own(lambda m, x: m.c(m.r(m.b(m.r(m.a(x)))).flatten(1)), **layers("abr", c=nn.Linear(384, 5))),
    "in place": Own(lambda m, x: m.c(F.relu(m.a(x), inplace=True).flatten(1)), **layers("a", c=nn.Linear(384, 5))),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_forward_of_ones_own_that_is_a_stack_is_one(name: str) -> None:
    assert isinstance(fuse(STACKS[name]), Fused)
    check(STACKS[name], (3, 8, 8))


def added(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    y = m.b(m.n(x).relu())
    y += x
    return m.c(y.flatten(1))


def on_vectors(m: Any, x: Tensor) -> Tensor:
    h = m.a(x.flatten(1)).relu()
    return m.c(h + m.d(h).relu())


def residual(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.n(m.a(x)))
    x = F.relu(torch.add(m.s(x), m.t(x)))
    return m.c(F.adaptive_avg_pool2d(x, 1).flatten(1))


BRANCHES: dict[str, nn.Module] = {
    "residual": Own(residual, **layers("anst", c=nn.Linear(8, 5))),
    "over a value": Own(added, **layers("abn", c=nn.Linear(384, 5))),
    "the sample itself": Own(
        lambda m, x: m.c((x + F.max_pool2d(m.d(x), 3, 1, 1)).flatten(1)), d=nn.Conv2d(3, 3, 3, padding=1), c=nn.Linear(192, 5)
    ),
    "three ways": Own(
        lambda m, x: m.c((m.a(x) + m.b(m.e(x)) + m.n(m.d(x))).tanh().flatten(1)),
        **layers("abn", e=nn.Conv2d(3, 6, 1), d=nn.Conv2d(3, 6, 5, padding=2), c=nn.Linear(384, 5)),
    ),
    "itself twice": Own(lambda m, x: m.c((lambda y: y + y)(m.a(x)).relu().flatten(1)), **layers("a", c=nn.Linear(384, 5))),
    "relu and bare": Own(lambda m, x: m.c((lambda y: y.relu() + y)(m.a(x)).flatten(1)), **layers("a", c=nn.Linear(384, 5))),
    "average pools": Own(
        lambda m, x: m.c((F.avg_pool2d(m.a(x), 2) + F.max_pool2d(m.d(x), 3, stride=2, padding=1)).flatten(1)),
        **layers("a", d=nn.Conv2d(3, 6, (3, 1), padding=(1, 0)), c=nn.Linear(96, 5)),
    ),
    "norm without parameters": Own(
        lambda m, x: m.c((m.a(x) + m.n(m.b(m.e(x)))).flatten(1)),
        **layers("ab", e=nn.Conv2d(3, 6, 1), n=nn.GroupNorm(3, 6, affine=False), c=nn.Linear(384, 5)),
    ),
    "on vectors": Own(on_vectors, a=nn.Linear(192, 9), d=nn.Linear(9, 9), c=nn.Linear(9, 5)),
    "identity and relu": Own(
        lambda m, x: m.c((lambda y: m.r(m.i(y)) + m.b(m.i(y)))(m.a(x)).flatten(1)), **layers("abr", i=nn.Identity(), c=nn.Linear(384, 5))
    ),
    "relu behind tanh": Own(
        lambda m, x: m.c((m.a(x).tanh().relu() + m.e(x)).flatten(1)), **layers("a", e=nn.Conv2d(3, 6, 1), c=nn.Linear(384, 5))
    ),
    "ends on images": Own(lambda m, x: (m.a(x) + m.e(x)).flatten(1), **layers("a", e=nn.Conv2d(3, 6, 1))),
    "strange strides": Own(
        lambda m, x: m.c((m.p(x) + m.q(x)).flatten(1)),
        p=nn.Conv2d(3, 4, (2, 3), stride=(3, 2), padding=(1, 0)), q=nn.Conv2d(3, 4, (4, 2), stride=(2, 3)), c=nn.Linear(36, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("products", [True, False], ids=["matrix products", "library"])
@pytest.mark.parametrize("name", BRANCHES)
def test_branches_give_each_model_what_it_would_compute_alone(name: str, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_rows, "WEIGHTS_A_ROW", 0 if products else 10**9)
    module = (
        BRANCHES[name]
        if name != "ends on images"
        else Own(lambda m, x: (m.a(x) + m.a2(x)).flatten(1), **layers("a", a2=nn.Conv2d(3, 6, 1)))
    )
    fused = fuse(module)
    assert isinstance(fused, Branched)
    for k, b in ((3, 4), (1, 2), (2, 1), (1, 60)):
        check_form(fused, module, (3, 8, 8), k, b)


@pytest.mark.parametrize(
    ("params", "task"),
    [({"stem": "large"}, Task("classification", (1, 28, 28), 10)), ({"groups": 4}, Task("classification", (3, 8, 8), 3))],
    ids=["large stem", "small stem"],
)
def test_resnet(params: dict[str, Any], task: Task) -> None:
    module = build("resnet18", params, task, 0)
    fused = fuse(module)
    assert isinstance(fused, Branched)
    check_form(fused, module, task.shape, 2, 3)


def scaled() -> nn.Module:
    module = Own(lambda m, x: m.c(x.flatten(1)) * m.scale, c=nn.Linear(192, 5))
    module.scale = nn.Parameter(torch.ones(1))
    return module


def shared_over(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = F.relu(y, inplace=True)
    return m.c((z + y).flatten(1))


UNREADABLE: dict[str, nn.Module] = {
    "looks at numbers": Own(lambda m, x: m.c(x.flatten(1)) if x.sum() > 0 else m.c(-x.flatten(1)), c=nn.Linear(192, 5)),
    "a parameter outside": scaled(),
    "a factor": Own(lambda m, x: 2 * m.c(x.flatten(1)), c=nn.Linear(192, 5)),
    "alpha": Own(lambda m, x: m.c(torch.add(x, m.d(x), alpha=0.5).flatten(1)), d=nn.Conv2d(3, 3, 1), c=nn.Linear(192, 5)),
    "over a value used elsewhere": Own(shared_over, **layers("a", c=nn.Linear(384, 5))),
    "a fixed view": Own(lambda m, x: m.c(x.view(-1, 192)), c=nn.Linear(192, 5)),
    "a layer left out": Own(lambda m, x: m.c(x.flatten(1)), **layers("a", c=nn.Linear(192, 5))),
    "a layer for nothing": Own(lambda m, x: (m.a(x), m.c(x.flatten(1)))[1], **layers("a", c=nn.Linear(192, 5))),
    "a layer twice": Own(lambda m, x: m.c((x + m.d(m.d(x))).flatten(1)), d=nn.Conv2d(3, 3, 1), c=nn.Linear(192, 5)),
    "dropout": Own(lambda m, x: m.c(F.dropout(x, 0.5).flatten(1)), c=nn.Linear(192, 5)),
    "noise": Own(lambda m, x: m.c((x + torch.randn_like(x)).flatten(1)), c=nn.Linear(192, 5)),
    "sizes that follow the image": Own(lambda m, x: m.c(F.max_pool2d(x, x.shape[2]).flatten(1)), c=nn.Linear(3, 5)),
    "dilated in a branch": Own(lambda m, x: m.c((x + m.d(x)).flatten(1)), d=nn.Conv2d(3, 3, 3, padding=2, dilation=2), c=nn.Linear(192, 5)),
    "norm of vectors in a branch": Own(
        lambda m, x: m.c((lambda h: h + m.n(h))(m.d(x.flatten(1)))), d=nn.Linear(192, 6), n=nn.GroupNorm(2, 6), c=nn.Linear(6, 5)
    ),
    "two outputs": Own(lambda m, x: (m.c(x.flatten(1)), x), c=nn.Linear(192, 5)),  # type: ignore[arg-type,return-value]
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_whatever_does_more_has_no_fused_form(name: str) -> None:
    assert fuse(UNREADABLE[name]) is None


def test_reading_a_model_changes_nothing_that_other_threads_see() -> None:
    before, seen = nn.Module.__call__, []
    module = Own(lambda m, x: (seen.append(nn.Module.__call__), m.c((x + m.d(x)).flatten(1)))[1], d=nn.Conv2d(3, 3, 1), c=nn.Linear(192, 5))
    assert fuse(module) is not None
    assert seen == [before]
    assert isinstance(module.d, nn.Conv2d)


@pytest.mark.parametrize(
    ("window", "stride", "margin"), [((3, 3), (1, 1), (1, 1)), ((7, 7), (2, 2), (3, 3)), ((2, 5), (3, 1), (0, 2)), ((1, 1), (2, 2), (0, 0))]
)
def test_columns_are_those_of_unfold_and_fold(window: tuple[int, int], stride: tuple[int, int], margin: tuple[int, int]) -> None:
    x = torch.randn(2, 5, 9, 8, generator=torch.Generator().manual_seed(0))
    expected = F.unfold(x, window, padding=margin, stride=stride)  # [b, C*window, pixels]
    frame = Frame(9, 8, 5, *margin)
    size = ((9 + 2 * margin[0] - window[0]) // stride[0] + 1, (8 + 2 * margin[1] - window[1]) // stride[1] + 1)
    given = F.pad(x.permute(0, 2, 3, 1), (0, 0, margin[1], margin[1], margin[0], margin[0])).contiguous()
    out = torch.empty(2, size[0] * size[1], expected.shape[1])
    kernels_columns.columns(frame, window, stride, size, False)(given.data_ptr(), out.data_ptr(), 2)
    assert torch.equal(out, expected.transpose(1, 2))
    back = torch.zeros_like(given)
    kernels_columns.columns(frame, window, stride, size, True)(back.data_ptr(), out.data_ptr(), 2)
    inner = back[:, margin[0] : 9 + margin[0], margin[1] : 8 + margin[1]].permute(0, 3, 1, 2)
    torch.testing.assert_close(inner, F.fold(expected, (9, 8), window, padding=margin, stride=stride))


def test_clients_of_a_large_model_are_trained_one_after_the_other(small: Callable[..., Scenario], monkeypatch: pytest.MonkeyPatch) -> None:
    world = set_up(small(model="cnn", clients={"count": 5, "train": {"momentum": 0.9, "lr": 0.05, "epochs": 2}})).world
    chunk = chunk_of(world, REGISTRY.make("behaviour", "honest"))
    together, seen, blocks = train(world, chunk), [], cohort._train_blocks

    def noted(world: Any, chunk: Any, ready: list[Any], block: Tensor | None = None) -> Any:
        seen.append(len(ready))
        return blocks(world, chunk, ready, block)

    monkeypatch.setattr(cohort, "_train_blocks", noted)
    monkeypatch.setattr(cohort, "ALONE_ABOVE", world.layout.size - 1)
    alone = train(world, chunk)
    assert seen == [1] * 5
    torch.testing.assert_close(by_client(alone), by_client(together), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(alone.losses, together.losses)
    assert alone.clients == together.clients


def test_branches_are_fused_where_they_can_be(small: Callable[..., Scenario]) -> None:
    world = set_up(small(model="resnet18")).world
    assert choose_path(world, Behaviour()) == "fused"
    assert choose_path(world, REGISTRY.make("behaviour", "fedprox")) == "loop"  # with a loss of its own, and too large for vmap
    assert choose_path(dataclasses.replace(world, precision="bfloat16"), Behaviour()) == "loop"
    assert choose_path(dataclasses.replace(world, precision="bfloat16", path="fused"), Behaviour()) == "vmap"
    assert choose_path(dataclasses.replace(world, device="cuda"), Behaviour()) == "vmap"
