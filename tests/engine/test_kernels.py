"""The machine code of convolutions, pools and linear layers, against PyTorch in float64."""

from __future__ import annotations

import llvmlite.binding as llvm
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtrust.engine import fused as fused_module
from fedtrust.engine import jit, kernels, kernels_dense
from fedtrust.engine.fused import fuse
from fedtrust.engine.kernels import Frame, Window
from fedtrust.engine.native_layers import each
from tests.engine.test_fused import check, gradients, stack_of, stacked

#: Other processors' register files; their tiles run here too, slower.
HOSTS = {"sse": (4, 16), "neon": (4, 32), "avx": (8, 16), "avx512": (16, 32)}


def host_like(name: str) -> jit.Host:
    lanes, registers = HOSTS[name]
    return jit.host()._replace(lanes=lanes, registers=registers)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_frame(x: Tensor, frame: Frame) -> Tensor:
    """[b, C, H, W] the way a frame lies in memory."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, frame.left, frame.left, frame.top, frame.top)).contiguous()


def out_of_frame(x: Tensor, frame: Frame) -> Tensor:
    inner = x[:, frame.top : frame.high - frame.top, frame.left : frame.wide - frame.left]
    return inner.permute(0, 3, 1, 2)


#: inputs, outputs, window rows and columns, padding, height, width, margins of the output
SHAPES = [
    (1, 16, 5, 5, (2, 2), 28, 28, (0, 0)),
    (16, 16, 3, 3, (1, 1), 14, 14, (1, 1)),
    (3, 20, 3, 5, (0, 4), 9, 11, (2, 0)),
    (5, 7, 1, 1, (0, 0), 6, 4, (0, 0)),
    (2, 33, 4, 2, (3, 1), 5, 13, (0, 3)),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("host", HOSTS)
def test_a_convolution_and_its_gradients(shape: tuple[int, int, int, int, tuple[int, int], int, int, tuple[int, int]], host: str) -> None:
    inputs, outputs, rows, columns, padding, height, width, margins = shape
    x, w, c = rand(3, inputs, height, width), rand(outputs, inputs, rows, columns, seed=1), rand(outputs, seed=2)
    leaves = [v.double().requires_grad_() for v in (x, w, c)]
    expected = F.conv2d(*leaves, padding=padding)
    inside, window = Frame(height, width, inputs, *padding), Window(rows, columns, *padding)
    outside = Frame(*expected.shape[2:], outputs, *margins)
    given, weight = in_frame(x, inside), w.permute(2, 3, 1, 0).contiguous()
    out = torch.full((3, outside.high, outside.wide, outputs), 5.0)
    run = kernels.write_convolution(inside, outside, window, True, host_like(host)).compiled()
    run(given.data_ptr(), weight.data_ptr(), c.data_ptr(), out.data_ptr(), 3)
    torch.testing.assert_close(out_of_frame(out, outside), expected.float(), atol=1e-4, rtol=1e-5)
    assert out.numel() - expected.numel() == int((out == 5.0).sum())  # the margins are left alone

    g = rand(*expected.shape, seed=3)
    wanted = torch.autograd.grad(expected, leaves[1:], g.double())
    above = in_frame(g, outside)
    gw, gc = torch.full((rows, columns, inputs, outputs), float("nan")), torch.full((outputs,), float("nan"))
    run = kernels.write_weight_gradient(inside, outside, window, True, host_like(host)).compiled()
    run(given.data_ptr(), above.data_ptr(), gw.data_ptr(), gc.data_ptr(), 3)
    torch.testing.assert_close(gw.permute(3, 2, 0, 1), wanted[0].float(), atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(gc, wanted[1].float(), atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(("samples", "inputs", "outputs"), [(1, 1, 1), (10, 784, 64), (5, 30, 2), (7, 19, 33), (13, 8, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients(samples: int, inputs: int, outputs: int, bias: bool) -> None:
    models, apart = 3, inputs * outputs + outputs + 5
    block, grads = rand(models, apart), torch.full((models, apart), 9.0)
    w, c = block[:, : inputs * outputs].view(models, outputs, inputs), block[:, inputs * outputs : inputs * outputs + outputs]
    x, g = rand(models, samples, inputs, seed=1), rand(models, samples, outputs, seed=2)
    leaves = [v.double().detach().requires_grad_() for v in (x, w, c)]
    expected = leaves[0] @ leaves[1].transpose(1, 2) + (leaves[2].unsqueeze(1) if bias else 0)
    gx, gw = torch.autograd.grad(expected, leaves[:2], g.double())
    out, back, size = torch.empty(models, samples, outputs), torch.empty(models, samples, inputs), (samples, inputs, outputs)
    gradients = grads[:, : inputs * outputs], grads[:, inputs * outputs :]
    each(models, (kernels_dense.dense(*size, bias), x, w, c, out))
    each(models, (kernels_dense.dense_weight_gradient(*size, bias), x, g, *gradients))
    each(models, (kernels_dense.dense_input_gradient(*size), g, w, back))
    torch.testing.assert_close(out, expected.float(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(back, gx.float(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(grads[:, : inputs * outputs].view_as(w), gw.float(), atol=1e-4, rtol=1e-5)
    shift = grads[:, inputs * outputs : inputs * outputs + outputs]
    torch.testing.assert_close(shift, g.sum(1) if bias else torch.full_like(shift, 9.0), atol=1e-4, rtol=1e-5)
    assert bool((grads[:, -5:] == 9.0).all())  # what lies behind is not touched


@pytest.mark.parametrize(("channels", "side", "height", "width"), [(16, 2, 28, 28), (5, 3, 10, 7), (19, 2, 5, 4)])
@pytest.mark.parametrize("relu", [True, False])
def test_a_pool_takes_the_place_that_pytorch_takes(channels: int, side: int, height: int, width: int, relu: bool) -> None:
    x = rand(2, channels, height, width).round()  # whole numbers: many ties
    x[0, 0, 0, 1] = float("nan")
    leaf = x.clone().requires_grad_()
    expected = F.max_pool2d(leaf, side)
    expected = expected.relu() if relu else expected
    inside, outside = Frame(height, width, channels, 1, 2), Frame(height // side, width // side, channels, 2, 1)
    out, places = (
        torch.zeros(2, outside.high, outside.wide, channels),
        torch.empty(2, height // side, width // side, channels, dtype=torch.uint8),
    )
    kernels.pool(inside, outside, side, relu)(in_frame(x, inside).data_ptr(), out.data_ptr(), places.data_ptr(), 2)
    torch.testing.assert_close(out_of_frame(out, outside), expected, equal_nan=True, atol=0, rtol=0)
    g = rand(*expected.shape, seed=1)
    (wanted,) = torch.autograd.grad(expected, leaf, g)
    above, gx = in_frame(g, outside), torch.zeros(2, inside.high, inside.wide, channels)
    kernels.pool_gradient(inside, outside, side)(above.data_ptr(), places.data_ptr(), gx.data_ptr(), 2)
    torch.testing.assert_close(out_of_frame(gx, inside), wanted, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        ((3, 9, 11), [nn.Conv2d(3, 5, 3, padding=(2, 0)), nn.ReLU(), nn.MaxPool2d(3), nn.Conv2d(5, 18, 2), nn.Flatten(), nn.Linear(72, 4)]),
        ((2, 7, 6), [nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(2, 17, 3, padding=2), nn.ReLU(), nn.Conv2d(17, 4, 3), nn.Flatten()]),
        ((1, 8, 8), [nn.Conv2d(1, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()]),
        ((1, 8, 8), [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.ReLU(), nn.Identity(), nn.Conv2d(8, 4, 3), nn.AvgPool2d(2), nn.Flatten()]),
        ((2, 11, 10), [nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 1), nn.Flatten()]),
        (
            (1, 10, 10),
            [nn.Conv2d(1, 6, 3, bias=False), nn.MaxPool2d(2), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Flatten()],
        ),
        ((3, 2, 2), [nn.Flatten(), nn.Linear(12, 300), nn.ReLU(), nn.Linear(300, 3)]),
    ],
    ids=["rest-of-a-pool", "pool-first", "smooth", "relu-twice", "pool-tanh-pool", "groupnorm-between", "linear"],
)
def test_layers_with_and_without_machine_code_fit_together(shape: tuple[int, ...], layers: list[nn.Module]) -> None:
    module = stack_of(*layers)
    check(module, shape)
    check(module, shape, k=1, b=60)  # too many samples for the linear kernels


def test_another_image_size_gets_buffers_of_its_own() -> None:
    module = stack_of(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten())
    fused = fuse(module)
    assert fused is not None
    values = stacked(module, 2)
    network = fused.on(values, {n: torch.empty_like(v) for n, v in values.items()})
    for size in (6, 4, 6):
        x = rand(2, 3, 1, size, size)
        expected = torch.stack([F.conv2d(x[i], values["0.weight"][i], values["0.bias"][i], padding=1).flatten(1) for i in range(2)])
        torch.testing.assert_close(network.forward(x)[0], expected, atol=1e-5, rtol=1e-5)


def test_without_llvm_the_librarys_convolutions_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stack_of(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    fused = fuse(module)
    assert fused is not None
    values, x = stacked(module, 2), rand(2, 3, 1, 6, 6)
    outputs, grads = gradients(fused, values, x, lambda out: out.square().sum())
    monkeypatch.setattr(fused_module, "no_native", lambda: "RuntimeError: no such processor")
    monkeypatch.setattr(kernels, "convolution", None)  # whoever asks for it fails
    others, theirs = gradients(fused, values, x, lambda out: out.square().sum())
    torch.testing.assert_close(outputs, others, atol=1e-5, rtol=1e-5)
    for name in grads:
        torch.testing.assert_close(grads[name], theirs[name], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("problem", [RuntimeError("no target for this triple"), OSError("cannot map executable memory")])
def test_a_machine_without_code_says_why(problem: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise problem

    monkeypatch.setattr(llvm, "initialize_native_target", fail)
    jit.host.cache_clear()
    try:
        assert str(problem) in jit.missing()
    finally:
        monkeypatch.undo()
        jit.host.cache_clear()
    assert jit.missing() == ""


def test_wide_registers_are_used_where_there_are_some() -> None:
    """Made, not run: this machine may not have them."""
    wide = jit.of("skylake-avx512", {"avx512f": True, "avx512vl": True, "avx": True, "avx2": True, "fma": True})
    assert (wide.lanes, wide.tile) == (16, 14)
    if not llvm.get_default_triple().startswith("x86_64"):
        pytest.skip("another architecture")
    code = kernels.write_convolution(Frame(14, 14, 16, 1, 1), Frame(14, 14, 16), Window(3, 3, 1, 1), True, wide)
    assembly = jit.target(wide).emit_assembly(code.optimised())
    assert assembly.count("vfmadd") >= 14
    assert "zmm" in assembly


@pytest.mark.parametrize(("count", "most"), [(28, 6), (14, 6), (5, 6), (1, 1), (48, 5), (7, 3)])
def test_pieces_are_equal_and_cover_everything(count: int, most: int) -> None:
    covered = [at + i for at, size, many in jit.evenly(count, most) for i in range(size * many)]
    sizes = [size for _, size, many in jit.evenly(count, most) for _ in range(many)]
    assert covered == list(range(count))
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-count // most)
