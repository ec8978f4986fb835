"""Muon's iteration beside torch's own, its precision and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_accurate
from torch.optim import _muon

from lightning_ext.functional import newton_schulz, orthogonalize

MUON = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_in_bfloat16_it_is_torchs_to_the_rounding(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    truth = newton_schulz(x.double())
    torchs = _muon._zeropower_via_newtonschulz(x, MUON, 5, 1e-7).float()
    mine = newton_schulz(x, dtype=torch.bfloat16)
    assert mine.dtype == torch.float32
    assert_accurate(mine.bfloat16(), truth, torch_out=torchs.bfloat16())


def test_on_a_cpu_half_precision_is_multiplied_in_float32() -> None:
    x = torch.randn(24, 40).bfloat16()
    assert newton_schulz(x).equal(newton_schulz(x.float()).bfloat16())


def test_five_steps_bring_singular_values_near_to_one() -> None:
    values = torch.logspace(-2, 0, 60, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))[0]
    found = (left.T @ newton_schulz(left * values)).diagonal()[values >= 0.01 * values.norm()]
    assert len(found) > 30
    assert found.min() >= 0.68
    assert found.max() <= 1.14


def test_the_scale_of_x_does_not_matter_nor_does_the_input_change() -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    before = x.clone()
    assert newton_schulz(x * 64).equal(newton_schulz(x))
    assert x.equal(before)


@pytest.mark.parametrize("scale", [1e-30, 1e20, 1e37])
def test_finite_matrices_of_any_size_have_a_norm(scale: float) -> None:
    x = scale * torch.randn(2, 9, 4)
    truth = newton_schulz(x.double() / scale)
    assert_accurate(newton_schulz(x, eps=1e-38), truth)


def test_eps_is_the_smallest_norm_that_is_divided_by() -> None:
    x, steps = torch.tensor([[3e-9, 0.0], [0.0, 4e-9]]), {"coefficients": (1.0, 0.0, 0.0)}
    torch.testing.assert_close(newton_schulz(x, **steps), x / 1e-7)
    torch.testing.assert_close(newton_schulz(x, eps=1e-8, **steps), x / 1e-8)
    torch.testing.assert_close(newton_schulz(x, eps=1e-9, **steps), x / 5e-9)


def test_a_stack_is_its_matrices() -> None:
    x = torch.randn(2, 3, 9, 4, dtype=torch.float64)
    found = newton_schulz(x)
    assert found.shape == x.shape
    for mine, alone in zip(found.flatten(0, 1), x.flatten(0, 1), strict=True):
        assert_accurate(mine, newton_schulz(alone))


def test_zeros_and_nothing_stay_so() -> None:
    assert newton_schulz(torch.zeros(3, 4)).eq(0).all()
    for shape in ((0, 4), (4, 0), (0, 3, 4)):
        assert newton_schulz(torch.zeros(shape)).shape == shape


def test_it_maps_and_differentiates() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    assert_accurate(torch.vmap(newton_schulz)(x), newton_schulz(x))
    found = torch.func.grad(lambda x: newton_schulz(x).sum())(x)
    (expected,) = torch.autograd.grad(newton_schulz(x.requires_grad_()).sum(), x)
    assert_accurate(found, expected)


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(3), {}, ValueError, "give real matrices"),
        (X.int(), {}, ValueError, "give real matrices"),
        (X, {"steps": 0}, ValueError, "steps must be at least 1"),
        (X, {"eps": 0.0}, ValueError, "eps above 0"),
        (X, {"coefficients": (1.0, 2.0)}, ValueError, "give a, b and c"),
        (X, {"dtype": torch.int32}, TypeError, "real floating dtype"),
    ],
)
def test_what_does_not_fit_is_refused(
    x: torch.Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        newton_schulz(x, **options)


@pytest.mark.parametrize("shape", [(24, 40), (24, 60)])
@pytest.mark.parametrize("function", [newton_schulz, orthogonalize])
def test_autocast_does_not_round_the_products(
    function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, int]
) -> None:
    x = torch.randn(shape)
    expected = function(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(x).equal(expected)
