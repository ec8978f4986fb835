"""Norms of units: which units there are, dtypes, digits, gradients."""

from __future__ import annotations

import pytest
import torch

from lightning_ext.functional import unit_norms


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 4), (3, 1)),
        ((3, 4, 2, 2), (3, 1, 1, 1)),
        ((4,), (1,)),
        ((), ()),
        ((0,), (1,)),
        ((3, 0), (3, 1)),
        ((0, 3), (0, 1)),
    ],
)
def test_norms_broadcast_against_their_tensor(
    shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    x = torch.ones(shape)
    (norms,) = unit_norms([x])
    assert norms.shape == expected
    assert torch.broadcast_shapes(norms.shape, x.shape) == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    (norms,) = unit_norms([torch.full((2, 4096), 64.0, dtype=dtype)])
    assert norms.dtype == torch.float32
    assert norms.flatten().tolist() == [4096.0, 4096.0]


def test_complex_entries_count_real_and_imaginary_part() -> None:
    assert unit_norms([torch.tensor([3 + 4j])])[0].tolist() == [5]


def test_non_contiguous_entries_are_all_counted() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    torch.testing.assert_close(unit_norms([x.T])[0], x.norm(dim=0)[:, None])


@pytest.mark.parametrize("shape", [(3_000_000,), (2, 1_500_000)])
def test_long_units_keep_their_digits(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(
        unit_norms([x])[0].double(), unit_norms([x.double()])[0], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("width", [3, 100_000])
def test_gradient_at_zero_is_zero(width: int) -> None:
    x = torch.zeros(2, width, requires_grad=True)
    unit_norms([x])[0].sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_units_that_are_clipped_to_their_weights_have_the_norm_allowed() -> None:
    weights, gradients = [torch.randn(4, 3, 3)], [100 * torch.randn(4, 3, 3)]
    (allowed,) = [0.01 * x.clamp_min(1e-3) for x in unit_norms(weights)]
    (found,) = unit_norms(gradients)
    clipped = gradients[0] * (allowed / found).clamp_max(1)
    torch.testing.assert_close(unit_norms([clipped])[0], allowed)


def test_no_tensors_have_no_norms() -> None:
    assert unit_norms([]) == []
