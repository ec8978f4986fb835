"""Second moments in "int4" of some rows of a matrix, the maxima of whose columns are shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ext import functional, kernels
from lightning_ext.functional import QuantizedState, decode_state, encode_state

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, COLUMNS = 5, 140
OPS = ["adamw_update_", "lamb_update_", "adamp_update_"]


def _elsewhere(maxima: Tensor) -> Tensor:
    """As if another rank had rows whose squares reach from 0 to 2e-3."""
    return maxima.maximum(torch.linspace(0, 2e-3, COLUMNS, device=maxima.device))


def _lists(rows: int) -> list[list[Any]]:
    torch.manual_seed(0)
    shape = (rows, COLUMNS)
    weight, grad, mean = (torch.randn(shape, device=DEVICE) for _ in range(3))
    first = encode_state(mean * 1e-2, "int4")
    second = encode_state(mean.square() * 1e-3, "int4", signed=False)
    shared = second._replace(reduce=_elsewhere)
    return [[weight], [grad * 1e-2], [first], [shared], [torch.tensor(3.0, device=DEVICE)]]


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_takes_the_maxima_that_others_have(op: str) -> None:
    found, wanted, alone = (_lists(ROWS) for _ in range(3))
    alone[3] = [alone[3][0]._replace(reduce=None)]
    getattr(kernels, op)(*found, lr=0.01, fused=True)
    getattr(functional, op)(*wanted, lr=0.01)
    getattr(functional, op)(*alone, lr=0.01)
    torch.testing.assert_close(found[0][0], wanted[0][0], rtol=1e-5, atol=1e-6)
    new, truth, own = (x[3][0] for x in (found, wanted, alone))
    torch.testing.assert_close(new.scales, truth.scales, rtol=1e-6, atol=0.0)
    assert torch.equal(new.scales[ROWS:], _elsewhere(own.scales[ROWS:]))
    assert not torch.equal(truth.codes, own.codes)
    apart = decode_state(new) - decode_state(truth)
    assert apart.abs().max() <= truth.scales.max() / 16
    assert (new.codes != truth.codes).double().mean() <= 1e-2


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_rank_without_rows_takes_part(op: str, fused: bool) -> None:
    calls: list[Tensor] = []

    def share(maxima: Tensor) -> Tensor:
        calls.append(maxima.clone())
        return _elsewhere(maxima)

    lists = _lists(0)
    empty: QuantizedState = lists[3][0]
    lists[3] = [empty._replace(reduce=share)]
    getattr(kernels, op)(*lists, lr=0.01, fused=fused)
    assert [x.shape for x in calls] == [(COLUMNS,)]
    assert torch.equal(empty.scales, _elsewhere(torch.zeros(COLUMNS, device=DEVICE)))
