"""Subspaces of gradients: how much each method finds, and what it does with odd matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ext.functional import (
    dequantize,
    gaussian_projection,
    gradient_subspace,
    low_rank_update,
    project_back,
    project_gradient,
    quantize,
)

SHAPES = ((40, 24), (24, 40))


def matrix(shape: tuple[int, int], decay: float = 0.5) -> Tensor:
    """Singular values that fall by a power, as those of gradients do."""
    short = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], short))[0]
    right = torch.linalg.qr(torch.randn(shape[1], short))[0]
    return (left * torch.arange(1, short + 1).float() ** -decay) @ right.T


def energy(grad: Tensor, basis: Tensor) -> float:
    """The share of the most that a subspace of this rank can keep of the squares."""
    values = torch.linalg.svdvals(grad)[: len(basis)]
    return float(project_gradient(grad, basis).square().sum() / values.square().sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_svd_finds_all_there_is(shape: tuple[int, int]) -> None:
    grad = matrix(shape)
    assert energy(grad, gradient_subspace(grad, 6, method="svd")) > 1 - 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_others_find_nearly_all(shape: tuple[int, int]) -> None:
    grad = matrix(shape)
    assert energy(grad, gradient_subspace(grad, 6, method="randomized")) > 0.97
    before = gradient_subspace(grad + 0.05 * matrix(shape), 6)
    found = gradient_subspace(grad, 6, method="iteration", previous=before)
    assert energy(grad, found) > 0.97
    assert energy(grad, found) > energy(grad, before)


@pytest.mark.parametrize("method", ["svd", "randomized", "iteration"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_basis_is_orthonormal_and_sorted(method: str, shape: tuple[int, int]) -> None:
    grad = matrix(shape)
    basis = gradient_subspace(grad, 6, method=method, previous=gradient_subspace(grad, 6))
    torch.testing.assert_close(basis @ basis.T, torch.eye(6), atol=1e-5, rtol=0)
    sizes = project_gradient(grad, basis).norm(dim=0)
    assert (sizes[:-1] >= sizes[1:] - 1e-5).all()


@pytest.mark.parametrize("method", ["randomized", "iteration"])
def test_vectors_keep_their_signs(method: str) -> None:
    grad = matrix((40, 24))
    first = gradient_subspace(grad, 6)
    for previous in (first, -first):
        found = gradient_subspace(grad, 6, method=method, previous=previous)
        assert ((found * previous).sum(1) > 0).all()


@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_gradients_of_low_rank_pass_whole(method: str) -> None:
    grad = matrix((40, 3)) @ matrix((3, 24))
    basis = gradient_subspace(grad, 5, method=method)
    found = project_back(project_gradient(grad, basis), basis, grad.shape)
    torch.testing.assert_close(found, grad, atol=1e-5, rtol=0)


def test_random_projections_are_the_same_wherever_they_are_made() -> None:
    found = gaussian_projection(4, 10, seed=3, step=2, stream=1)
    other = gaussian_projection(4, 10, seed=3, step=2, stream=1, device="cpu", dtype=torch.float64)
    assert torch.equal(found, gaussian_projection(4, 10, seed=3, step=2, stream=1))
    torch.testing.assert_close(found.double(), other, rtol=0, atol=1e-6)
    for seed, step, stream in ((4, 2, 1), (3, 1, 1), (3, 2, 0)):
        assert not torch.equal(
            found, gaussian_projection(4, 10, seed=seed, step=step, stream=stream)
        )


def test_random_projections_keep_norms_on_average() -> None:
    x = matrix((50, 20))
    kept = [
        project_gradient(x, gaussian_projection(5, 20, seed=s)).square().sum() for s in range(200)
    ]
    ratios = torch.stack(kept) / x.square().sum()
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / 200**0.5


def test_codes_of_four_bits_hardly_move_a_subspace() -> None:
    grad = matrix((40, 24), decay=1.0)
    basis = gradient_subspace(grad, 6)
    rounded = dequantize(quantize(basis, "int4", block_size=256))
    straight = torch.linalg.qr(rounded.T)[0].T
    assert 0.98 < energy(grad, straight) < 1


@pytest.mark.parametrize(
    ("rank", "method", "hint"),
    [(0, "svd", "rank=0"), (25, "svd", "rank=25"), (2, "qr", "subspace='qr'")],
)
def test_wrong_subspaces_are_refused(rank: int, method: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        gradient_subspace(matrix((40, 24)), rank, method=method)


def test_a_form_that_there_is_not_is_refused() -> None:
    zero = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="form='lora'"):
        low_rank_update(torch.ones(4, 2), torch.ones(1, 2), zero, zero, 1, form="lora")
