"""Entries behind the 2³¹-th: rows, bits, matrices; what lies before them is never touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_ext import kernels
from lightning_ext.functional import FactoredState
from lightning_ext.kernels._triton._newton_schulz import symmetric_product

pytestmark = pytest.mark.usefixtures("lazy_memory", "last_program")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAR = 2**31


def room(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros: pages of a CPU that nobody has touched are."""
    make = torch.empty if DEVICE.type == "cpu" else torch.zeros
    return make(shape, dtype=dtype, device=DEVICE)


def test_norms_of_rows() -> None:
    x = room(FAR // 64 + 21, 64)
    x[-5:] = torch.arange(1.0, 6.0, device=DEVICE)[:, None]
    (found,) = kernels.unit_norms([x], fused=True)
    assert found.view(-1)[-5:].tolist() == [8.0, 16.0, 24.0, 32.0, 40.0]


@pytest.mark.parametrize("width", [0, 13], ids=["flat", "rows"])
def test_signs_become_bits(width: int) -> None:
    x = room(FAR // width + 300, width) if width else room(FAR + 2048 + 5)
    x.view(-1)[-2080:] = 1.0
    x.view(-1)[-2] = -1.0
    found = kernels.pack_signs(x, fused=True)
    place = (x.shape[-1] - 2) % 8
    assert found.view(-1)[-1] == 1 << place
    assert found.view(-1)[-2] == 0


def test_bits_become_signs() -> None:
    votes = room(1, FAR // 8 + 3, dtype=torch.uint8)
    votes[0, -3:] = torch.tensor([0, 255, 1], dtype=torch.uint8, device=DEVICE)
    found = kernels.unpack_votes(votes, 8 * votes.shape[-1], dtype=torch.float16, fused=True)
    assert found[-24:].tolist() == [1.0] * 8 + [-1.0] * 9 + [1.0] * 7


def test_bits_are_added_up() -> None:
    packed = room(3, FAR // 8 + 3, dtype=torch.uint8)
    packed[:, -3:] = torch.tensor([[0], [255], [1]], dtype=torch.uint8, device=DEVICE)
    found = kernels.sum_signs(packed, 8 * packed.shape[-1], fused=True)
    assert found[-8:].tolist() == [-1] + [1] * 7
    assert kernels.majority_vote(packed, fused=True)[..., -3:].tolist() == [[1, 1, 1]]


def test_products_of_a_stack() -> None:
    x = room(FAR // 256 + 1, 16, 16)
    x[-1] = torch.eye(16, device=DEVICE) * 3
    assert symmetric_product(x)[-1].equal(9 * torch.eye(16, device=DEVICE).half())


def test_adamp_projects_a_row() -> None:
    width, share = 2**14, 2**13
    shape = (FAR // width + 1, width)
    lists = [room(*shape), room(*shape), room(*shape), room(*shape)]
    weight, grad, mean, square = (x[-1] for x in lists)
    weight.fill_(1.0)
    grad[:share], grad[share:] = 1.0, -1.0  # orthogonal to the weights
    mean.fill_(1.0)  # the update is not
    square.fill_(1.0)
    alone = [[x[-1:].clone()] for x in lists]
    step = torch.tensor(3.0, device=DEVICE)
    for columns in ([[x] for x in lists], alone):
        kernels.adamp_update_(*columns, [step], lr=0.125, fused=True)
    for found, expected in zip(lists, alone, strict=True):
        assert found[-1, -1024:].equal(expected[0][0, -1024:])
    assert weight[-1] != 1.0


def test_came_moves_a_corner() -> None:
    rows, columns = 2**14 + 1, 2**17
    lists = [room(rows, columns) for _ in range(3)]
    for x, value in zip(lists, (1.0, 2.0, 0.0), strict=True):
        x[-1, -128:] = value
    state = FactoredState(*(torch.ones(n, device=DEVICE) for n in (rows, columns) * 2))
    kernels.came_update_(*([x] for x in lists), [state], lr=0.125, fused=True)
    weight, _, mean = (x[-1, -128:] for x in lists)
    assert mean.gt(0).all()
    assert mean.eq(mean[0]).all()
    assert weight.lt(1).all()
    assert weight.eq(weight[0]).all()
