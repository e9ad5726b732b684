from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from fedtrust.data.base import Task
from fedtrust.errors import InputError
from fedtrust.models.build import build

TASK = Task("characters", (12,), 7)
MODELS = {"gru": {"embedding": 5, "hidden": 6}, "char-transformer": {"width": 8, "heads": 2, "layers": 2}}


def text(rows: int, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 7, (rows, length), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_looks_ahead_and_a_beginning_is_enough(name: str) -> None:
    model = build(name, MODELS[name], TASK, 1)
    x = text(3)
    whole = model(x)
    assert whole.shape == (3, 12, 7)
    other = x.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 7
    torch.testing.assert_close(model(other)[:, :5], whole[:, :5])
    assert not torch.allclose(model(other)[:, 5:], whole[:, 5:])
    torch.testing.assert_close(model(x[:, :4]), whole[:, :4])


@pytest.mark.parametrize("name", MODELS)
def test_every_character_so_far_counts(name: str) -> None:
    model = build(name, MODELS[name], TASK, 1)
    x = text(2)
    for place in range(6):
        other = x.clone()
        other[:, place] = (other[:, place] + 1) % 7
        assert not torch.allclose(model(other)[:, 5], model(x)[:, 5], atol=1e-6), place


@pytest.mark.parametrize("name", MODELS)
def test_many_models_at_once_are_each_alone(name: str) -> None:
    models = [build(name, MODELS[name], TASK, seed) for seed in (1, 2, 3)]
    x = torch.stack([text(4), text(4).flip(0), text(4)])
    stacked = {key: torch.stack([dict(m.named_parameters())[key].detach() for m in models]) for key, _ in models[0].named_parameters()}
    together = vmap(lambda parameters, x: functional_call(models[0], parameters, (x,)))(stacked, x)
    for i, model in enumerate(models):
        torch.testing.assert_close(together[i], model(x[i]), atol=1e-5, rtol=1e-4)


def test_the_recurrent_layer_is_pytorchs() -> None:
    """The same weights in nn.GRU give the same numbers (it has one bias more in the other gates, here 0)."""
    model = build("gru", MODELS["gru"], TASK, 1)
    reference = nn.GRU(5, 6, batch_first=True)
    own = dict(model.named_parameters())
    with torch.no_grad():
        reference.weight_ih_l0.copy_(own["given.weight"])
        reference.weight_hh_l0.copy_(own["kept.weight"])
        reference.bias_ih_l0.copy_(own["given.bias"])
        reference.bias_hh_l0.copy_(own["kept.bias"])
        states, _ = reference(nn.functional.embedding(text(3), own["embedding.weight"]))
        wanted = nn.functional.linear(states, own["head.weight"], own["head.bias"])
    torch.testing.assert_close(model(text(3)), wanted, atol=1e-6, rtol=1e-5)


def test_attention_is_pytorchs() -> None:
    block = build("char-transformer", MODELS["char-transformer"], TASK, 1).get_submodule("blocks.0")
    h = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    own = dict(block.named_parameters())
    normed = nn.functional.layer_norm(h, (8,))
    query, key, value = (
        part.view(2, 12, 2, 4).transpose(1, 2)
        for part in nn.functional.linear(normed, own["asked.weight"], own["asked.bias"]).chunk(3, dim=-1)
    )
    seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).reshape(2, 12, 8)
    middle = h + nn.functional.linear(seen, own["mixed.weight"], own["mixed.bias"])
    wide = nn.functional.gelu(nn.functional.linear(nn.functional.layer_norm(middle, (8,)), own["wide.weight"], own["wide.bias"]))
    wanted = middle + nn.functional.linear(wide, own["narrow.weight"], own["narrow.bias"])
    torch.testing.assert_close(block(h), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_text_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="reads characters, but the task is a classification"):
        build(name, {}, Task("classification", (12,), 7), 1)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(InputError, match="heads: 3 heads do not divide a width of 8"):
        build("char-transformer", {"width": 8, "heads": 3}, TASK, 1)
