"""Newton–Schulz kernels: half of the tiles, symmetric to the bit, singular values, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from harness import assert_accurate, launches
from torch import Tensor

from lightning_ext import functional
from lightning_ext.kernels import newton_schulz
from lightning_ext.kernels._triton._newton_schulz import symmetric_product, symmetric_product_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextmanager
def operations() -> Iterator[list[int]]:
    """Collect the multiplications and additions that launches do, from their grids."""
    kind = type(symmetric_product_kernel)
    run, found = kind.run, []

    def counted(self: Any, *args: Any, grid: tuple[int], **kwargs: Any) -> Any:
        x = args[0]
        found.append(2 * grid[0] * kwargs["BLOCK"] ** 2 * x.shape[-1])
        return run(self, *args, grid=grid, **kwargs)

    kind.run = counted
    try:
        yield found
    finally:
        kind.run = run


def test_half_of_the_operations_are_done() -> None:
    count, size, width = 2, 320, 128  # 5 rows of tiles of 64
    x = torch.randn(count, size, width, device=DEVICE)
    with operations() as found:
        symmetric_product(x)
    whole = 2 * count * size * size * width
    assert found == [whole * (5 * 6 // 2) // 5**2]  # 15 of 25 tiles, not 25


def test_what_a_step_saves_is_what_is_said() -> None:
    x = torch.randn(640, 640, device=DEVICE)
    with operations() as found:
        newton_schulz(x, steps=1, fused=True)
    half, whole = 11 / 20, 2 * 640**3  # of 10 rows of tiles 55 of 100 are computed
    assert sum(found) == pytest.approx(2 * half * whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 17, 64, 65, 200])
def test_a_product_is_symmetric_to_the_bit(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(2, size, 40, device=DEVICE).to(dtype)
    found = symmetric_product(x)
    assert found.equal(found.mT)
    again = symmetric_product(found, a=found, alpha=0.5, beta=-2.0)
    assert again.equal(again.mT)


def test_a_product_is_alpha_x_xt_plus_beta_a() -> None:
    x, a = torch.randn(2, 70, 33, device=DEVICE), torch.randn(2, 70, 70, device=DEVICE)
    a = a + a.mT
    found = symmetric_product(x, a=a, alpha=0.5, beta=-2.0)
    assert_accurate(found, 0.5 * x.double() @ x.double().mT - 2 * a.double())


def singular_values(found: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return (left.T @ found.double() @ right).diagonal()


def test_singular_values_are_those_of_the_polynomial() -> None:
    left = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(90, 60, dtype=torch.float64))[0]
    values = torch.logspace(-2, 0, 60, dtype=torch.float64)
    found = newton_schulz((left * values @ right.T).float().to(DEVICE), fused=True)
    truth = values / values.norm()
    for _ in range(5):
        truth = 3.4445 * truth - 4.7750 * truth**3 + 2.0315 * truth**5
    assert_accurate(singular_values(found.cpu(), left, right).float(), truth)


def test_two_runs_are_the_same_to_the_bit_and_x_stays() -> None:
    x = torch.randn(2, 70, 33, device=DEVICE)
    before = x.clone()
    assert newton_schulz(x, fused=True).equal(newton_schulz(x, fused=True))
    assert x.equal(before)


def test_of_many_matrices_each_product_is_one_launch() -> None:
    with launches() as found:
        newton_schulz(torch.randn(6, 20, 24, device=DEVICE), steps=3, fused=True)
    assert found == ["symmetric_product_kernel"] * 6


def test_a_stack_may_have_more_matrices_than_a_second_axis_has_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grids: list[tuple[int, ...]] = []
    kind = type(symmetric_product_kernel)
    monkeypatch.setattr(kind, "run", lambda *_, grid, **__: grids.append(grid))
    symmetric_product(torch.empty(70_000, 65, 1, device=DEVICE))
    assert grids == [(70_000 * 3,)]


@pytest.mark.parametrize("scale", [1e-30, 1e20, 1e37])
def test_finite_matrices_of_any_size_have_a_norm(scale: float) -> None:
    x = torch.randn(2, 20, 24, device=DEVICE)
    found = newton_schulz(scale * x, eps=1e-38, fused=True)
    assert_accurate(found, newton_schulz((scale * x).double(), eps=1e-38, fused=False))


def test_where_a_gradient_is_asked_for_the_plain_operations_run() -> None:
    x = torch.randn(4, 5, device=DEVICE, requires_grad=True)
    with launches() as found:
        newton_schulz(x).sum().backward()
    assert found == []
    assert x.grad is not None
    with pytest.raises(RuntimeError, match="has no gradient"):
        newton_schulz(x, fused=True)


def test_it_compiles_as_one_graph() -> None:
    x = torch.randn(2, 6, 4, device=DEVICE)
    run = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), newton_schulz(x, fused=False))


def test_it_composes_with_transforms() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, device=DEVICE)
    assert_accurate(torch.vmap(newton_schulz)(x), functional.newton_schulz(x))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(3), {}, ValueError, "give real matrices"),
        (torch.ones(2, 3), {"steps": 0}, ValueError, "steps must be at least 1"),
        (torch.ones(2, 3).double(), {}, TypeError, "does not take torch.float64"),
        (torch.ones(2, 3), {"dtype": torch.float64}, TypeError, "dtype=torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_launch(
    x: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with launches() as found, pytest.raises(error, match=message):
        newton_schulz(x.to(DEVICE), **options, fused=True)
    assert found == []
