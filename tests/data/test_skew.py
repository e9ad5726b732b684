from __future__ import annotations

import pickle

import pytest
import torch

from fedtrust.data.base import SkewFn, Task
from fedtrust.data.skew import Contrast, Noise, Rotation, contrast, noise, rotation
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY

IMAGES = Task("classification", (1, 8, 8), 10, low=0.0, high=1.0)
TABLE = Task("classification", (30,), 2)


def batch(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["rotation", "noise", "contrast"])
def test_a_skew_is_one_deterministic_picklable_function_a_client_that_changes_things(name: str) -> None:
    make = REGISTRY.make("feature-skew", name)
    fns, again, other = make(6, IMAGES, 1), make(6, IMAGES, 1), make(6, IMAGES, 2)
    assert len(fns) == 6
    assert len(set(fns)) == 6
    assert all(isinstance(fn, SkewFn) for fn in fns)
    assert fns == again
    assert fns != other
    x = batch(5, 1, 8, 8)
    before = x.clone()
    for fn in fns:
        y = fn(x)
        assert torch.equal(x, before)
        assert y.shape == x.shape
        assert y.dtype == torch.float32
        assert y.min() >= 0
        assert y.max() <= 1
        assert torch.equal(y, fn(x))
        assert torch.equal(y, pickle.loads(pickle.dumps(fn))(x))
    # at most one client of an even spread may be left as it is (angle 0)
    assert sum(torch.equal(fn(x), x) for fn in fns) <= 1


@pytest.mark.parametrize("name", ["rotation", "noise", "contrast"])
def test_one_client_gets_the_full_severity(name: str) -> None:
    (fn,) = REGISTRY.make("feature-skew", name)(1, IMAGES, 0)
    value = {"rotation": lambda: fn.degrees, "noise": lambda: fn.std, "contrast": lambda: fn.factor}[name]()
    assert value == pytest.approx({"rotation": 45.0, "noise": 0.3, "contrast": 0.25}[name])


def test_severities_are_evenly_spread() -> None:
    assert sorted(fn.degrees for fn in rotation(5, IMAGES, 0, max_degrees=30.0)) == [-30, -15, 0, 15, 30]
    assert sorted(fn.std for fn in noise(4, IMAGES, 0, max_std=0.4)) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert sorted(fn.factor for fn in contrast(4, IMAGES, 0, min_contrast=0.2)) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    # dealt by the seed: the client's number says nothing
    assert [fn.std for fn in noise(20, IMAGES, 0)] != sorted(fn.std for fn in noise(20, IMAGES, 0))


@pytest.mark.parametrize(("degrees", "quarters"), [(90, 1), (180, 2), (-90, -1), (0, 0)])
@pytest.mark.parametrize("side", [7, 8])
def test_a_quarter_turn_is_exact_and_anticlockwise(degrees: float, quarters: int, side: int) -> None:
    x = batch(3, 2, side, side)
    torch.testing.assert_close(Rotation(degrees)(x), torch.rot90(x, quarters, dims=(-2, -1)), atol=1e-5, rtol=0)


def test_rotation_keeps_shapes_on_oblong_images() -> None:
    """A disc stays a disc: the aspect ratio is accounted for."""
    h, w = 41, 81
    yy, xx = torch.meshgrid(torch.arange(h) - 20.0, torch.arange(w) - 40.0, indexing="ij")
    disc = (torch.sqrt(yy**2 + xx**2) < 12).float()[None, None]
    assert (Rotation(33.0)(disc) - disc).abs().mean() < 0.01
    bar = ((yy.abs() < 1.5) & (xx.abs() < 15)).float()[None, None]
    upright = ((xx.abs() < 1.5) & (yy.abs() < 15)).float()[None, None]
    torch.testing.assert_close(Rotation(90.0)(bar), upright, atol=1e-4, rtol=0)


def test_what_turns_into_view_has_the_lowest_value() -> None:
    x = torch.ones(1, 1, 9, 9)
    assert Rotation(45.0)(x)[0, 0, 0, 0] == 0
    assert Rotation(45.0, fill=-1.0)(x)[0, 0, 0, 0] == -1
    assert Rotation(45.0)(x)[0, 0, 4, 4] == pytest.approx(1)


def test_noise_has_its_deviation_and_is_not_shared() -> None:
    x = torch.zeros(400, 30)
    a, b = Noise(0.5, seed=1, client=0)(x), Noise(0.5, seed=1, client=1)(x)
    assert a.std() == pytest.approx(0.5, rel=0.03)
    assert abs(a.mean()) < 0.02
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.03
    assert not torch.equal(a, Noise(0.5, seed=2, client=0)(x))
    assert Noise(0.5, 1, 0, 0.0, 1.0)(x).min() == 0


def test_noise_is_for_tables_too_but_rotation_and_contrast_are_not() -> None:
    fns = noise(3, TABLE, 0)
    assert all(fn.low is None for fn in fns)
    assert fns[0](torch.zeros(4, 30)).shape == (4, 30)
    for skew in (rotation, contrast):
        with pytest.raises(InputError, match=r"needs images; this source has samples of shape \[30\]"):
            skew(3, TABLE, 0)


def test_contrast_scales_about_each_images_mean() -> None:
    x = batch(3, 2, 8, 8)
    y = Contrast(0.25)(x)
    torch.testing.assert_close(y.mean((-2, -1)), x.mean((-2, -1)))
    torch.testing.assert_close(y.std((-2, -1)), 0.25 * x.std((-2, -1)))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("rotation", {"max_degree": 10.0}, "did you mean 'max_degrees'"),
        ("rotation", {"max_degrees": 181.0}, "less than or equal to 180"),
        ("noise", {"std": 1.0}, "did you mean 'max_std'"),
        ("noise", {"max_std": 0.0}, "greater than 0"),
        ("contrast", {"min_contrast": 1.0}, "less than 1"),
    ],
)
def test_wrong_parameters_are_refused(name: str, params: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        REGISTRY.make("feature-skew", name, params)


def test_the_bare_interface_says_so() -> None:
    with pytest.raises(TypeError, match="must say what it does"):
        SkewFn()(torch.zeros(1))
