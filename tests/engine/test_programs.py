"""Steps that were noted once are made again for other models, elsewhere in memory, by any thread."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from test_fused import DIGITS, MNIST, stacked
from torch import Tensor, nn

from fedtrust.engine import jit, kernels
from fedtrust.engine.fused import Bound, Fused, fuse
from fedtrust.engine.native_layers import NotStraightError
from fedtrust.engine.native_program import Program, Replayed
from fedtrust.models.build import build

pytestmark = pytest.mark.skipif(bool(jit.missing()), reason="no machine code here")


def step(form: Fused, values: dict[str, Tensor], x: Tensor) -> tuple[Bound | Replayed, dict[str, Tensor]]:
    """One step with the gradient 2 * outputs: the network, and the outputs and gradients by name."""
    sizes = [value[0].numel() for value in values.values()]
    block = torch.full((len(x), sum(sizes)), float("nan"))
    into = {n: part.view(v.shape) for (n, v), part in zip(values.items(), block.split(sizes, dim=1), strict=True)}
    network = form.on(values, into)
    outputs, tape = network.forward(x)
    found = {"outputs": outputs.clone()}
    network.backward(tape, 2 * outputs)
    return network, found | into


def same(found: dict[str, Tensor], module: nn.Module, values: dict[str, Tensor], x: Tensor) -> None:
    for model in range(len(x)):
        own = {n: v[model].detach().requires_grad_() for n, v in values.items()}
        outputs = torch.func.functional_call(module, own, (x[model],))
        torch.testing.assert_close(found["outputs"][model], outputs.detach(), atol=1e-5, rtol=1e-5)
        for name, grad in zip(own, torch.autograd.grad(outputs.square().sum(), list(own.values())), strict=True):
            torch.testing.assert_close(found[name][model], grad, atol=1e-4, rtol=1e-4)


def fused_of(module: nn.Module) -> Fused:
    form = fuse(module)
    assert isinstance(form, Fused)
    return form


@pytest.mark.parametrize("name", ["cnn", "cnn-large", "mlp", "logistic"])
def test_other_models_elsewhere_take_the_same_steps(name: str) -> None:
    module = build(name, {}, DIGITS, 0)
    form, held = fused_of(module), []
    for seed, models, samples in ((0, 3, 4), (1, 3, 4), (2, 2, 4), (3, 1, 4), (4, 3, 2), (5, 4, 4)):
        values, x = stacked(module, models, seed), torch.rand(models, samples, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        network, found = step(form, values, x)
        assert isinstance(network, Replayed)
        same(found, module, values, x)
        held.append((values, x, found, network))  # so that nothing stands where something stood before


def test_steps_of_fewer_models_keep_no_buffers_of_their_own() -> None:
    module = build("cnn", {}, DIGITS, 0)
    form, held = fused_of(module), {}
    for models in (1, 3, 5, 2, 1, 4):
        network, _ = step(form, stacked(module, models), torch.rand(models, 4, 1, 8, 8))
        assert isinstance(network, Replayed)
        held = network._steps._found
    assert sorted(held) == [1, 2, 4, 5]
    places = {
        models: {b.data_ptr() for p in (found.there, found.back) for b in p.buffers} - {found.grad.data_ptr()}
        for models, found in held.items()
    }
    assert all(mine == places[5] for mine in places.values())


def test_images_may_lie_in_any_order() -> None:
    module = build("cnn", {}, DIGITS, 0)
    values, x = stacked(module, 2), torch.rand(2, 8, 8, 3).permute(0, 3, 1, 2).unsqueeze(2)
    assert not x.is_contiguous()
    same(step(fused_of(module), values, x)[1], module, values, x)


def test_a_layer_that_computes_with_pytorch_stays_out_of_programs() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 3))
    form, values = fused_of(module), stacked(module, 2)
    for samples in (60, 4, 60):  # too many for a linear layer's own machine code, and few enough
        x = torch.rand(2, samples, 1, 8, 8)
        network, found = step(form, values, x)
        assert isinstance(network, Replayed)
        same(found, module, values, x)
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))
    network, found = step(fused_of(smooth), values, x)
    assert isinstance(network, Bound)


def test_a_call_on_a_part_of_what_moves_cannot_be_followed() -> None:
    moving, buffer = torch.full((2, 8), -1.0), torch.full((2, 8), -1.0)
    with pytest.raises(NotStraightError):
        Program.of([(kernels.rectify(), moving[:, 1:], 7)], 2, [moving])
    program = Program.of([(kernels.rectify(), moving, 8), (kernels.rectify(), buffer[:, 1:], 7)], 2, [moving])
    there = torch.full((2, 8), -1.0)
    program.run(np.array([there.data_ptr()]))
    assert (moving.unique().tolist(), there.unique().tolist(), buffer.sum(1).tolist()) == ([-1.0], [0.0], [-1.0, -1.0])


def test_nan_passes_a_relu_as_in_pytorch() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3))
    values, x = stacked(module, 2), torch.rand(2, 4, 1, 8, 8)
    x[1, 2] = float("nan")
    found = step(fused_of(module), values, x)[1]["outputs"]
    assert torch.equal(found.isnan().any(-1), torch.tensor([[False] * 4, [False, False, True, False]]))


def test_threads_do_not_share_programs() -> None:
    module = build("cnn", {}, MNIST, 0)
    form, wrong = fused_of(module), []
    values = [stacked(module, 4, seed) for seed in range(2)]
    x = [torch.rand(4, 10, 1, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    alone = [step(form, values[i], x[i])[1] for i in range(2)]

    def work(i: int) -> None:
        for _ in range(20):
            found = step(form, values[i], x[i])[1]
            wrong.extend(name for name in found if not torch.equal(found[name], alone[i][name]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
